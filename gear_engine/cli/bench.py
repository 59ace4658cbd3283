"""``gear-engine bench``: lists and runs benchmarks, and writes the record that ``gear-engine report`` reads."""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gear_engine.errors import InvalidRequestError

if TYPE_CHECKING:
    import torch

__all__ = ["DEFAULT_OUT", "add_parser", "run"]

DEFAULT_OUT = Path("gear-engine-report.json")
PEERS = ("reference", "compiled", "official", "faiss")
#: Seconds of sampling per row.
_CAP = {"quick": 0.5, "standard": 3.0, "full": 5.0}
_DEFAULT_PEERS = {"quick": "reference,faiss", "standard": "reference,faiss", "full": "reference,compiled,faiss"}
_MOST_THREADS = 1024
_SMALLEST_ROTATION, _LARGEST_ROTATION = 64 << 20, 256 << 20


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="measure ops, models and tokenizers on this device",
        description="Runs benchmarks and writes a JSON report; `gear-engine report` turns it into pages and plots.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run (default: all); see --list")
    parser.add_argument("--list", action="store_true", help="print benchmarks, fields and values, and stop")
    parser.add_argument("--preset", default="quick", help="quick (about a minute), standard or full (default: quick)")
    parser.add_argument("--filter", metavar="TEXT", help="keep the cases whose name holds TEXT, such as images=8")
    parser.add_argument(
        "--grid", nargs="+", default=[], metavar="FIELD=V,V", help="values for a field in place of the preset's"
    )
    parser.add_argument("--device", default=None, help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--backend", default="auto", help="backends to measure, separated by commas (default: auto)")
    parser.add_argument("--peers", help=f"beside them, of {', '.join(PEERS)} (default: by preset), or none")
    parser.add_argument("--official", type=Path, metavar="PATH", help="checkout of the official code, as a peer")
    parser.add_argument("--noise-bound", type=float, default=3.0, metavar="PERCENT", help="(default: 3)")
    parser.add_argument("--max-seconds", type=float, help="cap of sampling per row (default: by preset)")
    parser.add_argument("--no-check", action="store_true", help="do not compare outputs with the reference")
    parser.add_argument("--no-breakdown", action="store_true", help="do not take decode steps apart")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs (default: 0)")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help=f"(default: {DEFAULT_OUT})")


def _grid(pairs: list[str]) -> dict[str, list[str]]:
    grid: dict[str, list[str]] = {}
    for pair in pairs:
        name, equals, values = pair.partition("=")
        if not (name and equals and values):
            raise InvalidRequestError(f"--grid {pair!r}: say FIELD=VALUE or FIELD=VALUE,VALUE")
        if name in grid:
            raise InvalidRequestError(f"--grid: {name!r} stands there twice; say {name}=VALUE,VALUE")
        grid[name] = values.split(",")
    return grid


def _peers(args: argparse.Namespace) -> frozenset[str]:
    text = _DEFAULT_PEERS.get(args.preset, "reference") if args.peers is None else args.peers
    peers = {name for name in text.split(",") if name and name != "none"}
    unknown = sorted(peers - set(PEERS))
    if unknown:
        raise InvalidRequestError(f"--peers: there is no peer {unknown[0]!r}; there are {', '.join(PEERS)}")
    if args.official is not None:
        peers.add("official")
    elif "official" in peers:
        raise InvalidRequestError("--peers official needs --official with a checkout of the official code")
    return frozenset(peers)


def _refuse(args: argparse.Namespace) -> None:
    """Raises InvalidRequestError for an option out of range: before a run that takes minutes, not after it."""
    import torch

    from gear_engine.ops import backends

    for name in ("noise_bound", "max_seconds"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise InvalidRequestError(f"--{name.replace('_', '-')} must be positive, got {value}")
    if args.threads is not None and not 1 <= args.threads <= _MOST_THREADS:
        raise InvalidRequestError(f"--threads must be at least 1 and at most {_MOST_THREADS}, got {args.threads}")
    if not 0 <= args.seed < 2**32:
        raise InvalidRequestError(f"--seed must lie in [0, 2^32), got {args.seed}")
    known = {"auto"} | {backend for _, backend, _ in backends.table(torch.device("cpu"), torch.float32)}
    for name in args.backend.split(","):
        if name not in known:
            raise InvalidRequestError(f"--backend: there is no backend {name!r}; there are {', '.join(sorted(known))}")
    if args.out.is_dir() or not args.out.parent.is_dir():
        raise InvalidRequestError(f"--out {args.out}: say a file in a folder that exists")


def _rotation(device: torch.device, preset: str) -> int:
    """Twice the last cache, between 64 and 256 MiB: virtual machines report their host's whole cache. Quick: 64 MiB."""
    from gear_engine.report.facts import device_facts

    if preset == "quick":
        return _SMALLEST_ROTATION
    facts = device_facts(device, 1)
    if facts["gpu"] is not None:
        last = facts["gpu"]["l2_cache"] or _LARGEST_ROTATION
    else:
        last = max(facts["cpu"]["caches"].values(), default=_LARGEST_ROTATION)
    return int(min(max(2 * last, _SMALLEST_ROTATION), _LARGEST_ROTATION))


def _command(args: argparse.Namespace) -> str:
    """The command with paths replaced: what somebody else would type."""
    from gear_engine.report.privacy import scrub

    words = ["gear-engine bench", *args.names, f"--preset {args.preset}"]
    if args.filter:
        words.append(f"--filter '{args.filter}'")
    if args.grid:
        words.append("--grid " + " ".join(args.grid))
    for name in ("device", "threads", "peers", "max_seconds"):
        value = getattr(args, name)
        if value is not None:
            words.append(f"--{name.replace('_', '-')} {value}")
    for name, default in (("backend", "auto"), ("noise_bound", 3.0), ("seed", 0)):
        if getattr(args, name) != default:
            words.append(f"--{name.replace('_', '-')} {getattr(args, name)}")
    words += ["--official PATH"] if args.official is not None else []
    words += ["--no-check"] if args.no_check else []
    words += ["--no-breakdown"] if args.no_breakdown else []
    return scrub(" ".join(words))


def _list(args: argparse.Namespace) -> int:
    from gear_engine.bench.registry import benchmarks, select

    known = benchmarks()
    select(args.names, args.preset, {}, None)
    for name in args.names or known:
        benchmark = known[name]
        print(f"{name}: {benchmark.summary}")
        for field, values in benchmark.fields.items():
            print(f"    {field} = {', '.join(str(value) for value in values)}")
    print("\nCases of each preset: ", end="")
    counts = {preset: len(select(args.names, preset, {}, None)) for preset in ("quick", "standard", "full")}
    print(", ".join(f"{preset} {count}" for preset, count in counts.items()))
    return 0


def _progress(total: int) -> Any:
    """A bar over cases with the time left; ``progress(done, name)``."""
    from tqdm import tqdm

    bar = tqdm(total=total, unit="case", dynamic_ncols=True, mininterval=0.5, file=sys.stderr)
    shown = ""

    def progress(done: int, name: str) -> None:
        nonlocal shown
        if name != shown:
            shown = name
            bar.set_description_str(name[:60], refresh=False)
        if done > bar.n:
            bar.update(done - bar.n)
        else:
            bar.refresh() if time.monotonic() - bar.last_print_t > 1 else None
        if done == total:
            bar.close()

    return progress


def run(args: argparse.Namespace) -> int:
    """Exit status 0: measured and written."""
    import torch

    from gear_engine.bench.harness import Run, run_cases
    from gear_engine.bench.registry import Context, select
    from gear_engine.bench.sampling import Limits
    from gear_engine.cli.environment import pick_device
    from gear_engine.report.record import write_report
    from gear_engine.report.text import summary_table
    from gear_engine.runs.world import World

    if args.list:
        return _list(args)
    cases = select(args.names, args.preset, _grid(args.grid), args.filter)
    _refuse(args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = pick_device(args.device, World())
    context = Context(
        device=device,
        seed=args.seed,
        backends=tuple(args.backend.split(",")),
        peers=_peers(args),
        official=args.official,
        rotate_bytes=_rotation(device, args.preset),
    )
    cap = args.max_seconds or _CAP[args.preset]
    limits = Limits(noise_bound=args.noise_bound / 100, max_seconds=cap)
    settings = Run(_command(args), args.preset, limits, check=not args.no_check, breakdown=not args.no_breakdown)
    record = run_cases(cases, context, settings, _progress(len(cases)))
    write_report(record, args.out)
    print(summary_table(record))
    print(f"\nWritten to {args.out}. `gear-engine report {args.out}` makes pages and plots of it.")
    return 0
