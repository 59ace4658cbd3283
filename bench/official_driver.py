"""Runs the official code of a checkout in a process of its own: ``python -P official_driver.py JOB``.

JOB is a JSON file (see :func:`main`). The steps are those of the official sampling programs, driven from here because
those need accelerate and seed before their models are built, so that on a CPU their tokens follow the models' random
initialisation; here both sides of a comparison seed after building. Imports nothing of gear_engine.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch


def _clocks() -> np.ndarray[Any, Any]:
    """Wall clock and processor time of all threads, in seconds."""
    return np.array([time.perf_counter(), time.process_time()])


def _build_generator(job: dict[str, Any]) -> torch.nn.Module:
    if job["task"] == "text":
        from models.llamagen_t2i import ModelArgs, Transformer
    else:
        from models.llamagen import ModelArgs, Transformer
    model: torch.nn.Module = Transformer(ModelArgs(**job["model"]))
    return model.eval()


def _build_tokenizer(name: str, fields: dict[str, Any]) -> torch.nn.Module:
    from models import Tokenizers

    tokenizer: torch.nn.Module = Tokenizers[name](**fields)
    return tokenizer.eval()


class _Scores:
    """Replaces ``torch.multinomial`` by its equal, argmax(p / q), and keeps log p - log q of two tokens per draw."""

    def __init__(self, other: np.ndarray) -> None:
        self.other = torch.from_numpy(other.astype(np.int64))  # [B, n], the other side's tokens
        self.gaps: list[torch.Tensor] = []

    def __call__(self, probs: torch.Tensor, num_samples: int) -> torch.Tensor:
        noise = torch.empty_like(probs).exponential_(1)
        token = (probs / noise).argmax(dim=-1, keepdim=True)
        scores = probs.double().log() - noise.double().log()  # [B, V]
        step = len(self.gaps)
        other = self.other[:, step : step + 1].to(probs.device)
        self.gaps.append((scores.gather(1, token) - scores.gather(1, other)).squeeze(1))
        return token

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        original = torch.multinomial
        torch.multinomial = self  # type: ignore[assignment]
        try:
            yield
        finally:
            torch.multinomial = original


def _sample_batch(model: torch.nn.Module, condition: dict[str, torch.Tensor], job: dict[str, Any]) -> torch.Tensor:
    block_size = int(job["model"]["block_size"])
    if job["task"] == "text":
        from models.generate_t2i import generate_t2i

        tokens: torch.Tensor = generate_t2i(
            model,
            condition["states"],
            condition["uncond_states"],
            block_size,
            cond_mask=condition["mask"],
            uncond_mask=condition["uncond_mask"],
            **job["sampling"],
        )
        return tokens
    from models.generate import generate

    tokens = generate(model, condition["labels"], block_size, **job["sampling"])
    return tokens


def _run_sampling(job: dict[str, Any], other_tokens: np.ndarray | None) -> dict[str, np.ndarray]:
    """Build, load, seed, then sample and decode batch by batch; returns arrays and the seconds of both phases."""
    model = _build_generator(job)
    tokenizer = _build_tokenizer(job["tokenizer"], job.get("tokenizer_fields", {})) if job["tokenizer"] else None
    checkpoint = torch.load(job["checkpoint"], map_location="cpu", weights_only=True)
    model.load_state_dict(checkpoint["ema"])
    if tokenizer is not None:
        tokenizer.load_state_dict(checkpoint["vq_ema"])
    del checkpoint
    conditions = _conditions(job)
    torch.manual_seed(int(job["seed"]))
    tokens, pixels, gaps = [], [], []
    sample_s, decode_s = np.zeros(2), np.zeros(2)
    first = 0
    for condition in conditions:
        batch = len(next(iter(condition.values())))
        scores = None if other_tokens is None else _Scores(other_tokens[first : first + batch])
        first += batch
        start = _clocks()
        with scores.installed() if scores is not None else contextlib.nullcontext():
            tokens.append(_sample_batch(model, condition, job))
        sample_s += _clocks() - start
        if scores is not None:
            gaps.append(torch.stack(scores.gaps, dim=1))
        if tokenizer is not None:
            start = _clocks()
            grid = int(job["model"]["block_size"] ** 0.5)
            images = tokenizer.decode_code(tokens[-1], [batch, int(job["code_dim"]), grid, grid])  # type: ignore[operator]
            images = torch.clamp(127.5 * images + 128.0, 0, 255).permute(0, 2, 3, 1).to(torch.uint8)
            decode_s += _clocks() - start
            pixels.append(images)
    result = {"tokens": torch.cat(tokens).numpy(), "seconds": np.stack([sample_s, decode_s])}
    if pixels:
        result["pixels"] = torch.cat(pixels).numpy()
    if gaps:
        result["gaps"] = torch.cat(gaps).numpy()
    return result


def _conditions(job: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    """Per batch: the official program's random labels, or slices of the stored caption features."""
    count, batch = int(job["count"]), int(job["batch"])
    if job["task"] == "class":
        rng = torch.Generator().manual_seed(int(job["seed"]))
        classes = int(job["model"]["num_classes"])
        batches = [torch.randint(0, classes, (batch,), generator=rng) for _ in range(-(-count // batch))]
        return [{"labels": labels} for labels in batches]
    with np.load(job["captions"]) as stored:
        captions = {name: torch.from_numpy(stored[name]) for name in stored.files}
    return [{name: rows[i : i + batch] for name, rows in captions.items()} for i in range(0, count, batch)]


def _run_tokenizer(job: dict[str, Any]) -> dict[str, np.ndarray]:
    """Encode, read distances and decode one batch of images; with ``write_checkpoint`` also store the weights.

    With ``exact_of`` only decode the codes of that earlier result, in float64.
    """
    torch.manual_seed(int(job["seed"]))
    tokenizer = _build_tokenizer(job["tokenizer"], job.get("tokenizer_fields", {}))
    if job.get("write_checkpoint"):
        torch.save({"model": tokenizer.state_dict()}, job["checkpoint"])
    if job.get("exact_of"):
        with np.load(job["exact_of"]) as stored:
            codes, shape = torch.from_numpy(stored["indices"]), list(stored["quant"].shape)
        decoded = tokenizer.double().decode_code(codes, shape)  # type: ignore[operator]
        return {"decoded": decoded.numpy()}
    images = torch.from_numpy(np.load(job["images"]))
    start = _clocks()
    quant, _, info, distances = tokenizer.encode(images, return_distance=True)  # type: ignore[operator]
    encode_s = _clocks() - start
    indices = info[2]
    start = _clocks()
    decoded = tokenizer.decode_code(indices, list(quant.shape))  # type: ignore[operator]
    decode_s = _clocks() - start
    rows = distances.reshape(-1, distances.shape[-1])[:: max(1, distances.numel() // distances.shape[-1] // 64)]
    return {
        "quant": quant.numpy(),
        "indices": indices.numpy(),
        "distance_rows": rows.numpy(),
        "decoded": decoded.numpy(),
        "seconds": np.stack([encode_s, decode_s]),
    }


def main() -> None:
    """Job fields: checkout, task (class, text, tokenizer), checkpoint, out (.npz), seed, threads; for sampling model,
    sampling, tokenizer (name or null), code_dim, count, batch, captions, other_tokens (.npz whose ``tokens`` are scored
    against); for tokenizers tokenizer, images (.npy), write_checkpoint, exact_of (.npz of an
    earlier run, whose codes are decoded in float64)."""
    job = json.loads(Path(sys.argv[1]).read_text())
    sys.path.insert(0, job["checkout"])
    torch.set_grad_enabled(False)
    if job.get("threads"):
        torch.set_num_threads(int(job["threads"]))
    other = None
    if job.get("other_tokens"):
        with np.load(job["other_tokens"]) as stored:
            other = stored["tokens"]
    result = _run_tokenizer(job) if job["task"] == "tokenizer" else _run_sampling(job, other)
    np.savez(job["out"], torch=np.array(torch.__version__), **result)


if __name__ == "__main__":
    main()
