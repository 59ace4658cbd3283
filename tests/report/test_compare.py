from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gear_engine.errors import ReportError
from gear_engine.report.compare import compare
from gear_engine.report.markdown import comparison_markdown, verdict_lines
from gear_engine.report.record import Report
from tests.report.conftest import make_record, make_row

Record = dict[str, Any]


def _verdicts(first: Record, second: Record) -> dict[str, str]:
    (comparison,) = compare([Report(first), Report(second)])
    return {change.row.id: change.verdict for change in comparison.changes}


def _noisy(scale: float, noise: float, seed: int, count: int = 60) -> list[float]:
    rng = np.random.default_rng(seed)
    return (scale * (1 + noise * rng.standard_normal(count))).clip(min=scale / 10).tolist()


def test_two_recorded_runs_of_one_commit_name_no_change(recorded: Callable[[str], Record]) -> None:
    verdicts = _verdicts(recorded("first"), recorded("second"))
    assert len(verdicts) == 6
    assert set(verdicts.values()) <= {"equal", "cannot tell"}, verdicts
    assert "equal" in verdicts.values()
    backwards = _verdicts(recorded("second"), recorded("first"))
    assert set(backwards.values()) <= {"equal", "cannot tell"}, backwards


def test_a_quiet_and_a_busy_recorded_run_name_no_change(recorded: Callable[[str], Record]) -> None:
    """The medians lie up to five times apart: other programs took half of the CPU in one of the runs."""
    (comparison,) = compare([Report(recorded("quiet")), Report(recorded("busy"))])
    assert len(comparison.changes) >= 5
    assert max(change.ratio.value for change in comparison.changes) > 1.3
    assert {change.verdict for change in comparison.changes} == {"cannot tell"}


def test_a_recorded_run_equals_itself(recorded: Callable[[str], Record]) -> None:
    verdicts = _verdicts(recorded("quiet"), recorded("quiet"))
    assert set(verdicts.values()) <= {"equal", "cannot tell"}
    assert "equal" in verdicts.values()


def test_ten_percent_on_one_op_is_found_and_named(recorded: Callable[[str], Record]) -> None:
    first, second = recorded("quiet"), recorded("quiet")
    quiet = [index for index, row in enumerate(Report(first).rows) if row.summary.noise < 0.015]
    assert quiet
    for index in quiet:
        second = recorded("quiet")
        second["rows"][index]["samples"] = [1.1 * each for each in second["rows"][index]["samples"]]
        (comparison,) = compare([Report(first), Report(second)])
        slower = [change.row.id for change in comparison.changes if change.verdict == "slower"]
        assert slower == [Report(second).rows[index].id]
        assert any(line.startswith("SLOWER: " + slower[0]) for line in verdict_lines(comparison))
        assert [change for change in comparison.changes if change.regressed(0.05)]
        assert not [change for change in comparison.changes if change.regressed(0.2)]


def test_noise_says_cannot_tell() -> None:
    first = make_record([make_row(samples=_noisy(0.01, 0.5, 1, 20))])
    second = make_record([make_row(samples=[1.1 * each for each in _noisy(0.01, 0.5, 2, 20)])])
    assert set(_verdicts(first, second).values()) == {"cannot tell"}


def test_a_machine_that_slowed_down_says_cannot_tell() -> None:
    """10% more in the row, and 17% less in the control measurements around it."""
    fast, slow = {"bandwidth": 3e10, "rate": 1e11}, {"bandwidth": 2.5e10, "rate": 1e11}
    first = make_record([make_row(samples=_noisy(0.01, 0.01, 1), control=fast)])
    second = make_record([make_row(samples=_noisy(0.011, 0.01, 2), control=slow)])
    assert set(_verdicts(first, second).values()) == {"cannot tell"}
    second["rows"][0]["control"] = fast
    assert set(_verdicts(first, second).values()) == {"slower"}
    assert set(_verdicts(second, first).values()) == {"faster"}


def test_a_machine_of_another_speed_says_cannot_tell_of_large_changes_too() -> None:
    """On a shared machine a row may follow the machine's speed by more than the controls do."""
    fast, slow = {"bandwidth": 3e10, "rate": 1.5e11}, {"bandwidth": 2.9e10, "rate": 1.1e11}
    first = make_record([make_row(samples=_noisy(0.01, 0.01, 1), control=fast)])
    second = make_record([make_row(samples=_noisy(0.018, 0.01, 2), control=slow)])
    (comparison,) = compare([Report(first), Report(second)])
    assert comparison.changes[0].ratio.low > 1.2 and comparison.changes[0].verdict == "cannot tell"
    assert not comparison.changes[0].regressed(0.05)
    assert "busy ±30%" in comparison_markdown([comparison])


def test_a_busy_machine_says_cannot_tell() -> None:
    quiet, busy = ({"bandwidth": 3e10, "rate": 1e11, "others": share} for share in (0.01, 0.4))
    first = make_record([make_row(samples=_noisy(0.01, 0.01, 1), control=quiet)])
    second = make_record([make_row(samples=_noisy(0.02, 0.01, 2), control=busy)])
    assert set(_verdicts(first, second).values()) == {"cannot tell"}
    second["rows"][0]["control"] = quiet
    assert set(_verdicts(first, second).values()) == {"slower"}


def test_few_samples_cannot_tell() -> None:
    first, second = make_record([make_row(samples=[1.0])]), make_record([make_row(samples=[2.0])])
    assert set(_verdicts(first, second).values()) == {"cannot tell"}


def test_many_equal_rows_name_none() -> None:
    rows = [
        [make_row(params={"n": n}, samples=_noisy(0.01, 0.02, 100 * run + n, 40)) for n in range(60)] for run in (1, 2)
    ]
    verdicts = list(_verdicts(make_record(rows[0]), make_record(rows[1])).values())
    assert "slower" not in verdicts and "faster" not in verdicts
    assert verdicts.count("equal") > 50


def test_devices_side_by_side() -> None:
    first = make_record([make_row(samples=_noisy(0.01, 0.01, 1))])
    second = make_record([make_row(samples=_noisy(0.002, 0.01, 2))])
    second["device"]["name"] = "Another CPU, 8 cores"
    (comparison,) = compare([Report(first), Report(second)])
    assert not comparison.same_device
    assert comparison.changes[0].ratio.value == pytest.approx(0.2, rel=0.02)
    text = comparison_markdown([comparison])
    assert "The devices differ" in text and "**faster**" in text


def test_three_reports_and_rows_of_one_side() -> None:
    first = make_record([make_row(), make_row(benchmark="prefill")])
    second = make_record([make_row(), make_row(benchmark="rollout")])
    comparisons = compare([Report(first), Report(second), Report(first)])
    assert len(comparisons) == 2
    assert comparisons[0].only_baseline == ("prefill[model=LlamaGen-B, images=1] cpu",)
    assert comparisons[0].only_other == ("rollout[model=LlamaGen-B, images=1] cpu",)


def test_refuses() -> None:
    record = make_record([make_row()])
    with pytest.raises(ReportError, match="at least two"):
        compare([Report(record)])
    with pytest.raises(ReportError, match="no row in common"):
        compare([Report(record), Report(make_record([make_row(benchmark="prefill")]))])
    with pytest.raises(ReportError, match=r"1 token in one report and 4 image in the other.*different work"):
        compare([Report(record), Report(make_record([make_row(items=4, item="image")]))])
