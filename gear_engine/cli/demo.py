"""``gear-engine demo``: the model that ships with the package, sampled and decoded; shows that everything runs."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gear_engine.cli.environment import DTYPE_NAMES
from gear_engine.errors import InvalidRequestError
from gear_engine.runs.world import World

if TYPE_CHECKING:
    import torch

    from gear_engine.models.transformer import Transformer
    from gear_engine.tokenizers import Tokenizer

__all__ = ["add_parser", "random_generator", "random_tokenizer", "run"]

_CFG_SCALE = 2.0
_WARM_UP_TOKENS = 4


def add_parser(subparsers: Any) -> None:
    """Adds ``demo`` to the command line."""
    parser = subparsers.add_parser(
        "demo",
        help="sample the small model that ships with the package",
        description="Samples the class-conditional model that ships with the package (64 px scenes of shapes), shows "
        "the picture where there is a display, and compares the speed of the chosen kernels with plain torch's.",
    )
    parser.add_argument(
        "--model",
        choices=("shapes", "random"),
        default="shapes",
        help="shapes: the trained one. random: random weights at 128 px, patterns and no pictures (%(default)s)",
    )
    parser.add_argument("--output-dir", type=Path, default=Path("demo-output"), help="(%(default)s)")
    parser.add_argument("--images", type=int, default=32, metavar="N", help="number of images (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the images, and of random weights (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, default="fp32", help="(%(default)s)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: an accelerator if there is one)")
    parser.add_argument("--backend", default="auto", help="NAME, or OP=NAME,...; see gear-engine info (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Samples, writes the grid, prints the speeds; the exit status."""
    from gear_engine.cli.environment import dtype_of, parse_backend, pick_device
    from gear_engine.cli.pictures import labelled_grid
    from gear_engine.tokenizers import to_uint8

    if args.images < 1 or args.seed < 0:
        raise InvalidRequestError("--images must be at least 1 and --seed must not be negative")
    device = pick_device(args.device, World())
    generator, tokenizer, names = _models(args.model, args.seed)
    generator, tokenizer = generator.to(device, dtype_of(args.dtype)).eval(), tokenizer.to(device).eval()
    config = generator.config
    labels = [index % config.num_classes for index in range(args.images)]
    tokens, rate, chosen = _timed(generator, labels, args.seed, parse_backend(args.backend))
    _, reference_rate, _ = _timed(generator, labels, args.seed, "reference")
    size = config.grid_size * tokenizer.config.downsample
    images = to_uint8(tokenizer.decode_code(tokens, tokenizer.latent_shape(len(labels), size, size)))
    columns = config.num_classes if args.model == "shapes" else 4
    picture = labelled_grid(list(images.cpu().numpy()), [names[label] for label in labels], columns=columns)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / "samples.png"
    picture.save(path)
    print(f"{len(labels)} images of {size} x {size} pixels, model '{args.model}', guidance {_CFG_SCALE:g}: {path}")
    print(f"sampling with {', '.join(sorted(set(chosen.values())))}: {rate:.2f} images/s")
    print(f"sampling with plain torch (reference): {reference_rate:.2f} images/s, ratio {rate / reference_rate:.2f}")
    _show(path)
    return 0


def _models(name: str, seed: int) -> tuple[Transformer, Tokenizer, tuple[str, ...]]:
    """Generator, tokenizer and class names."""
    if name == "random":
        generator = random_generator(seed)
        return generator, random_tokenizer(seed), tuple(f"class {i}" for i in range(generator.config.num_classes))
    from gear_engine.checkpoint import load_generator, load_tokenizer
    from gear_engine.pretrained import SHAPES
    from gear_engine.training.scenes import CLASS_NAMES

    return load_generator(SHAPES), load_tokenizer(SHAPES), CLASS_NAMES


def _show(path: Path) -> None:
    """Opens the picture in the desktop's viewer if somebody sits in front of one."""
    opener = shutil.which("open" if sys.platform == "darwin" else "xdg-open")
    seen = sys.platform == "darwin" or "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
    if opener is not None and seen and sys.stdout.isatty():
        quiet = subprocess.DEVNULL
        subprocess.Popen([opener, str(path)], stdout=quiet, stderr=quiet, start_new_session=True)


def random_generator(seed: int) -> Transformer:
    """A class-conditional model of 8 x 8 tokens whose weights follow from ``seed`` alone."""
    from gear_engine.config import GeneratorConfig
    from gear_engine.models.transformer import Transformer

    config = GeneratorConfig(dim=256, n_layer=6, n_head=4, vocab_size=1024, block_size=64, num_classes=10)
    model = Transformer(config)
    _randomise(model, seed)
    return model


def random_tokenizer(seed: int) -> Tokenizer:
    """A small VQ tokenizer, 16 pixels per token, whose weights follow from ``seed`` alone."""
    from gear_engine.config import TokenizerConfig
    from gear_engine.tokenizers import build_tokenizer

    tokenizer = build_tokenizer(TokenizerConfig(family="vq", codebook_size=1024, z_channels=64, ch=32))
    _randomise(tokenizer, seed)
    return tokenizer


def _randomise(module: torch.nn.Module, seed: int) -> None:
    """Weights with unit gain: normal with variance 1 / fan-in, embeddings of unit variance, norms of one."""
    import torch

    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=source)
            if parameter.dim() > 1:
                fan_in = 1 if "embedding" in name else parameter[0].numel()
                parameter.copy_(noise / fan_in**0.5)
            else:
                parameter.copy_(torch.zeros_like(noise) if name.endswith("bias") else torch.ones_like(noise))


def _timed(
    generator: Transformer, labels: list[int], seed: int, backend: str | dict[str, str]
) -> tuple[torch.Tensor, float, dict[str, str]]:
    """Tokens, images per second without the warm-up, and the backends by op."""
    import torch

    from gear_engine.engine import Engine
    from gear_engine.request import SamplingParams

    engine = Engine(generator, max_images=len(labels), backend=backend)
    params = SamplingParams(cfg_scale=_CFG_SCALE)
    seeds = list(range(seed * len(labels), (seed + 1) * len(labels)))
    engine.generate(labels, params, seeds=seeds, max_new_tokens=_WARM_UP_TOKENS)
    _synchronize(engine.device)
    start = time.perf_counter()
    tokens = engine.generate(labels, params, seeds=seeds)
    _synchronize(engine.device)
    rate = len(labels) / (time.perf_counter() - start)
    with torch.no_grad():
        return tokens.clone(), rate, dict(engine.ops.backends)


def _synchronize(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
