"""The planner alone: what is known of a rollout before any token is drawn."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gear_engine.request import SamplingParams
from gear_engine.scheduler import Scheduler
from gear_engine.segments import Segment, bucket_for, buckets, plan_segment

P = SamplingParams


@pytest.mark.parametrize(("most", "sizes"), [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (16, (1, 2, 4, 8, 16))])
def test_buckets(most: int, sizes: tuple[int, ...]) -> None:
    assert buckets(most) == sizes
    for rows in range(1, most + 1):
        bucket = bucket_for(rows, most)
        assert bucket >= rows
        assert all(size < rows for size in sizes if size < bucket)


def test_guided_tokens_counts_what_guided_at_says() -> None:
    for interval in (-1, -0.5, 0, 0.5, 3, 100.25):
        params = P(cfg_scale=2.0, cfg_interval=interval)
        guided = [p for p in range(300) if params.guided_at(p)]
        assert guided == list(range(min(300, int(min(params.guided_tokens, 300)))))
        # The official loop: decode step i draws token i + 1 and drops guidance when i > n > -1.
        assert guided == [p for p in range(300) if p == 0 or not (interval > -1 and p - 1 > interval)]
    assert P(cfg_scale=1.0, cfg_interval=3).guided_tokens == 0
    assert P(cfg_scale=2.0).guided_tokens == math.inf


def _segments(scheduler: Scheduler, max_images: int) -> list[Segment]:
    """A whole rollout, planned: nothing is run."""
    found = []
    while scheduler.num_unfinished:
        batches = scheduler.schedule()
        for batch in batches:
            if batch.is_prefill:
                scheduler.advance(batch)
            else:
                found.append(plan_segment(batch, 2 * max_images, 1000 if len(batches) == 1 else 1))
                scheduler.advance(batch, found[-1].steps)
    return found


def test_one_segment_until_guidance_ends_and_one_after() -> None:
    scheduler = Scheduler(3)
    for seed in range(3):
        scheduler.add(None, P(cfg_scale=2.0, cfg_interval=4), seed, 16)
    guided, alone = _segments(scheduler, 3)
    assert (guided.bucket, guided.images, guided.steps) == (6, 3, 5)
    assert [row.slot for row in guided.rows] == [0, 1, 2, 3, 4, 5]
    assert [row.image_slot for row in guided.rows] == [0, 1, 2, 0, 1, 2]
    assert [row.partner for row in guided.rows] == [3, 4, 5, -1, -1, -1]
    assert [row.draws for row in guided.rows] == [True] * 3 + [False] * 3
    assert (alone.bucket, alone.images, alone.steps) == (4, 3, 10)
    assert [row.slot for row in alone.rows] == [0, 1, 2]
    assert [row.position for row in alone.rows] == [5, 5, 5]


def test_an_image_without_guidance_has_no_partner() -> None:
    scheduler = Scheduler(2)
    scheduler.add(None, P(), 7, 4)
    scheduler.add(None, P(cfg_scale=3.0), 8, 4)
    (segment,) = _segments(scheduler, 2)
    assert [(row.slot, row.image_slot, row.partner, row.seed) for row in segment.rows] == [
        (0, 0, -1, 7),
        (1, 1, 2, 8),
        (2, 1, -1, 8),
    ]
    assert segment.bucket == 4


@settings(max_examples=60, deadline=None)
@given(
    images=st.lists(
        st.tuples(st.integers(1, 20), st.sampled_from([1.0, 2.0]), st.sampled_from([-1, 0, 2.5, 7, 30])), max_size=9
    ),
    max_images=st.integers(1, 4),
)
def test_a_plan_is_the_steps_of_the_scheduler_put_together(
    images: list[tuple[int, float, float]], max_images: int
) -> None:
    planned, stepped = Scheduler(max_images), Scheduler(max_images)
    for seed, (total, scale, interval) in enumerate(images):
        for scheduler in (planned, stepped):
            scheduler.add(None, P(cfg_scale=scale, cfg_interval=interval), seed, total)
    expected = []
    while stepped.num_unfinished:
        for batch in stepped.schedule():
            if not batch.is_prefill:
                expected.append((batch.slots, [image.drawn - 1 for image in batch.images]))
            stepped.advance(batch)
    found = [
        (tuple(row.slot for row in segment.rows), [row.position + step for row in segment.rows[: segment.images]])
        for segment in _segments(planned, max_images)
        for step in range(segment.steps)
    ]
    assert found == expected
