"""``gear-engine reconstruct``: images through a tokenizer and back, with how close they come."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gear_engine.cli.environment import DTYPE_NAMES
from gear_engine.errors import InvalidRequestError
from gear_engine.runs.world import World

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from gear_engine.metrics import CodebookUsage
    from gear_engine.tokenizers import Tokenizer

__all__ = ["add_parser", "reconstruct_image", "run"]

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
_COLUMNS = ("psnr", "ssim", "l1")


def add_parser(subparsers: Any) -> None:
    """Adds ``reconstruct`` to the command line."""
    parser = subparsers.add_parser(
        "reconstruct",
        help="encode and decode images with a tokenizer",
        description="Writes each image beside its reconstruction, and metrics.json: PSNR, SSIM, L1, codebook usage.",
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGES", help="image files, or folders of them")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer file or folder")
    parser.add_argument("--output-dir", type=Path, default=Path("reconstructions"), help="(%(default)s)")
    parser.add_argument("--vq-model", help="tokenizer by name, such as VQ-16 (default: from the file)")
    parser.add_argument("--use-vq-ema", default=True, action=argparse.BooleanOptionalAction, help="EMA weights")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, default="fp32", help="(%(default)s)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: an accelerator if there is one)")


def run(args: argparse.Namespace) -> int:
    """Reconstructs; the exit status."""
    import torch

    from gear_engine.cli.environment import dtype_of, pick_device
    from gear_engine.cli.loading import load_tokenizer_alone
    from gear_engine.cli.pictures import labelled_grid
    from gear_engine.metrics import codebook_usage

    paths = _image_paths(args.images)
    sizes = [_read(path).shape for path in paths]
    device = pick_device(args.device, World())
    tokenizer = load_tokenizer_alone(args, device, dtype_of(args.dtype))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    indices: list[torch.Tensor] = []
    for number, (path, (height, width, _)) in enumerate(zip(paths, sizes, strict=True)):
        original = _read(path)
        restored, codes = reconstruct_image(tokenizer, original)
        indices.append(codes)
        row = {"image": str(path), "height": height, "width": width, **_compare(original, restored)}
        rows.append(row)
        labels = [path.name[:24], f"{_text(row['psnr'])} dB"]
        labelled_grid([original, restored], labels, columns=2).save(args.output_dir / f"{number:04d}-{path.stem}.png")
    usage = codebook_usage(torch.cat(indices), tokenizer.quantize.num_codes)
    mean = {name: _mean([row[name] for row in rows]) for name in _COLUMNS}
    report = {
        "tokenizer": {"file": str(args.tokenizer), "dtype": args.dtype, **tokenizer.config.to_dict()},
        "images": rows,
        "mean": mean,
        "codebook": {**dataclasses.asdict(usage), "fraction": usage.fraction},
    }
    (args.output_dir / "metrics.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    _print_table(rows, mean, usage)
    print(f"pictures and metrics.json are in {args.output_dir}")
    return 0


def reconstruct_image(tokenizer: Tokenizer, image: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], torch.Tensor]:
    """Encodes and decodes one image of any size.

    It is padded at the right and bottom by its own edge to multiples of the downsample, and cropped back. A latent of a
    single position has no variance to normalise by, so there are at least two.

    Args:
        image: [H, W, 3] uint8.

    Returns:
        The reconstruction, [H, W, 3] uint8, and the code indices, int64, of the padded image.
    """
    import torch
    import torch.nn.functional as F

    from gear_engine.tokenizers import to_uint8

    height, width, _ = image.shape
    factor = tokenizer.config.downsample
    pixels = torch.from_numpy(image.copy()).to(tokenizer.device).permute(2, 0, 1)[None]
    floats = pixels.float() / 127.5 - 1  # [1, 3, H, W]
    right = 2 * factor - width if max(width, height) <= factor else -width % factor
    padded = F.pad(floats, (0, right, 0, -height % factor), mode="replicate").contiguous().to(tokenizer.dtype)
    with torch.no_grad():
        _, _, info = tokenizer.encode(padded)
        codes = info[2]
        restored = tokenizer.decode_code(codes, tokenizer.latent_shape(1, *padded.shape[2:]))
    result: NDArray[np.uint8] = to_uint8(restored[:, :, :height, :width])[0].cpu().numpy()
    return result, codes.flatten().cpu()


def _image_paths(given: Sequence[Path]) -> list[Path]:
    paths: list[Path] = []
    for path in given:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in _SUFFIXES)
            if not inside:
                raise InvalidRequestError(f"{path} holds no images ({', '.join(sorted(_SUFFIXES))})")
            paths += inside
        else:
            paths.append(path)
    return paths


def _read(path: Path) -> NDArray[np.uint8]:
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):
                # convert() would clip 16-bit grey to white where it is above 255.
                upright = Image.fromarray(((np.asarray(upright).astype(np.uint32) + 128) // 257).astype(np.uint8))
            elif upright.mode in ("I", "F"):
                raise ValueError(f"its pixels are of mode {upright.mode}, whose range is unknown; save it with 8 bits")
            return np.asarray(upright.convert("RGB"), dtype=np.uint8)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InvalidRequestError(f"cannot read the image {path}: {error}") from error


def _compare(original: NDArray[np.uint8], restored: NDArray[np.uint8]) -> dict[str, float | None]:
    """The metrics of one image; None for PSNR of equal images, and for SSIM of images that are too small for it."""
    import torch

    from gear_engine.metrics import l1, psnr, ssim

    a, b = torch.from_numpy(original.copy())[None], torch.from_numpy(restored.copy())[None]
    decibels = float(psnr(a, b))
    return {
        "psnr": decibels if math.isfinite(decibels) else None,
        "ssim": float(ssim(a, b)) if min(original.shape[:2]) >= 11 else None,
        "l1": float(l1(a, b)),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _text(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _print_table(rows: Sequence[dict[str, Any]], mean: dict[str, float | None], usage: CodebookUsage) -> None:
    width = max(4, *(len(Path(row["image"]).name) for row in rows))
    print(f"{'image':<{width}}  {'size':>11}  {'PSNR dB':>8}  {'SSIM':>7}  {'L1':>7}")
    for row in [*rows, {"image": "mean", **mean}]:
        size = f"{row['width']} x {row['height']}" if "width" in row else ""
        numbers = f"{_text(row['psnr']):>8}  {_text(row['ssim'], 4):>7}  {_text(row['l1'], 4):>7}"
        print(f"{Path(row['image']).name:<{width}}  {size:>11}  {numbers}")
    print(
        f"codebook: {usage.num_used} of {usage.num_codes} codes used ({usage.fraction:.2%}) by {usage.num_indices} "
        f"indices, perplexity {usage.perplexity:.1f}"
    )
