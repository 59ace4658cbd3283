"""One Triton binary serves every number of rows: Triton would compile others for 1 and for multiples of 16.

Equal bits in every bucket are promised by one order of sums, in one binary; and a captured step must not meet a binary
that no warm-up compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gear_engine.ops import (
    group_norm_silu,
    residual_moments,
    sample_tokens,
    sign_bits,
    skinny_linear,
    soft_readout,
    triton_backend,
)
from gear_engine.ops.sample_tokens import SamplingTable
from gear_engine.request import SamplingParams

pytest.importorskip("triton", reason="triton is not installed")
jit = pytest.importorskip("triton.runtime.jit")
interpreter = pytest.importorskip("triton.runtime.interpreter")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _linear(rows: int) -> None:
    weight = torch.randn(32, 48, device=DEVICE)
    skinny_linear.skinny_linear(torch.randn(rows, 48, device=DEVICE), weight, backend="triton")


def _sample(rows: int) -> None:
    table = SamplingTable.build([SamplingParams(top_k=3)] * rows, [False] * rows, 64, DEVICE)
    seeds = torch.arange(rows, device=DEVICE)
    logits = torch.randn(rows, 64, device=DEVICE)
    sample_tokens.sample_tokens(logits, table, seeds=seeds, positions=seeds, backend="triton")


def _nearest(rows: int) -> None:
    z, codebook = torch.randn(rows, 4, device=DEVICE), torch.randn(32, 4, device=DEVICE)
    triton_backend.kernel("codebook_quantize")(z, z[:, 0].contiguous(), codebook, codebook[:, 0].contiguous(), False)


def _signs(rows: int) -> None:
    sign_bits.sign_bits(torch.randn(rows, 16, device=DEVICE), 2, backend="triton")


def _readout(rows: int) -> None:
    operands = (torch.randn(*shape, device=DEVICE) for shape in ((rows, 4), (32, 4), (32, 16)))
    soft_readout.soft_readout(*operands, 1.0, "l2", backend="triton")


def _norm(images: int) -> None:
    rows = torch.randn(images, 3, 5, 32, device=DEVICE)
    moments = torch.empty(images, 3, 8, 2, dtype=torch.float64, device=DEVICE)
    residual_moments.residual_moments(rows.flatten(0, 1), None, moments.flatten(0, 1), backend="triton")
    group_norm_silu.group_norm_silu(rows, moments, None, None, rows, backend="triton")


def _variants(monkeypatch: pytest.MonkeyPatch, call: Callable[[], None]) -> set[str]:
    """The kernels that ``call`` launches, each with what Triton knows of its arguments when it compiles it."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend

    found = set()
    backend = CUDABackend(GPUTarget("cuda", 90, 32))

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launch = {name: value for name, value in options.items() if name in self.arg_names}
        kernel = jit.JITFunction(self.fn, do_not_specialize=self.kwargs["do_not_specialize"])
        bind = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
        found.add(f"{self.fn.__name__}: {bind(*args, **launch)[1]}")

    with monkeypatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "run", run)
        call()
    return found


@pytest.mark.skipif(DEVICE.type == "cuda", reason="asks the interpreter what was launched; tests/gpu counts binaries")
@pytest.mark.parametrize("launch", [_linear, _sample, _nearest, _signs, _readout, _norm])
def test_the_number_of_rows_makes_no_variant(monkeypatch: pytest.MonkeyPatch, launch: Callable[[int], None]) -> None:
    few = _variants(monkeypatch, lambda: launch(2))
    assert few
    for rows in (1, 16, 17, 64):
        assert _variants(monkeypatch, lambda rows=rows: launch(rows)) == few  # type: ignore[misc]
