"""The result of the serving benchmark: parts run at different times, as one document and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.report import Row

NAME = "bench-serving"


BUSY = 0.2
"""More of the processors in use by others: then it is them, too, that is measured."""


@dataclass
class Part:
    """The rows of one part, and under which circumstances they came about."""

    rows: list[Row]
    at: str
    """UTC."""
    took_s: float
    load_average: tuple[float, float]
    """Over a minute, when it began and when it ended."""
    options: str
    """What was asked for, in words."""
    commit: str = ""
    busy: float | None = None
    """Share of the processors that others used just before."""


def unfinished(group: str, why: str) -> list[Row]:
    """In place of the rows of a part that could not be measured."""
    return [Row(group, "the whole part", "", (), note=f"not run: {why}")]


def to_json(parts: Mapping[str, Part], facts: Mapping[str, Any]) -> str:
    told = {
        name: {**asdict(part), "rows": [_row(row) for row in part.rows]}
        for name, part in parts.items()
    }
    return json.dumps({"machine": facts, "parts": told}, indent=1, ensure_ascii=False) + "\n"


def _row(row: Row) -> dict[str, Any]:
    """All that it is made of, and what follows, for who reads the JSON."""
    rounded = {name: [round(v, 6) for v in getattr(row, name)] for name in ("ours", "limit")}
    peers = {name: list(values) for name, values in row.peers.items()}
    ratio = None if row.ratio is None else round(row.ratio, 4)
    return {**asdict(row), **rounded, "peers": peers, "ratio": ratio, "reached": row.reached}


def from_json(text: str) -> dict[str, Part]:
    """Raises ValueError, KeyError, TypeError for what ``to_json`` has not written."""
    found = {}
    for name, told in json.loads(text)["parts"].items():
        rows = [
            Row(**{k: v for k, v in row.items() if k not in ("ratio", "reached")})
            for row in told.pop("rows")
        ]
        told["load_average"] = tuple(told["load_average"])
        found[name] = Part(rows, **told)
    return found


def document(parts: Mapping[str, Part], facts: Mapping[str, Any], wanted: Sequence[str]) -> str:
    """``wanted``: the names of all parts there are, in their order."""
    packages = ", ".join(f"{name} {v}" for name, v in facts["packages"].items())
    rows = [row for name in wanted if name in parts for row in parts[name].rows]
    goals = [row for row in rows if row.goal is not None]
    lines = [
        "# Serving, measured",
        "",
        (
            "Written by `make bench-serving`; how each figure is taken stands in "
            "[bench/README.md](../bench/README.md). Parts can be run by themselves: each tells "
            "when it was."
        ),
        "",
        (
            f"{facts['cores']} cores ({facts['cpu']}), {facts['memory_gib']} GiB, Linux "
            f"{facts['kernel']}, Python {facts['python']}; {packages}."
        ),
        "",
        (
            f"**{sum(row.reached is True for row in goals)} of {len(goals)} goals reached.** "
            f"{sum(row.reached is None for row in goals)} were not measured; "
            f"{sum(name not in parts for name in wanted)} of {len(wanted)} parts were not run."
        ),
    ]
    for name in wanted:
        if name not in parts:
            lines += ["", f"## {name}", "", "Not run."]
            continue
        part = parts[name]
        for group in dict.fromkeys(row.group for row in part.rows):
            lines += ["", f"## {group}", "", _circumstances(part), ""]
            lines += _table([row for row in part.rows if row.group == group])
    return "\n".join(lines) + "\n"


def _circumstances(part: Part) -> str:
    begin, end = part.load_average
    told = f"{part.at}, {part.took_s:.0f} s; {part.options}. "
    told += f"Load average {begin:.1f} before, {end:.1f} after."
    if part.busy is not None:
        told += f" Just before, {100 * part.busy:.0f} % of the processors were in use by others."
        if part.busy > BUSY:
            told += " **These figures say little.**"
    return told


def _table(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| | ours | unit | against | ratio | goal | reached | others |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(row.to_markdown() for row in rows),
    ]
    notes = [f"- {row.name}: {_plain(row.note)}" for row in rows if row.note]
    return [*lines, "", *notes] if notes else lines


def _plain(text: str) -> str:
    """What servers have answered may hold anything."""
    return " ".join(text.split()).replace("|", "/").replace("<", "&lt;")


def write(
    folder: Path, parts: Mapping[str, Part], facts: Mapping[str, Any], wanted: Sequence[str]
) -> None:
    """``bench-serving.json`` and ``bench-serving.md`` in ``folder``."""
    (folder / f"{NAME}.json").write_text(to_json(parts, facts))
    (folder / f"{NAME}.md").write_text(document(parts, facts, wanted))


def read(folder: Path) -> dict[str, Part]:
    """What was measured before; {} if there is nothing, or nothing of this form."""
    try:
        return from_json((folder / f"{NAME}.json").read_text())
    except (OSError, ValueError, KeyError, TypeError):
        return {}
