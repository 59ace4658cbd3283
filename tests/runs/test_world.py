"""Several processes of one run, started as torchrun starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gear_engine.errors import ConfigError
from gear_engine.runs.world import World, detect_world

ROOT = Path(__file__).resolve().parents[2]


def launch(case: str) -> subprocess.CompletedProcess[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*torchrun, "-m", "tests.runs.world_script", case]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_without_a_launcher_there_is_one_process() -> None:
    world = detect_world({})
    assert world == World(0, 1, 0)
    assert world.is_main
    world.join()
    world.wait()
    assert world.share(lambda: 3) == 3
    world.leave()


def test_ranks_are_read_from_the_environment() -> None:
    environment = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert detect_world(environment) == World(5, 8, 1)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "x"}, "integers"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "contradict"),
        ({"RANK": "-1"}, "contradict"),
        ({"WORLD_SIZE": "0"}, "contradict"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "torchrun"),
    ],
)
def test_an_impossible_environment_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        detect_world(environment)


def test_two_processes_agree() -> None:
    done = launch("agree")
    assert done.returncode == 0, done.stderr
    assert all(f"rank {rank} of 2 has {{'from': 0}}" in done.stdout for rank in (0, 1))


def test_a_refusal_of_rank_0_reaches_every_process() -> None:
    done = launch("refuse")
    assert done.returncode == 0, done.stderr
    assert all(f"rank {rank} refused: no" in done.stdout for rank in (0, 1))


def test_a_dead_process_is_noticed() -> None:
    done = launch("die")
    assert done.returncode != 0
    assert "rank 0 noticed: process 0 of 2 lost another process" in done.stdout, done.stderr
