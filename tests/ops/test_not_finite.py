"""NaN and infinities: every backend gives an index that exists, and for codes and signs the reference's.

Drawn tokens are looked up by the next step before anybody reads that the logits were not finite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gear_engine.ops import codebook_quantize, sample_tokens, sign_bits
from gear_engine.ops.sample_tokens import SamplingTable
from gear_engine.request import SamplingParams

Emulated = Callable[[str], Callable[..., Any]]
NAN, INF = float("nan"), float("inf")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _run(op: Any, backend: str, emulated: Emulated) -> Callable[..., Any]:
    """``backend`` on the GPU if there is one, else emulated, interpreted or the CPU's own."""
    name = op.__name__.rpartition(".")[2]
    if backend == "cuda":
        return emulated(name)
    if backend == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    device = DEVICE if backend == "triton" else torch.device("cpu")

    def run(*tensors: Any, **options: Any) -> Any:
        there = [x.to(device) if isinstance(x, torch.Tensor) else x for x in tensors]
        found = getattr(op, name)(*there, **options, backend=backend)
        return tuple(x.cpu() for x in found) if isinstance(found, tuple) else found.cpu()

    return run


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton", "cuda"])
@pytest.mark.parametrize("bad", [(NAN,), (INF,), (-INF,), (INF, -INF, NAN)])
def test_a_drawn_token_exists(emulated: Emulated, backend: str, bad: tuple[float, ...]) -> None:
    """One bad logit, a few, or nothing else."""
    vocab_size = 23
    settings = [
        SamplingParams(),
        SamplingParams(top_k=3),
        SamplingParams(top_p=0.5),
        SamplingParams(sample_logits=False),
        SamplingParams(top_k=5, top_p=0.9, temperature=0.7),
    ]
    device = DEVICE if backend == "triton" else torch.device("cpu")
    table = SamplingTable.build(settings, [False] * len(settings), vocab_size, device)
    seeds, positions = torch.arange(len(settings)).to(device), torch.zeros(len(settings), dtype=torch.int64).to(device)
    run = _run(sample_tokens, backend, emulated)
    for places in ([7], [0, 9, vocab_size - 1], list(range(vocab_size))):
        logits = torch.randn(len(settings), vocab_size)
        for i, place in enumerate(places):
            logits[:, place] = bad[i % len(bad)]
        tokens = run(logits, table, seeds=seeds, positions=positions)
        assert ((tokens >= 0) & (tokens < vocab_size)).all(), tokens


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
@pytest.mark.parametrize("metric", ["l2", "l2_normalized", "inner_product"])
def test_the_nearest_code(emulated: Emulated, backend: str, metric: codebook_quantize.Metric) -> None:
    """The bad number in the vectors, or in a code too, of the first block or a later one."""
    z, codebook = torch.randn(8, 6), torch.randn(150, 6)
    z[1, 3], z[2, 0], z[3, 5], z[4], z[5] = NAN, INF, -INF, NAN, 3e38
    cases = [(z, codebook)]
    for place, bad in ((140, NAN), (3, INF)):
        codes = codebook.clone()
        codes[place, 2] = bad
        cases.append((z, codes))
    run = _run(codebook_quantize, backend, emulated)
    for vectors, codes in cases:
        indices = run(vectors, codes, metric)[0]
        assert indices.tolist() == codebook_quantize.reference(vectors, codes, metric)[0].tolist()


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
def test_signs(emulated: Emulated, backend: str) -> None:
    z = torch.randn(9, 6)
    z[0, 0], z[1, 2], z[2, 3], z[3] = NAN, INF, -INF, -0.0
    for groups in (1, 3):
        for found, expected in zip(
            _run(sign_bits, backend, emulated)(z, groups), sign_bits.reference(z, groups), strict=True
        ):
            assert torch.equal(found, expected)
