"""Every tokenizer against what the official implementation returned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gear_engine.config import TOKENIZER_PRESETS
from gear_engine.tokenizers import Tokenizer, build_tokenizer, soft_readout
from tests.golden_weights import golden_noise, golden_state_dict, load_golden, relative_error

NAMES = sorted(TOKENIZER_PRESETS)


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest, goldens_dir: Path) -> tuple[Tokenizer, dict[str, torch.Tensor]]:
    name: str = request.param
    tokenizer = build_tokenizer(TOKENIZER_PRESETS[name])
    tokenizer.load_state_dict(golden_state_dict(tokenizer), strict=True)
    return tokenizer, load_golden(goldens_dir, f"tok_{name}")


@torch.no_grad()
def test_encode_matches_official(case: tuple[Tokenizer, dict[str, torch.Tensor]]) -> None:
    tokenizer, golden = case
    quant, diff, info = tokenizer.encode(golden["image"])
    assert torch.equal(info[2].reshape(2, -1), golden["indices"])
    assert info[2].dtype == torch.int64 and info[2].ndim == 1
    assert relative_error(quant, golden["quant"]) <= 1e-5
    assert diff[0] is None and diff[3] == 0


@torch.no_grad()
def test_distances_and_soft_readout_match_official(case: tuple[Tokenizer, dict[str, torch.Tensor]]) -> None:
    tokenizer, golden = case
    quant, _, info, distance = tokenizer.encode(golden["image"], return_distance=True)
    assert torch.equal(info[2].reshape(2, -1), golden["indices"])
    assert relative_error(quant, golden["quant"]) <= 1e-5
    num_codes = tokenizer.quantize.num_codes
    assert distance.shape == (info[2].numel(), num_codes)
    assert relative_error(distance[:8, :: num_codes // 256], golden["distance_rows"]) <= 1e-5
    scale = distance[:8].abs().max()
    assert (distance[:8].min(dim=1).values - golden["distance_min"]).abs().max() / scale <= 1e-5
    readout = soft_readout(distance[:16], golden_noise("readout", (num_codes, 40)), 0.3)
    assert relative_error(readout, golden["soft_readout"]) <= 1e-4


@torch.no_grad()
def test_decode_code_matches_official(case: tuple[Tokenizer, dict[str, torch.Tensor]]) -> None:
    tokenizer, golden = case
    images = tokenizer.decode_code(golden["codes"], tuple(golden["quant"].shape))
    assert relative_error(images, golden["decoded"]) <= 1e-5


def test_forward_returns_the_official_tuples(case: tuple[Tokenizer, dict[str, torch.Tensor]]) -> None:
    tokenizer, golden = case
    with torch.no_grad():
        images, diff = tokenizer(golden["image"])
        again, quant, full_diff, info, distance = tokenizer(golden["image"], return_distance=True)
    assert images.shape == golden["image"].shape and len(diff) == len(full_diff) == 4
    assert relative_error(again, images) <= 1e-5
    assert quant.shape == golden["quant"].shape and info[:2] == (None, None)
    assert distance.shape[0] == info[2].numel()
