"""``gear-engine report``: pages and plots of a record, comparisons, a regression gate, and the results folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gear_engine.cli.bench import DEFAULT_OUT
from gear_engine.errors import InvalidRequestError

if TYPE_CHECKING:
    from gear_engine.report.compare import Comparison

__all__ = ["add_parser", "run"]

#: Exit status of a gate that found a regression.
REGRESSED = 1


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "report",
        help="turn benchmark records into pages and plots, or compare them",
        description=(
            "report [RUN.json] writes JSON, Markdown, HTML, CSV and PNG; report merge A.json B.json ... compares the "
            "others with A; report add RUN.json adds it to a results folder and renews the folder's index."
        ),
    )
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="[merge|add] RUN.json",
        help=f"records of gear-engine bench (default: {DEFAULT_OUT})",
    )
    parser.add_argument("--out-dir", type=Path, help="folder to write to (default: the record's name without .json)")
    parser.add_argument("--formats", default="json,md,html,csv,png", help="of json, md, html, csv, png (default: all)")
    parser.add_argument("--out", type=Path, help="merge: also write the comparison to this Markdown file")
    parser.add_argument(
        "--fail-over",
        metavar="PERCENT",
        help="merge: exit 1 if a row is slower beyond noise and by more than this, as 5%%",
    )
    parser.add_argument(
        "--results", type=Path, default=Path("bench/results"), help="add: the folder to add to (default: bench/results)"
    )


def _limit(text: str) -> float:
    try:
        value = float(text.removesuffix("%")) / 100
    except ValueError:
        raise InvalidRequestError(f"--fail-over {text!r}: say a percentage, such as 5%") from None
    if not 0 <= value < 10:
        raise InvalidRequestError(f"--fail-over {text!r}: must lie between 0% and 1000%")
    return value


def _gate(comparisons: list[Comparison], limit: float) -> int:
    """Prints what regressed; the exit status."""
    for comparison in comparisons:
        if not comparison.same_device:
            raise InvalidRequestError(
                "--fail-over compares runs of one device; these are of different devices or threads"
            )
    failed = [change for each in comparisons for change in each.changes if change.regressed(limit)]
    unsure = sum(each.count("cannot tell") for each in comparisons)
    for change in failed:
        print(f"REGRESSION: {change.row.id}: {change.ratio.value - 1:+.1%}")
    if unsure:
        print(f"cannot tell for {unsure} rows: measure again on a quieter machine, or with a larger --max-seconds")
    print(f"gate at {limit:.0%}: {'failed' if failed else 'passed'}")
    return REGRESSED if failed else 0


def _merge(args: argparse.Namespace, paths: list[Path]) -> int:
    from gear_engine.report.compare import compare
    from gear_engine.report.markdown import comparison_markdown, verdict_lines
    from gear_engine.report.record import read_report

    if len(paths) < 2:
        raise InvalidRequestError("report merge needs at least two records: the baseline first")
    limit = None if args.fail_over is None else _limit(args.fail_over)
    if args.out is not None and (args.out.is_dir() or not args.out.parent.is_dir()):
        raise InvalidRequestError(f"--out {args.out}: say a file in a folder that exists")
    comparisons = compare([read_report(path) for path in paths])
    text = comparison_markdown(comparisons)
    if args.out is not None:
        args.out.write_text(text, encoding="utf-8")
        for comparison in comparisons:
            print(f"{comparison.other.source} against {comparison.baseline.source}:")
            print("\n".join(f"  {line}" for line in verdict_lines(comparison)))
        print(f"Written to {args.out}")
    else:
        print(text)
    return 0 if limit is None else _gate(comparisons, limit)


def run(args: argparse.Namespace) -> int:
    """Exit status 0: written, or nothing regressed; 1: ``--fail-over`` found a regression."""
    from gear_engine.report.record import read_report
    from gear_engine.report.writers import add_to_results, write_report_folder

    action = args.inputs[0] if args.inputs and args.inputs[0] in ("merge", "add") else "write"
    paths = [Path(name) for name in (args.inputs if action == "write" else args.inputs[1:])]
    if action == "merge":
        return _merge(args, paths)
    if args.fail_over is not None or args.out is not None:
        raise InvalidRequestError("--fail-over and --out belong to `report merge A.json B.json`")
    if action == "write" and len(paths) > 1 and args.out_dir is not None:
        raise InvalidRequestError("--out-dir holds one report; write several without it, or one at a time")
    written = []
    for path in paths or [DEFAULT_OUT]:
        report = read_report(path)
        if action == "add":
            written += add_to_results(report, args.results)
        else:
            folder = args.out_dir if args.out_dir is not None else path.with_suffix("")
            written += write_report_folder(report, folder, frozenset(args.formats.split(",")))
    for file in written:
        print(file)
    return 0
