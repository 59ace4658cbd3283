"""The GPU decoder's logic on the CPU: called instead of captured, and with a side that is as late as it may be."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gear_engine.errors import BackendUnavailableError, ConfigError, InvalidRequestError
from gear_engine.metrics import psnr
from gear_engine.ops import backends
from gear_engine.tokenizers import Tokenizer, build_tokenizer, choose_decoder, decoder_name, resize, to_uint8
from gear_engine.tokenizers.device_decoder import DeviceDecoder
from gear_engine.tokenizers.device_network import NORM_OPS, resolve_norms
from tests.golden_weights import golden_state_dict, relative_error
from tests.tokenizers.test_tokenizer import SMALL

NAMES = sorted(name for name, config in SMALL.items() if config.num_codebooks == 1)
#: Implementations of the passes between convolutions that can run here.
NORMS = [
    name
    for name, found in backends.implementations("group_norm_silu").items()
    if found.why_not(torch.device("cpu"), torch.float32) is None
]


@pytest.fixture(scope="module", params=NAMES)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    tokenizer = build_tokenizer(SMALL[request.param])
    tokenizer.load_state_dict(golden_state_dict(tokenizer))
    return tokenizer


def _tokens(tokenizer: Tokenizer, images: int, grid: int = 2) -> torch.Tensor:
    return torch.randint(0, tokenizer.quantize.num_codes, (images, grid * grid))


@torch.no_grad()
def _expected(tokenizer: Tokenizer, tokens: torch.Tensor, grid: int = 2) -> torch.Tensor:
    quant = tokenizer.lookup(tokens, (len(tokens), tokenizer.config.codebook_embed_dim, grid, grid))
    return to_uint8(tokenizer.decode(quant))


class _Late:
    """Work begins only when somebody waits for it, or for what was submitted after it."""

    def __init__(self) -> None:
        self.queue: list[Callable[[], None]] = []

    def run(self, work: Callable[[], None], tokens: torch.Tensor) -> Callable[[], None]:
        self.queue.append(work)

        def wait() -> None:
            while work in self.queue:
                self.queue.pop(0)()

        return wait


def test_fp32_gives_the_modules_pixels(tokenizer: Tokenizer) -> None:
    """Full batches and a padded one; a pixel may be off by one where rounding decides."""
    tokens = _tokens(tokenizer, 5)
    pixels = DeviceDecoder(tokenizer, batch=2).decode(tokens)
    difference = (pixels.int() - _expected(tokenizer, tokens).int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.001


@pytest.fixture(scope="module", params=["vq", "ibq", "lfq"])
def tiny(request: pytest.FixtureRequest) -> Tokenizer:
    """Two levels, a channel or two to a group: what Triton's interpreter runs in a second."""
    config = SMALL[request.param]
    tokenizer = build_tokenizer(dataclasses.replace(config, ch=32, ch_mult=(1, 2), downsample=2, num_res_blocks=1))
    tokenizer.load_state_dict(golden_state_dict(tokenizer))
    return tokenizer


@torch.no_grad()
def _floats(tokenizer: Tokenizer, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Two images of an odd grid by the device's decoder, and by the modules."""
    torch.manual_seed(0)
    tokens, shape = _tokens(tokenizer, 2, 3)[:, :3], (2, tokenizer.config.codebook_embed_dim, 1, 3)
    images = DeviceDecoder(tokenizer, **options).decode_code(tokens, shape)
    return images, tokenizer.decode(tokenizer.lookup(tokens, shape))


def test_floats_of_any_shape(tokenizer: Tokenizer) -> None:
    assert relative_error(*_floats(tokenizer)) <= 1e-5


@pytest.mark.parametrize("backend", NORMS)
def test_every_implementation_of_the_norms(tiny: Tokenizer, backend: str) -> None:
    assert DeviceDecoder(tiny, backend=backend).backends == dict.fromkeys(NORM_OPS, backend)
    assert relative_error(*_floats(tiny, backend=backend)) <= 1e-5
    # The interpreter of Triton cuts bf16 off where a GPU rounds it.
    assert 1e-4 < relative_error(*_floats(tiny, backend=backend, dtype=torch.bfloat16)) <= 0.05


@pytest.mark.skipif("triton" not in NORMS, reason="triton is not installed")
@pytest.mark.parametrize("tiny", ["lfq"], indirect=True)
def test_an_image_by_triton_does_not_depend_on_its_batch(tiny: Tokenizer) -> None:
    """Adaptive norms, whose scale and shift are an image's own, among them."""
    decoder, tokens = DeviceDecoder(tiny, batch=2, backend="triton"), _tokens(tiny, 2)
    together = decoder.decode(tokens)
    assert torch.equal(decoder.decode(tokens[1:])[0], together[1])
    assert (together.int() - _expected(tiny, tokens).int()).abs().max() <= 1


def test_bf16_operands(tokenizer: Tokenizer) -> None:
    tokens = _tokens(tokenizer, 2)
    pixels = DeviceDecoder(tokenizer, batch=2, dtype=torch.bfloat16).decode(tokens)
    exact = _expected(tokenizer, tokens)
    assert float(psnr(pixels.movedim(3, 1) / 255, exact.movedim(3, 1) / 255).min()) > 38
    assert not torch.equal(pixels, exact)


@pytest.fixture(scope="module")
def vq() -> Tokenizer:
    tokenizer = build_tokenizer(SMALL[NAMES[-1]])
    tokenizer.load_state_dict(golden_state_dict(tokenizer))
    return tokenizer


def test_an_image_does_not_depend_on_its_batch(vq: Tokenizer) -> None:
    decoder, tokens = DeviceDecoder(vq, batch=3), _tokens(vq, 3)
    together = decoder.decode(tokens)
    for row in range(3):
        assert torch.equal(decoder.decode(tokens[row : row + 1])[0], together[row])


def test_batches_may_be_late(vq: Tokenizer) -> None:
    """Results are asked for in any order, while later batches use the same buffers."""
    side = _Late()
    decoder, batches = DeviceDecoder(vq, batch=2, side=side), [_tokens(vq, 2) for _ in range(5)]
    expected = [DeviceDecoder(vq, batch=2).decode(tokens) for tokens in batches]
    pending = []
    for number, tokens in enumerate(batches):
        pending.append(decoder.submit(tokens.clone()))
        assert len(side.queue) <= 2, f"{number}: two batches are under way at most"
    for number in (3, 0, 4, 2, 1):
        assert torch.equal(pending[number].result(), expected[number])
    kept = pending[0].result()
    decoder.decode(batches[1])
    assert torch.equal(kept, expected[0])


def test_a_call_takes_any_number_of_images_and_resizes_them(vq: Tokenizer) -> None:
    """Two calls may be late whatever their sizes; resizing comes before clamping, as officially."""
    side = _Late()
    decoder, tokens = DeviceDecoder(vq, batch=2, side=side), _tokens(vq, 5)
    five, one, small = decoder.submit(tokens), decoder.submit(tokens[:1]), None
    assert len(side.queue) == 2
    small = decoder.submit(tokens[:3], 13)
    assert len(side.queue) == 2, "a third call waits for the first"
    expected = _expected(vq, tokens)
    assert (five.result().int() - expected.int()).abs().max() <= 1
    assert torch.equal(one.result(), five.result()[:1])
    quant = vq.lookup(tokens[:3], (3, vq.config.codebook_embed_dim, 2, 2))
    with torch.no_grad():
        resized = to_uint8(resize(vq.decode(quant), 13))
    assert (small.result().int() - resized.int()).abs().max() <= 1


def test_sizes_have_programs_of_their_own(vq: Tokenizer) -> None:
    decoder = DeviceDecoder(vq, batch=1)
    for grid in (2, 3, 2):
        tokens = _tokens(vq, 1, grid)
        difference = decoder.decode(tokens).int() - _expected(vq, tokens, grid).int()
        assert difference.abs().max() <= 1
    assert len(decoder._programs) == 2


def test_changed_weights_are_read_into_the_same_places() -> None:
    tokenizer = build_tokenizer(SMALL[NAMES[-1]])
    tokenizer.load_state_dict(golden_state_dict(tokenizer))
    decoder, tokens = DeviceDecoder(tokenizer, batch=1), _tokens(tokenizer, 1)
    before = decoder.decode(tokens)
    places = [weight.data_ptr() for weight in decoder._network.weights.values()]
    with torch.no_grad():
        tokenizer.decoder.conv_out.weight.mul_(-1)
    assert torch.equal(decoder.decode(tokens), before)
    decoder.refresh()
    assert (decoder.decode(tokens).int() - _expected(tokenizer, tokens).int()).abs().max() <= 1
    assert places == [weight.data_ptr() for weight in decoder._network.weights.values()]


def test_how_its_norms_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU by Triton, where it is installed: without it in plain torch, or an error if Triton was asked for."""
    gpu = torch.device("cuda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    for asked in ("auto", "cuda", "triton", {"skinny_linear": "reference"}):
        assert resolve_norms(gpu, asked) == dict.fromkeys(NORM_OPS, "triton")
    assert resolve_norms(gpu, "reference") == dict.fromkeys(NORM_OPS, "reference")
    mixed = {"group_norm_silu": "triton", "residual_moments": "reference"}
    assert resolve_norms(gpu, {"residual_moments": "reference"}) == mixed
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert resolve_norms(gpu) == dict.fromkeys(NORM_OPS, "reference")
    with pytest.raises(BackendUnavailableError, match="triton is not installed"):
        resolve_norms(gpu, {"group_norm_silu": "triton"})


def test_inference_mode_leaves_no_trace(vq: Tokenizer) -> None:
    tokens = _tokens(vq, 1)
    with torch.inference_mode():
        decoder = DeviceDecoder(vq, batch=1)
        inside = decoder.decode(tokens.clone())
    decoder.refresh()
    assert torch.equal(decoder.decode(tokens), inside)
    with torch.inference_mode():
        assert torch.equal(decoder.decode(tokens), inside)


def test_where_it_is_chosen(vq: Tokenizer) -> None:
    """On every device but the CPU, in fp32 unless another arithmetic is asked for, wherever it can decode."""
    assert choose_decoder(vq, None, 2) is None
    for made in [copy.deepcopy(vq).to("meta")]:
        for dtype in (None, torch.float32, torch.bfloat16):
            chosen = choose_decoder(made, dtype, 3)
            assert isinstance(chosen, DeviceDecoder)
            assert (chosen.dtype, chosen.batch) == (dtype or torch.float32, 3)
            assert decoder_name(chosen, made) == "device"
    groups = build_tokenizer(next(config for config in SMALL.values() if config.num_codebooks > 1)).to("meta")
    for other in (made.half(), groups):
        assert choose_decoder(other, None, 3) is None
        assert decoder_name(None, other) == "reference"


def test_refusals(vq: Tokenizer) -> None:
    decoder = DeviceDecoder(vq, batch=2)
    for bad in (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(0, 4, dtype=torch.int64), torch.zeros(4)):
        with pytest.raises(InvalidRequestError, match="square"):
            decoder.submit(bad)
    with pytest.raises(InvalidRequestError, match="positive"):
        decoder.submit(_tokens(vq, 1), 0)
    assert not decoder._programs
    for options in ({"dtype": torch.float16}, {"batch": 0}):
        with pytest.raises(ConfigError):
            DeviceDecoder(vq, **options)  # type: ignore[arg-type]
    groups = next(config for config in SMALL.values() if config.num_codebooks > 1)
    with pytest.raises(ConfigError, match="per position"):
        DeviceDecoder(build_tokenizer(groups))
