"""The plots of a report, by matplotlib: PNG files, and figures as SVG whose colours follow a page's theme."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gear_engine.errors import ReportError
from gear_engine.report.record import Report, Row
from gear_engine.report.series import Curve, batch_curves, breakdown_rows, floor_rows, shortened, timeline_rows
from gear_engine.report.text import percent, seconds_text

__all__ = ["PLOTS", "curve_svgs", "write_pngs"]

#: Colours of series, in order; told apart by people with any colour vision (Okabe and Ito), with markers beside them.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
#: The same, dark enough for white text on them.
_FILLS = ("#0072b2", "#c65102", "#00805f", "#a8558a", "#946200", "#5560b8", "#8c3b3b", "#2f6f7a", "#6b6b1f")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
#: Stacked bars beyond these make no readable figure; the page and the Markdown hold all.
_MOST_STACKS = 24
_INK, _PAPER, _RULE = "#1b1f24", "#ffffff", "#d0d7de"
_FAMILY = "DejaVu Sans"


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ReportError("plots need the report extra: pip install 'gear-engine[report]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.family": _FAMILY,
            "font.size": 10,
            "svg.fonttype": "none",
            "text.parse_math": False,  # a label is what it says, also with two dollar signs in it
            "text.color": _INK,
            "axes.labelcolor": _INK,
            "axes.edgecolor": _RULE,
            "xtick.color": _INK,
            "ytick.color": _INK,
            "axes.facecolor": _PAPER,
            "figure.facecolor": _PAPER,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "grid.color": _RULE,
            "grid.linewidth": 0.8,
            "legend.frameon": False,
        }
    )
    return plt


def _panel(axes: Any, title: str, curves: list[Curve], ylabel: str) -> None:
    """Latency or throughput against batch, both logarithmic, one line per implementation and dtype."""
    batches = sorted({x for curve in curves for x in curve.batches})
    for index, curve in enumerate(curves):
        # Constant colours per label would need a table that outlives the panel; order is by label everywhere.
        axes.plot(
            curve.batches, curve.values, marker=_MARKERS[index % len(_MARKERS)], color=COLOURS[index % len(COLOURS)],
            label=curve.label, linewidth=1.8, markersize=5,
        )  # fmt: skip
        if curve.low is not None and curve.high is not None and len(curve.batches) > 1:
            axes.fill_between(
                curve.batches, curve.low, curve.high, color=COLOURS[index % len(COLOURS)], alpha=0.15, lw=0
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    axes.margins(x=0.08, y=0.12)
    low, high = axes.get_ylim()
    ticks = [digit * 10.0**power for power in range(-9, 10) for digit in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.grid(True, axis="y")
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("images per batch")
    axes.set_ylabel(ylabel)
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.2),
        ncols=_columns([curve.label for curve in curves], 50),
        fontsize=9,
        handlelength=1.6,
    )


def _curves_figure(report: Report, throughput: bool) -> Any | None:
    panels = batch_curves(report, throughput)
    if not panels:
        return None
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    plt = _pyplot()
    figure, axes = plt.subplots(
        lines, columns, figsize=(5.2 * columns, 4.2 * lines), squeeze=False, layout="constrained"
    )
    for (title, ylabel, curves), axis in zip(panels, axes.flat, strict=False):
        _panel(axis, title, curves, ylabel)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(
        "Throughput against batch" if throughput else "Latency against batch", x=0.01, ha="left", fontsize=13
    )
    return figure


def _floor_figure(report: Report) -> Any | None:
    rows = floor_rows(report)
    if not rows:
        return None
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(10, 1.4 + 0.3 * len(rows)), layout="constrained")
    shown = [min(1.0, row.reached or 0.0) for _, row in rows]
    places = range(len(rows))
    axes.barh(places, [1.0] * len(rows), color=_RULE, alpha=0.35, height=0.72)
    axes.barh(places, shown, color=[COLOURS[0] if row.role == "engine" else COLOURS[6] for _, row in rows], height=0.72)
    for place, (_, row) in zip(places, rows, strict=True):
        floor = row.floor
        assert floor is not None
        text = (
            f"{percent(row.reached)}   {seconds_text(row.summary.median)}, floor {seconds_text(floor[0])} ({floor[1]})"
        )
        axes.text(1.02, place, text, va="center", fontsize=9)
    axes.set_yticks(places, [label for label, _ in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100% = floor"])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_title("Share of the device's floor reached", loc="left", fontsize=13)
    return figure


def _columns(names: list[str], characters: int) -> int:
    """Columns of a legend on a line of so many characters; a marker takes five."""
    return max(1, min(len(names), characters // (5 + max(map(len, names), default=1))))


def _stack(axes: Any, place: int, parts: list[tuple[str, float, float]], total: float, colours: dict[str, str]) -> None:
    for name, start, end in parts:
        axes.barh(place, end - start, left=start, color=colours[name], height=0.62, edgecolor=_PAPER, linewidth=0.8)
        if (end - start) / total > 0.07:
            middle = (start + end) / 2
            axes.text(middle, place, seconds_text(end - start), ha="center", va="center", fontsize=8.5, color=_PAPER)


def _stacked_figure(title: str, bars: list[tuple[str, list[tuple[str, float, float]]]]) -> Any | None:
    """Bars of consecutive parts (name, start, end) in seconds, each bar on its own scale of time."""
    if not bars:
        return None
    plt = _pyplot()
    names = list(dict.fromkeys(name for _, parts in bars for name, _, _ in parts))
    names.sort(key=lambda name: name == "gap")  # last, and it takes no colour of a kernel's
    colours = {name: "#8c959f" if name == "gap" else _FILLS[i % len(_FILLS)] for i, name in enumerate(names)}
    size = (10, 1.0 + 1.25 * len(bars))
    figure, axes = plt.subplots(len(bars), 1, figsize=size, squeeze=False, layout="constrained")
    for axis, (label, parts) in zip(axes.flat, bars, strict=True):
        total = max(end for _, _, end in parts)
        _stack(axis, 0, parts, total, colours)
        unit, scale = ("s", 1.0) if total >= 1 else ("ms", 1e3)
        ticks = [tick for tick in axis.get_xticks() if 0 <= tick <= total * 1.001]
        axis.set_xlim(0, total)
        axis.set_xticks(ticks, [f"{tick * scale:g} {unit}" for tick in ticks], fontsize=9)
        axis.set_yticks([])
        axis.spines["left"].set_visible(False)
        axis.set_title(f"{label}: {seconds_text(total)}", loc="left", fontsize=9.5)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[name]) for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=_columns(names, 130), fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13)
    return figure


def _labelled(row: Row) -> str:
    params = ", ".join(f"{name}={value}" for name, value in row.params.items() if name not in ("position", "tokenizer"))
    return shortened(f"{row.benchmark}, {row.implementation}, {params}", 100)


def _breakdown_figure(report: Report) -> Any | None:
    bars = [(_labelled(row), parts) for row, parts in breakdown_rows(report)][:_MOST_STACKS]
    return _stacked_figure("Where the time goes (kernels called one by one)", bars)


def _timeline_figure(report: Report) -> Any | None:
    bars = [(_labelled(row), parts) for row, parts in timeline_rows(report)][:_MOST_STACKS]
    return _stacked_figure("From labels to images", bars)


#: File name -> (title, figure of a report, or None if the report has no rows for it).
PLOTS: dict[str, tuple[str, Callable[[Report], Any | None]]] = {
    "latency.png": ("Latency against batch", lambda report: _curves_figure(report, False)),
    "throughput.png": ("Throughput against batch", lambda report: _curves_figure(report, True)),
    "floor.png": ("Share of the floor per op", _floor_figure),
    "breakdown.png": ("Decode steps and rollouts, kernel by kernel", _breakdown_figure),
    "timeline.png": ("End-to-end timeline", _timeline_figure),
}


def write_pngs(report: Report, folder: Path) -> dict[str, str]:
    """Writes the plots that the report has rows for; title -> file name."""
    plt = _pyplot()
    written = {}
    for file, (title, make) in PLOTS.items():
        figure = make(report)
        if figure is None:
            continue
        figure.savefig(folder / file, dpi=150, metadata={"Software": None})
        plt.close(figure)
        written[title] = file
    return written


def curve_svgs(report: Report, throughput: bool) -> list[str]:
    """The panels of the batch plots as inline SVG, coloured by the page's custom properties."""
    plt = _pyplot()
    found = []
    for title, ylabel, curves in batch_curves(report, throughput):
        figure, axes = plt.subplots(figsize=(4.9, 3.9), layout="constrained")
        _panel(axes, title, curves, ylabel)
        figure.patch.set_alpha(0)
        axes.patch.set_alpha(0)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)
        found.append(_themed(out.getvalue()))
    return found


def _themed(svg: str) -> str:
    """One figure's SVG for a page: no prolog, no fixed size, colours and font from the page, ids of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    for colour, name in ((_INK, "--ink"), (_RULE, "--rule"), (_PAPER, "--paper")):
        svg = svg.replace(colour, f"var({name})")
    return svg.replace(f"'{_FAMILY}'", "inherit").replace(f'"{_FAMILY}"', "inherit")
