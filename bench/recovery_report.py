"""What was measured of recovery, as tables and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.recovery_analysis import median, percentile
from bench.recovery_trials import Outcome, first_again, told_of_hangs
from bench.report import Row

HEAD = (
    "| system | settings | ranks | trials | failed | p50 | p99 | max | beyond a step, p50 / p99 | "
    "steps redone | all ranks again | goal | reached |"
)


def row_of(outcome: Outcome) -> str:
    """One line of the table; times in seconds."""
    name = f"**{outcome.name}**" if outcome.name == "paddle_ft" else outcome.name
    cells = [name, outcome.settings, str(outcome.ranks)]
    if outcome.not_run:
        return f"| {' | '.join([*cells, outcome.not_run, *[''] * 9])} |"
    failed = str(outcome.failures)
    if outcome.failures:
        failed = f"**{outcome.failures}** (> {outcome.timeout_s:g} s)"
    cells += [str(outcome.trials), failed]
    new = [r.new_s for r in outcome.found]
    if new:
        beyond, redone = outcome.beyond(), [r.redone for r in outcome.found]
        full = [r.full_s for r in outcome.found if r.full_s is not None]
        again = f"{median(full):.2f} ({len(full)} of {len(new)})" if full else "never"
        cells += [
            f"**{percentile(new, 0.5):.3f}**", f"{percentile(new, 0.99):.3f}", f"{max(new):.3f}",
            f"{percentile(beyond, 0.5):.3f} / {percentile(beyond, 0.99):.3f}",
            f"{median(redone):g}, at most {max(redone)}", again,
        ]  # fmt: skip
    else:
        cells += ["never", *[""] * 5]
    goal = "" if outcome.goal_s is None else "{:g} / {:g}".format(*outcome.goal_s)
    cells += [goal, {True: "yes", False: "**no**", None: ""}[outcome.reached]]
    return f"| {' | '.join(cells)} |"


def document(
    name: str, facts: Mapping[str, Any], outcomes: Sequence[Outcome], rows: Sequence[Row], how: str
) -> str:
    packages = ", ".join(f"{name} {v}" for name, v in facts["packages"].items())
    reached = [o.reached for o in outcomes if o.reached is not None]
    reached += [r.reached for r in rows if r.reached is not None]
    lines = [
        "# Recovery, measured",
        "",
        (
            f"Written by `make {name}`; how each figure is taken stands in "
            "[bench/README.md](../bench/README.md). Seconds from the signal to the first **new** "
            "step that all ranks of the world there is then have applied; a trial that does not "
            "come to one in time is counted as failed."
        ),
        "",
        (
            f"{facts['cores']} cores ({facts['cpu']}), {facts['memory_gib']} GiB, Linux "
            f"{facts['kernel']}, Python {facts['python']}; {packages}. {how}"
        ),
        "",
        f"**{sum(r is True for r in reached)} of {len(reached)} goals reached.**",
    ]
    for group in dict.fromkeys(o.group for o in outcomes):
        members = [o for o in outcomes if o.group == group]
        lines += ["", f"## {group}", "", HEAD, "| --- " * HEAD.count(" |") + "|"]
        lines += [row_of(o) for o in members]
        told = [(o, first_again(o) + told_of_hangs(o) + o.note) for o in members]
        notes = [f"- {o.name}, {o.settings}: {text}" for o, text in told if text]
        lines += ["", *notes] if notes else []
    for group in dict.fromkeys(r.group for r in rows):
        members_of = [r for r in rows if r.group == group]
        lines += ["", f"## {group}", "",
                  "| | ours | unit | against | ratio | goal | reached | others |",
                  "| --- | --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
        lines += [r.to_markdown() for r in members_of]
        notes = [f"- {r.name}: {r.note}" for r in members_of if r.note]
        lines += ["", *notes] if notes else []
    return "\n".join(lines) + "\n"


def load_told(loads: Sequence[float], cores: int, took_s: float) -> str:
    """What else the machine did: ``loads`` are averages over a minute, taken before each row."""
    middle, most = median(loads), max(loads)
    told = (
        f"Load average before the rows {middle:.1f} (median), {most:.1f} (most); the run took "
        f"{took_s:.0f} s. "
    )
    if middle > 1.5 * cores:  # what is measured is itself a load of one or two
        return told + "**The machine was busy with other work: these figures say little.**"
    return told + "The load is mostly that of the jobs that are measured."


def write(
    folder: Path,
    name: str,
    facts: Mapping[str, Any],
    outcomes: Sequence[Outcome],
    rows: Sequence[Row],
    loads: Sequence[float],
    took_s: float,
) -> None:
    """``<name>.json`` and ``<name>.md`` in ``folder``."""
    wire = {
        "machine": facts,
        "took_s": round(took_s),
        "load_average": [round(x, 2) for x in loads],
        "faults": [o.to_json() for o in outcomes],
        "rows": [r.to_json() for r in rows],
    }
    text = json.dumps(wire, indent=1, ensure_ascii=False)
    (folder / f"{name}.json").write_text(text + "\n")
    how = load_told(loads, facts["cores"], took_s)
    (folder / f"{name}.md").write_text(document(name, facts, outcomes, rows, how))
