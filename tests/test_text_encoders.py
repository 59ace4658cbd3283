"""Text encoders on tiny Qwen3 and T5 towers built from a config; nothing is downloaded."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch

from gear_engine.errors import BackendUnavailableError, CheckpointError, InvalidRequestError
from gear_engine.text_encoders import (
    QwenTextEncoder,
    T5TextEncoder,
    left_pad,
    load_text_encoder,
)

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ["<pad>", "</s>", "<unk>", "a", "cat", "dog", "blue", "on", "sofa"]


def word_tokenizer(padding_side: str, *, end_token: bool) -> Any:
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if end_token:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 1)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side=padding_side,
        model_input_names=["input_ids", "attention_mask"],
    )


@pytest.fixture(scope="module", params=["right", "left"])
def qwen_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(f"qwen_{request.param}")
    config = transformers.Qwen3Config(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
    )
    # Users have the language-model files: the head must be left behind.
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    word_tokenizer(request.param, end_token=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("t5")
    config = transformers.T5Config(
        vocab_size=len(WORDS), d_model=24, d_kv=6, d_ff=32, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    word_tokenizer("right", end_token=True).save_pretrained(folder)
    return folder


def test_qwen_states_are_the_towers_on_the_padded_batch(qwen_folder: Path) -> None:
    encoder = load_text_encoder(qwen_folder, max_length=7, dtype=torch.float32)
    assert isinstance(encoder, QwenTextEncoder)
    assert encoder.hidden_size == 32
    prompts = ["a blue cat", "dog", "a cat on a blue sofa a cat on a sofa"]
    features = encoder.encode(prompts)
    batch = encoder.tokenizer(prompts, max_length=7, padding="max_length", truncation=True, return_tensors="pt")
    tower = transformers.AutoModel.from_pretrained(qwen_folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = tower(**batch).last_hidden_state
    assert features.states.shape == (3, 7, 32)
    torch.testing.assert_close(features.states, expected)
    assert features.mask.dtype == torch.bool
    assert features.mask.sum(1).tolist() == [3, 1, 7]
    # The tokenizer's own padding side decides where the tokens lie.
    side = encoder.tokenizer.padding_side
    assert features.mask[1].tolist() == ([True] + [False] * 6 if side == "right" else [False] * 6 + [True])


def test_qwen_empty_caption_may_have_no_valid_token(qwen_folder: Path) -> None:
    empty = load_text_encoder(qwen_folder, max_length=5, dtype=torch.float32)
    assert isinstance(empty, QwenTextEncoder)
    features = empty.encode_empty()
    assert features.states.shape == (1, 5, 32)
    assert not features.mask.any()
    torch.testing.assert_close(features.states, empty.encode("").states)


def test_prompts_are_batched_in_order(qwen_folder: Path) -> None:
    encoder = load_text_encoder(qwen_folder, max_length=6, dtype=torch.float32)
    prompts = ["a cat", "blue dog", "sofa", "a", "dog on a sofa"]
    calls: list[int] = []
    handle = encoder.model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    whole, split = encoder.encode(prompts), encoder.encode(prompts, batch_size=2)
    handle.remove()
    assert calls == [5, 2, 2, 1]
    torch.testing.assert_close(whole.states, split.states, rtol=1e-5, atol=1e-5)
    assert torch.equal(whole.mask, split.mask)


def test_default_dtype_is_bfloat16_and_weights_are_frozen(qwen_folder: Path) -> None:
    encoder = load_text_encoder(qwen_folder)
    assert encoder.dtype == torch.bfloat16
    assert encoder.max_length == 300
    assert not any(p.requires_grad for p in encoder.model.parameters())
    assert not encoder.model.training
    assert not hasattr(encoder.model, "lm_head")


def test_t5_states_move_to_the_right_end_and_padding_is_zero(t5_folder: Path) -> None:
    encoder = load_text_encoder(t5_folder, max_length=6, dtype=torch.float32)
    assert isinstance(encoder, T5TextEncoder)
    assert encoder.hidden_size == 24
    assert not any("decoder" in name for name, _ in encoder.model.named_parameters())
    features = encoder.encode(["a blue cat", "dog"])
    batch = encoder.tokenizer(["a blue cat", "dog"], max_length=6, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        plain = encoder.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    assert features.mask.tolist() == [[False] * 2 + [True] * 4, [False] * 4 + [True] * 2]
    torch.testing.assert_close(features.states[0, 2:], plain[0, :4])
    torch.testing.assert_close(features.states[1, 4:], plain[1, :2])
    assert not features.states[0, :2].any()
    assert not features.states[1, :4].any()


def test_t5_without_left_padding_still_masks(t5_folder: Path) -> None:
    loaded = load_text_encoder(t5_folder, max_length=6, dtype=torch.float32)
    encoder = T5TextEncoder(loaded.tokenizer, loaded.model, 6, pad_left=False)
    features = encoder.encode("dog")
    assert features.mask.tolist() == [[True] * 2 + [False] * 4]
    assert not features.states[0, 2:].any()
    assert features.states[0, :2].any()


def test_left_pad_full_and_empty_rows() -> None:
    states = torch.arange(12.0).reshape(2, 3, 2) + 1
    features = left_pad(states, torch.tensor([[1, 1, 1], [0, 0, 0]]))
    assert torch.equal(features.states[0], states[0])
    assert not features.states[1].any()
    with pytest.raises(InvalidRequestError, match="valid tokens first"):
        left_pad(states, torch.tensor([[0, 1, 1], [1, 0, 0]]))


def test_preprocess_is_applied(t5_folder: Path) -> None:
    encoder = load_text_encoder(t5_folder, max_length=6, dtype=torch.float32, preprocess=str.lower)
    torch.testing.assert_close(encoder.encode("DOG").states, encoder.encode("dog").states)


@pytest.mark.parametrize("prompts", [[], ["a", 3], 7])
def test_bad_prompts(t5_folder: Path, prompts: Any) -> None:
    encoder = load_text_encoder(t5_folder, max_length=6)
    with pytest.raises(InvalidRequestError, match="prompts must be"):
        encoder.encode(prompts)


def test_missing_folder_and_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="no text encoder at"):
        load_text_encoder(tmp_path)
    with pytest.raises(CheckpointError, match="no text encoder at"):
        load_text_encoder("nobody/no-such-encoder", local_files_only=True)


def test_a_name_pins_its_revision(qwen_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Any]] = []

    def record(name: str, **options: Any) -> Any:
        asked.append((name, options.get("revision")))
        raise OSError("offline")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", record)
    for name, options in (
        ("owner/name@0a1b2c3", {}),
        ("owner/name@0a1b2c3", {"revision": "0a1b2c3"}),
        ("owner/name", {"revision": "v1.0"}),
        ("owner/name", {}),
    ):
        with pytest.raises(CheckpointError, match="no text encoder at"):
            load_text_encoder(name, **options)
    assert asked == [("owner/name", revision) for revision in ("0a1b2c3", "0a1b2c3", "v1.0", None)]
    with pytest.raises(InvalidRequestError, match="different revisions"):
        load_text_encoder("owner/name@0a1b2c3", revision="main")
    monkeypatch.undo()
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name@1").symlink_to(qwen_folder)
    monkeypatch.chdir(tmp_path)
    assert load_text_encoder("owner/name@1", max_length=3).max_length == 3


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "transformers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(BackendUnavailableError, match=r"gear-engine\[t2i\]"):
        load_text_encoder("anything")
