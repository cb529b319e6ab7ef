"""The launcher's command line: flags, what they mean as settings, and one sentence for a mistake.

The flags are those of ``paddle.distributed.launch`` where it has them, with ``-`` or ``_``.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import os
import shlex
import sys
import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from paddle_ft import policies
from paddle_ft.chaos import plan as chaos_plan
from paddle_ft.chaos.plan import Plan
from paddle_ft.config import Loaded, load
from paddle_ft.errors import ConfigError

EPILOG = """exit codes:
  0    training is complete
  1    workers failed more often than --max_restart allows
  2    a flag, key, file or value is wrong
  3    etcd cannot be reached, or too few nodes came
  4    the checkpoint store cannot be used
  5    a checkpoint is damaged everywhere, or belongs to another model
  6    workers fail at the same step in the same way in every attempt
  7    this node is much slower than the others (--probe)
  70   a defect of paddle_ft (please report its traceback)
  71   this machine is short of disk space, memory, descriptors or processes
  130  stopped by Ctrl-C, 143 stopped by SIGTERM; the last checkpoint is named

examples:
  python -m paddle_ft.launch --nproc_per_node 2 train.py --epochs 10
  python -m paddle_ft.launch --nnodes 2:4 --etcd 10.0.0.1:2379 --checkpoint s3://bucket/run \\
      train.py
  python -m paddle_ft.launch --then-serve '--model digits --http_port 8000' train.py
"""

IGNORED = {
    "rank": "ranks follow from membership",
    "log_level": "",
    "log_overwrite": "logs are appended to",
    "sort_ip": "ranks follow from membership",
    "enable_gpu_log": "",
    "start_port": "ports are found",
    "elastic_level": "jobs are always elastic",
    "elastic_timeout": "use job.join_window_s in the configuration",
}
"""Flags of paddle.distributed.launch that have no effect here, and why."""


@dataclass(frozen=True, slots=True)
class Command:
    """What the command line asks for."""

    loaded: Loaded
    worker: tuple[str, ...]
    """Script and arguments, as the bootstrap takes them."""
    notes: tuple[str, ...]
    quiet: bool
    print_config: bool
    chaos: Plan | None = None
    then_serve: tuple[str, ...] = ()
    """Flags of ``paddle_ft.serve`` for what this node does once training has ended well."""


class Parser(argparse.ArgumentParser):
    """Errors are one sentence; an unknown flag gets the nearest known one."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see --help)")


class Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        sys.stdout.write(f"{version()}\n")
        parser.exit()


def version() -> str:
    """``paddle-ft 0.1.0``."""
    from importlib import metadata

    return f"paddle-ft {metadata.version('paddle-ft')}"


_FLAGS = (
    # group, flags, what stands for the value ("" for a switch), help
    ("job", "--nnodes", "N[:M]", "nodes: N, or N:M for at least N and at most M (1)"),
    ("job", "--nproc_per_node", "K", "worker processes on this node (number of devices, or 1)"),
    ("job", "--job_id", "NAME", ("name of the job; launchers with the same etcd and name are one "
     "job (name of the script)")),
    ("job", "--devices --gpus", "0,1,…", ("accelerators of this node, one for each process "
     "(none: CPU)")),
    ("job", "--host", "HOST", "address under which the other nodes reach this one (found out)"),
    ("job", "--node", "NAME", "name of this node (name of the host)"),
    ("job", "--log_dir", "DIR", "directory for the workers' output (log)"),
    ("job", "--module", "", "the script is the name of a module, as with python -m"),
    ("job", "--then_serve", "FLAGS", ("once training has ended well this node serves what was "
     "published, as python -m paddle_ft.serve FLAGS in the job's group: '--model NAME'")),
    ("fault tolerance", "--etcd", "ENDPOINTS", ("etcd members, host:port,… (a private etcd for "
     "this launcher alone)")),
    ("fault tolerance", "--checkpoint", "URL", ("where the state is kept: a directory, "
     "file:///dir or s3://bucket/prefix (checkpoints/<job_id>)")),
    ("fault tolerance", "--checkpoint_every", "WHEN", ("when to save: 100 (steps), 30s, 10min, "
     "SIGUSR1, auto (the interval that loses least), never, or several of them joined by commas "
     "(auto)")),
    ("fault tolerance", "--cache", "DIR", "directory of a local SSD cache in front of the store"),
    ("fault tolerance", "--durable", "WHERE", ("commit a checkpoint once the store has it: "
     "remote, or once the local disks have it in --cache: local (remote)")),
    ("fault tolerance", "--max_restart", "K", ("worker failures within job.restart_window_s that "
     "are answered by a restart (3)")),
    ("fault tolerance", "--spares", "K", ("worker processes kept ready to take over, with the "
     "script run until it needs its rank (0)")),
    ("fault tolerance", "--recovery", "HOW", ("in_place: workers that are left go on with what "
     "they have in memory, where the script allows it; restart: all are started again (in_place)")),
    ("fault tolerance", "--probe", "HOW", ("local: measure this node first, and do not join if it "
     "is much slower than the others (off)")),
    ("fault tolerance", "--master", "ADDRESS", ("etcd://host:port is the same as --etcd; a plain "
     "host:port is not needed")),
    ("other", "--chaos", "PLAN", ("hurt this job on purpose, as in kill-worker@30s,"
     "stop-worker@60s:for=2s, and report what came of it")),
    ("other", "--config", "FILE", ("TOML file of settings, as configs/default.toml; flags win "
     "over it")),
    ("other", "--print_config", "", "print every setting and where it came from, and end"),
    ("other", "--quiet", "", "no progress line"),
)  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """Every flag with ``_`` and with ``-``; what follows the script is the script's."""
    parser = Parser(
        prog="python -m paddle_ft.launch",
        usage="python -m paddle_ft.launch [flags] script.py [args of the script]",
        description="Runs a PaddlePaddle training script so that it survives the loss of workers "
        "and nodes. Flags may be written with - or _.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    hidden = [("other", f"--{name}", "VALUE", argparse.SUPPRESS) for name in (*IGNORED, "run_mode")]
    add_flags(parser, (*_FLAGS, *hidden))
    parser.add_argument("script", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def add_flags(
    parser: argparse.ArgumentParser,
    flags: Iterable[tuple[str, str, str, str]],
    repeated: Collection[str] = (),
) -> None:
    """Each (group, forms, value or "" for a switch, help), with ``_`` and with ``-``; --version.

    Those in ``repeated`` may be given more than once.
    """
    groups: dict[str, argparse._ArgumentGroup] = {}
    for title, names, value, told in flags:
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        first, *more = names.split()
        forms = dict.fromkeys((first, f"--{first[2:].replace('_', '-')}", *more))
        if value:
            action = "append" if first in repeated else "store"
            groups[title].add_argument(
                *forms, dest=first[2:], metavar=value, help=told, action=action
            )
        else:
            groups[title].add_argument(*forms, dest=first[2:], action="store_true", help=told)
    groups["other"].add_argument("--version", action=Version, nargs=0, help="tell it and end")


def parse(arguments: Sequence[str], environ: dict[str, str]) -> Command:
    """The command that ``arguments`` ask for; raises ConfigError."""
    try:
        os.getcwd()
    except OSError:
        raise ConfigError(
            "the current directory is no longer there: change to one that is"
        ) from None
    parser = build_parser()
    given = parser.parse_args(_known(parser, arguments))
    values: dict[str, object] = {}
    notes = [
        f"--{name} has no effect here" + (f": {why}" if why else "")
        for name, why in IGNORED.items()
        if getattr(given, name) is not None
    ]
    if given.run_mode not in (None, "collective"):
        raise ConfigError(f"--run_mode {given.run_mode} is not supported: only collective is")
    for name, path in _DIRECT.items():
        if getattr(given, name) is not None:
            values[path] = getattr(given, name)
    if given.nnodes is not None:
        values |= _nnodes(given.nnodes)
    if given.devices is not None:
        devices = tuple(filter(None, given.devices.split(",")))
        values["job.devices"] = devices
        values.setdefault("job.nproc_per_node", max(len(devices), 1))
    if given.checkpoint_every is not None:
        policies.parse(given.checkpoint_every)
    _master(given, values, notes)
    if not given.print_config:
        _check_script(given)
    if "job.id" not in values and "PADDLE_FT_JOB__ID" not in environ and given.script:
        stem = Path(given.script[0]).stem if not given.module else given.script[0]
        plain = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in stem)
        values["job.id"] = plain.lstrip("._-")[:100] or "job"
    flags = {path: f"--{name}" for name, path in _DIRECT.items()}
    loaded = load(values, environ, given.config, flags)
    worker = ("-m", *given.script) if given.module else tuple(given.script)
    chaos = chaos_plan.of_own_job(given.chaos) if given.chaos else None
    then = _then_serve(given)
    return Command(loaded, worker, tuple(notes), given.quiet, given.print_config, chaos, then)


_DIRECT = {
    "nproc_per_node": "job.nproc_per_node",
    "job_id": "job.id",
    "host": "job.host",
    "node": "job.node",
    "log_dir": "job.log_dir",
    "max_restart": "job.max_restart",
    "spares": "job.spares",
    "recovery": "job.recovery",
    "checkpoint": "checkpoint.url",
    "checkpoint_every": "checkpoint.when",
    "cache": "checkpoint.cache",
    "durable": "checkpoint.durable",
    "probe": "health.probe",
}


_OTHER_FLAGS = {
    "ips": ": it is not needed, launchers find each other through --etcd",
    "nprocs": ": did you mean --nproc_per_node?",
    "nproc": ": did you mean --nproc_per_node?",
}


def _known(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> list[str]:
    """``arguments``, so that flags in the value of one are not taken for flags of the launcher.

    Raises ConfigError for an unknown flag before the script, which argparse would hand to the
    script.
    """
    joined: list[str] = []
    known = {option: action for action in parser._actions for option in action.option_strings}
    pending = list(arguments)
    while pending and pending[0].startswith("-") and pending[0] != "--":
        joined.append(pending.pop(0))
        name, equals, _ = joined[-1].partition("=")
        action = known.get(name)
        if action is None:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f": did you mean {near[0]}?" if near else ""
            hint = _OTHER_FLAGS.get(name.lstrip("-").replace("-", "_"), hint)
            raise ConfigError(
                f"there is no flag {name}{hint}; flags of the script come after its name (see "
                f"--help)"
            )
        if not equals and action.nargs != 0:
            if not pending:
                raise ConfigError(f"{name} needs a value (see --help)")
            if action.dest == "then_serve":
                joined[-1] += f"={pending.pop(0)}"
            else:
                joined.append(pending.pop(0))
    return joined + pending


def _then_serve(given: argparse.Namespace) -> tuple[str, ...]:
    if given.then_serve is None:
        return ()
    try:
        flags = shlex.split(given.then_serve)
    except ValueError as error:
        raise ConfigError(f"--then-serve {given.then_serve!r}: {str(error).lower()}") from None
    if not flags:
        raise ConfigError("--then-serve is empty: give it '--model NAME'")
    return (*(("--config", given.config) if given.config else ()), *flags)


def _nnodes(text: str) -> dict[str, object]:
    low, _, high = text.partition(":")
    if not low.isdigit() or (high and not high.isdigit()) or int(low) < 1:
        raise ConfigError(f"--nnodes {text} is not N or N:M with numbers from 1")
    if high and int(high) < int(low):
        raise ConfigError(f"--nnodes {text}: the maximum is below the minimum")
    return {"job.nodes_min": int(low), "job.nodes_max": int(high or low)}


def _master(given: argparse.Namespace, values: dict[str, object], notes: list[str]) -> None:
    etcd = given.etcd
    if given.master is not None:
        if given.master.startswith("etcd://"):
            etcd = etcd or given.master
        else:
            notes.append(
                f"--master {given.master} is not needed: launchers find each other through --etcd"
            )
    if etcd is not None:
        values["etcd.endpoints"] = tuple(filter(None, etcd.split(",")))


def _check_script(given: argparse.Namespace) -> None:
    if not given.script:
        raise ConfigError("there is no script to run: python -m paddle_ft.launch train.py")
    script = given.script[0]
    if given.module:
        if importlib.util.find_spec(script.partition(".")[0]) is None:
            raise ConfigError(f"there is no module {script}")
    elif not os.path.isfile(script):
        where = "" if os.path.isabs(script) else f" in {os.getcwd()}"
        raise ConfigError(f"there is no script {script}{where}")
    elif script.endswith(".py"):
        _check_syntax(script)


def _check_syntax(script: str) -> None:
    """What no restart can mend is told before anything starts."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(Path(script).read_bytes(), script, "exec", dont_inherit=True)
    except OSError as error:
        raise ConfigError(f"{script} cannot be read: {error.strerror}") from error
    except SyntaxError as error:
        line = f", line {error.lineno}" if error.lineno else ""
        raise ConfigError(f"{script}{line}: {error.msg}") from error
    except ValueError as error:
        raise ConfigError(f"{script} is not a Python script: {error}") from error
