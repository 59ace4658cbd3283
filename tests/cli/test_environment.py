"""Which device a process takes, and what --backend means."""

from __future__ import annotations

import pytest
import torch

from gear_engine.cli.environment import parse_backend, pick_device
from gear_engine.errors import ConfigError, InvalidRequestError
from gear_engine.runs.world import World


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """A machine with two CUDA devices; holds the devices that were made current."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    return chosen


@pytest.mark.parametrize("name", [None, "cuda"])
def test_every_process_takes_the_accelerator_of_its_local_rank(two_gpus: list[torch.device], name: str | None) -> None:
    # The second machine of two with two devices each.
    devices = [pick_device(name, World(rank=2 + local, size=4, local_rank=local)) for local in (0, 1)]
    assert devices == two_gpus == [torch.device("cuda", 0), torch.device("cuda", 1)]


def test_a_named_device_is_taken_as_named(two_gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_device("cuda:1", World()) == torch.device("cuda", 1)
    assert pick_device("cpu", World()) == torch.device("cpu")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert pick_device(None, World()) == torch.device("cpu")
    assert two_gpus == [torch.device("cuda", 1)]


def test_devices_that_are_not_there(two_gpus: list[torch.device]) -> None:
    for name, world in (("cuda:2", World()), (None, World(2, 3, 2)), ("mps", World()), ("abacus", World())):
        with pytest.raises(ConfigError, match=r"--device"):
            pick_device(name, world)
    assert two_gpus == []


def test_backends_by_name_and_by_op() -> None:
    assert parse_backend("reference") == "reference"
    assert parse_backend("skinny_linear=cpu,sample_tokens=reference") == {
        "skinny_linear": "cpu",
        "sample_tokens": "reference",
    }
    for text in ("skinny_linear=", "=cpu", "skinny_linear=cpu,,"):
        with pytest.raises(InvalidRequestError, match="--backend"):
            parse_backend(text)
