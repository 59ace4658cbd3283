"""Our side of a comparison in a process of its own: ``python -m gear_engine.bench.engine_driver JOB``.

Takes the job files of :mod:`gear_engine.bench.official_driver` and returns the same arrays.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gear_engine import Engine, SamplingParams, TextCondition
from gear_engine.checkpoint import load_generator, load_tokenizer
from gear_engine.tokenizers import to_uint8


def _clocks() -> np.ndarray[Any, Any]:
    """Wall clock and processor time of all threads, in seconds."""
    return np.array([time.perf_counter(), time.process_time()])


def _conditions(job: dict[str, Any]) -> list[torch.Tensor | TextCondition]:
    count, batch = int(job["count"]), int(job["batch"])
    if job["task"] == "class":
        rng = torch.Generator().manual_seed(int(job["seed"]))
        classes = int(job["model"]["num_classes"])
        return [torch.randint(0, classes, (batch,), generator=rng) for _ in range(-(-count // batch))]
    with np.load(job["captions"]) as stored:
        rows = {name: torch.from_numpy(stored[name]) for name in stored.files}
    found: list[torch.Tensor | TextCondition] = []
    for start in range(0, count, batch):
        part = {name: tensor[start : start + batch] for name, tensor in rows.items()}
        # The empty caption is the same for every image.
        found.append(TextCondition(part["states"], part["mask"], part["uncond_states"][0], part["uncond_mask"][0]))
    return found


def _run_sampling(job: dict[str, Any]) -> dict[str, np.ndarray]:
    overrides = {"text_attn": job["model"]["text_attn"]} if job["task"] == "text" else {}
    model = load_generator(job["checkpoint"], **overrides)
    tokenizer = load_tokenizer(job["checkpoint"]) if job["tokenizer"] else None
    conditions = _conditions(job)
    engine = Engine(model, max_images=int(job["batch"]))
    params = SamplingParams(**job["sampling"])
    torch.manual_seed(int(job["seed"]))
    tokens, pixels = [], []
    sample_s, decode_s = np.zeros(2), np.zeros(2)
    for condition in conditions:
        start = _clocks()
        tokens.append(engine.generate(condition, params, rng="torch"))
        sample_s += _clocks() - start
        if tokenizer is not None:
            start = _clocks()
            grid = model.config.grid_size
            shape = (len(tokens[-1]), tokenizer.config.codebook_embed_dim, grid, grid)
            pixels.append(to_uint8(tokenizer.decode_code(tokens[-1], shape)))
            decode_s += _clocks() - start
    result = {"tokens": torch.cat(tokens).numpy(), "seconds": np.stack([sample_s, decode_s])}
    if pixels:
        result["pixels"] = torch.cat(pixels).numpy()
    return result


def _run_tokenizer(job: dict[str, Any]) -> dict[str, np.ndarray]:
    tokenizer = load_tokenizer(job["checkpoint"])
    images = torch.from_numpy(np.load(job["images"]))
    start = _clocks()
    quant, _, info, distances = tokenizer.encode(images, return_distance=True)
    encode_s = _clocks() - start
    flat = distances.reshape(-1, distances.shape[-1])  # [N, K]
    indices = info[2]
    with np.load(job["official"]) as stored:
        official = torch.from_numpy(stored["indices"])
    start = _clocks()
    decoded = tokenizer.decode_code(official, tuple(quant.shape))
    decode_s = _clocks() - start
    # How much farther than the nearest code the official one lies: 0 where the two agree.
    rows = torch.arange(len(flat))
    gap = (flat[rows, official.reshape(-1)] - flat[rows, indices.reshape(-1)]).abs() / flat.abs().max()
    return {
        "quant": quant.numpy(),
        "indices": indices.numpy(),
        "index_gap": gap.numpy(),
        "distance_rows": flat[:: max(1, len(flat) // 64)].numpy(),
        "decoded": decoded.numpy(),
        "seconds": np.stack([encode_s, decode_s]),
    }


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_grad_enabled(False)
    if job.get("threads"):
        torch.set_num_threads(int(job["threads"]))
    result = _run_tokenizer(job) if job["task"] == "tokenizer" else _run_sampling(job)
    np.savez(job["out"], torch=np.array(torch.__version__), **result)


if __name__ == "__main__":
    main()
