"""Every published format leads to the same configuration and the right weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from gear_engine.checkpoint import load_pair, open_generator, open_tokenizer, read_generator, read_tokenizer
from gear_engine.config import GENERATOR_PRESETS, GeneratorConfig, TokenizerConfig
from gear_engine.errors import CheckpointError
from tests.checkpoint import files
from tests.checkpoint.files import GENERATOR, HEADS, IBQ, LFQ, TEXT, VQ

LIVE, AVERAGED = files.generator_state(shift=1.0), files.generator_state()
GIVEN = {**HEADS, "image_size": 8, "downsample_ratio": 2}


def save(tmp_path: Path, root: Any) -> Path:
    return files.save(tmp_path / "checkpoint.pt", root)


@pytest.mark.parametrize("ema", [True, False])
def test_stage_1(tmp_path: Path, ema: bool) -> None:
    path = save(tmp_path, files.stage1())
    pair = load_pair(path, ema=ema, **HEADS)
    assert pair.generator.config == GENERATOR
    assert pair.tokenizer.config == VQ
    assert files.equal(pair.generator.state_dict(), AVERAGED if ema else LIVE)
    assert files.equal(pair.tokenizer.state_dict(), files.tokenizer_state(shift=0.0 if ema else 1.0))
    assert (pair.generator_source.is_ema, pair.tokenizer_source.is_ema) == (ema, ema)
    assert ("EMA" in str(pair.generator_source)) == ema
    assert not pair.generator.training
    assert not any(parameter.requires_grad for parameter in pair.generator.parameters())


def test_stage_0_has_a_tokenizer_only(tmp_path: Path) -> None:
    path = save(tmp_path, files.stage1(ar=..., ema=..., stage=0))
    config, state, source = read_tokenizer(path)
    assert config == VQ
    assert files.equal(state, files.tokenizer_state())
    assert source.section == "vq_ema"
    with pytest.raises(CheckpointError, match="holds a tokenizer but no generator"):
        read_generator(path, **HEADS)


def test_published_without_args_assumes_256_pixels_and_says_so(tmp_path: Path) -> None:
    path = save(tmp_path, files.stage2(args=...))
    config, state, source = read_generator(path, **HEADS)
    assert config == GENERATOR.replace(block_size=256)
    assert files.equal(state, AVERAGED)
    assert "256 pixels are assumed" in str(source)
    config, _, source = read_generator(path, image_size=512, **HEADS)
    assert config.block_size == 1024
    assert "assumed" not in str(source)


def test_the_bundled_tokenizer_tells_the_downsample(tmp_path: Path) -> None:
    path = save(tmp_path, files.stage1(args=...))
    assert read_generator(path, **HEADS).config.block_size == (256 // 2) ** 2


@pytest.mark.parametrize("wrapper", ["model", "module", "state_dict", ""])
def test_llamagen(tmp_path: Path, wrapper: str) -> None:
    path = save(tmp_path, {wrapper: LIVE} if wrapper else LIVE)
    config, state, source = read_generator(path, **GIVEN)
    assert config == GENERATOR
    assert files.equal(state, LIVE)
    assert not source.is_ema
    assert "no EMA weights" in str(source)


@pytest.mark.parametrize("ema", [True, False])
def test_llamagen_training_file_with_a_namespace(tmp_path: Path, ema: bool) -> None:
    root = {"model": LIVE, "optimizer": files.optimizer(LIVE), "steps": 3, "args": files.namespace(), "ema": AVERAGED}
    config, state, source = read_generator(save(tmp_path, root), ema=ema, **HEADS)
    assert config == GENERATOR
    assert files.equal(state, AVERAGED if ema else LIVE)
    assert source.is_ema == ema
    assert source.has_args


def test_llamagen_vq_with_usage_statistics(tmp_path: Path) -> None:
    state = files.tokenizer_state()
    path = save(tmp_path, {"model": {**state, "quantize.codebook_used": torch.zeros(65536)}})
    config, found, _ = read_tokenizer(path)
    assert config == VQ
    assert files.equal(found, state)


def test_sampling_caches_are_leftovers(tmp_path: Path) -> None:
    caches = {f"layers.{i}.attention.kv_cache.{k}": torch.full((2, 4, 9, 12), torch.nan) for i in (0, 1) for k in "kv"}
    path = save(tmp_path, {"model": {**LIVE, **caches}})
    assert files.equal(read_generator(path, **GIVEN).state, LIVE)


@pytest.mark.parametrize("config", [IBQ, LFQ], ids=["ibq", "lfq"])
@pytest.mark.parametrize("ema", [True, False])
def test_lightning_shadows(tmp_path: Path, config: TokenizerConfig, ema: bool) -> None:
    live, averaged = files.tokenizer_state(config, shift=1.0), files.tokenizer_state(config)
    path = save(tmp_path, files.lightning(live, averaged))
    module, source = open_tokenizer(path, ema=ema)
    assert module.config == config
    assert files.equal(module.state_dict(), averaged if ema else live)
    assert source.is_ema == ema


@pytest.mark.parametrize("place", ["_orig_mod.", "model", "encoder._orig_mod."])
def test_lightning_shadows_of_a_compiled_model(tmp_path: Path, place: str) -> None:
    """torch.compile may have been called on the tokenizer, on the whole Lightning module, or on a part of it."""
    live, averaged = files.tokenizer_state(IBQ, shift=1.0), files.tokenizer_state(IBQ)
    if place == "model":
        root = files.lightning(live, averaged)
        root["state_dict"] = files.compiled(root["state_dict"])
    else:
        old = place.removesuffix("_orig_mod.")
        both = [{name.replace(old, place, 1): tensor for name, tensor in state.items()} for state in (live, averaged)]
        root = files.lightning(*both)
        assert any("_orig_mod" in name and name.startswith("model_ema.") for name in root["state_dict"])
    path = save(tmp_path, root)
    assert files.equal(read_tokenizer(path).state, averaged)
    assert files.equal(read_tokenizer(path, ema=False).state, live)


def test_a_shadow_without_its_tensor_and_a_tensor_without_its_shadow(tmp_path: Path) -> None:
    root = files.lightning(files.tokenizer_state(LFQ), files.tokenizer_state(LFQ))
    root["state_dict"]["model_ema.encoderconvinwight"] = root["state_dict"].pop("model_ema.encoderconv_inweight")
    with pytest.raises(CheckpointError, match=r"model_ema\.encoderconvinwight"):
        read_tokenizer(save(tmp_path, root))
    del root["state_dict"]["model_ema.encoderconvinwight"]
    with pytest.raises(CheckpointError, match=r"encoder\.conv_in\.weight.*no EMA shadow"):
        read_tokenizer(save(tmp_path, root))
    assert read_tokenizer(tmp_path / "checkpoint.pt", ema=False).config == LFQ


def test_compile_prefixes_anywhere(tmp_path: Path) -> None:
    inner = {name.replace("layers.1.", "layers.1._orig_mod."): tensor for name, tensor in AVERAGED.items()}
    root = files.stage1(ema=inner, ar=files.compiled(LIVE), vq_ema=files.compiled(files.tokenizer_state()))
    path = save(tmp_path, root)
    assert files.equal(read_generator(path, **HEADS).state, AVERAGED)
    assert files.equal(read_generator(path, ema=False, **HEADS).state, LIVE)
    assert files.equal(read_tokenizer(path).state, files.tokenizer_state())
    both = {**AVERAGED, "_orig_mod.norm.weight": AVERAGED["norm.weight"]}
    with pytest.raises(CheckpointError, match=r"two tensors are called 'norm\.weight'"):
        read_generator(save(tmp_path, files.stage2(ema=both)), **HEADS)


def test_text_to_image(tmp_path: Path) -> None:
    args = {**files.ARGS, "cls_token_num": 5, "text_attn": "prefix", "text_encoder": "Qwen3"}
    path = save(tmp_path, files.stage2(ar=files.generator_state(TEXT), ema=files.generator_state(TEXT), args=args))
    module, _ = open_generator(path, **HEADS)
    assert module.config == TEXT
    assert files.equal(module.state_dict(), files.generator_state(TEXT))


def test_text_to_image_published(tmp_path: Path) -> None:
    path = save(tmp_path, {"ema": files.generator_state(TEXT)})
    config = read_generator(path, **GIVEN).config
    assert config == TEXT.replace(cls_token_num=300, text_attn="causal")
    assert read_generator(path, cls_token_num=5, text_attn="prefix", **GIVEN).config == TEXT


def test_llamagen_text(tmp_path: Path) -> None:
    config = TEXT.replace(n_double_stream_layers=0, learned_uncond=True, text_attn="causal")
    path = save(tmp_path, {"model": files.generator_state(config)})
    assert read_generator(path, **GIVEN).config == config


def test_grouped_query_heads_and_a_table_without_the_unconditional_row(tmp_path: Path) -> None:
    config = GENERATOR.replace(n_kv_head=2, has_uncond_class=False)
    path = save(tmp_path, files.stage2(ema=files.generator_state(config)))
    assert read_generator(path, **HEADS).config == config


def test_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(AVERAGED, path)
    config, state, source = read_generator(path, **GIVEN)
    assert config == GENERATOR
    assert files.equal(state, AVERAGED)
    assert not source.verified


def test_dtype(tmp_path: Path) -> None:
    path = save(tmp_path, files.stage2())
    state = read_generator(path, dtype=torch.bfloat16, **HEADS).state
    assert all(torch.equal(state[name], tensor.bfloat16()) for name, tensor in AVERAGED.items())
    mixed = {name: tensor.half() if "w1" in name else tensor for name, tensor in AVERAGED.items()}
    state = read_generator(save(tmp_path, files.stage2(ema=mixed)), **HEADS).state
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


@pytest.mark.parametrize("name", sorted(GENERATOR_PRESETS))
def test_the_published_sizes_follow_from_the_shapes(name: str) -> None:
    from gear_engine.checkpoint.infer_generator import GeneratorOverrides, infer_generator
    from gear_engine.checkpoint.stored import StorageRef, StoredTensor, contiguous_stride

    preset: GeneratorConfig = GENERATOR_PRESETS[name]
    shapes = {
        key: StoredTensor(StorageRef("0", torch.float32, 0), torch.float32, 0, shape, contiguous_stride(shape))
        for key, shape in files.generator_shapes(preset).items()
    }
    assert infer_generator(shapes, {}, GeneratorOverrides()) == preset


def test_ema_only_and_live_asked_for(tmp_path: Path) -> None:
    path = save(tmp_path, {"ema": AVERAGED})
    with pytest.raises(CheckpointError, match="EMA weights of the generator only"):
        read_generator(path, ema=False, **GIVEN)


@pytest.mark.parametrize("where", ["absolute", "beside", "above"])
def test_a_named_tokenizer(tmp_path: Path, where: str) -> None:
    folder = tmp_path / "exps" / "run" / "checkpoints"
    folder.mkdir(parents=True)
    named = {"absolute": str(tmp_path / "vq.pt"), "beside": "vq.pt", "above": "pretrained/vq.pt"}[where]
    place = {"absolute": tmp_path, "beside": folder, "above": tmp_path / "exps" / "pretrained"}[where] / "vq.pt"
    place.parent.mkdir(exist_ok=True)
    files.save(place, {"model": files.tokenizer_state()})
    path = files.save(folder / "3.pt", files.stage2(args={**files.ARGS, "vq_ckpt": named, "vq_use_ema": True}))
    pair = load_pair(path, **HEADS)
    assert files.equal(pair.tokenizer.state_dict(), files.tokenizer_state())
    assert "args.vq_ckpt" in str(pair.tokenizer_source)
    assert "trained with the tokenizer's EMA" in str(pair.tokenizer_source)
    place.unlink()
    with pytest.raises(CheckpointError, match=r"args\.vq_ckpt names .*vq\.pt.* not reachable.*pass the tokenizer"):
        load_pair(path, **HEADS)


def test_no_tokenizer_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, files.stage2())
    with pytest.raises(CheckpointError, match=r"names none.*pass the tokenizer's path"):
        load_pair(path, **HEADS)
    other = files.save(tmp_path / "vq.pt", {"vq": files.tokenizer_state()})
    assert load_pair(path, tokenizer=other, **HEADS).tokenizer.config == VQ


@pytest.mark.parametrize("override", [True, False])
@pytest.mark.parametrize("bundled", [True, False])
def test_the_tokenizer_of_the_initial_checkpoint_wins(tmp_path: Path, override: bool, bundled: bool) -> None:
    initial = {"vq": files.tokenizer_state(shift=2.0)} if bundled else {"ar": LIVE}
    args = {
        **files.ARGS,
        "vq_ckpt": str(files.save(tmp_path / "vq.pt", {"model": files.tokenizer_state()})),
        "ar_init_ckpt": str(files.save(tmp_path / "initial.pt", initial)),
        "vq_override_from_ar_init": override,
    }
    path = save(tmp_path, files.stage2(args=args))
    expected = files.tokenizer_state(shift=2.0 if override and bundled else 0.0)
    assert files.equal(read_tokenizer(path).state, expected)
    (tmp_path / "initial.pt").unlink()
    if override:
        with pytest.raises(CheckpointError, match="ar_init_ckpt"):
            read_tokenizer(path)
    else:
        assert files.equal(read_tokenizer(path).state, files.tokenizer_state())
