"""What the gateway adds to a request, and what processor time a request takes."""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from bench.report import Row
from bench.serving_analysis import failed
from bench.serving_load import infer_request
from bench.serving_rows import Say
from bench.serving_speed import Http, p50_ms, row_of
from bench.serving_world import Broken, World, until
from paddle_ft.agent.net import free_ports
from paddle_ft.agent.tether import tethered
from paddle_ft.serve.nginx import find_nginx

MINIMAL = """\
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/nginx.log;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    upstream replicas {{ {servers} keepalive 64; }}
    server {{
        listen 127.0.0.1:{port};
        client_max_body_size 64m;
        location / {{
            proxy_pass http://replicas;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
        }}
    }}
}}
"""


# ---------------------------------------------------------------- the hop


def hop(world: World, rounds: int, calls: int, say: Say) -> list[Row]:
    """p50 through the gateway and through a hand-written nginx, less that of a replica; in turn."""
    group = "The hop"
    ports = {n.http_port for n in world.nodes.values()}
    request = infer_request(world.model.name, row_of(world.model))
    takes: dict[str, list[float]] = {"direct": [], "gateway": [], "nginx": []}
    with ExitStack() as stack:
        port = stack.enter_context(by_hand(world.folder / "by-hand", sorted(ports)))
        where = {"direct": min(ports), "gateway": world.http_port, "nginx": port}
        clients = {name: Http(where[name], request) for name in takes}
        for client in clients.values():
            stack.callback(client.close)
        for number in range(rounds):
            say(f"{group}: round {number + 1} of {rounds}")
            for name, client in clients.items():
                client.warm()
                takes[name].append(p50_ms([client.call() for _ in range(calls)]))
    ours, theirs = (
        [a - b for a, b in zip(takes[name], takes["direct"], strict=True)]
        for name in ("gateway", "nginx")
    )
    told = ", ".join(f"{name} {statistics.median(v):.3f} ms" for name, v in takes.items())
    return [Row(group, "the gateway, beyond a replica asked directly", "ms", ours, theirs,
                "nginx with a configuration by hand", note=f"p50: {told}")]  # fmt: skip


@contextmanager
def by_hand(folder: Path, ports: Sequence[int]) -> Iterator[int]:
    """The same nginx with the least of a configuration; gives its port."""
    folder.mkdir()
    (port,) = free_ports("127.0.0.1", 1)
    servers = " ".join(f"server 127.0.0.1:{p};" for p in ports)
    text = MINIMAL.format(folder=folder, servers=servers, port=port)
    (folder / "nginx.conf").write_text(("user root;\n" if os.geteuid() == 0 else "") + text)
    argv = [str(find_nginx().path), "-p", f"{folder}/", "-c", "nginx.conf", "-g", "daemon off;"]
    process = subprocess.Popen(
        tethered(argv, 15), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        until(lambda: process.poll() is not None or listens(port), "nginx listens")
        if process.poll() is not None:
            raise Broken(f"nginx has ended: {(folder / 'nginx.log').read_text()[-300:]}")
        yield port
    finally:
        process.terminate()
        process.wait(10)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# ---------------------------------------------------------------- processor time


def cost(world: World, rate_hz: float, for_s: float, say: Say) -> list[Row]:
    """Processor time of each request at a fixed rate; other work on the machine does not enter."""
    group = f"Processor time, {rate_hz:g} POST/s"
    say(f"{group}: {for_s:g} s")
    fronts = [node.pid for node in world.nodes.values()]
    trees = {
        "front of a replica": lambda: sum(own_s(pid) for pid in fronts),
        "worker": lambda: sum(below_s(pid) for pid in fronts),
        "gateway (nginx, health checks)": lambda: (
            own_s(world.gateway_pid) + below_s(world.gateway_pid)
        ),
    }
    takes: dict[str, tuple[float, float]] = {}
    idle_s = for_s / 2
    quiet = {name: of() for name, of in trees.items()}
    time.sleep(idle_s)
    quiet = {name: (of() - quiet[name]) / idle_s for name, of in trees.items()}
    with world.load(rate_hz) as load:
        time.sleep(1.0)
        before, begin_s = {name: of() for name, of in trees.items()}, time.monotonic()
        time.sleep(for_s)
        took_s = time.monotonic() - begin_s
        takes = {
            name: (of() - before[name] - quiet[name] * took_s, quiet[name])
            for name, of in trees.items()
        }
    count = sum(begin_s <= r.answered_s < begin_s + took_s for r in load.requests)
    if not count:
        raise Broken("nobody was answered")
    bad = f"{failed(load.requests)} of {len(load.requests)} requests failed"
    return [
        Row(group, name, "ms a request", [1000 * max(0.0, used_s) / count],
            note=f"beyond the {100 * idle:.1f} % of a core that it takes without requests; {bad}")
        for name, (used_s, idle) in takes.items()
    ]  # fmt: skip


def own_s(pid: int) -> float:
    """Processor time of a process, s; 0 if it has ended."""
    with suppress(OSError):
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def below_s(pid: int) -> float:
    """Of all that it has started."""
    total = 0.0
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            total += sum(
                own_s(child) + below_s(child) for child in map(int, path.read_text().split())
            )
    return total
