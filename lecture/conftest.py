"""How `python -m pytest lecture` runs, and the list of the exercises that it ends with."""

from pathlib import Path

import pytest

COLORS = {"right": "green", "wrong": "red", "not begun": "yellow"}
OUTCOMES = {"passed": "right", "failed": "wrong", "skipped": "not begun"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """None: it takes longer to start processes than to check all exercises in this one."""
    paths = [config.invocation_params.dir / arg.partition("::")[0] for arg in config.args]
    is_alone = all(path.resolve().is_relative_to(Path(__file__).parent) for path in paths)
    return 0 if is_alone else None  # None leaves it to pytest-xdist


def pytest_terminal_summary(terminalreporter):
    """In the lecture's order, in place of pytest's list of what was skipped and what failed."""
    reports = [r for outcome in OUTCOMES for r in terminalreporter.stats.get(outcome, [])]
    rows = [
        (*dict(report.user_properties)["exercise"], OUTCOMES[report.outcome])
        for report in reports
        if "exercise" in dict(report.user_properties)
    ]
    if not rows:
        return
    if len(rows) == len(reports):
        terminalreporter.reportchars = ""
    terminalreporter.section("exercises")
    for _, name, step, outcome in sorted(rows):
        line = f"{step[:7]}  {name:24}{outcome}"
        terminalreporter.write_line(line, **{COLORS[outcome]: True})
