"""Memory in large pages holds what any memory would."""

from __future__ import annotations

import gc
import mmap
import os
import weakref
from pathlib import Path

import pytest
import torch

from gear_engine import pages
from gear_engine.engine import Engine
from gear_engine.pages import PAGE, LargePages, collapse
from tests.models_for_tests import small_model

CPU = torch.device("cpu")
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
needs_large_pages = pytest.mark.skipif(
    not SETTING.is_file() or "[never]" in SETTING.read_text(), reason="the system grants no large pages"
)


def large_bytes(tensor: torch.Tensor) -> int:
    """Bytes in large pages of the mappings that a tensor lies in."""
    begin, found, inside = tensor.data_ptr(), 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            low, high = (int(each, 16) for each in first.split("-"))
            inside = low < begin + tensor.nbytes and begin < high
        elif inside and first == "AnonHugePages:":
            found += int(rest.split()[0]) << 10
    return found


def test_tensors_of_one_block() -> None:
    source = LargePages()
    made = [
        source.zeros(shape, dtype, CPU)
        for shape, dtype in [
            ((3, 5), torch.bfloat16),
            ((7,), torch.int8),
            ((2, 0), torch.float32),
            ((1000, 999), torch.float32),
        ]
    ]
    assert [(tuple(each.shape), each.dtype) for each in made[::3]] == [
        ((3, 5), torch.bfloat16),
        ((1000, 999), torch.float32),
    ]
    for number, each in enumerate(made):
        assert each.is_contiguous()
        assert not each.any()
        assert each.numel() == 0 or each.data_ptr() % 64 == 0
        each.fill_(number + 1)
    assert all(bool((each == number + 1).all()) for number, each in enumerate(made)), "they overlap"
    assert made[0].data_ptr() % PAGE == 0


def test_more_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_BLOCK", 1 << 16)
    source = LargePages()
    made = [source.zeros((size,), torch.uint8, CPU).fill_(i) for i, size in enumerate((40000, 30000, 1 << 18, 100))]
    assert [int(each.sum()) for each in made] == [0, 30000, 2 << 18, 300]


def test_a_block_lives_as_long_as_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks: list[weakref.ref[mmap.mmap]] = []
    new_block = pages._new_block

    def watched(*size: int) -> tuple[mmap.mmap, int, int]:
        found = new_block(*size)
        blocks.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr(pages, "_new_block", watched)
    first, second = (lambda source: (source.zeros((9,), torch.int64, CPU), source.zeros((5,), torch.int64, CPU)))(
        LargePages()
    )
    gc.collect()
    assert len(blocks) == 1
    del first
    gc.collect()
    assert blocks[0]() is not None
    assert not second.fill_(3).sub_(3).any()
    del second
    gc.collect()
    assert blocks[0]() is None


def test_other_devices_and_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    assert LargePages().zeros((3,), torch.float32, torch.device("meta")).device.type == "meta"
    with torch.device("meta"):
        assert LargePages().zeros((3,), torch.float32).device.type == "meta"

    def refuse(*args: object, **kwargs: object) -> mmap.mmap:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(MemoryError, match="Cannot allocate"):
        LargePages().zeros((3,), torch.float32, CPU)


def test_a_kernel_without_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(mmap.mmap):
        def madvise(self, *advice: int) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    assert bool((LargePages().zeros((3, 4), torch.float32, CPU).fill_(2) == 2).all())


@needs_large_pages
def test_large_pages_are_asked_for_private_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a child process writes into memory of its own must not be seen here."""
    asked = []

    class Asking(mmap.mmap):
        def madvise(self, *advice: int) -> None:
            asked.append(advice)
            super().madvise(*advice)

    monkeypatch.setattr(mmap, "mmap", Asking)
    tensor = LargePages().zeros((5 << 20,), torch.uint8, CPU)
    assert asked == [(mmap.MADV_HUGEPAGE,)]
    tensor.fill_(1)
    child = os.fork()
    if child == 0:
        tensor.numpy()[:] = 2
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert bool((tensor == 1).all())


def test_collapsed_memory_keeps_its_contents_and_addresses() -> None:
    tensors = [torch.arange(3_000_000), torch.arange(10), torch.randn(1000, 1000)[:, ::2], torch.empty(0)]
    before, addresses = [each.clone() for each in tensors], [each.data_ptr() for each in tensors]
    done = collapse([*tensors, torch.empty(5, device="meta")])
    assert all(torch.equal(*pair) for pair in zip(tensors, before, strict=True))
    assert [each.data_ptr() for each in tensors] == addresses
    assert done % PAGE == 0
    assert done == 0 or large_bytes(tensors[0]) > 0


def test_a_warm_engine_draws_the_same() -> None:
    expected = Engine(small_model(), max_images=2).generate([1, 2], seeds=[3, 4])
    engine = Engine(small_model(), max_images=2)
    engine.warm_up()
    assert torch.equal(engine.generate([1, 2], seeds=[3, 4]), expected)
