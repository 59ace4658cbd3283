"""Two or more reports side by side, and what changed beyond noise.

A row's change is the ratio of medians, other / baseline, with an interval that counts three sources of doubt: the noise
of the samples (bootstrap), the number of rows looked at (Bonferroni), and, on one device, how much faster or slower the
machine itself was, by the control measurements that bracket every row. When the interval is too wide to decide, or
other programs were busy while one of the rows was measured, the verdict is ``"cannot tell"``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gear_engine.errors import ReportError
from gear_engine.report.record import Report, Row
from gear_engine.report.statistics import Interval, ratio_of_medians

__all__ = ["EQUAL_WITHIN", "Change", "Comparison", "Verdict", "compare"]

Verdict = Literal["faster", "slower", "equal", "cannot tell"]

#: Two medians are called equal if the whole interval of their ratio lies within this of 1.
EQUAL_WITHIN = 0.05
#: Differences below this are never named, however narrow the interval: where memory and threads happen to lie moves the
#: medians of two runs of one commit by so much.
SMALLEST_CHANGE = 0.05
#: Share of CPU time of other processes beyond which a row says nothing about a change.
DISTURBED = 0.10
#: How far the machine's own speed may move between two rows; a row follows it by more or by less than the controls do.
UNSTEADY = 1.10
#: The control measurements agree with themselves to about this on an idle machine.
_CONTROL_NOISE = 0.05


@dataclass(frozen=True)
class Change:
    """One row in two reports.

    Attributes:
        row, other: baseline and other; equal ids.
        ratio: median(other) / median(baseline) with its interval; above 1 is slower.
        machine: how far the machine's own speed moved between the two, as a factor >= 1; widens ``ratio``.
        disturbed: other processes took more of the CPU than :data:`DISTURBED` while one of the two was measured, or
            ``machine`` is above :data:`UNSTEADY`.
        verdict: what the interval allows to say.
    """

    row: Row
    other: Row
    ratio: Interval
    machine: float
    disturbed: bool
    verdict: Verdict

    def regressed(self, limit: float) -> bool:
        """Whether the other report is slower beyond noise and by more than ``limit`` (0.05: 5%)."""
        return self.verdict == "slower" and self.ratio.value > 1 + limit


@dataclass(frozen=True)
class Comparison:
    """Another report against the baseline.

    Attributes:
        baseline, other: the reports.
        changes: the rows that both have, in the baseline's order.
        only_baseline, only_other: ids of rows that only one of them has.
    """

    baseline: Report
    other: Report
    changes: tuple[Change, ...]
    only_baseline: tuple[str, ...]
    only_other: tuple[str, ...]

    @property
    def same_device(self) -> bool:
        return _device_key(self.baseline) == _device_key(self.other)

    def count(self, verdict: Verdict) -> int:
        return sum(change.verdict == verdict for change in self.changes)


def _device_key(report: Report) -> tuple[str, str, int]:
    return report.device["kind"], report.device["name"], report.device["cpu"]["threads"]


def _machine_factor(row: Row, other: Row) -> float:
    """How far the control measurements around the two rows lie apart, beyond their own noise; 1 if they agree."""
    first, second = row.data.get("control"), other.data.get("control")
    if not first or not second:
        return 1.0
    apart = max(abs(math.log(second[name] / first[name])) for name in ("bandwidth", "rate"))
    return math.exp(max(0.0, apart - _CONTROL_NOISE))


def _disturbed(row: Row) -> bool:
    return bool(row.data.get("control", {}).get("others", 0) > DISTURBED)


def _verdict(ratio: Interval) -> Verdict:
    if ratio.low > 1 + SMALLEST_CHANGE:
        return "slower"
    if ratio.high < 1 / (1 + SMALLEST_CHANGE):
        return "faster"
    if ratio.low >= 1 / (1 + EQUAL_WITHIN) and ratio.high <= 1 + EQUAL_WITHIN:
        return "equal"
    return "cannot tell"


def _change(row: Row, other: Row, comparisons: int, same_device: bool) -> Change:
    if row.data["item"] != other.data["item"] or row.data["items"] != other.data["items"]:
        raise ReportError(
            f"{row.id} makes {row.data['items']:g} {row.data['item']} in one report and {other.data['items']:g} "
            f"{other.data['item']} in the other: they did different work and cannot be compared"
        )
    ratio = ratio_of_medians(row.samples, other.samples, comparisons=comparisons)
    machine = _machine_factor(row, other) if same_device else 1.0
    ratio = Interval(ratio.value, ratio.low / machine, ratio.high * machine)
    disturbed = same_device and (machine > UNSTEADY or _disturbed(row) or _disturbed(other))
    return Change(row, other, ratio, machine, disturbed, "cannot tell" if disturbed else _verdict(ratio))


def compare(reports: Sequence[Report]) -> list[Comparison]:
    """Every other report against the first.

    Raises:
        ReportError: fewer than two reports, or no row in common.
    """
    if len(reports) < 2:
        raise ReportError("a comparison needs at least two reports")
    baseline = reports[0]
    first = {row.id: row for row in baseline.rows}
    comparisons = []
    for report in reports[1:]:
        second = {row.id: row for row in report.rows}
        common = [name for name in first if name in second]
        if not common:
            raise ReportError(
                f"{baseline.source} and {report.source} have no row in common; run both with the same preset or filter"
            )
        same_device = _device_key(baseline) == _device_key(report)
        changes = tuple(_change(first[name], second[name], len(common), same_device) for name in common)
        comparisons.append(
            Comparison(
                baseline,
                report,
                changes,
                tuple(name for name in first if name not in second),
                tuple(name for name in second if name not in first),
            )
        )
    return comparisons
