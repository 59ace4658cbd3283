"""dual_readout: values and gradients of every backend against the materialised form in double precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from gear_engine.errors import BackendUnavailableError, InvalidRequestError
from gear_engine.ops import codebook_quantize, readout_kernels, sign_bits
from gear_engine.ops.dual_readout import dual_readout, reference
from tests.golden_weights import relative_error
from tests.ops.cpu_paths import LEVELS, forced, threads

DISTANCES = ("l2", "l2_normalized", "inner_product", "lfq")
#: (backend, dtype, instruction set); Triton's kernels are tested with the others of their kind.
WAYS = [
    ("chunked", torch.float32, None),
    ("chunked", torch.float64, None),
    *(("cpu", torch.float32, level) for level in LEVELS),
]


def on(level: str | None) -> AbstractContextManager[None]:
    return nullcontext() if level is None else forced(level)


def operands(n: int, k: int, d: int, c: int, distance: str, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """z, codebook, table; an lfq codebook holds the sign vectors, whatever k is."""
    codebook = torch.randn(k, d)
    if distance == "lfq":
        codebook = ((torch.arange(2**d)[:, None] >> torch.arange(d)) & 1) * 2.0 - 1.0
    return [x.to(dtype) for x in (torch.randn(n, d), codebook, torch.randn(len(codebook), c))]


def values(function: Any, inputs: list[torch.Tensor], tau: float, distance: str, **options: Any) -> list[torch.Tensor]:
    """(soft, gradients of all three operands) under a fixed random upstream gradient, and the indices last."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    indices, soft = function(*leaves, tau, distance, **options)
    return [soft.detach(), *torch.autograd.grad(soft, leaves, upstream_of(soft).to(soft)), indices]


def upstream_of(soft: torch.Tensor) -> torch.Tensor:
    """The fixed random gradient, in double precision."""
    return torch.randn(soft.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(("backend", "dtype", "level"), WAYS)
@settings(max_examples=20, deadline=None)
@given(
    n=st.one_of(st.integers(0, 9), st.integers(40, 110)),
    k=st.one_of(st.integers(1, 9), st.integers(60, 300)),
    d=st.integers(1, 9),
    c=st.one_of(st.integers(1, 40), st.sampled_from([67, 100])),
    tau=st.sampled_from([0.01, 0.3, 5.0, 1e6]),
    distance=st.sampled_from(DISTANCES),
    seed=st.integers(0, 10**6),
)
def test_matches_the_materialised_form(
    backend: str,
    dtype: torch.dtype,
    level: str | None,
    n: int,
    k: int,
    d: int,
    c: int,
    tau: float,
    distance: str,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    inputs = operands(n, k, d, c, distance, dtype)
    with on(level):
        *actual, indices = values(dual_readout, inputs, tau, distance, backend=backend)
    *expected, _ = values(reference, [x.double() for x in inputs], tau, distance)
    assert torch.equal(indices, reference(*inputs, tau, distance)[0])  # type: ignore[arg-type]
    # Rounding of the scores is divided by tau, and a gradient of differences that cancel is as wrong as its terms:
    # (upstream . table's row) / tau for the latents and the codebook.
    tolerance = max(1e-4, 1e-5 / tau) if dtype == torch.float32 else 1e-11
    assert relative_error(actual[0], expected[0]) <= tolerance if n else actual[0].shape == (0, c)
    terms = (upstream_of(expected[0]) @ inputs[2].double().T).abs()
    scale = (1 if distance == "inner_product" else 2) / tau * max(1.0, float(terms.max()) if n else 0.0)
    for got, want, factor in zip(actual[1:], expected[1:], (scale, scale, 1.0), strict=True):
        assert got.shape == want.shape and got.dtype == dtype
        error = float((got.double() - want).abs().max()) if want.numel() else 0.0
        assert error <= tolerance * max(float(want.abs().max()) if want.numel() else 0.0, factor)


def test_indices_are_the_official_ones() -> None:
    for distance in ("l2", "l2_normalized", "inner_product"):
        z, codebook, table = operands(500, 3000, 8, 3, distance, torch.float32)
        expected = codebook_quantize.reference(z, codebook, distance)[0]  # type: ignore[arg-type]
        assert torch.equal(dual_readout(z, codebook, table, 0.5, distance)[0], expected)  # type: ignore[arg-type]
    z, codebook, table = operands(500, 0, 10, 3, "lfq", torch.float32)
    z[3] = 0
    indices = dual_readout(z, codebook, table, 0.5, "lfq")[0]
    assert indices.dtype == torch.int64 and torch.equal(indices, sign_bits.reference(z)[0][:, 0])
    assert torch.equal(codebook[indices], torch.where(z > 0, 1.0, -1.0))


@pytest.mark.parametrize("distance", DISTANCES)
def test_gradcheck(distance: str) -> None:
    inputs = [x.requires_grad_() for x in operands(4, 7, 3, 5, distance)]

    def soft(*leaves: torch.Tensor) -> torch.Tensor:
        return dual_readout(*leaves, 0.7, distance)[1]  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(soft, inputs)
    with pytest.raises(BackendUnavailableError, match="differentiable once"):
        torch.autograd.gradgradcheck(soft, inputs)
    assert torch.autograd.gradgradcheck(lambda *leaves: reference(*leaves, 0.7, distance)[1], inputs)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
def test_only_what_requires_a_gradient_gets_one(wanted: tuple[int, ...]) -> None:
    inputs = operands(5, 11, 3, 4, "l2")
    whole = values(dual_readout, inputs, 0.7, "l2")[1:4]
    leaves = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
    upstream = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    dual_readout(*leaves, 0.7, "l2")[1].backward(upstream)
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (i in wanted)
        if leaf.grad is not None:
            assert torch.allclose(leaf.grad, whole[i], rtol=1e-12, atol=1e-12)


def test_strided_operands() -> None:
    inputs = operands(6, 40, 3, 4, "l2_normalized", torch.float32)
    strided = [torch.stack((x, x + 1), dim=-1)[..., 0] for x in inputs]
    transposed = [x.t().contiguous().t() for x in inputs]
    expected = values(dual_readout, inputs, 0.3, "l2_normalized")
    for others in (strided, transposed):
        assert not others[0].is_contiguous()
        indices, soft = dual_readout(*others, 0.3, "l2_normalized")
        assert torch.equal(indices, expected[-1]) and torch.allclose(soft, expected[0], rtol=1e-5, atol=1e-6)
    leaves = [x.detach().requires_grad_() for x in inputs]
    soft = dual_readout(*(x.t().contiguous().t() for x in leaves), 0.3, "l2_normalized")[1]
    grads = torch.autograd.grad(soft.sum(), leaves)  # the upstream gradient has stride 0
    same = torch.autograd.grad(reference(*leaves, 0.3, "l2_normalized")[1].sum(), leaves)
    assert all(relative_error(got, want) <= 1e-4 for got, want in zip(grads, same, strict=True))


@pytest.mark.parametrize(("backend", "dtype", "level"), WAYS)
def test_nothing_overflows(backend: str, dtype: torch.dtype, level: str | None) -> None:
    codebook = torch.tensor([[0.0], [1e4], [-1e4]], dtype=dtype)
    inputs = [torch.tensor([[1.0], [1e4]], dtype=dtype), codebook, torch.eye(3, dtype=dtype)]
    sharp = operands(7, 0, 6, 5, "lfq", dtype)
    with on(level):
        far = values(dual_readout, inputs, 1.0, "l2", backend=backend)
        soft, *grads, indices = values(dual_readout, sharp, 1e-6, "lfq", backend=backend)
    assert far[0].tolist() == [[1, 0, 0], [0, 1, 0]] and far[-1].tolist() == [0, 1]
    assert torch.equal(soft, sharp[2][indices])  # as sharp as an argmax
    assert all(bool(grad.isfinite().all()) for grad in (*far[1:4], *grads))


def test_threads_and_other_rows_change_no_bit() -> None:
    """More rows than one chunk of the compiled backward pass, and more codes than one block."""
    inputs = operands(450, 150, 8, 20, "l2", torch.float32)
    with threads(1):
        whole = values(dual_readout, inputs, 0.3, "l2", backend="cpu")
    with threads(5):
        again = values(dual_readout, inputs, 0.3, "l2", backend="cpu")
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    expected = values(reference, [x.double() for x in inputs], 0.3, "l2")
    assert all(relative_error(a, b) <= 1e-4 for a, b in zip(whole[:4], expected[:4], strict=True))
    rows = torch.tensor([0, 97, 383, 384, 449])
    few = values(dual_readout, [inputs[0][rows], *inputs[1:]], 0.3, "l2", backend="cpu")
    assert torch.equal(few[0], whole[0][rows])


class _Largest(TorchDispatchMode):
    """The largest number of elements of any result."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple) else (out,):
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.numel())
        return out


def test_chunks_hold_a_bounded_number_of_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = operands(37, 23, 3, 4, "l2")
    whole = values(dual_readout, inputs, 0.7, "l2", backend="chunked")
    monkeypatch.setattr(readout_kernels, "_BLOCK_SCORES", 23 * 5)
    for got, want in zip(values(dual_readout, inputs, 0.7, "l2", backend="chunked"), whole, strict=True):
        assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)
    given = readout_kernels.Operands.make(*inputs, 1.0, "l2")
    with _Largest() as largest:
        soft, lse = readout_kernels._chunked_forward(given)
        readout_kernels._chunked_backward(soft, soft.sum(1), lse, given, [True, True, True])
    assert largest.elements == max(5 * 23, soft.numel())


def test_torch_sees_one_op() -> None:
    for dtype in (torch.float32, torch.float64):
        inputs = [x.requires_grad_() for x in operands(5, 9, 3, 4, "l2", dtype)]
        torch.library.opcheck(torch.ops.gear_engine.dual_readout, (*inputs, 0.7, "l2", "auto"))
    inputs = operands(5, 9, 3, 4, "l2_normalized")
    compiled = torch.compile(dual_readout, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        values(compiled, inputs, 0.7, "l2_normalized"), values(dual_readout, inputs, 0.7, "l2_normalized"), strict=True
    ):
        assert torch.equal(got, want)


def test_autocast_is_left_at_the_door() -> None:
    inputs = operands(5, 9, 3, 4, "l2", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        soft = dual_readout(inputs[0].bfloat16(), *inputs[1:], 0.7, "l2")[1]
    assert torch.equal(soft, dual_readout(inputs[0].bfloat16().float(), *inputs[1:], 0.7, "l2")[1])


def test_bad_arguments() -> None:
    z, codebook, table = operands(4, 16, 8, 5, "l2", torch.float32)
    for tau in (0.0, -1.0, float("nan"), float("inf"), 1e-39):
        with pytest.raises(InvalidRequestError, match="tau"):
            dual_readout(z, codebook, table, tau, "l2")
    for arguments, match in (
        ((z, codebook, table, 1.0, "cosine"), "distance"),
        ((z[0], codebook, table, 1.0, "l2"), "z"),
        ((z[:, :7], codebook, table, 1.0, "l2"), "codebook"),
        ((z, codebook, table[:3], 1.0, "l2"), "table"),
        ((z, codebook[:0], table[:0], 1.0, "l2"), "empty"),
        ((z, codebook.double(), table, 1.0, "l2"), "share dtype"),
        ((z.half(), codebook.half(), table.half(), 1.0, "l2"), "fp32 or fp64"),
        ((z, codebook, table, 1.0, "lfq"), "2\\^d"),
    ):
        with pytest.raises(InvalidRequestError, match=match):
            dual_readout(*arguments)  # type: ignore[arg-type]
    with pytest.raises(BackendUnavailableError, match="no backend"):
        dual_readout(z, codebook, table, 1.0, "l2", backend="fpga")


def test_gradients_through_the_normalisation_are_torchs() -> None:
    z, codebook, table = (x.requires_grad_() for x in operands(6, 20, 4, 5, "l2_normalized"))
    soft = dual_readout(z, codebook, table, 0.3, "l2_normalized")[1]
    grads = torch.autograd.grad(soft.square().sum(), (z, codebook))
    # Scaling a vector changes nothing, so a gradient is orthogonal to its vector.
    assert float((grads[0] * z.detach()).sum(dim=1).abs().max()) <= 1e-12
    assert float((grads[1] * codebook.detach()).sum(dim=1).abs().max()) <= 1e-12
    unit = [F.normalize(x.detach(), dim=-1) for x in (z, codebook)]
    assert torch.allclose(soft, dual_readout(*unit, table, 0.3, "l2")[1], rtol=1e-12, atol=1e-12)
