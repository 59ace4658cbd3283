"""What ``run.json`` records of a sampling command."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from gear_engine.files import content_hash
from gear_engine.runs.record import Settings

if TYPE_CHECKING:
    import torch

    from gear_engine.cli.loading import Models
    from gear_engine.cli.sampling import Plan, Source
    from gear_engine.engine import Engine

__all__ = ["device_name", "run_settings"]


def device_name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def run_settings(plan: Plan, models: Models, source: Source, engine: Engine) -> list[Settings]:
    """What ``run.json`` records, one per guidance scale."""
    from gear_engine.tokenizers import DeviceDecoder, decoder_name

    args = plan.args
    generator_hash = content_hash(Path(models.generator_source.path))
    same_file = models.tokenizer_source.path == models.generator_source.path
    tokenizer_hash = generator_hash if same_file else content_hash(Path(models.tokenizer_source.path))
    decoder = {"decoder": decoder_name(models.decoder, models.tokenizer)}
    if isinstance(models.decoder, DeviceDecoder):
        decoder |= models.decoder.backends
    common = {
        "command": args.command,
        "checkpoint": {
            "sha256": generator_hash,
            "ema": models.generator_source.is_ema,
            **models.generator.config.to_dict(),
        },
        "tokenizer": {
            "sha256": tokenizer_hash,
            "ema": models.tokenizer_source.is_ema,
            **models.tokenizer.config.to_dict(),
        },
        "num_images": source.count,
        "seed": args.seed,
        "rng": args.rng,
        "dtype": args.dtype,
        "weight_format": args.weight_format,
        # Only where it is given: folders without it can be resumed.
        **({} if args.cache_dtype is None else {"cache_dtype": args.cache_dtype}),
        "decode_dtype": args.decode_dtype,
        "decode_batch": plan.decode_batch,
        "device": plan.device.type,
        "tf32": args.tf32 if plan.device.type == "cuda" else None,
        # As chosen, not as asked for: "auto" may choose otherwise after another build.
        "backend": {**engine.ops.backends, **decoder},
        "world_size": plan.world.size,
        "per_proc_batch_size": plan.batch,
        "image_size": models.image_size,
        "image_size_eval": args.image_size_eval or models.image_size,
    }
    # The conditions come last: they follow from seed, rng and number, and the first difference is what is named.
    return [{**common, "sampling": dataclasses.asdict(params), **source.settings()} for params in plan.scales]
