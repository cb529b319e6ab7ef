"""``paddle-ft chaos``: faults on purpose, and what came of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from paddle_ft.chaos import plan as plans

chaos_app = typer.Typer(no_args_is_help=True, help="Hurt a job on purpose and see what it does.")
_PASS_ON = {"allow_extra_args": True}


@chaos_app.callback()
def options() -> None:
    """Hurt a job on purpose and see what it does."""


@chaos_app.command(context_settings=_PASS_ON)
def run(
    context: typer.Context,
    plan: Annotated[str, typer.Argument(help="TOML file, or a plan such as kill-worker@30s")],
    compare: Annotated[
        bool, typer.Option(help="run it undisturbed first, and compare the weights")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="write the report to this file, too")] = None,
) -> None:
    """Start a job with the arguments after --, do the faults of a plan, and print a report."""
    from paddle_ft.chaos import run as runner

    read = runner.read_plan(Path(plan)) if plan.endswith(".toml") else plans.parse(plan)
    report, code = runner.run(replace(read, compare=compare or read.compare), context.args, json)
    for line in report:
        typer.echo(line)
    raise typer.Exit(code)


@chaos_app.command()
def show(
    plan: Annotated[str, typer.Argument(help="TOML file, or a plan such as kill-worker@30s")],
) -> None:
    """Print the faults of a plan, the random ones too, without doing them."""
    from paddle_ft.chaos import run as runner

    read = runner.read_plan(Path(plan)) if plan.endswith(".toml") else plans.parse(plan)
    for fault in read.faults:
        typer.echo(str(fault))
