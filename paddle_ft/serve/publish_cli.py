"""``paddle-ft publish`` and ``paddle-ft models``: put models into a store, see which are there."""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING, Annotated

import typer

from paddle_ft.errors import ConfigError, CoordinationError

if TYPE_CHECKING:
    from paddle_ft.config import Config
    from paddle_ft.serve.publish import Published

Url = Annotated[
    str,
    typer.Option(
        "--store", help="directory, file:// or s3://…", envvar="PADDLE_FT_CHECKPOINT__URL"
    ),
]
ConfigFile = Annotated[str | None, typer.Option("--config", help="TOML file with the settings")]
Json = Annotated[bool, typer.Option("--json", help="for programs")]


def publish(
    path: Annotated[
        str, typer.Argument(help="inference files (folder or prefix), or a folder with pipeline.py")
    ],
    name: Annotated[str, typer.Option("--name", "-n", help="of the model")],
    store: Url,
    outputs: Annotated[
        str, typer.Option(help="names for the outputs, in order: a,b; default: Paddle's own")
    ] = "",
    warm_up: Annotated[
        list[str] | None,
        typer.Option("--warm-up", help="shape of an input for warming up: image=4,3,48,320"),
    ] = None,
    batched: Annotated[
        bool | None,
        typer.Option(help="rows of requests may be joined; default: see shapes"),
    ] = None,
    etcd: Annotated[
        str, typer.Option(help="tell the group there: host:port,…", envvar="PADDLE_FT_ETCD")
    ] = "",
    group: Annotated[
        str, typer.Option(help="the serving group that is told, with --etcd")
    ] = "default",
    config_file: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """Publish a model as the next version of its name, and tell a serving group."""
    from paddle_ft.checkpoint.cli import settings_of
    from paddle_ft.config import load
    from paddle_ft.serve.publish import publish as run

    members = tuple(filter(None, etcd.removeprefix("etcd://").split(",")))
    access = load(
        {"etcd.endpoints": members, "serve.group": group},
        os.environ,
        config_file,
        {"etcd.endpoints": "--etcd", "serve.group": "--group"},
    ).config
    done = run(
        path,
        name,
        store,
        outputs=tuple(filter(None, outputs.split(","))),
        batched=batched,
        warm_up=dict(map(_shape, warm_up or [])),
        config=settings_of(config_file),
    )
    if members:
        _register(done, access)
    ref = done.ref
    if as_json:
        values = {"name": ref.name, "version": ref.version, "digest": ref.digest}
        values |= {"bytes": done.nbytes, "bytes_new": done.nbytes_new, "signed": done.signed}
        typer.echo(json.dumps(values))
        return
    typer.echo(
        f"{ref.name} {ref.version} is in {done.store_url}: {done.nbytes / 1e6:.1f} MB, of which "
        f"{done.nbytes_new / 1e6:.1f} MB are new; {'signed' if done.signed else 'not signed'}"
        + (f"; the serving group {access.serve.group} has been told" if members else "")
    )


def models(
    store: Url,
    name: Annotated[str, typer.Option("--name", "-n", help="only this model")] = "",
    config_file: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """List the models in a store, and their versions."""
    from rich.table import Table

    from paddle_ft.checkpoint.cli import open_url, screen
    from paddle_ft.errors import CheckpointError
    from paddle_ft.serve.models import list_versions, read_version

    place, trust = open_url(store, config_file)
    found = list_versions(place, name)
    if as_json:
        typer.echo(json.dumps(found))
        return
    if not found:
        typer.echo(f"{place.url} holds no {'model ' + name if name else 'models'}")
        return
    table = Table("model", "version", "published", "MB", "takes", "", box=None, pad_edge=False)
    for model, versions in found.items():
        for version in reversed(versions):
            try:
                manifest, _ = read_version(place, model, version, trust)
            except CheckpointError as error:
                table.add_row(model, str(version), "", "", "", str(error))
                continue
            at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest.created_s))
            info = manifest.info
            takes = "pipeline" if info is None else " ".join(f.name for f in info.inputs)
            source = " ".join(f"{k} {v}" for k, v in manifest.source.items())
            size = f"{manifest.nbytes / 1e6:.1f}"
            table.add_row(model, str(version), at, size, takes, source)
    screen().print(table)


def _register(done: Published, config: Config) -> None:
    """Raises CoordinationError, which says what was done all the same."""
    from paddle_ft.coordination.etcd import EtcdCoordinator
    from paddle_ft.serve import registry
    from paddle_ft.serve.register import register

    name, version = done.ref.name, done.ref.version
    try:
        coordinator = EtcdCoordinator(config.etcd)
        try:
            now = registry.Published(version, done.store_url, time.time())
            register(coordinator, config.serve.group, name, now)
        finally:
            coordinator.close()
    except CoordinationError as error:
        raise CoordinationError(
            f"{name} {version} is in {done.store_url}, but the serving group {config.serve.group} "
            f"was not told: {error}"
        ) from None


def _shape(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, sizes = text.partition("=")
    try:
        return name, tuple(int(size) for size in sizes.split(","))
    except ValueError:
        raise ConfigError(f"--warm-up {text} is no shape; give NAME=4,3,48,320.") from None
