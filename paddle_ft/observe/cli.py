"""``paddle-ft events`` and ``goodput``: what has happened, and where the time has gone."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from paddle_ft.errors import ConfigError
from paddle_ft.observe import goodput
from paddle_ft.observe.events import FILE, Event, parse, read
from paddle_ft.observe.story import last_job

FOLLOW_S = 0.3
BAR_WIDTH = 40
CLOCKS = ("step_s",)
"""Fields that are a moment of CLOCK_MONOTONIC, which says nothing to people."""


def show_events(directory: Path, follow: bool) -> None:
    """Prints the events below ``directory``; ``follow``: and goes on with those to come."""
    if not follow:
        for event in sorted(_read([directory]), key=lambda e: e.wall_s):
            typer.echo(line_of(event))
        return
    for event in _follow(directory / FILE):
        typer.echo(line_of(event))


def line_of(event: Event) -> str:
    """One line for people."""
    clock = time.strftime("%H:%M:%S", time.localtime(event.wall_s))
    node = event.run.rpartition("-")[0] or event.run
    shown = {n: v for n, v in event.fields.items() if v not in ("", None) and n not in CLOCKS}
    told = ", ".join(_field(name, value) for name, value in shown.items())
    kind = event.kind.replace("_", " ")
    return f"{clock}.{int(event.wall_s % 1 * 1000):03} {node:10} {kind:14} {told}".rstrip()


def _field(name: str, value: Any) -> str:
    if isinstance(value, list):
        value = " ".join(map(str, value))
    elif isinstance(value, bool):
        value = "yes" if value else "no"
    return str(value) if name == "reason" else f"{name.replace('_', ' ')} {value}"


def _follow(path: Path) -> Iterator[Event]:
    """All events, and then each as it is written; without an end."""
    while True:
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            yield from _follow_one(path, file)
        time.sleep(FOLLOW_S)


def _follow_one(path: Path, file: BinaryIO) -> Iterator[Event]:
    """What is in ``file`` and comes, until there is another one by this name, and it is read."""
    rest, own = b"", os.fstat(file.fileno()).st_ino
    while True:
        try:
            replaced = path.stat().st_ino != own
        except FileNotFoundError:
            replaced = True
        data = file.read()
        *lines, rest = (rest + data).split(b"\n")
        yield from (event for line in lines if (event := parse(line)) is not None)
        if replaced and not data:
            return
        time.sleep(FOLLOW_S)


def show_goodput(directories: Sequence[Path], as_json: bool) -> None:
    """Prints where the time of the last job in these log directories has gone."""
    told = goodput.account(last_job(_read(directories)))
    if as_json:
        typer.echo(json.dumps(goodput.to_json(told), indent=2))
        return
    screen = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)
    screen.print(_table(told.seconds, told.wall_s))
    state = "" if told.ended else ", which has not ended or was killed"
    screen.print(f"\n{goodput.summary(told)}\nof {told.wall_s:.1f} s{state}", highlight=False)
    if not told.steps:
        screen.print("No step was told: only a script with a session tells them.")
        return
    redone = f", {told.steps_redone} of them done again" if told.steps_redone else ""
    screen.print(f"{told.steps} steps{redone}", highlight=False)
    if told.faults:
        screen.print(_faults(told.faults))


def _table(seconds: Mapping[goodput.Category, float], wall_s: float) -> Table:
    table = Table("", "", "s", "%", box=None, pad_edge=False, show_header=True)
    table.columns[2].justify = table.columns[3].justify = "right"
    for category in goodput.CATEGORIES:
        share = seconds[category] / wall_s if wall_s > 0 else 0.0
        style = "green" if category == "useful" else "red"
        bar = f"[{style}]{'█' * round(share * BAR_WIDTH):{BAR_WIDTH}}[/]"
        table.add_row(
            goodput.TITLES[category], bar, f"{seconds[category]:.2f}", f"{share * 100:.1f}"
        )
    return table


def _faults(faults: Sequence[goodput.Fault]) -> Table:
    table = Table("noticed", "fault", "detection", "recovery", "steps redone", box=None)
    for fault in faults:
        clock = time.strftime("%H:%M:%S", time.localtime(fault.wall_s))
        recovery = f"{fault.recovery_s:.2f} s" if fault.over else "not yet"
        told = (
            escape(fault.reason),
            f"{fault.detection_s:.2f} s",
            recovery,
            str(fault.steps_redone),
        )
        table.add_row(clock, *told)
    return table


def _read(directories: Sequence[Path]) -> list[Event]:
    """Raises ConfigError if there are no events."""
    named = ", ".join(map(str, directories))
    try:
        events = read(directories)
    except OSError as error:
        raise ConfigError(f"{named} cannot be read: {error.strerror}") from error
    if not events:
        raise ConfigError(f"no events are in {named}; give the --log_dir of a launcher.")
    return events
