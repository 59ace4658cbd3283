"""Table and plot of a study's result."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from gear_engine.bench.study_runs import RECIPES

__all__ = ["curves", "plot", "steps_to_reach", "table"]

#: Keys of a point -> axis label.
_PANELS = {
    ("samples", "frechet_distance"): "Fréchet distance of samples",
    ("samples", "class_accuracy"): "class accuracy of samples",
    ("reconstruction", "perplexity"): "codebook perplexity, held-out images",
    ("reconstruction", "psnr"): "reconstruction PSNR (dB)",
}


def curves(result: dict[str, Any], name: str, part: str, value: str) -> list[list[tuple[int, float]]]:
    """(step, value) of every run of a recipe."""
    runs = [run for run in result["runs"] if run["recipe"] == name]
    return [[(point["step"], point[part][value]) for point in run["curve"]] for run in runs]


def steps_to_reach(curve: list[tuple[int, float]], target: float) -> int | None:
    """First measured step whose value is at most ``target``; None if there is none."""
    return next((step for step, value in curve if value <= target), None)


def _spread(values: list[float], digits: int = 2) -> str:
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def table(result: dict[str, Any]) -> str:
    """A Markdown table: final values as mean ± standard deviation over seeds, and steps to the baseline's final value.

    The baseline's final value is the mean over its seeds; a recipe's steps are listed per seed, - where a run never
    gets there.
    """
    baseline = [curve[-1][1] for curve in curves(result, "llamagen-repa", "samples", "frechet_distance")]
    target = statistics.mean(baseline) if baseline else float("-inf")
    lines = [
        "| recipe | seeds | Fréchet distance | class accuracy (%) | steps to the baseline's final distance | "
        "codes used, perplexity | PSNR (dB) | CPU s per run |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, title in RECIPES.items():
        runs = [run for run in result["runs"] if run["recipe"] == name]
        if not runs:
            continue
        last = [run["curve"][-1] for run in runs]
        reached = [steps_to_reach(curve, target) for curve in curves(result, name, "samples", "frechet_distance")]
        cells = [
            title,
            str(len(runs)),
            _spread([point["samples"]["frechet_distance"] for point in last]),
            _spread([100 * point["samples"]["class_accuracy"] for point in last], 1),
            ", ".join("-" if step is None else str(step) for step in reached),
            f"{_spread([point['reconstruction']['codes_used'] for point in last], 0)}, "
            f"{_spread([point['reconstruction']['perplexity'] for point in last], 0)}",
            _spread([point["reconstruction"]["psnr"] for point in last]),
            _spread([point["cpu_seconds"] for point in last], 0),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    facts = result["facts"]
    lines += [
        "",
        f"Warm-up tokenizer: PSNR {facts['warm_up']['psnr']:.2f} dB, {facts['warm_up']['codes_used']} codes used, "
        f"perplexity {facts['warm_up']['perplexity']:.0f}, Fréchet distance of its reconstructions "
        f"{facts['warm_up']['frechet_distance']:.2f}. Real scenes against held-out ones: {facts['real_distance']:.2f}. "
        f"Judge: {100 * facts['judge_accuracy']:.2f}% of held-out scenes.",
        "",
    ]
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Four panels against steps: every run as a thin line, the mean over seeds as a thick one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    for axis, ((part, value), label) in zip(axes.flat, _PANELS.items(), strict=True):
        for number, (name, title) in enumerate(RECIPES.items()):
            found = curves(result, name, part, value)
            if not found:
                continue
            colour = f"C{number}"
            for curve in found:
                axis.plot(*zip(*curve, strict=True), color=colour, alpha=0.35, linewidth=1)
            steps = [step for step, _ in found[0]]
            means = [statistics.mean(curve[i][1] for curve in found) for i in range(min(map(len, found)))]
            axis.plot(steps[: len(means)], means, color=colour, linewidth=2, marker="o", markersize=3, label=title)
        axis.set_xlabel("steps after the warm-up")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes.flat[0].legend()
    figure.savefig(path, dpi=110)
