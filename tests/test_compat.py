"""The drop-in functions on modules that are not ours: official names, wrappers, swapped weights, nothing left."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from gear_engine import compat
from gear_engine.config import GeneratorConfig, TokenizerConfig
from gear_engine.errors import ConfigError, InvalidRequestError
from gear_engine.models.transformer import Transformer
from gear_engine.tokenizers import build_tokenizer
from tests.golden_weights import golden_index, golden_state_dict, load_golden
from tests.plain_generator import PlainTransformer, plain_generate

CLASS_CONFIG = GeneratorConfig(dim=72, n_layer=2, n_head=2, vocab_size=97, block_size=16, num_classes=7)
GEAR_TEXT_CONFIG = CLASS_CONFIG.replace(
    conditioning="text", cls_token_num=6, caption_dim=20, n_double_stream_layers=1, text_attn="prefix"
)
LLAMAGEN_TEXT_CONFIG = CLASS_CONFIG.replace(conditioning="text", cls_token_num=6, caption_dim=20, learned_uncond=True)
TOKENS = 16


@pytest.fixture(autouse=True)
def _released() -> Iterator[None]:
    yield
    compat.release()


def plain(config: GeneratorConfig = CLASS_CONFIG, seed: int = 0) -> PlainTransformer:
    torch.manual_seed(seed)
    return PlainTransformer(config).eval()


def labels_null(model: PlainTransformer, labels: torch.Tensor) -> torch.Tensor:
    return torch.full_like(labels, model.num_classes)


def golden_model(entry: dict[str, Any]) -> PlainTransformer:
    names = ("dim", "n_layer", "n_head", "vocab_size", "block_size")
    fields = {name: entry[name] for name in names}
    if entry["kind"] == "c2i":
        config = GeneratorConfig(**fields, num_classes=entry["num_classes"])
    else:
        learned = entry["kind"] == "llamagen_t2i"
        double = entry.get("n_double_stream_layers", max(1, round(entry["n_layer"] / 3)))
        config = GeneratorConfig(
            **fields,
            conditioning="text",
            cls_token_num=entry["cls_token_num"],
            caption_dim=entry["caption_dim"],
            text_attn=entry.get("text_attn", "causal"),
            n_double_stream_layers=0 if learned else double,
            learned_uncond=learned,
        )
    model = PlainTransformer(config)
    model.load_state_dict(golden_state_dict(model))
    return model.eval()


@pytest.mark.parametrize("name", ["c2i_hd32", "c2i_hd72", "c2i_hd100"])
def test_class_goldens_through_a_foreign_module(goldens_dir: Path, name: str) -> None:
    entry, golden = golden_index(goldens_dir)[name], load_golden(goldens_dir, name)
    model = golden_model(entry)
    for index, run in enumerate(entry["runs"]):
        sampling = {key: value for key, value in run.items() if key != "seed"}
        torch.manual_seed(run["seed"])
        tokens = compat.generate(model, golden["cond"], entry["block_size"], **sampling)
        assert tokens.dtype == torch.int32
        assert torch.equal(tokens, golden[f"run{index}.tokens"].int())


@pytest.mark.parametrize("name", ["t2i_causal", "t2i_prefix", "t2i_all_double"])
def test_text_goldens_through_a_foreign_module(goldens_dir: Path, name: str) -> None:
    entry, golden = golden_index(goldens_dir)[name], load_golden(goldens_dir, name)
    model = golden_model(entry)
    for index, run in enumerate(entry["runs"]):
        sampling = {key: value for key, value in run.items() if key != "seed"}
        torch.manual_seed(run["seed"])
        tokens = compat.generate_t2i(
            model,
            golden["cond_emb"],
            golden["uncond_emb"],
            entry["block_size"],
            cond_mask=golden["cond_mask"],
            uncond_mask=golden["uncond_mask"],
            **sampling,
        )
        assert torch.equal(tokens, golden[f"run{index}.tokens"].int())


@pytest.mark.parametrize("name", ["llamagen_t2i_hd64", "llamagen_t2i_hd100"])
def test_llamagen_text_goldens_through_a_foreign_module(goldens_dir: Path, name: str) -> None:
    entry, golden = golden_index(goldens_dir)[name], load_golden(goldens_dir, name)
    model = golden_model(entry)
    for index, run in enumerate(entry["runs"]):
        sampling = {key: value for key, value in run.items() if key != "seed"}
        torch.manual_seed(run["seed"])
        tokens = compat.generate(model, golden["cond"], entry["block_size"], golden["emb_masks"], **sampling)
        assert torch.equal(tokens, golden[f"run{index}.tokens"].int())


SETTINGS: list[dict[str, Any]] = [
    {},
    {"cfg_scale": 3.0, "top_k": 20},
    {"cfg_scale": 2.0, "cfg_interval": 4, "temperature": 0.8, "top_p": 0.9},
    {"sample_logits": False, "cfg_scale": 1.5},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_and_generator_state_are_those_of_the_plain_sampler(settings: dict[str, Any], batch: int) -> None:
    model = plain()
    labels = torch.arange(batch) % 7
    torch.manual_seed(11)
    expected = plain_generate(model, labels, TOKENS, uncond=labels_null(model, labels), **settings)
    state = torch.get_rng_state()
    torch.manual_seed(11)
    tokens = compat.generate(model, labels, TOKENS, **settings)
    assert torch.equal(tokens, expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_fewer_tokens_than_the_image_holds_and_one_token() -> None:
    model, labels = plain(), torch.tensor([1, 2])
    torch.manual_seed(3)
    expected = plain_generate(model, labels, TOKENS, uncond=labels_null(model, labels), cfg_scale=2.0)
    for count in (1, 5):
        torch.manual_seed(3)
        assert torch.equal(compat.generate(model, labels, count, cfg_scale=2.0), expected[:, :count])


def test_own_generator_leaves_the_global_one_alone() -> None:
    model, labels = plain(), torch.tensor([4])
    torch.manual_seed(5)
    expected = compat.generate(model, labels, TOKENS)
    before = torch.get_rng_state()
    own = torch.Generator().manual_seed(5)
    assert torch.equal(compat.generate(model, labels, TOKENS, generator=own), expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_grouped_heads() -> None:
    model = plain(CLASS_CONFIG.replace(dim=128, n_head=4, n_kv_head=2))
    labels = torch.tensor([0, 6])
    torch.manual_seed(1)
    expected = plain_generate(model, labels, TOKENS, uncond=labels_null(model, labels), cfg_scale=2.0)
    torch.manual_seed(1)
    assert torch.equal(compat.generate(model, labels, TOKENS, cfg_scale=2.0), expected)


def text_inputs(batch: int = 3, length: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    states = torch.randn(batch, length, 20)
    mask = torch.zeros(batch, length, dtype=torch.long)
    mask[0, :4], mask[1, 3:], mask[2, :] = 1, 1, 1
    return states, mask


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("masks", ["both", "none", "caption only"])
def test_gear_text(shared: bool, masks: str) -> None:
    model = plain(GEAR_TEXT_CONFIG)
    states, mask = text_inputs()
    uncond = torch.randn(1, 6, 20).expand(3, -1, -1) if shared else torch.randn(3, 6, 20)
    uncond_mask = torch.zeros(3, 6, dtype=torch.long)
    if not shared:
        uncond_mask[1, :2] = 1
    given = {"both": (mask, uncond_mask), "none": (None, None), "caption only": (mask, None)}[masks]
    # With guidance the official sampler drops a caption mask that comes without the other.
    both = (mask, uncond_mask) if masks == "both" else (None, None)
    torch.manual_seed(2)
    expected = plain_generate(
        model, states, TOKENS, uncond=uncond, mask=both[0], uncond_mask=both[1], cfg_scale=3.0, top_k=30
    )
    torch.manual_seed(2)
    tokens = compat.generate_t2i(model, states, uncond, TOKENS, given[0], given[1], cfg_scale=3.0, top_k=30)
    assert torch.equal(tokens, expected)


def test_gear_text_without_guidance_needs_no_empty_caption() -> None:
    model = plain(GEAR_TEXT_CONFIG)
    states, mask = text_inputs()
    torch.manual_seed(2)
    expected = plain_generate(model, states, TOKENS, mask=mask)
    torch.manual_seed(2)
    assert torch.equal(compat.generate_t2i(model, states, None, TOKENS, mask, cfg_scale=1.0), expected)
    with pytest.raises(InvalidRequestError, match="uncond_emb"):
        compat.generate_t2i(model, states, None, TOKENS, mask)


@pytest.mark.parametrize("masked", [True, False])
def test_llamagen_text(masked: bool) -> None:
    model = plain(LLAMAGEN_TEXT_CONFIG)
    states, mask = text_inputs()
    if masked:
        states = states * mask[:, :, None]
    uncond = model.cls_embedding.uncond_embedding.expand(3, -1, -1)
    given = mask if masked else None
    torch.manual_seed(4)
    expected = plain_generate(model, states, TOKENS, uncond=uncond, mask=given, uncond_mask=given, cfg_scale=5.0)
    torch.manual_seed(4)
    assert torch.equal(compat.generate(model, states, TOKENS, given, cfg_scale=5.0), expected)


def test_wrapped_by_compile_and_by_ddp() -> None:
    model, labels = plain(), torch.tensor([3, 3])
    torch.manual_seed(6)
    expected = compat.generate(model, labels, TOKENS)
    if torch.distributed.is_available():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            parallel = nn.parallel.DistributedDataParallel(model)
            torch.manual_seed(6)
            assert torch.equal(compat.generate(parallel, labels, TOKENS), expected)
            torch.manual_seed(6)
            assert torch.equal(compat.generate(torch.compile(parallel), labels, TOKENS), expected)
        finally:
            torch.distributed.destroy_process_group()
    torch.manual_seed(6)
    assert torch.equal(compat.generate(torch.compile(model), labels, TOKENS), expected)
    for index, layer in enumerate(model.layers):
        model.layers[index] = torch.compile(layer)  # as trainers do that compile block by block
    torch.manual_seed(6)
    assert torch.equal(compat.generate(model, labels, TOKENS), expected)


def test_our_own_transformer() -> None:
    model, labels = plain(), torch.tensor([3, 5])
    ours = Transformer(CLASS_CONFIG).eval()
    ours.load_state_dict(model.state_dict())
    torch.manual_seed(6)
    expected = compat.generate(model, labels, TOKENS, cfg_scale=2.0)
    torch.manual_seed(6)
    assert torch.equal(compat.generate(ours, labels, TOKENS, cfg_scale=2.0), expected)


def test_training_mode_is_an_error() -> None:
    model, labels = plain(), torch.tensor([0])
    model.train()
    with pytest.raises(ConfigError, match="training mode"):
        compat.generate(model, labels, TOKENS)
    model.eval()
    model.layers[1].train()
    with pytest.raises(ConfigError, match=r"training mode \(layers\.1\)"):
        compat.generate(model, labels, TOKENS)


def test_caches_that_the_official_sampler_left_on_the_module() -> None:
    model, labels = plain(), torch.tensor([2])
    torch.manual_seed(1)
    expected = compat.generate(model, labels, TOKENS)
    for block in model.layers:
        block.attention.kv_cache = nn.Module()  # in training mode, as the official sampler's are
        block.attention.kv_cache.register_buffer("k_cache", torch.full((2, 2, 24, 36), 9.0))
    before = fingerprint(model)
    torch.manual_seed(1)
    assert torch.equal(compat.generate(model, labels, TOKENS), expected)
    assert [row[:-1] for row in before] == [row[:-1] for row in fingerprint(model)]


def fingerprint(model: nn.Module) -> list[Any]:
    """Everything that a call could leave on a module: attributes, tensors, addresses, versions, modes, hooks."""
    found: list[Any] = []
    for name, module in model.named_modules():
        plain_attributes = {key: id(value) for key, value in vars(module).items() if not key.startswith("_")}
        tables = {key: list(value) for key, value in vars(module).items() if isinstance(value, dict)}
        found.append((name, module.training, plain_attributes, tables))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        grad = None if tensor.grad is None else tensor.grad.data_ptr()
        state = (tensor.data_ptr(), tensor._version, tensor.dtype, tensor.requires_grad, grad)
        found.append((name, id(tensor), *state, tensor.detach().clone()))
    return found


@pytest.mark.parametrize("config", [CLASS_CONFIG, LLAMAGEN_TEXT_CONFIG])
def test_the_module_is_left_as_found(config: GeneratorConfig) -> None:
    model = plain(config)
    model.output.weight.grad = torch.ones_like(model.output.weight)
    before = fingerprint(model)
    cond = torch.tensor([1, 2, 3]) if config is CLASS_CONFIG else text_inputs()[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compat.generate(model, cond, TOKENS, cfg_scale=2.0)
        assert torch.is_autocast_enabled("cpu")
    compat.generate(model, cond, TOKENS, dtype=torch.bfloat16)
    assert torch.is_grad_enabled()
    after = fingerprint(model)
    assert [row[:-1] for row in before] == [row[:-1] for row in after]
    tensors = [(old[-1], new[-1]) for old, new in zip(before, after, strict=True) if isinstance(old[-1], torch.Tensor)]
    assert tensors
    assert all(torch.equal(old, new) for old, new in tensors)


def test_autocast_outside_changes_nothing() -> None:
    model, labels = plain(), torch.tensor([2, 6])
    torch.manual_seed(7)
    expected = compat.generate(model, labels, TOKENS, cfg_scale=3.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(7)
        assert torch.equal(compat.generate(model, labels, TOKENS, cfg_scale=3.0), expected)


def test_ema_weights_swapped_in_by_data_copy_are_noticed() -> None:
    model, ema, labels = plain(seed=0), plain(seed=1), torch.tensor([1, 2, 3])

    def official(module: PlainTransformer) -> torch.Tensor:
        torch.manual_seed(8)
        return plain_generate(module, labels, TOKENS)

    def ours(dtype: torch.dtype | None = None) -> torch.Tensor:
        torch.manual_seed(8)
        return compat.generate(model, labels, TOKENS, dtype=dtype)

    live_tokens, ema_tokens = official(model), official(ema)
    assert not torch.equal(live_tokens, ema_tokens)
    assert torch.equal(ours(), live_tokens)
    bf16_live = ours(torch.bfloat16)
    stashed = [p.detach().clone() for p in model.parameters()]
    versions = [(p._version, p.data_ptr()) for p in model.parameters()]
    for p, q in zip(model.parameters(), ema.parameters(), strict=True):
        p.data.copy_(q.data)
    assert versions == [(p._version, p.data_ptr()) for p in model.parameters()]  # nothing to see from outside
    assert torch.equal(ours(), ema_tokens)
    assert not torch.equal(ours(torch.bfloat16), bf16_live)
    for p, kept in zip(model.parameters(), stashed, strict=True):
        p.data.copy_(kept)
    assert torch.equal(ours(), live_tokens)
    assert torch.equal(ours(torch.bfloat16), bf16_live)


def test_dtype_samples_as_a_module_of_that_dtype_would() -> None:
    model, cast, labels = plain(), plain().bfloat16(), torch.tensor([0, 1])
    torch.manual_seed(9)
    tokens = compat.generate(model, labels, TOKENS, cfg_scale=2.0, dtype=torch.bfloat16)
    torch.manual_seed(9)
    assert torch.equal(compat.generate(cast, labels, TOKENS, cfg_scale=2.0), tokens)
    assert model.output.weight.dtype == torch.float32


def tensor_bytes() -> int:
    """Bytes of all distinct tensor storages that Python still reaches."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, nn.Parameter):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_nothing_that_the_user_dropped_stays_alive() -> None:
    model, labels = plain(), torch.tensor([0])
    compat.generate(model, labels, TOKENS, dtype=torch.bfloat16)
    compat.generate(model, labels, TOKENS)
    old_head = weakref.ref(model.output.weight)
    old_storage = weakref.ref(model.norm.weight.untyped_storage())
    model.output.weight = nn.Parameter(model.output.weight.detach().clone())
    model.norm.weight.data = model.norm.weight.data.clone()
    gc.collect()
    assert old_head() is None
    assert old_storage() is None
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert len(compat._engines) == 0


def test_caches_are_kept_and_reused_and_released() -> None:
    model = plain(CLASS_CONFIG.replace(dim=128, n_head=2, block_size=64))
    labels = torch.zeros(16, dtype=torch.long)
    cache_bytes = 2 * 2 * 16 * 128 * 64 * 4  # layers x (k, v) x images x dim x tokens x fp32
    idle = tensor_bytes()
    compat.generate(model, labels, 64)
    kept = tensor_bytes()
    assert kept - idle >= cache_bytes
    compat.generate(model, labels, 64)
    compat.generate(model, labels[:3], 16)
    assert tensor_bytes() == kept
    compat.release(torch.compile(model))
    assert tensor_bytes() == idle
    compat.release(model)  # twice is fine


def test_packed_or_cast_weights_do_not_outlive_the_call() -> None:
    model = plain(CLASS_CONFIG.replace(vocab_size=5000))
    compat.generate(model, torch.tensor([0]), TOKENS)
    idle = tensor_bytes()
    compat.release(model)
    compat.generate(model, torch.tensor([0]), TOKENS, dtype=torch.bfloat16)
    assert tensor_bytes() <= idle


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: compat.generate(m, torch.tensor([8]), TOKENS), "label 8"),
        (lambda m: compat.generate(m, torch.tensor([-1]), TOKENS), "label -1"),
        (lambda m: compat.generate(m, torch.tensor([0.5]), TOKENS), "labels must be integers"),
        (lambda m: compat.generate(m, torch.tensor(1), TOKENS), "one-dimensional"),
        (lambda m: compat.generate(m, torch.tensor([1]), 17), "17"),
        (lambda m: compat.generate(m, torch.tensor([1]), 0), "0"),
        (lambda m: compat.generate(m, torch.tensor([1]), TOKENS, cfg_scale=float("nan")), "cfg_scale"),
        (lambda m: compat.generate(m, torch.tensor([1]), TOKENS, cfg_scale=-1.0), "cfg_scale"),
        (lambda m: compat.generate(m, torch.tensor([1]), TOKENS, top_p=0.0), "top_p"),
        (lambda m: compat.generate(m, torch.tensor([1]), TOKENS, top_k=-1), "top_k"),
        (lambda m: compat.generate(m, torch.tensor([1]), TOKENS, torch.zeros(1, 1)), "masked"),
        (lambda m: compat.generate_t2i(m, torch.randn(1, 1, 8), None, TOKENS), "call generate for"),
        (lambda m: compat.generate(plain(GEAR_TEXT_CONFIG), text_inputs()[0], TOKENS), "generate_t2i"),
        (lambda m: compat.generate(plain(LLAMAGEN_TEXT_CONFIG), torch.randn(2, 5, 20), TOKENS), "do not fit"),
    ],
)
def test_bad_requests(change: Callable[[PlainTransformer], Any], message: str) -> None:
    model = plain()
    with pytest.raises(InvalidRequestError, match=message):
        change(model)
    assert len(compat._engines) == 0  # refused before anything is allocated


def test_modules_of_another_kind() -> None:
    with pytest.raises(ConfigError, match="no model that gear_engine knows"):
        compat.generate(nn.Linear(2, 2).eval(), torch.tensor([0]), 1)
    model = plain()
    model.layers[0].attention.wqkv.bias = nn.Parameter(torch.zeros(3 * 72))
    with pytest.raises(ConfigError, match=r"layers\.0\.attention\.wqkv\.bias"):
        compat.generate(model.eval(), torch.tensor([0]), 1)
    model = plain()
    del model.config.rope_base
    with pytest.raises(ConfigError, match="rope_base"):
        compat.generate(model, torch.tensor([0]), 1)


class ForeignTokenizer(nn.Module):
    """A module with the official attribute names around the layers of ours; no decode_code of its own."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        ours = build_tokenizer(config)
        for name, part in ours.named_children():
            if name != "quantize" and not isinstance(part, nn.Identity):
                setattr(self, name, part)
        self.quantize = nn.Module()
        args = {"codebook_embed_dim": config.codebook_embed_dim, "num_res_blocks": config.num_res_blocks}
        if config.family == "lfq":
            args |= {"downsample": config.downsample, "num_codebooks": config.num_codebooks}
            self.quantize.register_buffer("mask", torch.zeros(1), persistent=False)
        else:
            self.quantize.embedding = nn.Embedding(config.codebook_size, config.codebook_embed_dim)
        mult = "decoder_ch_mult" if config.family == "vq" else "ch_mult"
        self.config = SimpleNamespace(**args, **{mult: list(config.ch_mult)}, z_channels=config.z_channels)
        if config.family == "vq":
            self.quantize.l2_norm = config.codebook_l2_norm
            self.quantize.register_buffer("codebook_used", torch.zeros(4))


TOKENIZERS = {
    "vq": TokenizerConfig(family="vq", codebook_size=50, ch=32, ch_mult=(1, 2), z_channels=32, downsample=2),
    "ibq": TokenizerConfig(
        family="ibq",
        codebook_size=50,
        codebook_embed_dim=12,
        ch=32,
        ch_mult=(1, 2),
        z_channels=12,
        num_res_blocks=1,
        downsample=2,
        codebook_l2_norm=False,
    ),
    "glfq": TokenizerConfig(
        family="lfq",
        codebook_size=2**6,
        codebook_embed_dim=6,
        z_channels=6,
        ch=32,
        ch_mult=(1, 2),
        num_res_blocks=1,
        downsample=2,
        num_codebooks=2,
        codebook_l2_norm=False,
    ),
}


@pytest.mark.parametrize("family", list(TOKENIZERS))
def test_decode_code_of_a_foreign_tokenizer(family: str) -> None:
    config = TOKENIZERS[family]
    torch.manual_seed(0)
    foreign = ForeignTokenizer(config).eval()
    ours = build_tokenizer(config)
    state = {k: v for k, v in foreign.state_dict().items() if k not in ("quantize.codebook_used", "quantize.mask")}
    ours.load_state_dict(state)
    shape = (2, config.codebook_embed_dim, 3, 5)
    high = 8 if family == "glfq" else config.codebook_size
    codes = torch.randint(0, high, (2 * 3 * 5 * config.num_codebooks,))
    before = fingerprint(foreign)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        images = compat.decode_code(foreign, codes, shape)
    with torch.no_grad():
        assert torch.equal(images, ours.decode_code(codes, shape))
    assert images.dtype == torch.float32
    assert not images.requires_grad
    assert torch.equal(compat.decode_code(ours, codes, shape), images)
    assert [row[:-1] for row in before] == [row[:-1] for row in fingerprint(foreign)]
    for parameter in foreign.parameters():
        parameter.data.mul_(1.01)
    assert not torch.equal(compat.decode_code(torch.compile(foreign), codes, shape), images)
    foreign.train()
    with pytest.raises(ConfigError, match="training mode"):
        compat.decode_code(foreign, codes, shape)


def test_foreign_tokenizer_with_an_unknown_part() -> None:
    foreign = ForeignTokenizer(TOKENIZERS["vq"]).eval()
    foreign.extra = nn.Linear(2, 2).eval()
    with pytest.raises(ConfigError, match=r"unknown tensor extra\.weight"):
        compat.decode_code(foreign, torch.zeros(4, dtype=torch.long), (1, 8, 2, 2))
