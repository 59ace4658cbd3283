"""The CPU decoder against the modules and against the official numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gear_engine.config import TOKENIZER_PRESETS
from gear_engine.errors import BackendUnavailableError, ConfigError, InvalidRequestError
from gear_engine.metrics import psnr
from gear_engine.ops import native
from gear_engine.tokenizers import Decoder, Tokenizer, build_tokenizer, convolution
from gear_engine.tokenizers import canvas as canvas_module
from gear_engine.tokenizers.decoder_fast import unavailable
from tests.golden_weights import golden_state_dict, load_golden, relative_error
from tests.tokenizers.test_tokenizer import SMALL

pytestmark = pytest.mark.skipif(native.unavailable("residual_moments_cpu") is not None, reason="not compiled")
needs_bf16 = pytest.mark.skipif(unavailable(torch.bfloat16) is not None, reason="no bf16 convolutions")


@pytest.fixture(scope="module", params=sorted(SMALL))
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    tokenizer = build_tokenizer(SMALL[request.param])
    tokenizer.load_state_dict(golden_state_dict(tokenizer))
    return tokenizer


def _codes(tokenizer: Tokenizer, batch: int, height: int, width: int) -> torch.Tensor:
    quantize = tokenizer.quantize
    return torch.randint(0, quantize.num_codes, (batch, height, width, quantize.num_codebooks)).squeeze(-1)


def _psnr(images: torch.Tensor, expected: torch.Tensor) -> float:
    return float(psnr(*((x.clamp(-1, 1) + 1) / 2 for x in (images, expected))).min())


@torch.no_grad()
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 2, 3), (3, 4, 1)])
def test_fp32_equals_the_modules(
    tokenizer: Tokenizer, batch: int, height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = _codes(tokenizer, batch, height, width)
    expected = tokenizer.decode(tokenizer.lookup(codes))
    decoder = Decoder(tokenizer)
    images = decoder.decode_code(codes)
    assert images.is_contiguous()
    assert relative_error(images, expected) <= 1e-5
    # Strips of a few rows, and again over memory that is dirty from the call before.
    monkeypatch.setattr(canvas_module, "STRIP_BYTES", 20_000)
    assert relative_error(decoder.decode_code(codes), expected) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)])
def test_an_image_does_not_depend_on_its_batch(tokenizer: Tokenizer, dtype: torch.dtype) -> None:
    decoder = Decoder(tokenizer, dtype=dtype)
    codes = _codes(tokenizer, 3, 2, 2)
    together = decoder.decode_code(codes)
    for index in range(3):
        assert torch.equal(decoder.decode_code(codes[index : index + 1])[0], together[index])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)])
def test_an_image_does_not_depend_on_the_images_before(
    tokenizer: Tokenizer, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small and large images take other tiles and other converted weights."""
    monkeypatch.setattr(convolution, "_LARGE_PIXELS", 40)
    small, large = _codes(tokenizer, 1, 2, 2), _codes(tokenizer, 1, 6, 5)
    used = Decoder(tokenizer, dtype=dtype)
    before = used.decode_code(small)
    assert torch.equal(used.decode_code(large), Decoder(tokenizer, dtype=dtype).decode_code(large))
    assert torch.equal(used.decode_code(small), before)


@torch.no_grad()
@pytest.mark.parametrize("name", ["VQ-16", "LFQ-16"])
def test_an_image_does_not_depend_on_the_threads(name: str) -> None:
    """At full width, on a grid so small that torch's 1 x 1 convolutions would share the channels out."""
    tokenizer = build_tokenizer(TOKENIZER_PRESETS[name].replace(num_res_blocks=1))
    tokenizer.load_state_dict(golden_state_dict(tokenizer))
    decoder, codes = Decoder(tokenizer), _codes(tokenizer, 1, 6, 6)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(decoder.decode_code(codes))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@needs_bf16
@torch.no_grad()
def test_bf16_passes_45_db(tokenizer: Tokenizer) -> None:
    codes = _codes(tokenizer, 2, 6, 5)
    images = Decoder(tokenizer, dtype=torch.bfloat16).decode_code(codes)
    assert images.dtype == torch.float32
    expected = tokenizer.decode(tokenizer.lookup(codes))
    assert _psnr(images, expected) >= 45
    assert not torch.equal(images, expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["VQ-16", "LFQ-8"])
def test_goldens_in_fp32(name: str, goldens_dir: Path) -> None:
    tokenizer = build_tokenizer(TOKENIZER_PRESETS[name])
    tokenizer.load_state_dict(golden_state_dict(tokenizer))
    golden = load_golden(goldens_dir, f"tok_{name}")
    images = Decoder(tokenizer).decode_code(golden["codes"], tuple(golden["quant"].shape))
    assert relative_error(images, golden["decoded"]) <= 1e-5


@torch.no_grad()
def test_refresh_reads_changed_weights_and_release_gives_memory_back(tokenizer: Tokenizer) -> None:
    decoder = Decoder(tokenizer)
    codes = _codes(tokenizer, 1, 2, 2)
    before = decoder.decode_code(codes)
    weight = tokenizer.decoder.conv_in.weight
    original = weight.clone()
    try:
        weight.data.copy_(original * 1.5)
        decoder.refresh()
        assert relative_error(decoder.decode_code(codes), tokenizer.decode(tokenizer.lookup(codes))) <= 1e-5
        assert not torch.equal(decoder.decode_code(codes), before)
    finally:
        weight.data.copy_(original)
    assert decoder.nbytes > 0
    decoder.release()
    assert decoder.nbytes == 0
    decoder.refresh()
    assert torch.equal(decoder.decode_code(codes), before)


def test_what_cannot_be_decoded_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="float32 or"):
        Decoder(tokenizer, dtype=torch.float16)
    decoder = Decoder(tokenizer)
    with pytest.raises(InvalidRequestError, match="must lie in"):
        decoder.decode_code(_codes(tokenizer, 1, 2, 2) + 2**40)
    with pytest.raises(InvalidRequestError, match="must be"):
        decoder.decode(torch.zeros(1, tokenizer.config.codebook_embed_dim + 1, 2, 2))
    with torch.device("meta"):
        elsewhere = Tokenizer(tokenizer.config)
    with pytest.raises(BackendUnavailableError, match="on the CPU"):
        Decoder(elsewhere)
    with pytest.raises(ConfigError, match="fp32 weights"):
        Decoder(build_tokenizer(tokenizer.config).bfloat16())


def test_decode_code_takes_it_only_without_gradients(tokenizer: Tokenizer) -> None:
    codes = _codes(tokenizer, 1, 2, 2)
    modules = tokenizer.decode_code(codes)
    assert modules.grad_fn is not None
    assert not tokenizer.runs_cpu_decoder()
    with torch.inference_mode():
        assert tokenizer.runs_cpu_decoder()
        images = tokenizer.decode_code(codes)
        assert torch.equal(images, Decoder(tokenizer).decode_code(codes))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not tokenizer.runs_cpu_decoder()
    assert relative_error(images, modules.detach()) <= 1e-5


@torch.inference_mode()
def test_fp32_keeps_half_of_the_tolerance_at_full_depth() -> None:
    """The published VQ-16 on an 8 x 8 latent, where sums have up to 4608 products; measured: 1.3e-6 off float64."""
    tokenizer = build_tokenizer(TOKENIZER_PRESETS["VQ-16"])
    tokenizer.load_state_dict(golden_state_dict(tokenizer))
    codes = torch.randint(0, tokenizer.quantize.num_codes, (1, 8, 8), generator=torch.Generator().manual_seed(0))
    quant = tokenizer.lookup(codes)
    images = tokenizer.decode_code(codes)
    assert relative_error(images, tokenizer.double().decode(quant.double())) <= 5e-6
