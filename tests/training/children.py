"""Processes that the tests start, kill and join; imported once by the fork server, so that each starts at once."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
import torch._dynamo  # takes seconds, which every child would spend anew when its trainer imports it

from gear_engine.runs.world import World
from gear_engine.training import TrainConfig, Trainer
from tests.training.tiny import source


def resume(settings: TrainConfig) -> None:
    """Trains to the end from wherever the folder stands."""
    torch.set_num_threads(1)
    for _ in Trainer(settings, source(settings), resume=True, device="cpu").run():
        pass


def one_of_two(settings: TrainConfig, rank: int, port: int, out: Path) -> None:
    """Trains as one of two processes; writes its records and the sum of all weights to ``out``."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    world = World(rank, 2)
    world.join()
    try:
        trainer = Trainer(settings, source(settings), world=world, device="cpu", write=False)
        records = list(trainer.run())
    finally:
        world.leave()
    out.write_text(json.dumps({"records": records, "weights": weights(trainer)}))


def weights(trainer: Trainer) -> dict[str, float]:
    """The sum of the absolute values of each model's weights."""
    state = trainer.state
    modules = {
        "tokenizer": state.tokenizer,
        "generator": state.generator,
        "projectors": state.projectors,
        "discriminator": state.discriminator,
        "tokenizer_ema": state.tokenizer_ema,
    }
    return {
        name: sum(float(p.detach().abs().sum()) for p in module.parameters())
        for name, module in modules.items()
        if module is not None
    }
