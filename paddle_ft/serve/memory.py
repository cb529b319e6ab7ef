"""How much of its memory this process may still take: the machine's, or its container's."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def used_share() -> float:
    """From 0 to 1: what is used of the machine's memory or of a control group's, if that is more.

    What the kernel would give up at once (caches) does not count. 0 where it cannot be told.
    """
    return max([_machine(), *_groups(_CGROUPS, _own_group())])


def _machine() -> float:
    with suppress(OSError, ValueError, KeyError, ZeroDivisionError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = {name: int(rest.split()[0]) for name, _, rest in (x.partition(":") for x in lines)}
        return 1 - fields["MemAvailable"] / fields["MemTotal"]
    return 0.0


def _own_group() -> str:
    """Path below the root of control groups, of version 2; "" if there is none."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::"):
                return line[3:].strip("/")
    return ""


def _groups(root: Path, path: str) -> Iterator[float]:
    """Of the group and of those around it, as far as they have a bound."""
    place = root / path
    for group in (place, *place.parents):
        with suppress(OSError, ValueError, KeyError, ZeroDivisionError):
            most = int((group / "memory.max").read_text())  # "max" is none
            stat = dict(x.split() for x in (group / "memory.stat").read_text().splitlines())
            used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])
            yield max(0, used) / most
        if group == root:
            return


def free_bytes() -> int | None:
    """What may still be taken, of the machine and of every control group around this process.

    None where it cannot be told.
    """
    found = []
    with suppress(OSError, ValueError, KeyError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = {name: int(rest.split()[0]) for name, _, rest in (x.partition(":") for x in lines)}
        found.append(1024 * fields["MemAvailable"])
    place = _CGROUPS / _own_group()
    for group in (place, *place.parents):
        with suppress(OSError, ValueError, KeyError):
            most = int((group / "memory.max").read_text())  # "max" is none
            stat = dict(x.split() for x in (group / "memory.stat").read_text().splitlines())
            used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])
            found.append(max(0, most - max(0, used)))
        if group == _CGROUPS:
            break
    return min(found, default=None)


def private_bytes(pids: Iterable[int]) -> int:
    """What these processes would give back together; those that have ended do not count."""
    page, total = os.sysconf("SC_PAGE_SIZE"), 0
    for pid in pids:
        with suppress(OSError, ValueError, IndexError):
            _, resident, shared = Path(f"/proc/{pid}/statm").read_text().split()[:3]
            total += page * max(0, int(resident) - int(shared))
    return total
