"""Decoding by programs against decoding op by op: equal tokens in every bucket, and nothing new after the warm-up.

Here the programs are called. ``_Captured`` stands for a graph: it refuses, while it "captures", every read of device
numbers on the host, and replays without Python's help in choosing buffers.
"""

from __future__ import annotations

import contextlib
import gc
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gear_engine import step_program
from gear_engine.cuda_graph import CaptureCost, EagerLauncher, Executor
from gear_engine.engine import Engine
from gear_engine.errors import BackendUnavailableError, ConfigError
from gear_engine.request import ImageRequest, SamplingParams
from gear_engine.step_program import ProgramSteps
from tests.models_for_tests import SETTINGS, TEXT, captions, fresh_model, small_model

P = SamplingParams
CPU = torch.device("cpu")


def _programs(engine: Engine) -> ProgramSteps:
    assert isinstance(engine._steps, ProgramSteps)
    return engine._steps


class TestEqualTokens:
    """Against op by op, under equal seeds; the compiled kernels give a row the same bits in any batch."""

    @pytest.mark.parametrize("images", [1, 2, 3, 5, 8])
    def test_in_every_bucket(self, images: int) -> None:
        """1 to 16 rows: all images guided, none, and mixed."""
        direct = Engine(small_model(), max_images=8, execution="direct")
        eager = Engine(small_model(), max_images=8, execution="eager")
        labels = [(3 * i + 1) % 10 for i in range(images)]
        seeds = [2**i + i for i in range(images)]
        for params in (P(cfg_scale=3.0, top_k=30), P(), [SETTINGS[i % len(SETTINGS)] for i in range(images)]):
            expected = direct.generate(labels, params, seeds=seeds)
            assert torch.equal(eager.generate(labels, params, seeds=seeds), expected)

    def test_with_plain_torch(self) -> None:
        """Sums of another batch may round otherwise there; on these inputs no token is close enough to change."""
        arguments: dict[str, Any] = {"condition": [1, 5, 9], "params": SETTINGS[1:4], "seeds": [5, 6, 7]}
        expected = Engine(small_model(), max_images=3, backend="reference").generate(**arguments)
        eager = Engine(small_model(), max_images=3, backend="reference", execution="eager")
        assert torch.equal(eager.generate(**arguments), expected)

    def test_of_captions(self) -> None:
        params = P(cfg_scale=3.0, top_k=30, cfg_interval=6)
        expected = Engine(small_model(TEXT), max_images=6).generate(captions(), params)
        assert torch.equal(
            Engine(small_model(TEXT), max_images=6, execution="eager").generate(captions(), params), expected
        )

    @pytest.mark.parametrize("params", [SETTINGS[0], SETTINGS[2], SETTINGS[5], [*SETTINGS[:2], SETTINGS[4]]])
    def test_under_the_official_draws(self, params: Any) -> None:
        """(B, V) from torch's generator, whatever the bucket; and the generator is left in the same state."""
        left = []
        for execution in ("direct", "eager"):
            torch.manual_seed(11)
            engine = Engine(small_model(), max_images=5, execution=execution)  # type: ignore[arg-type]
            left.append((engine.generate([1, 2, 3], params, rng="torch"), torch.get_rng_state()))
        assert torch.equal(left[0][0], left[1][0])
        assert torch.equal(left[0][1], left[1][1])

    def test_when_images_join_and_leave(self) -> None:
        rng = random.Random(5)
        engines = [Engine(small_model(), max_images=3, execution=e) for e in ("direct", "eager")]  # type: ignore[arg-type]
        lengths = [16, 5, 1, 16, 9, 2, 2, 12]
        pending = list(range(8))
        done: list[dict[int, torch.Tensor]] = [{}, {}]
        while pending or engines[0].num_unfinished:
            joining = [pending.pop(0)] if pending and rng.random() < 0.4 else []
            for engine, found in zip(engines, done, strict=True):
                for i in joining:
                    params = SETTINGS[i % len(SETTINGS)]
                    engine.add_request(ImageRequest(label=i, seed=i, params=params, max_new_tokens=lengths[i]))
                found.update({finished.request_id: finished.tokens for finished in engine.step()})
        assert len(done[0]) == 8
        assert done[0].keys() == done[1].keys()
        for request_id, tokens in done[0].items():
            assert torch.equal(done[1][request_id], tokens)

    def test_the_callback_sees_the_same(self) -> None:
        seen: list[list[torch.Tensor]] = [[], []]
        for execution, found in zip(("direct", "eager"), seen, strict=True):
            engine = Engine(small_model(), max_images=2, execution=execution)  # type: ignore[arg-type]
            engine.generate([1, 2, 3], SETTINGS[2], callback=lambda *a, found=found: found.append(a[2].clone()))
        assert len(seen[0]) == 32
        assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


@contextlib.contextmanager
def _no_host_reads() -> Iterator[None]:
    """What a capture refuses: numbers of the device that the host waits for."""

    def refused(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("device numbers are read on the host")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("item", "tolist", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
            patch.setattr(torch.Tensor, name, refused)
        yield


class _Captured:
    """Stands for a graph launcher: warm-ups for real, then a run that may not read on the host."""

    warmups = 2

    def __init__(self) -> None:
        self.prepared = 0

    def prepare(self, step: Any) -> Executor:
        for _ in range(self.warmups):
            step()
        self.prepared += 1

        class _Replay:
            cost = CaptureCost(0.5, 1000)

            def run(self) -> None:
                with _no_host_reads():
                    step()

        return _Replay()


def _captured_engine(**options: Any) -> tuple[Engine, _Captured]:
    engine = Engine(small_model(), execution="eager", **options)
    launcher = _programs(engine)._launcher = _Captured()
    return engine, launcher


class TestCapture:
    def test_a_step_reads_nothing_on_the_host(self) -> None:
        engine, launcher = _captured_engine(max_images=3)
        expected = Engine(small_model(), max_images=3).generate([1, 2, 3], SETTINGS[2])
        assert torch.equal(engine.generate([1, 2, 3], SETTINGS[2]), expected)
        assert launcher.prepared == 3, "the start; six rows, and four after guidance has ended"
        assert _programs(engine).cost == CaptureCost(1.5, 3000)

    def test_the_reference_reads_and_is_found_out(self) -> None:
        engine, _ = _captured_engine(max_images=1, backend="reference")
        with pytest.raises(AssertionError, match="on the host"):
            engine.generate([1])

    def test_a_bucket_prepared_during_a_rollout_changes_nothing(self) -> None:
        """Warm-ups run for real: on inert rows, in the middle of other images' steps."""
        engine, launcher = _captured_engine(max_images=4)
        direct = Engine(small_model(), max_images=4)
        for found in (engine, direct):
            for i in range(4):
                params, total = SETTINGS[i], (16, 4, 9, 12)[i]
                found.add_request(ImageRequest(label=i, seed=i, params=params, max_new_tokens=total))
        done: list[dict[int, torch.Tensor]] = [{}, {}]
        while direct.num_unfinished:
            for which, into in ((engine, done[0]), (direct, done[1])):
                into.update({finished.request_id: finished.tokens for finished in which.step()})
        assert launcher.prepared >= 3
        assert len(done[1]) == 4
        assert all(torch.equal(done[0][i], tokens) for i, tokens in done[1].items())

    def test_everything_can_be_prepared_ahead(self) -> None:
        engine, launcher = _captured_engine(max_images=3)
        engine.warm_up()
        engine.warm_up(rng="torch")
        assert launcher.prepared == _programs(engine).num_programs == 2 * 2 * len((1, 2, 4, 6))
        for rng in ("philox", "torch"):
            engine.generate([1, 2], SETTINGS[2], rng=rng)  # type: ignore[arg-type]
        assert launcher.prepared == 16
        assert engine.capture_cost == CaptureCost(8.0, 16000)
        captioned = Engine(small_model(TEXT), max_images=3, execution="eager")
        captioned.warm_up()
        assert _programs(captioned).num_programs == len((1, 2, 4, 6)), "captions start op by op"
        direct = Engine(small_model())
        direct.warm_up()
        assert direct.capture_cost == CaptureCost()

    def test_other_weights_are_captured_anew_and_equal_places_are_not(self) -> None:
        engine, launcher = _captured_engine(max_images=1)
        model, other = fresh_model(), fresh_model()
        other.output.weight.data.mul_(-1)
        for weights, prepared in ((model, 2), (model, 2), (other, 4), (model, 6)):
            engine.bind(None)
            engine.bind(weights)
            tokens = engine.generate([1], seeds=[4])
            assert launcher.prepared == prepared
            assert torch.equal(tokens, Engine(weights).generate([1], seeds=[4]))
        for parameter in model.parameters():
            parameter.data.copy_(parameter.data.flip(0))
        assert torch.equal(engine.generate([1], seeds=[4]), Engine(model).generate([1], seeds=[4]))
        assert launcher.prepared == 6, "weights are read in place"


def test_a_hundred_rollouts_take_no_more_memory_and_no_new_program() -> None:
    engine, launcher = _captured_engine(max_images=4, max_new_tokens=6)
    engine.warm_up()
    engine.warm_up(rng="torch")
    direct = Engine(small_model(), max_images=4, max_new_tokens=6)
    prepared, rng = launcher.prepared, random.Random(1)
    buffers = [
        b.data_ptr() for b in (engine.cache.kv, _programs(engine).tokens, _programs(engine)._buffers.table.buffer)
    ]
    tensors = 0
    for rollout in range(100):
        images = rng.randint(1, 4)
        labels = [rng.randint(0, 9) for _ in range(images)]
        params = [rng.choice(SETTINGS) for _ in range(images)]
        source: dict[str, Any] = {"seeds": [rng.randrange(2**40) for _ in range(images)]}
        found = []
        for which in (engine, direct):
            if rollout % 3 == 0:
                source = {"rng": "torch", "generator": torch.Generator().manual_seed(rollout)}
            found.append(which.generate(labels, params, **source))
        assert torch.equal(*found)
        if rollout in (10, 99):
            gc.collect()
            alive = sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
            assert tensors == 0 or alive <= tensors
            tensors = alive
    assert launcher.prepared == prepared
    assert buffers == [
        b.data_ptr() for b in (engine.cache.kv, _programs(engine).tokens, _programs(engine)._buffers.table.buffer)
    ]
    assert int(_programs(engine)._buffers.counter) == _programs(engine)._launched


class TestExecution:
    def test_graphs_need_a_device(self) -> None:
        with pytest.raises(BackendUnavailableError, match="CUDA devices, not on cpu"):
            Engine(small_model(), execution="graph")
        with pytest.raises(ConfigError, match="auto, direct, eager, graph"):
            Engine(small_model(), execution="lazy")  # type: ignore[arg-type]

    def test_auto(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert not isinstance(Engine(small_model())._steps, ProgramSteps)
        ops = Engine(small_model(), backend="reference").ops
        cuda = torch.device("cuda")
        assert "not decode_attention by 'reference'" in str(step_program._why_not_captured(ops, cuda))
        object.__setattr__(ops, "backends", dict.fromkeys(ops.backends, "triton"))
        assert step_program._why_not_captured(ops, cuda) is None

    def test_one_token_needs_no_program(self) -> None:
        engine = Engine(small_model(), max_new_tokens=1, execution="eager")
        assert engine.generate([1, 2]).shape == (2, 1)


def test_eager_programs_let_go_of_weights() -> None:
    engine = Engine(small_model(), max_images=1, execution="eager")
    assert isinstance(_programs(engine)._launcher, EagerLauncher)
    engine.generate([1])
    engine.bind(None)
    assert _programs(engine).num_programs == 0
