"""Labels, seeds and batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gear_engine.errors import InvalidRequestError
from gear_engine.runs.batches import chunks, official_batches, strided
from gear_engine.runs.labels import (
    balanced_labels,
    check_labels,
    official_labels,
    random_labels,
    read_labels,
    text_hash,
)
from gear_engine.runs.seeds import image_label, image_seed


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 4))
def test_official_batches_cover_every_image_once(count: int, batch: int, world: int) -> None:
    drawn = [i for rank in range(world) for b in official_batches(count, batch, world, rank) for i in b]
    assert all(len(b) == batch for rank in range(world) for b in official_batches(count, batch, world, rank))
    assert sorted(drawn) == list(range(len(drawn)))
    assert count <= len(drawn) < count + batch * world


@given(st.integers(0, 40), st.integers(1, 4), st.integers(1, 7))
def test_strided_shares_and_chunks(count: int, world: int, size: int) -> None:
    shares = [strided(count, world, rank) for rank in range(world)]
    assert sorted(i for share in shares for i in share) == list(range(count))
    for share in shares:
        parts = chunks(share, size)
        assert [i for part in parts for i in part] == share
        assert all(len(part) == size for part in parts[:-1])


@pytest.mark.parametrize(("count", "batch", "world"), [(7, 3, 1), (10, 2, 2), (5, 4, 3)])
def test_official_labels_replay_the_official_loop(count: int, batch: int, world: int) -> None:
    seed, num_classes = 5, 1000
    labels = official_labels(seed, count, num_classes, batch, world, "cpu")
    for rank in range(world):
        generator = torch.Generator().manual_seed(seed * world + rank)
        total = 0
        while total < count:
            drawn = torch.randint(0, num_classes, (batch,), generator=generator)
            for i in range(batch):
                assert labels[i * world + rank + total] == drawn[i]
            total += batch * world


def test_random_labels_do_not_depend_on_the_number_of_images() -> None:
    assert random_labels(3, 100, 1000)[:10] == random_labels(3, 10, 1000)
    assert random_labels(3, 10, 1000) != random_labels(4, 10, 1000)


def test_random_labels_are_uniform() -> None:
    labels = random_labels(0, 50_000, 10)
    counts = [labels.count(c) for c in range(10)]
    chi_square = sum((c - 5000) ** 2 / 5000 for c in counts)
    assert chi_square < 27.9  # 99.9% quantile at 9 degrees of freedom


def test_image_seeds_are_keys_and_differ() -> None:
    seeds = {image_seed(run, index) for run in range(20) for index in range(5000)}
    assert len(seeds) == 100_000
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Pinned: a change here changes every user's images.
    assert image_seed(0, 0) == 6017775124710473527
    assert image_label(0, 0, 1000) == 276


def test_balanced_labels() -> None:
    assert balanced_labels(7, 3) == [0, 1, 2, 0, 1, 2, 0]


def test_labels_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_text("3\n 1\n0\n\n")
    assert read_labels(path) == [3, 1, 0]
    assert read_labels(path, 2) == [3, 1]
    with pytest.raises(InvalidRequestError, match="holds 3 labels, 4 images"):
        read_labels(path, 4)
    path.write_text("3\nx\n")
    with pytest.raises(InvalidRequestError, match="line 2: 'x'"):
        read_labels(path)
    path.write_text("\n")
    with pytest.raises(InvalidRequestError, match="no labels"):
        read_labels(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidRequestError, match="cannot read"):
        read_labels(path)
    with pytest.raises(InvalidRequestError, match="cannot read"):
        read_labels(tmp_path / "absent")


def test_label_range() -> None:
    check_labels([0, 1000], 1000)
    with pytest.raises(InvalidRequestError, match=r"image 1 is 1001; labels lie in \[0, 1000\]"):
        check_labels([0, 1001], 1000)
    with pytest.raises(InvalidRequestError, match="image 0 is -1"):
        check_labels([-1], 1000)


def test_text_hash_tells_line_breaks_from_items() -> None:
    assert text_hash(["a", "b"]) != text_hash(["a\nb"])
    assert text_hash([1, 2]) == text_hash(["1", "2"])
