"""Runs that are killed, and runs in two processes."""

from __future__ import annotations

import json
import multiprocessing
import random
import socket
import time
from pathlib import Path

import pytest
import torch

from gear_engine.errors import ConfigError
from gear_engine.runs.world import World
from gear_engine.training import Trainer
from gear_engine.training.checkpoints import latest_checkpoint
from gear_engine.training.logs import read_log
from tests.training.children import one_of_two, resume, weights
from tests.training.test_stages import losses
from tests.training.tiny import config, source

_PATIENCE = 300.0  # seconds


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.children"])
    return context


def test_ten_kills_leave_the_curve_as_it_is(tmp_path: Path, processes) -> None:
    """A run that is killed ten times at any moment, also while it writes, has the losses of one that is left alone."""
    steps, kills = 24, 10
    changes = {
        "steps": steps,
        "batch_size": 2,
        "encoder": {"steps": 1},
        "output": {"checkpoint_every": 1, "keep": 2},
    }
    whole = config("joint", tmp_path / "whole", **changes)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the child: sums are split among threads
    try:
        list(Trainer(whole, source(whole), device="cpu").run())
    finally:
        torch.set_num_threads(threads)
    killed = config("joint", tmp_path / "killed", **changes)
    chance = random.Random(8)
    for _ in range(kills):
        child = processes.Process(target=resume, args=(killed,))
        child.start()
        before, end = latest_checkpoint(killed), time.monotonic() + _PATIENCE
        while latest_checkpoint(killed) == before and time.monotonic() < end:
            time.sleep(0.002)
        time.sleep(chance.random() * 0.15)
        child.kill()
        child.join(_PATIENCE)
        assert child.exitcode in (-9, 0)
        found = sorted((killed.folder / "checkpoints").glob("*.pt"))
        assert found, "no checkpoint"
        for path in found:
            assert torch.load(path, weights_only=True)["steps"] == int(path.stem)
    child = processes.Process(target=resume, args=(killed,))
    child.start()
    child.join(_PATIENCE)
    assert child.exitcode == 0
    expected, found = (losses(read_log(run.folder / "log.jsonl")) for run in (whole, killed))
    assert len(expected) == steps and found == expected
    ends = [torch.load(latest_checkpoint(run), weights_only=True) for run in (whole, killed)]
    for section in ("ar", "ema", "vq", "vq_ema", "projectors", "discriminator"):
        assert all(torch.equal(value, ends[1][section][name]) for name, value in ends[0][section].items())
    assert not list((killed.folder / "checkpoints").glob(".*.tmp")), "half-written files stay behind"


def test_two_processes_are_one_with_twice_the_batch(tmp_path: Path, processes) -> None:
    settings = config(
        "joint",
        precision="fp64",
        steps=4,
        generator={"dropout": 0.0, "token_dropout": 0.0},
        loss={"discriminator_norm": "group", "lecam_weight": 0.1, "adaptive": False},
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outs = [tmp_path / f"{rank}.json" for rank in range(2)]
    children = [processes.Process(target=one_of_two, args=(settings, rank, port, out)) for rank, out in enumerate(outs)]
    for child in children:
        child.start()
    trainer = Trainer(settings, source(settings), device="cpu", write=False)
    expected = losses(list(trainer.run()))
    for child in children:
        child.join(_PATIENCE)
        assert child.exitcode == 0
    first, second = (json.loads(out.read_text()) for out in outs)
    assert first["weights"] == second["weights"]
    assert first["weights"] == pytest.approx(weights(trainer), rel=1e-9)
    assert len(expected) == 4
    for found, record in zip(losses(first["records"]), expected, strict=True):
        assert found == pytest.approx(record, rel=1e-7, abs=1e-9)


def test_batch_norm_on_two_cpus_is_refused() -> None:
    settings = config("joint")
    with pytest.raises(ConfigError, match="discriminator_norm = 'group'"):
        Trainer(settings, source(settings), world=World(0, 2), device="cpu", write=False)
