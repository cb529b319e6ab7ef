"""Network namespaces of this machine: cut off, slowed down, and healed; root and iproute2 only.

A namespace whose devices are ends of veth pairs with the other end on a bridge here is cut at that
bridge's ports, which drop everything in silence, as a pulled cable does. Any other one is cut by
iptables, inside of it.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence

COMMAND_TIMEOUT_S = 10.0


class CommandFailed(Exception):
    """A command of the system ended with an error; the sentence names both."""


def run(argv: Sequence[str]) -> str:
    """What it printed; raises CommandFailed, OSError if there is no such command."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
    if done.returncode:
        raise CommandFailed(f"{' '.join(argv)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def inside(namespace: str) -> list[str]:
    """What to put in front of a command that is to run in ``namespace``; it keeps its pid."""
    return ["ip", "netns", "exec", namespace]


def of_process(pid: int) -> str:
    """Name of the network namespace that ``pid`` is in; "" if it is that of this process."""
    own, other = (os.stat(f"/proc/{p}/ns/net").st_ino for p in ("self", pid))
    return "" if own == other else run(["ip", "netns", "identify", str(pid)]).strip()


def cut(namespace: str) -> list[list[str]]:
    """Lets nothing in or out of ``namespace``; gives the commands that heal it.

    Raises CommandFailed, OSError.
    """
    ports = _ports(namespace)
    if ports:
        do = [["bridge", "link", "set", "dev", port, "state", "0"] for port in ports]
        undo = [[*argv[:-1], "3"] for argv in do]
    else:
        own = inside(namespace)
        ways = (("INPUT", "-i"), ("OUTPUT", "-o"))
        rules = [[chain, "!", way, "lo", "-j", "DROP"] for chain, way in ways]
        do = [[*own, "iptables", "-I", *rule] for rule in rules]
        undo = [[*own, "iptables", "-D", *rule] for rule in rules]
    for argv in do:
        run(argv)
    return undo


def slow(namespace: str, rate: str, latency_s: float) -> list[list[str]]:
    """Lets ``rate`` (as tc writes it) out of ``namespace``, and drops what would wait for longer
    than ``latency_s``; gives the commands that heal it. Raises CommandFailed, OSError.
    """
    shape = ["tbf", "rate", rate, "burst", "32kbit", "latency", f"{latency_s * 1000:g}ms"]
    undo = []
    for link in _links(namespace):
        where = ["dev", str(link["ifname"]), "root"]
        run([*inside(namespace), "tc", "qdisc", "replace", *where, *shape])
        undo.append([*inside(namespace), "tc", "qdisc", "del", *where])
    return undo


def _links(namespace: str) -> list[dict[str, object]]:
    listed = json.loads(run(["ip", "-json", "-n", namespace, "link"]))
    return [link for link in listed if link["ifname"] != "lo"]


def _ports(namespace: str) -> list[str]:
    """The bridge ports here that the devices of ``namespace`` are connected to.

    None unless all of them are.
    """
    links = _links(namespace)
    listed = json.loads(run(["ip", "-json", "-details", "link"]))
    here = {
        (link["ifindex"], link.get("link_index")): link["ifname"]
        for link in listed
        if link.get("linkinfo", {}).get("info_slave_kind") == "bridge"
    }
    found = [here.get((link.get("link_index"), link["ifindex"]), "") for link in links]
    return found if all(found) else []
