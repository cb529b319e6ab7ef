"""``paddle-ft health``: who is where, who has not come to where the others wait, who is slow."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

from paddle_ft.config import EtcdConfig
from paddle_ft.coordination import schema
from paddle_ft.errors import ConfigError
from paddle_ft.health.judge import HealthRecord, missing_at
from paddle_ft.health.phases import NAMES

FLIGHTS_SHOWN = 3
STALE_S = 30.0
"""A file that is older belongs to a launcher that has ended, or hangs itself."""


@dataclass(frozen=True, slots=True)
class Told:
    """What one node has told, and how long ago where that is known."""

    node: str
    record: HealthRecord
    age_s: float = -1.0


def health(
    etcd: Annotated[
        str, typer.Option(help="etcd members, host:port,…", envvar="PADDLE_FT_ETCD")
    ] = "",
    job_id: Annotated[str, typer.Option("--job-id", "--job_id", help="name of the job")] = "",
    log_dir: Annotated[
        Path, typer.Option("--log-dir", "--log_dir", help="that of a launcher")
    ] = Path("log"),
    lift: Annotated[str, typer.Option(help="take this node out of quarantine")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Show what each rank is doing, who has not come where others wait, and who is slow.

    Without --etcd it is read from the log directory of a launcher.
    """
    if (lift or etcd) and not (etcd and job_id):
        raise ConfigError("give --etcd host:port and --job-id NAME")
    if lift:
        lift_quarantine(etcd, job_id, lift)
        return
    quarantine: Mapping[str, str] = {}
    if etcd:
        told, quarantine = from_etcd(etcd, job_id)
    else:
        told = from_files(log_dir)
    newest = max((t.record.generation for t in told), default=0)
    told = [t for t in told if t.record.generation == newest]
    flights = flights_in(log_dir)
    if as_json:
        nodes = [{"node": t.node, "age_s": t.age_s} | asdict(t.record) for t in told]
        whole = {"nodes": nodes, "quarantine": dict(quarantine), "flights": list(map(str, flights))}
        typer.echo(json.dumps(whole, indent=1))
        return
    screen = Console(soft_wrap=True)
    for line in describe(told, quarantine, flights):
        screen.print(line, markup=False, highlight=False)


def from_files(log_dir: Path) -> list[Told]:
    """What the launchers have left in ``log_dir``; raises ConfigError if there is nothing."""
    found = []
    for path in sorted(log_dir.glob("health-*.json")):
        try:
            whole = json.loads(path.read_text())
            record = TypeAdapter(HealthRecord).validate_python(
                {key: whole[key] for key in HealthRecord.__dataclass_fields__}
            )
            found.append(Told(str(whole["node"]), record, time.time() - float(whole["wall_s"])))
        except (OSError, ValueError, KeyError, TypeError, ValidationError):
            continue  # of another version, or cut off
    if not found:
        raise ConfigError(
            f"no launcher has told anything in {log_dir}: give its --log_dir, or --etcd and "
            f"--job-id"
        )
    return found


def from_etcd(endpoints: str, job_id: str) -> tuple[list[Told], Mapping[str, str]]:
    """What the nodes have told last, and who is in quarantine and why."""
    from paddle_ft.coordination.etcd import EtcdCoordinator

    coordinator = EtcdCoordinator(EtcdConfig(endpoints=tuple(filter(None, endpoints.split(",")))))
    keys = schema.Keys(job_id)
    try:
        kvs = coordinator.read(keys.prefix).kvs
    finally:
        coordinator.close()
    state = schema.parse(keys, kvs)
    told = [Told(m.rpartition(".")[0], v.value) for m, v in sorted(state.health.items())]
    prefix = keys.quarantine
    barred = {
        kv.key[len(prefix) :]: kv.value.decode(errors="replace")
        for kv in kvs
        if kv.key.startswith(prefix)
    }
    return told, barred


def lift_quarantine(endpoints: str, job_id: str, node: str) -> None:
    """Takes ``node`` out of quarantine; raises ConfigError if it is not in it."""
    from paddle_ft.coordination.etcd import EtcdCoordinator

    coordinator = EtcdCoordinator(EtcdConfig(endpoints=tuple(filter(None, endpoints.split(",")))))
    keys = schema.Keys(job_id)
    try:
        for kv in coordinator.read(keys.quarantine + node).kvs:
            if kv.key == keys.quarantine + node:
                coordinator.transact(schema.lift_quarantine(keys, node, kv.mod_revision))
                typer.echo(f"node {node} may take part in job {job_id} again")
                return
    finally:
        coordinator.close()
    raise ConfigError(f"node {node} is not in quarantine in job {job_id}")


def flights_in(log_dir: Path) -> list[Path]:
    """The last flight records, newest first."""
    found = [p for p in (log_dir / "flight").glob("*") if re.match(r"\d{8}T\d{6}-", p.name)]
    return sorted(found, reverse=True)[:FLIGHTS_SHOWN]


def describe(
    told: Iterable[Told], quarantine: Mapping[str, str], flights: Iterable[Path]
) -> Iterator[str | Table]:
    """What a person wants to know."""
    told = list(told)
    rows = [row for t in told for row in t.record.rows]
    if not rows:
        yield "nothing is known of any rank"
    else:
        yield f"generation {told[0].record.generation}"
        yield _ranks(told)
    missing = missing_at(rows, [t.record.waiting for t in told if t.record.waiting])
    if missing:
        names = ", ".join(str(row.rank) for row in missing)
        number = max((row.entered for row in rows if row.inside), default=0)
        where = f"collective {number}, in which others wait" if number else "the group"
        yield f"not come to {where}: rank {names}"
    for one in told:
        for verdict in one.record.verdicts:
            who = f"rank {verdict.rank}" if verdict.rank >= 0 else "links"
            yield f"{verdict.kind}: {who} on {one.node}: {verdict.reason}"
        if one.record.blamed:
            last = time.strftime("%F %T", time.localtime(one.record.blamed[-1]))
            yield f"{one.node}: {len(one.record.blamed)} workers were ended, the last at {last}"
    for node, reason in sorted(quarantine.items()):
        yield f"in quarantine: {node}: {reason}"
    for path in flights:
        yield f"flight record: {path}"


def _ranks(told: Iterable[Told]) -> Table:
    table = Table("rank", "node", "is", "collective", "unchanged", "", box=None, pad_edge=False)
    for one in told:
        old = f"told {one.age_s:.0f} s ago" if one.age_s > STALE_S else ""
        for row in one.record.rows:
            notes = [old, "stopped" if row.evidence == "stopped" else ""]
            notes += [] if row.alive else ["its process has ended"]
            table.add_row(*_cells(one.node, row, notes))
    return table


def _cells(node: str, row: Any, notes: list[str]) -> list[str]:
    number = f"in {row.entered}" if row.inside else f"after {row.entered}"
    what = "in a collective" if row.inside else NAMES[row.phase]
    still = f"{row.still_s:.1f} s"
    return [str(row.rank), node, what, number, still, ", ".join(filter(None, notes))]
