"""Runs end the same whether they are broken off or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gear_engine.errors import InvalidRequestError, ResumeMismatchError
from gear_engine.request import SamplingParams
from gear_engine.runs.batches import official_batches, strided
from gear_engine.runs.folder import RunFolder, experiment_name, sampling_tag, step_tag
from gear_engine.runs.loop import Drawn, sample_in_order, sample_independent
from gear_engine.runs.states import GeneratorStates

SIZE = 8


def ignore(count: int) -> None:
    pass


def open_folder(path: Path, count: int, **fields: object) -> RunFolder:
    folder = RunFolder(path, count, SIZE)
    folder.open({"rng": "torch", **fields}, {})
    return folder


def contents(folder: RunFolder) -> dict[str, bytes]:
    return {str(p.relative_to(folder.path)): p.read_bytes() for p in sorted(folder.path.rglob("*")) if p.is_file()}


class Stop(Exception):
    pass


class SequentialModel:
    """Stands in for a generator: images follow from a torch generator's stream, in order."""

    def __init__(self, stop_before: int = -1) -> None:
        self.generator = torch.Generator().manual_seed(7)
        self.drawn: list[list[int]] = []
        self.stop_before = stop_before

    def __call__(self, indices: Sequence[int]) -> np.ndarray:
        if len(self.drawn) == self.stop_before:
            raise Stop
        self.drawn.append(list(indices))
        noise = torch.randint(0, 256, (len(indices), SIZE, SIZE, 3), generator=self.generator)
        return noise.to(torch.uint8).numpy()


def run_in_order(path: Path, count: int, batch: int, model: SequentialModel) -> RunFolder:
    folder = open_folder(path, count)
    states = GeneratorStates(folder.states, 0, model.generator)
    sample_in_order(folder, official_batches(count, batch, 1, 0), model, states, ignore)
    return folder


def test_the_last_batch_is_full_and_its_surplus_dropped(tmp_path: Path) -> None:
    model = SequentialModel()
    folder = run_in_order(tmp_path / "run", 5, 2, model)
    assert model.drawn == [[0, 1], [2, 3], [4, 5]]
    assert sorted(p.name for p in folder.samples.iterdir()) == [f"{i:06d}.png" for i in range(5)]


@pytest.mark.parametrize("stop_before", [0, 1, 2])
def test_a_sequential_run_resumes_exactly(tmp_path: Path, stop_before: int) -> None:
    whole = contents(run_in_order(tmp_path / "whole", 5, 2, SequentialModel()))
    with pytest.raises(Stop):
        run_in_order(tmp_path / "broken", 5, 2, SequentialModel(stop_before))
    again = SequentialModel()
    assert contents(run_in_order(tmp_path / "broken", 5, 2, again)) == whole
    assert len(again.drawn) == 3 - stop_before


def test_damage_in_the_middle_costs_one_batch(tmp_path: Path) -> None:
    folder = run_in_order(tmp_path / "run", 6, 2, SequentialModel())
    whole = contents(folder)
    image = folder.image_path(2)
    image.write_bytes(image.read_bytes()[:-20])
    again = SequentialModel()
    assert contents(run_in_order(tmp_path / "run", 6, 2, again)) == whole
    assert again.drawn == [[2, 3]]


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_lost_state_costs_the_batch_before(tmp_path: Path, damage: str) -> None:
    folder = run_in_order(tmp_path / "run", 6, 2, SequentialModel())
    whole = contents(folder)
    state = folder.states / "rank0000-batch000001.state"
    data = state.read_bytes()
    state.unlink()
    if damage == "cut":
        state.write_bytes(data[:100])
    elif damage == "flipped":
        state.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    folder.image_path(5).unlink()
    again = SequentialModel()
    assert contents(run_in_order(tmp_path / "run", 6, 2, again)) == whole
    assert again.drawn == [[2, 3], [4, 5]]


def test_a_finished_run_draws_nothing(tmp_path: Path) -> None:
    folder = run_in_order(tmp_path / "run", 6, 2, SequentialModel())
    folder.tidy(keep_pngs=True)
    assert not folder.states.exists()
    again = SequentialModel()
    run_in_order(tmp_path / "run", 6, 2, again)
    assert again.drawn == []


def independent(indices: Sequence[int]) -> np.ndarray:
    return np.stack([np.random.default_rng(i).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8) for i in indices])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 3), st.sets(st.integers(0, 8)))
def test_independent_images_do_not_depend_on_batch_world_or_history(
    tmp_path_factory: pytest.TempPathFactory, count: int, batch: int, world: int, finished: set[int]
) -> None:
    folder = open_folder(tmp_path_factory.mktemp("run"), count)
    finished = {i for i in finished if i < count}
    for index in finished:
        folder.save(index, independent([index])[0])
    drawn: list[int] = []

    def draw(indices: Sequence[int]) -> np.ndarray:
        assert len(indices) <= batch
        drawn.extend(indices)
        return independent(indices)

    for rank in range(world):
        sample_independent(folder, strided(count, world, rank), batch, draw, ignore)
    assert sorted(drawn) == sorted(set(range(count)) - finished)
    folder.pack()
    with np.load(folder.npz) as archive:
        assert np.array_equal(archive["arr_0"], independent(range(count)))


def test_progress_counts_finished_and_written_images(tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "run", 5)
    folder.save(1, independent([1])[0])
    steps: list[int] = []
    sample_independent(folder, range(5), 2, independent, steps.append)
    assert steps[0] == 1
    assert sum(steps) == 5


def test_images_drawn_before_a_failure_are_kept(tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "run", 6)
    calls = 0

    def draw(indices: Sequence[int]) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return independent(indices)

    with pytest.raises(KeyboardInterrupt):
        sample_independent(folder, range(6), 2, draw, ignore)
    assert folder.finished(range(6)) == {0, 1, 2, 3}


class IndependentModel(SequentialModel):
    def __call__(self, indices: Sequence[int]) -> np.ndarray:
        super().__call__(indices)
        return independent(indices)


MODELS = {"independent": IndependentModel, "in order": SequentialModel}


class Decoding:
    """Draws as ``draw`` does, on a device that decodes later; ``fail`` happens the first time it is waited for."""

    def __init__(self, draw: Callable[[Sequence[int]], np.ndarray], fail: dict[int, BaseException]) -> None:
        self.draw, self.fail = draw, fail
        self.events: list[str] = []

    def __call__(self, indices: Sequence[int]) -> Drawn:
        self.events.append(f"draw {indices[0]}")
        images = self.draw(indices)

        def wait() -> np.ndarray:
            self.events.append(f"wait {indices[0]}")
            if indices[0] in self.fail:
                raise self.fail.pop(indices[0])
            return images

        return wait


def run(path: Path, kind: str, draw: Callable[[Sequence[int]], Drawn], model: SequentialModel) -> RunFolder:
    """Five images in batches of two."""
    folder = open_folder(path, 5)
    if kind == "independent":
        sample_independent(folder, range(5), 2, draw, ignore)
    else:
        states = GeneratorStates(folder.states, 0, model.generator)
        sample_in_order(folder, official_batches(5, 2, 1, 0), draw, states, ignore)
    return folder


@pytest.mark.parametrize("kind", ["independent", "in order"])
def test_a_batch_is_waited_for_when_the_next_has_been_drawn(tmp_path: Path, kind: str) -> None:
    model, plain = MODELS[kind](), MODELS[kind]()
    late = Decoding(model, {})
    found = contents(run(tmp_path / "late", kind, late, model))
    assert late.events == ["draw 0", "draw 2", "wait 0", "draw 4", "wait 2", "wait 4"]
    assert found == contents(run(tmp_path / "plain", kind, plain, plain))


@pytest.mark.parametrize("kind", ["independent", "in order"])
@pytest.mark.parametrize(
    ("stop_before", "fail", "kept"),
    [
        (0, {}, 0),
        (1, {}, 2),  # what was under way reaches the folder
        (2, {}, 4),
        (9, {0: KeyboardInterrupt()}, 4),
        (9, {4: KeyboardInterrupt()}, 4),
        (9, {2: RuntimeError("the device is lost")}, 5),
        (1, {0: RuntimeError("the device is lost")}, 0),  # Stop is what the caller sees
    ],
)
def test_a_run_broken_off_while_a_device_decodes_resumes_exactly(
    tmp_path: Path, kind: str, stop_before: int, fail: dict[int, BaseException], kept: int
) -> None:
    """In every moment: images are whole or missing, and missing ones are drawn again."""
    plain, model, again = MODELS[kind](), MODELS[kind](stop_before), MODELS[kind]()
    whole = contents(run(tmp_path / "whole", kind, plain, plain))
    with pytest.raises((Stop, KeyboardInterrupt, RuntimeError)) as error:
        run(tmp_path / "broken", kind, Decoding(model, dict(fail)), model)
    assert isinstance(error.value, Stop) == (stop_before < 9)
    folder = RunFolder(tmp_path / "broken", 5, SIZE)
    assert folder.finished(range(5)) == set(range(kept))
    assert contents(run(tmp_path / "broken", kind, Decoding(again, {}), again)) == whole


def failing_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, image: np.ndarray) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gear_engine.runs.folder.write_png", full)


@pytest.mark.parametrize("count", [1, 5])
def test_a_failed_write_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    folder = open_folder(tmp_path / "run", count)
    failing_writer(monkeypatch)
    with pytest.raises(OSError, match="No space"):
        sample_independent(folder, range(count), 1, independent, ignore)


def test_packing_an_incomplete_folder_names_the_image(tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "run", 3)
    sample_independent(folder, [0, 2], 2, independent, ignore)
    with pytest.raises(ResumeMismatchError, match=r"000001\.png is missing"):
        folder.pack()
    assert not folder.npz.exists()


def test_samples_of_unknown_origin_are_not_mixed_in(tmp_path: Path) -> None:
    (tmp_path / "run" / "samples").mkdir(parents=True)
    (tmp_path / "run" / "samples" / "000000.png").write_bytes(b"?")
    with pytest.raises(ResumeMismatchError, match=r"no run\.json"):
        open_folder(tmp_path / "run", 3)


def test_pngs_are_removed_only_with_an_npz(tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "run", 2)
    sample_independent(folder, range(2), 2, independent, ignore)
    folder.tidy(keep_pngs=False)
    assert folder.samples.exists()
    folder.pack()
    folder.tidy(keep_pngs=False)
    assert sorted(p.name for p in folder.path.iterdir()) == ["run.json", "samples.npz"]


@pytest.mark.parametrize("make", [lambda p: RunFolder(p, 0, 8), lambda p: RunFolder(p, 1, 0)])
def test_impossible_runs(tmp_path: Path, make: Callable[[Path], RunFolder]) -> None:
    with pytest.raises(InvalidRequestError):
        make(tmp_path)


def test_folder_names() -> None:
    assert sampling_tag(SamplingParams()) == "cfg1-temp1"
    full = SamplingParams(cfg_scale=1.75, cfg_interval=10, temperature=0.9, top_k=100, top_p=0.95)
    assert sampling_tag(full, "again") == "cfg1.75-cfgint10-temp0.9-topk100-topp0.95-again"
    assert experiment_name(Path("/a/exp7/checkpoints/0400000.pt")) == "exp7"
    assert experiment_name(Path("/a/exp7/0400000.pt")) == "exp7"
    assert step_tag(Path("/a/0400000.pt")) == "step0400000"
