"""The decoder of a GPU, captured: its pixels, in any batch, and those of the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gear_engine.cli.main import main
from gear_engine.cuda_graph import EagerLauncher
from gear_engine.errors import BackendUnavailableError
from gear_engine.metrics import psnr
from gear_engine.ops.group_norm_silu import group_norm_silu
from gear_engine.ops.residual_moments import residual_moments
from gear_engine.tokenizers import Tokenizer, build_tokenizer, choose_decoder
from gear_engine.tokenizers.device_decoder import DeviceDecoder
from gear_engine.tokenizers.device_network import resolve_norms
from tests.cli import tiny
from tests.golden_weights import golden_state_dict, relative_error
from tests.tokenizers.test_tokenizer import SMALL

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: captured steps need one"),
]

GPU = torch.device("cuda")
NAMES = sorted(name for name, config in SMALL.items() if config.num_codebooks == 1)


@pytest.fixture(params=NAMES)
def tokenizer(request: pytest.FixtureRequest, without_tf32: None) -> Tokenizer:
    tokenizer = build_tokenizer(SMALL[request.param])
    tokenizer.load_state_dict(golden_state_dict(tokenizer))
    return tokenizer.to(GPU)


@pytest.fixture(params=["triton", "reference"])
def norms(request: pytest.FixtureRequest) -> str:
    """The implementation of the passes between convolutions."""
    name: str = request.param
    try:
        resolve_norms(GPU, name)
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    return name


def _tokens(tokenizer: Tokenizer, images: int) -> torch.Tensor:
    return torch.randint(0, tokenizer.quantize.num_codes, (images, 4), device=GPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixels(tokenizer: Tokenizer, dtype: torch.dtype, norms: str) -> None:
    """Captured and called alike; against the CPU: off by one where rounding decides, or 38 dB in bf16."""
    tokens = _tokens(tokenizer, 5)
    decoder = choose_decoder(tokenizer, dtype, 2, norms)
    assert isinstance(decoder, DeviceDecoder)
    assert set(decoder.backends.values()) == {norms}
    pixels = decoder.decode(tokens)
    called = DeviceDecoder(tokenizer, dtype=dtype, batch=2, backend=norms, launcher=EagerLauncher())
    assert torch.equal(pixels, called.decode(tokens))
    exact = DeviceDecoder(tokenizer.cpu(), batch=2).decode(tokens.cpu())
    if dtype == torch.float32:
        assert (pixels.int() - exact.int()).abs().max() <= 1
    else:
        assert float(psnr(pixels.movedim(3, 1) / 255, exact.movedim(3, 1) / 255).min()) > 38


@pytest.mark.parametrize(("edge", "channels"), [(256, 128), (16, 512), (33, 72)])
def test_norms_of_whole_maps(edge: int, channels: int, norms: str) -> None:
    """At the sizes of a VQ-16 decoder; with the same bits in any batch, in fp32 and bf16."""
    groups = channels // 4
    source = torch.randn(3, edge, edge, channels, device=GPU) * 3 + 10
    weight, bias = torch.randn(2, channels, device=GPU)
    expected = F.silu(F.group_norm(source.double().permute(0, 3, 1, 2), groups, weight.double(), bias.double(), 1e-6))

    def run(images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        stream, out = torch.zeros_like(images), torch.empty_like(images, dtype=dtype)
        moments = torch.empty(*images.shape[:2], groups, 2, dtype=torch.float64, device=GPU)
        flat = [each.flatten(0, 1) for each in (images, stream, moments)]
        residual_moments(*flat, accumulate=True, backend=norms)
        group_norm_silu(stream, moments, weight, bias, out, backend=norms)
        return out

    for dtype, bound in ((torch.float32, 5e-6), (torch.bfloat16, 5e-3)):
        together = run(source, dtype)
        assert relative_error(together.permute(0, 3, 1, 2).double(), expected) <= bound
        for image in range(3) if norms == "triton" else ():
            assert torch.equal(run(source[image : image + 1].clone(), dtype)[0], together[image])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_image_does_not_depend_on_its_batch(tokenizer: Tokenizer, dtype: torch.dtype) -> None:
    """Nor on its place in it: what ``--decode-batch`` above 1 needs under Philox."""
    decoder, tokens = DeviceDecoder(tokenizer, dtype=dtype, batch=4), _tokens(tokenizer, 4)
    together = decoder.decode(tokens)
    for row in range(4):
        assert torch.equal(decoder.decode(tokens[row : row + 1])[0], together[row])
        assert torch.equal(decoder.decode(tokens.roll(1, 0))[(row + 1) % 4], together[row])


def test_the_command_line(tmp_path: Path) -> None:
    """The images of the CPU, but for tokens that rounding decides; the decoder and the cache that were asked for."""
    checkpoint = tiny.stage1(tmp_path / "exp" / "checkpoints" / "0000007.pt")
    found = {}
    for device, flags in (("cpu", []), ("cuda", []), ("cuda", ["--cache-dtype", "fp8", "--decode-dtype", "bf16"])):
        out = tmp_path / f"out{len(found)}"
        words = ["sample", "--ckpt-path", str(checkpoint), "--output-dir", str(out), "--fid-num", "6", "--no-tf32"]
        assert main([*words, "--image-size-eval", str(tiny.IMAGE_SIZE), "--device", device, *flags]) == 0
        (archive,), (record,) = out.rglob("samples.npz"), out.rglob("run.json")
        found[len(found)] = np.load(archive)["arr_0"].astype(int)
        backend = json.loads(record.read_text())["settings"]["backend"]
        assert backend["decoder"] == ("cpu" if device == "cpu" else "device")
    assert found[2].shape == found[0].shape
    close = [np.abs(one - other).max() <= 1 for one, other in zip(found[0], found[1], strict=True)]
    assert sum(close) >= 5
