"""The scheduler alone: no device, no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gear_engine.errors import ConfigError
from gear_engine.request import SamplingParams
from gear_engine.scheduler import ScheduledBatch, Scheduler

P = SamplingParams
GUIDED = P(cfg_scale=2.0)


def _step(scheduler: Scheduler) -> tuple[list[ScheduledBatch], list[int]]:
    batches = scheduler.schedule()
    return batches, [image.request_id for batch in batches for image in scheduler.advance(batch)]


def test_offline_batches_fill_consecutive_slots_in_the_order_of_their_rows() -> None:
    scheduler = Scheduler(4)
    for label in range(3):
        scheduler.add(label, GUIDED, label, 5)
    (batch,), _ = _step(scheduler)
    assert batch.is_prefill
    assert [image.condition for image in batch.images] == [0, 1, 2]
    assert batch.slots == (0, 1, 2, 3, 4, 5)
    assert batch.first_slot == 0
    (batch,) = scheduler.schedule()
    assert not batch.is_prefill
    assert batch.slots == (0, 1, 2, 3, 4, 5)


def test_rows_keep_their_version_while_they_stay_the_same() -> None:
    scheduler = Scheduler(2)
    scheduler.add(0, P(cfg_scale=2.0, cfg_interval=2), 0, 8)
    scheduler.add(1, P(cfg_scale=2.0, cfg_interval=2), 0, 8)
    _step(scheduler)
    seen = []
    while scheduler.num_unfinished:
        (batch,), _ = _step(scheduler)
        seen.append((batch.version, batch.slots))
    guided, alone = seen[:3], seen[3:]
    assert len({version for version, _ in guided}) == 1
    assert len({version for version, _ in alone}) == 1
    assert {slots for _, slots in guided} == {(0, 1, 2, 3)}
    assert {slots for _, slots in alone} == {(0, 1)}
    assert guided[0][0] != alone[0][0]


def test_waiting_images_start_when_others_leave() -> None:
    scheduler = Scheduler(2)
    for total in (1, 3, 2):
        scheduler.add(None, P(), 0, total)
    batches, finished = _step(scheduler)
    assert [len(batch.images) for batch in batches] == [2]
    assert finished == [0]
    batches, finished = _step(scheduler)
    assert [(batch.is_prefill, [i.request_id for i in batch.images]) for batch in batches] == [
        (False, [1]),
        (True, [2]),
    ]
    assert finished == []
    _, finished = _step(scheduler)
    assert finished == [1, 2]
    assert scheduler.schedule() == []


def test_a_step_can_be_repeated() -> None:
    scheduler = Scheduler(2)
    scheduler.add(None, GUIDED, 0, 3)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert [batch.slots for batch in first] == [batch.slots for batch in second]
    assert all(batch.is_prefill for batch in first + second)


def test_guidance_takes_a_second_slot_only_while_it_lasts() -> None:
    scheduler = Scheduler(1)
    image = scheduler.add(None, P(cfg_scale=2.0, cfg_interval=0), 0, 4)
    for uncond_slot in (1, 1, None, None):
        batches = scheduler.schedule()
        assert image.uncond_slot == uncond_slot
        scheduler.advance(batches[0])
    plain = scheduler.add(None, P(cfg_scale=1.0), 0, 1)
    scheduler.schedule()
    assert plain.uncond_slot is None


def test_clear_drops_everything() -> None:
    scheduler = Scheduler(1)
    ids = [scheduler.add(None, GUIDED, 0, 4).request_id for _ in range(3)]
    _step(scheduler)
    scheduler.clear()
    assert scheduler.num_unfinished == 0
    assert scheduler.schedule() == []
    image = scheduler.add(None, GUIDED, 0, 4)
    assert image.request_id not in ids
    assert scheduler.schedule()[0].slots == (0, 1)


def test_needs_room() -> None:
    with pytest.raises(ConfigError, match="max_images"):
        Scheduler(0)


_IMAGES = st.tuples(
    st.sampled_from([P(), GUIDED, P(cfg_scale=2.0, cfg_interval=0), P(cfg_scale=2.0, cfg_interval=3)]),
    st.integers(1, 6),
)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.lists(st.one_of(st.none(), _IMAGES), max_size=25))
def test_any_history(max_images: int, events: list[tuple[SamplingParams, int] | None]) -> None:
    """None is a step. Slots never clash, every image gets exactly its tokens, none waits beside a free place."""
    scheduler = Scheduler(max_images)
    wanted: dict[int, int] = {}
    drawn: dict[int, int] = {}
    kept: dict[int, int] = {}
    for event in [*events, *[None] * 200]:
        if event is not None:
            image = scheduler.add(None, event[0], 0, event[1])
            wanted[image.request_id] = event[1]
            continue
        batches = scheduler.schedule()
        slots = [slot for batch in batches for slot in batch.slots]
        assert len(set(slots)) == len(slots)
        assert all(0 <= slot < 2 * max_images for slot in slots)
        images = [image for batch in batches for image in batch.images]
        assert len(images) <= max_images
        assert not scheduler.waiting or len(images) == max_images
        for image in images:
            assert (image.uncond_slot is not None) == image.params.guided_at(image.drawn)
            assert kept.setdefault(image.request_id, image.cond_slot) == image.cond_slot
            drawn[image.request_id] = drawn.get(image.request_id, 0) + 1
        for batch in batches:
            assert batch.is_prefill == (batch.images[0].drawn == 0)
            scheduler.advance(batch)
    assert drawn == wanted


def test_imports_no_torch() -> None:
    code = "import sys, gear_engine.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
