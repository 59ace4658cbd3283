"""When the device runs out of memory at work: a typed error, however it is told, and an engine that works on."""

from __future__ import annotations

import re
import weakref
from typing import Any

import pytest
import torch

from gear_engine import pipeline_output
from gear_engine.config import TOKENIZER_PRESETS
from gear_engine.engine import Engine
from gear_engine.errors import BackendUnavailableError, OutOfMemoryError
from gear_engine.memory import out_of_memory_is_typed as memory_error
from gear_engine.ops import conv_rows, native
from gear_engine.request import ImageRequest
from gear_engine.tokenizers import build_tokenizer
from tests.models_for_tests import small_model
from tests.ops.cpu_paths import threads


class TestOutOfMemoryAtWork:
    """The device can run out all the same: a typed error, and an engine that works on."""

    @pytest.mark.parametrize("execution", ["direct", "eager"])
    @pytest.mark.parametrize("op", ["skinny_linear", "decode_attention", "sample_tokens"])
    def test_in_an_op(self, op: str, execution: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        engine = Engine(small_model(), max_images=2, backend="reference", execution=execution)
        expected = engine.generate([1, 2, 3], seeds=[4, 5, 6])
        run, calls = getattr(engine.ops, op), 0
        tensors: list[weakref.ref[torch.Tensor]] = []

        def failing(*args: Any, **kwargs: Any) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == 3:
                held = torch.zeros(9)
                tensors.append(weakref.ref(held))
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.\nmore")
            out: torch.Tensor = run(*args, **kwargs)
            return out

        object.__setattr__(engine.ops, op, failing)
        with pytest.raises(OutOfMemoryError, match=r"Tried to allocate 1.00 GiB\.\); lower max_images") as caught:
            engine.generate([1, 2, 3], seeds=[4, 5, 6])
        assert caught.value.__context__ is not None
        assert tensors[0]() is None, "the error keeps tensors alive"
        assert engine.num_unfinished == 0
        assert torch.equal(engine.generate([1, 2, 3], seeds=[4, 5, 6]), expected)

    def test_in_a_capture(self) -> None:
        engine = Engine(small_model(), max_images=2, execution="eager")
        expected = engine.generate([1, 2])
        steps: Any = engine._steps
        launcher = steps._launcher

        class Full:
            warmups = 1

            def prepare(self, step: Any) -> Any:
                step()
                raise torch.OutOfMemoryError("no room for the graph")

        steps._programs.clear()
        steps._launcher = Full()
        for call in (engine.warm_up, lambda: engine.generate([1, 2])):
            with pytest.raises(OutOfMemoryError, match="no room for the graph"):
                call()
        steps._launcher = launcher
        assert torch.equal(engine.generate([1, 2]), expected)

    def test_between_the_steps_of_requests(self, monkeypatch: pytest.MonkeyPatch) -> None:
        engine = Engine(small_model(), max_images=2, execution="eager", backend="reference")
        expected = engine.generate([1], seeds=[3])[0]
        engine.add_request(ImageRequest(label=1, seed=3))
        engine.step()
        with monkeypatch.context() as patch:
            patch.setattr("gear_engine.step_program.decode_step", _out_of_memory)
            with pytest.raises(OutOfMemoryError):
                engine.step()
        found: list[Any] = []
        while engine.num_unfinished:
            found += engine.step()
        assert torch.equal(found[0].tokens, expected)

    def test_in_the_decoder(self) -> None:
        tokenizer = build_tokenizer(TOKENIZER_PRESETS["VQ-16"].replace(ch=32, num_res_blocks=1))
        with pytest.raises(OutOfMemoryError, match="lower decode_batch"):
            pipeline_output.decode(torch.zeros(1, 4, dtype=torch.int64), tokenizer, _out_of_memory, 1, "pt")

    def test_when_the_cache_is_allocated(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("gear_engine.kv_cache.torch.zeros", _out_of_memory)
        with pytest.raises(OutOfMemoryError, match="max_images"):
            Engine(small_model())


@pytest.mark.parametrize("count", [1, 2, 5])
def test_in_a_task_of_the_compiled_kernels(count: int) -> None:
    """Room for 2^44 channels is what each task asks for before it reads or writes anything."""
    source, weight = torch.randn(22, 20, 5), conv_rows.pack(torch.randn(3, 5, 3, 3), 4)
    expected, again = torch.empty(20, 20, 3), torch.empty(20, 20, 3)
    conv_rows.conv_rows(source, weight, None, expected)
    with threads(count):
        kernels = native.cpu_kernels()
        for _ in range(3):
            with pytest.raises(MemoryError):
                kernels.winograd_rows_cpu(0, 0, 0, 0, 64, 64, 64, 2**44, 1, 1, 4)
        with pytest.raises(OutOfMemoryError, match=r"ran out of memory \(.*\); lower"), memory_error("lower"):
            kernels.winograd_rows_cpu(0, 0, 0, 0, 64, 64, 64, 2**44, 1, 1, 4)
        conv_rows.conv_rows(source, weight, None, again)
    assert torch.equal(again, expected)


def _out_of_memory(*args: object, **kwargs: object) -> Any:
    raise torch.OutOfMemoryError("full")


class TestErrorsWithoutAType:
    """What says "out of memory" in words only."""

    @pytest.mark.parametrize(
        "error",
        [
            RuntimeError("decode_attention: out of memory"),  # our kernels' check of a launch
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: out of memory\nmore"),  # instantiation
            MemoryError("std::bad_alloc"),
        ],
    )
    def test_are_typed_too(self, error: Exception) -> None:
        line = re.escape(str(error).split("\n")[0])
        with pytest.raises(OutOfMemoryError, match=rf"ran out of memory \({line}\); buy"), memory_error("buy"):
            raise error

    def test_of_torch_on_a_cpu(self) -> None:
        with pytest.raises(OutOfMemoryError, match="can't allocate memory"), memory_error("buy"):
            torch.empty(2**60, dtype=torch.uint8)

    def test_raised_in_its_wake(self) -> None:
        """The end of a capture that failed raises an error of its own; what the failure held is let go of."""
        held: list[weakref.ref[torch.Tensor]] = []

        def work() -> None:
            tensor = torch.zeros(9)
            held.append(weakref.ref(tensor))
            _out_of_memory()

        def capture() -> None:
            try:
                work()
            finally:
                raise RuntimeError("operation failed due to a previous error during capture")

        with pytest.raises(OutOfMemoryError, match=r"memory \(full\)") as caught, memory_error("buy"):
            capture()
        assert caught.value.__context__ is not None
        assert held[0]() is None

    def test_others_stay_what_they_are(self) -> None:
        for error in (RuntimeError("shape mismatch"), BackendUnavailableError("out of memory"), ValueError("x")):
            with pytest.raises(type(error)) as caught, memory_error("buy"):
                raise error
            assert caught.value is error

    def test_what_others_are_dealing_with_is_no_cause(self) -> None:
        def work() -> None:
            with memory_error("buy"):
                raise RuntimeError("shape mismatch")

        try:
            _out_of_memory()
        except torch.OutOfMemoryError:
            with pytest.raises(RuntimeError, match="shape mismatch"):
                work()
