"""What a hang looked like before anything was ended: stacks, kernel's view, last collectives.

    <log_dir>/flight/<time>-gen<generation>-<node>/
        summary.txt         for people: who did not come, and what each rank did
        flight.json         the same for programs
        rank<n>.stacks.txt  Python stacks of all threads of that rank

Nothing here may keep a culprit alive: every step has a time limit, and what cannot be had is left
out and said to be missing.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from paddle_ft.health.judge import Row, Verdict
from paddle_ft.health.phases import NAMES, Call
from paddle_ft.health.stacks import SIGNAL, path_of

STACKS_S = 0.4
"""How long a process may take to write its stacks."""
PY_SPY_S = 5.0
THREADS_MAX = 64
RECORDS_MAX = 20
"""So many flight records are kept; the oldest go first."""
_POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class Subject:
    """One rank of this node."""

    row: Row
    pid: int
    calls: tuple[Call, ...] = ()


@dataclass(slots=True)
class _Found:
    kernel: dict[str, Any] = field(default_factory=dict)
    stacks: str = ""
    how: str = ""


def save(
    log_dir: Path,
    run_dir: Path,
    node: str,
    generation: int,
    subjects: Sequence[Subject],
    verdicts: Sequence[Verdict],
) -> Path:
    """Writes a record and gives its directory; raises OSError if it cannot be written.

    A stopped process among the culprits is continued, with the request for its stacks waiting for
    it, so that they are the first thing it does; whoever calls this ends it afterwards.
    """
    culprits = {verdict.rank for verdict in verdicts}
    found = {s.row.rank: _Found(kernel_view(s.pid)) for s in subjects}
    awake = [s for s in subjects if s.row.evidence != "stopped" or s.row.rank in culprits]
    for subject, text in _stacks(run_dir, awake):
        found[subject.row.rank].stacks = text
        found[subject.row.rank].how = "faulthandler" if text else ""
    for subject in subjects:
        one = found[subject.row.rank]
        if not one.stacks:
            one.stacks, one.how = _py_spy(subject.pid)
    stamp = time.strftime("%Y%m%dT%H%M%S")
    name = re.sub(r"[^A-Za-z0-9._-]", "_", node)
    directory = _new_directory(log_dir / "flight", f"{stamp}-gen{generation}-{name}")
    _write(directory, node, generation, subjects, verdicts, found)
    _forget_oldest(log_dir / "flight")
    return directory


def kernel_view(pid: int) -> dict[str, Any]:
    """What /proc tells of a process and its threads; as much as this user may see."""
    base = Path(f"/proc/{pid}")
    view: dict[str, Any] = {"pid": pid, "threads": []}
    for line in _read(base / "status").splitlines():
        name, _, value = line.partition(":")
        if name in ("State", "VmRSS", "Threads", "SigPnd", "ShdPnd"):
            view[name] = value.strip()
    with contextlib.suppress(OSError):
        for task in sorted(base.glob("task/*"), key=lambda t: int(t.name))[:THREADS_MAX]:
            state = _read(task / "stat").rpartition(")")[2].split()[:1]
            view["threads"].append(
                {
                    "tid": int(task.name),
                    "name": _read(task / "comm").strip(),
                    "state": state[0] if state else "",
                    "wchan": _read(task / "wchan").strip(),
                    "syscall": _read(task / "syscall").split(" ")[0].strip(),
                    "stack": _read(task / "stack").splitlines(),
                }
            )
    return view


def process_state(pid: int) -> tuple[str, float] | None:
    """State letter and processor time (s) of a process; None if it has gone."""
    fields = _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    if len(fields) < 13 or fields[0] in "ZX":
        return None
    return fields[0], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def delay_s(pid: int) -> float | None:
    """How long the main thread of a process has been ready to run and had no processor, s.

    None if the kernel does not tell.
    """
    words = _read(Path(f"/proc/{pid}/schedstat")).split()
    return int(words[1]) * 1e-9 if len(words) == 3 else None


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _stacks(run_dir: Path, subjects: Sequence[Subject]) -> list[tuple[Subject, str]]:
    """What each process wrote on being asked; "" for one that cannot be asked or did not."""
    asked: list[tuple[Subject, Path, int]] = []
    for subject in subjects:
        path = path_of(run_dir, subject.pid)
        with contextlib.suppress(OSError):
            size = path.stat().st_size
            os.kill(subject.pid, SIGNAL)
            if subject.row.evidence == "stopped":
                os.kill(subject.pid, signal.SIGCONT)
            asked.append((subject, path, size))
    until_s, sizes = time.monotonic() + STACKS_S, {s.pid: -1 for s in subjects}
    while time.monotonic() < until_s:
        time.sleep(_POLL_S)
        now = {s.pid: _size(path) for s, path, _ in asked}
        if now == {p: sizes[p] for p in now} and all(now[s.pid] > size for s, _, size in asked):
            break
        sizes |= now
    found = []
    for subject, path, size in asked:
        with contextlib.suppress(OSError), path.open("rb") as file:
            file.seek(size)
            found.append((subject, file.read().decode(errors="replace")))
    return found


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _py_spy(pid: int) -> tuple[str, str]:
    """Stacks as py-spy sees them from outside, native frames too, where it is installed."""
    tool = shutil.which("py-spy")
    if tool is None:
        return "", ""
    try:
        done = subprocess.run(
            [tool, "dump", "--native", "--nonblocking", "--pid", str(pid)],
            capture_output=True,
            timeout=PY_SPY_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "", ""
    text = done.stdout.decode(errors="replace")
    return (text, "py-spy") if done.returncode == 0 else ("", "")


def _new_directory(parent: Path, name: str) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    for number in range(100):
        directory = parent / (f"{name}.{number}" if number else name)
        with contextlib.suppress(FileExistsError):
            directory.mkdir()
            return directory
    raise FileExistsError(parent / name)


def _write(
    directory: Path,
    node: str,
    generation: int,
    subjects: Sequence[Subject],
    verdicts: Sequence[Verdict],
    found: dict[int, _Found],
) -> None:
    ranks, lines = [], [f"node {node}, generation {generation}, {time.strftime('%F %T %z')}", ""]
    lines += [f"rank {v.rank}: {v.kind}; {v.reason}" for v in verdicts]
    for subject in subjects:
        row, one = subject.row, found[subject.row.rank]
        file = f"rank{row.rank}.stacks.txt" if one.stacks else ""
        if file:
            (directory / file).write_text(one.stacks)
        told = {"row": asdict(row), "calls": [asdict(c) for c in subject.calls]}
        ranks.append({"kernel": one.kernel, "stacks": file, "stacks_by": one.how} | told)
        where = f"in collective {row.entered}" if row.inside else NAMES[row.phase]
        lines += ["", f"rank {row.rank}, pid {subject.pid}, step {row.step}: {where}"]
        lines += [f"  unchanged for {row.still_s:.1f} s; {one.kernel.get('State', 'process gone')}"]
        lines += [f"  Python stacks in {file}" if file else "  no Python stacks could be had"]
        for call in subject.calls[-5:]:
            took = f"{call.left_s - call.entered_s:.3f} s" if call.left_s else "not left"
            lines.append(f"  collective {call.number}: entered at {call.entered_s:.3f}, {took}")
    told_verdicts = [asdict(v) for v in verdicts]
    whole = {"node": node, "generation": generation, "wall_s": time.time()}
    whole |= {"at_s": time.monotonic(), "verdicts": told_verdicts, "ranks": ranks}
    (directory / "flight.json").write_text(json.dumps(whole, indent=1))
    (directory / "summary.txt").write_text("\n".join(lines) + "\n")


def _forget_oldest(parent: Path) -> None:
    records = sorted(parent.iterdir())  # the name begins with the time
    for old in records[:-RECORDS_MAX]:
        shutil.rmtree(old, ignore_errors=True)
