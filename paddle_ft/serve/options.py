"""Options that the commands for a serving group have in common, and the settings they stand for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from paddle_ft.errors import ConfigError

if TYPE_CHECKING:
    from paddle_ft.config import Config

Etcd = Annotated[
    str,
    typer.Option("--etcd", help="etcd members of the group: host:port,…", envvar="PADDLE_FT_ETCD"),
]
GroupName = Annotated[str, typer.Option("--group", help="name of the serving group (default)")]
ConfigFile = Annotated[
    str, typer.Option("--config", help="TOML file of settings, as configs/default.toml")
]


def settings(
    etcd: str, group: str, config: str, given: Mapping[str, str | None] | None = None
) -> Config:
    """The settings with what was ``given`` by path, each a flag; None: not given, as are "" of the
    others.

    Raises ConfigError, also where no etcd is named.
    """
    from paddle_ft.config import load

    members = tuple(filter(None, etcd.split(",")))
    values = {"etcd.endpoints": members or None, "serve.group": group or None} | dict(given or {})
    flags = {path: f"--{path.partition('.')[2].replace('_', '-')}" for path in values}
    flags["etcd.endpoints"] = "--etcd"
    loaded = load(
        {k: v for k, v in values.items() if v is not None}, os.environ, config or None, flags
    )
    if not loaded.config.etcd.endpoints:
        raise ConfigError(
            "no etcd is named: give --etcd host:port, that of the replicas (one that was started "
            "without names its own in its log)"
        )
    return loaded.config
