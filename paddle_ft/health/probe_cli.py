"""``paddle-ft probe``: what this node can do, and whether it keeps up with the others."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from paddle_ft.config import EtcdConfig
from paddle_ft.coordination import schema
from paddle_ft.errors import EXIT_UNFIT, ConfigError
from paddle_ft.health.figures import NAMES, Entry, Figures, Finding, told


def probe(
    cache: Annotated[str, typer.Option(help="directory whose disk is measured, too")] = "",
    etcd: Annotated[
        str, typer.Option(help="etcd members, host:port,…", envvar="PADDLE_FT_ETCD")
    ] = "",
    job_id: Annotated[str, typer.Option("--job-id", "--job_id", help="name of the job")] = "",
    nodes: Annotated[
        int, typer.Option(min=0, help="measure pairs of so many nodes, which all run this")
    ] = 0,
    node: Annotated[str, typer.Option(help="name of this node (that of the host)")] = "",
    host: Annotated[str, typer.Option(help="address of this node (found out)")] = "",
    timeout_s: Annotated[float, typer.Option(help="how long to wait for the others")] = 120.0,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Measure this node, before it joins a job: matrix product, memory copy, disk.

    With --etcd and --job-id it is compared with the nodes that have joined with launch --probe.
    With --nodes N as well, which is run on N nodes at once, all-reduces are measured in changing
    pairs, and the bad node or link among them is named.

    Ends with 0 if nothing is wrong, with 7 if this node or a link of it is.
    """
    from paddle_ft.health.probe import measure

    if (nodes or etcd) and not (etcd and job_id):
        raise ConfigError("give --etcd host:port and --job-id NAME")
    if nodes == 1:
        raise ConfigError("--nodes 1 makes no pair: give 2 or more, or leave it out")
    figures = measure(cache)
    entries: list[Entry] = []
    name = node or "this node"
    findings: list[Finding] = []
    if etcd:
        name, entries, findings = _compared(figures, etcd, job_id, nodes, node, host, timeout_s)
    if as_json:
        whole = {"node": name, "figures": asdict(figures), "findings": [*map(asdict, findings)]}
        typer.echo(json.dumps(whole | {"entries": [*map(asdict, entries)]}, indent=1))
    else:
        _show(name, figures, entries, findings)
    if any(name in finding.nodes for finding in findings):
        raise typer.Exit(EXIT_UNFIT)


def _compared(
    figures: Figures, etcd: str, job_id: str, nodes: int, node: str, host: str, timeout_s: float
) -> tuple[str, list[Entry], list[Finding]]:
    from paddle_ft.agent.net import NodeName, address_towards
    from paddle_ft.coordination.etcd import EtcdCoordinator
    from paddle_ft.health.figures import judge, shortfalls
    from paddle_ft.health.pairs import measure_pairs
    from paddle_ft.health.probe import figures_of_others

    config = EtcdConfig(endpoints=tuple(filter(None, etcd.split(","))))
    keys = schema.Keys(job_id)
    coordinator = EtcdCoordinator(config)
    with contextlib.closing(coordinator):
        named = NodeName(job_id, node)
        try:
            if not nodes:
                others = figures_of_others(coordinator, keys, named.name)
                short = shortfalls(figures, others)
                return named.name, [], [Finding((named.name,), "; ".join(short))] if short else []
            entries = measure_pairs(
                coordinator,
                keys,
                config,
                node=named.name,
                host=host or address_towards(coordinator.targets),
                count=nodes,
                figures=figures,
                timeout_s=timeout_s,
            )
            return named.name, entries, judge(entries)
        finally:
            named.release()


def _show(
    name: str, figures: Figures, entries: Sequence[Entry], findings: Sequence[Finding]
) -> None:
    screen = Console(soft_wrap=True)
    table = Table("", box=None, pad_edge=False)
    columns = {e.node: e.figures for e in entries} or {name: figures}
    for column in columns:
        table.add_column(column, justify="right")
    for figure, words in NAMES.items():
        table.add_row(words, *(told(figure, getattr(f, figure)) for f in columns.values()))
    screen.print(table)
    for entry in entries:
        pairs = [
            f"{p.peer} {p.seconds * 1000:.0f} ms" if p.seconds >= 0 else f"{p.peer} failed"
            for p in entry.pairs
        ]
        screen.print(f"{entry.node}: all-reduce with {', '.join(pairs) or 'nobody'}", markup=False)
    for finding in findings:
        what = "node" if len(finding.nodes) == 1 else "link"
        screen.print(f"bad {what} {' - '.join(finding.nodes)}: {finding.reason}", markup=False)
    if not findings:
        screen.print("nothing is wrong" if entries else f"{name} works")
