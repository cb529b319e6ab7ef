"""``paddle-ft``: launch a job, look at it, look after its checkpoints, serve models.

What a command needs is imported when it runs, so that help and completion are quick.
"""

from __future__ import annotations

import sys
import time
from argparse import SUPPRESS
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperCommand, TyperGroup

from paddle_ft import launch as launcher
from paddle_ft.chaos.cli import chaos_app
from paddle_ft.command_line import version
from paddle_ft.config import EtcdConfig
from paddle_ft.coordination import schema
from paddle_ft.coordination.view import find_trouble, live_nodes
from paddle_ft.entry import exit_code_of
from paddle_ft.errors import ConfigError, MembersMissing
from paddle_ft.health.cli import health
from paddle_ft.health.probe_cli import probe
from paddle_ft.serve.gateway_cli import gateway
from paddle_ft.serve.group_cli import promote
from paddle_ft.serve.onnx import onnx
from paddle_ft.serve.publish_cli import models, publish
from paddle_ft.serve.serving_cli import serve, serving

LOGS = Path("log")
"""Where a launcher that was not told otherwise puts its output."""

app = typer.Typer(
    name="paddle-ft",
    help="Fault-tolerant training and serving with PaddlePaddle.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


class _CkptGroup(TyperGroup):
    """The commands of ``checkpoint.cli``, imported when one of them is asked for."""

    def _real(self) -> TyperGroup:
        from paddle_ft.checkpoint.cli import ckpt_app

        group = typer.main.get_command(ckpt_app)
        assert isinstance(group, TyperGroup)
        return group

    def list_commands(self, ctx: Any) -> list[str]:
        return self._real().list_commands(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return self._real().get_command(ctx, cmd_name)


_ckpt = typer.Typer(
    cls=_CkptGroup, no_args_is_help=True, help="Look at checkpoints and look after them."
)
_ckpt.callback()(lambda: None)
app.add_typer(_ckpt, name="ckpt")
app.command()(health)
app.command()(probe)
app.command()(publish)
app.command()(models)
app.command()(onnx)
app.command()(gateway)
app.command()(serving)
app.command()(promote)
app.add_typer(chaos_app, name="chaos")


def _tell_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version())
        raise typer.Exit


@app.callback()
def options(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_tell_version, is_eager=True, help="tell it and end"),
    ] = False,
) -> None:
    """Fault-tolerant training and serving with PaddlePaddle."""


@dataclass(frozen=True)
class _Completion:
    """As click's CompletionItem, which is in click or in typer, by typer's version."""

    value: str
    help: str
    type: str = "plain"


class _PassOn(TyperCommand):
    """A command with an argument parser of its own; what it knows is completed, too."""

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        from paddle_ft import command_line
        from paddle_ft.serve import command

        parser = (command if ctx.info_name == "serve" else command_line).build_parser()
        known = [
            (option, action.help or "")
            for action in parser._actions
            for option in action.option_strings
            if option.startswith("--") and action.help != SUPPRESS
        ]
        return [
            _Completion(option, told)
            for option, told in known
            if incomplete.startswith("-") and option.startswith(incomplete)
        ]


_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


app.command(context_settings=_PASS_ON, add_help_option=False, cls=_PassOn)(serve)


@app.command(context_settings=_PASS_ON, add_help_option=False, cls=_PassOn)
def launch(context: typer.Context) -> None:
    """Run a training script: the same as python -m paddle_ft.launch."""
    raise typer.Exit(launcher.main(context.args))


@app.command()
def events(
    log_dir: Annotated[Path, typer.Option("--log_dir", "--log-dir", help="of a launcher")] = LOGS,
    follow: Annotated[bool, typer.Option("--follow", help="go on with what is to come")] = False,
) -> None:
    """Show what has happened to a job: faults, generations, checkpoints."""
    from paddle_ft.observe.cli import show_events

    show_events(log_dir, follow)


@app.command()
def goodput(
    log_dirs: Annotated[
        list[Path] | None, typer.Argument(help="those of all launchers of a job; default: log")
    ] = None,
    log_dir: Annotated[
        Path | None, typer.Option("--log_dir", "--log-dir", help="one more of them")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Show where the time of a job has gone, whether it runs or has ended."""
    from paddle_ft.observe.cli import show_goodput

    given = [*(log_dirs or ()), *([log_dir] if log_dir else ())]
    show_goodput(given or [LOGS], as_json)


@app.command()
def status(
    etcd: Annotated[str, typer.Option(help="etcd members, host:port,…", envvar="PADDLE_FT_ETCD")],
    job_id: Annotated[str, typer.Option("--job-id", "--job_id", help="name of the job")],
    watch: Annotated[bool, typer.Option(help="go on, a look each second")] = False,
) -> None:
    """Show who takes part in a job, its generation and its newest checkpoint."""
    from paddle_ft.coordination.etcd import EtcdCoordinator

    endpoints = tuple(filter(None, etcd.split(",")))
    coordinator = EtcdCoordinator(EtcdConfig(endpoints=endpoints))
    keys = schema.Keys(job_id)
    screen = Console()
    try:
        while True:
            state = schema.parse(keys, coordinator.read(keys.prefix).kvs)
            if watch:
                screen.clear()
            for line in describe(job_id, state):
                screen.print(line, markup=False, highlight=False, soft_wrap=True)
            if not watch:
                break
            time.sleep(1.0)
    finally:
        coordinator.close()


@app.command()
def drain(
    node: Annotated[str, typer.Argument(help="name of the node, as paddle-ft status shows it")],
    etcd: Annotated[str, typer.Option(help="etcd members, host:port,…", envvar="PADDLE_FT_ETCD")],
    job_id: Annotated[str, typer.Option("--job-id", "--job_id", help="name of the job")],
    timeout_s: Annotated[float, typer.Option(help="how long to wait for it to be gone")] = 120.0,
) -> None:
    """Move the work of a node elsewhere and let it go, without losing a step."""
    from paddle_ft.coordination.etcd import EtcdCoordinator

    coordinator = EtcdCoordinator(EtcdConfig(endpoints=tuple(filter(None, etcd.split(",")))))
    keys = schema.Keys(job_id)
    try:
        state = schema.parse(keys, coordinator.read(keys.prefix).kvs)
        found = [r for r in live_nodes(state).values() if r.value.member.node == node]
        if not found:
            names = ", ".join(sorted(r.value.member.node for r in live_nodes(state).values()))
            raise ConfigError(f"job {job_id} has no node {node}: it has {names or 'none'}")
        coordinator.transact(schema.ask_to_leave(keys, found[0]))
        deadline_s = time.monotonic() + timeout_s
        while found[0].value.member.id in live_nodes(state):
            if time.monotonic() > deadline_s:
                raise MembersMissing(
                    f"node {node} is still there after {timeout_s:g} s: see the output of its "
                    f"launcher"
                )
            time.sleep(0.1)
            state = schema.parse(keys, coordinator.read(keys.prefix).kvs)
    finally:
        coordinator.close()
    typer.echo(f"node {node} has left job {job_id}")


def describe(job_id: str, state: schema.JobState) -> Iterator[str | Table]:
    """What a person wants to know of a job."""
    if not state.nodes and state.generation is None:
        yield f"job {job_id}: nothing is known of it"
        return
    generation = state.generation.value if state.generation else None
    yield f"job {job_id}: " + (
        f"generation {generation.number}, {generation.world_size} ranks, "
        f"{generation.restarts} restarts; {generation.reason}"
        if generation
        else "has not started yet"
    )
    head = state.head.value.newest if state.head else None
    yield f"newest checkpoint: step {head.step} ({head.manifest})" if head else "no checkpoint yet"
    if not state.nodes:
        yield "no launcher of it is running now"
        return
    trouble = find_trouble(state)
    if trouble is not None:
        yield f"trouble: {trouble}"
    if state.outcome is not None:
        yield f"ended with {state.outcome.value.exit_code}: {state.outcome.value.reason}"
    yield _nodes(state)


def _nodes(state: schema.JobState) -> Table:
    table = Table("node", "address", "ranks", "state", "", box=None, pad_edge=False)
    generation = state.generation.value if state.generation else None
    members = generation.member_ids() if generation else ()
    for member_id, record in sorted(live_nodes(state).items()):
        member, told = record.value.member, record.value.status
        ranks = "in reserve"
        if generation is not None and member_id in members:
            first = generation.first_rank(member_id)
            ranks = ",".join(str(first + slot) for slot in range(member.slots))
        notes = ["leader"] if state.leader and state.leader.value == member_id else []
        notes += ["leaving"] if record.value.leaving else []
        notes += [escape(told.reason)] if told.reason else []
        table.add_row(member.node, member.host, ranks, told.state, ", ".join(notes))
    for name in sorted(state.quarantine):
        table.add_row(name, "", "", "in quarantine", "")
    return table


def main() -> None:
    """Entry point; operating errors end in one sentence and their exit code."""
    sys.exit(exit_code_of(app, "paddle-ft"))


if __name__ == "__main__":
    main()
