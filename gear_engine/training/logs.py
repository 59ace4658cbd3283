"""A run's log, one JSON object a line, and its sample pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from gear_engine.compat import generate, release
from gear_engine.files import atomic_file, write_atomic
from gear_engine.tokenizers import to_uint8
from gear_engine.training.state import TrainState

__all__ = ["Log", "write_samples"]

_GAP = 2


class Log:
    """``log.jsonl`` of a run. A run that resumes at step n drops the lines of later steps, which it writes again."""

    def __init__(self, path: Path, resumed_at: int) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_log(path) if line.get("step", 0) <= resumed_at] if resumed_at else []
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def write(self, record: dict[str, Any]) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; one that a killed process left half-written is passed over."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


@torch.no_grad()
def write_samples(state: TrainState, images: torch.Tensor, folder: Path) -> None:
    """Pictures of the averaged models at this step: originals above their reconstructions, and samples of all classes.

    Args:
        images: uint8 [n, 3, H, W], some of the last batch.
    """
    config = state.config.output
    folder.mkdir(parents=True, exist_ok=True)
    pixels = images[: config.sample_count].to(state.device).to(state.dtype) / 127.5 - 1.0
    codes = state.tokenizer_ema.encode(pixels)[2][2]
    shape = state.tokenizer_ema.latent_shape(len(pixels), *pixels.shape[2:])
    restored = state.tokenizer_ema.decode_code(codes, shape)
    _save(torch.cat((pixels, restored)), len(pixels), folder / f"{state.step:07d}-reconstructions.png")
    if state.generator_ema is None:
        return
    generator = state.generator_ema
    labels = torch.arange(config.sample_count, device=state.device) % generator.config.num_classes
    random = torch.Generator(state.device).manual_seed(state.config.seed)
    tokens = generate(
        generator,
        labels,
        generator.config.block_size,
        cfg_scale=config.sample_cfg_scale,
        generator=random,
        dtype=torch.float32,
    )
    release(generator)
    shape = state.tokenizer_ema.latent_shape(len(labels), *pixels.shape[2:])
    _save(state.tokenizer_ema.decode_code(tokens, shape), len(labels), folder / f"{state.step:07d}-samples.png")


def _save(images: torch.Tensor, columns: int, path: Path) -> None:
    """Images [n, 3, H, W] in [-1, 1] as a grid."""
    pixels = to_uint8(images.float()).cpu()  # [n, H, W, 3]
    count, height, width, _ = pixels.shape
    rows = -(-count // columns)
    canvas = torch.full((rows * (height + _GAP), columns * (width + _GAP), 3), 255, dtype=torch.uint8)
    for number, picture in enumerate(pixels):
        top, left = number // columns * (height + _GAP), number % columns * (width + _GAP)
        canvas[top : top + height, left : left + width] = picture
    with atomic_file(path, sync=False) as file:
        Image.fromarray(canvas.numpy()).save(file, "PNG")
