"""``python -m paddle_ft.launch [flags] script.py [args]``: arguments and settings -> agent."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from paddle_ft import policies
from paddle_ft.command_line import Command, parse
from paddle_ft.config import Config
from paddle_ft.coordination.kv import Coordinator
from paddle_ft.entry import SHORTAGES, entry
from paddle_ft.errors import EXIT_DONE, ConfigError, MachineError, PaddleFTError

if TYPE_CHECKING:
    from paddle_ft.coordination.embedded import EmbeddedEtcd

SOCKET_PLACE_BYTES_MAX = 60
"""The path of a Unix socket ends at 107 bytes; what a temporary directory may take of it."""


def run(command: Command) -> int:
    """Runs this node of the job; gives the exit code. Raises PaddleFTError."""
    # Heavy imports (grpc, boto3) come after the command line was found good.
    from paddle_ft.agent.snapshots import own_directory, remove_leftovers
    from paddle_ft.coordination.embedded import EmbeddedEtcd
    from paddle_ft.serve import then_serve

    config = command.loaded.config
    check(config)
    if command.then_serve:
        then_serve.check(command.then_serve, config)
    with contextlib.ExitStack() as stack:
        place = _temporary_directory()
        remove_leftovers(Path(place))
        if len(os.fsencode(place)) > SOCKET_PLACE_BYTES_MAX:
            place = "/tmp"  # noqa: S108  the directory made there is private
        run_dir = own_directory("run", Path(place))
        stack.callback(shutil.rmtree, run_dir, ignore_errors=True)
        etcd, embedded = config.etcd, None
        if not etcd.endpoints:
            embedded = EmbeddedEtcd(run_dir)
            stack.callback(embedded.stop)
        exit_code = _train(command, Path(run_dir), embedded)
        if exit_code or not command.then_serve:
            return exit_code
        if embedded is not None:
            etcd = etcd.model_copy(update={"endpoints": (embedded.endpoint,)})
        config = config.model_copy(update={"etcd": etcd})
        tend = embedded.revive if embedded is not None else lambda: None
        return then_serve.serve(command.then_serve, config, tend)


def _train(command: Command, run_dir: Path, embedded: EmbeddedEtcd | None) -> int:
    """Runs the agent; ``embedded`` is started as soon as this is a launcher that may run."""
    from paddle_ft.agent.agent import Agent
    from paddle_ft.agent.console import Console
    from paddle_ft.agent.membership import Node
    from paddle_ft.agent.net import NodeName
    from paddle_ft.agent.snapshots import shared_directory
    from paddle_ft.checkpoint.room import CheckpointRoom, alone
    from paddle_ft.coordination.etcd import EtcdCoordinator

    config, etcd = command.loaded.config, command.loaded.config.etcd
    with contextlib.ExitStack() as stack:
        name = NodeName(config.job.id, config.job.node)
        stack.callback(name.release)
        console = Console(name.name, command.quiet)
        for note in command.notes:
            console.say(note)
        stack.enter_context(alone(config))
        room = CheckpointRoom.open(config)
        stack.callback(room.close)
        if embedded is not None:
            etcd = etcd.model_copy(update={"endpoints": (embedded.start(),)})
        coordinator = EtcdCoordinator(etcd)
        stack.callback(coordinator.close)
        coordinator.ping()
        _probe(config, coordinator, name.name, console.say)
        console.say(
            f"job {config.job.id}, node {name.name}, checkpoints in {room.url}, "
            f"etcd {','.join(etcd.endpoints)}{' (private)' if embedded else ''}, "
            f"output in {config.job.log_dir}/"
        )
        host = _own_address(config, coordinator.targets)
        agent = Agent(
            config,
            command.worker,
            coordinator,
            room,
            node=Node(name.name, host, run_dir, shared_directory(config.job.id)),
            console=console,
            tend=embedded.revive if embedded else lambda: None,
        )
        stack.enter_context(_chaos(command, name.name, console.say))
        exit_code = agent.run()
        room.drain(config.job.stop_grace_s, console.say)
        if embedded is not None:
            with contextlib.suppress(PaddleFTError):
                room.release()
        return exit_code


def _probe(
    config: Config, coordinator: Coordinator, node: str, say: Callable[[str], object]
) -> None:
    """What ``--probe`` asks for; raises NodeUnfit if this node is not to join."""
    if config.health.probe == "local":
        from paddle_ft.health.probe import admit

        admit(config, coordinator, node, say)


def _own_address(config: Config, targets: Sequence[str]) -> str:
    """Where the other nodes reach this one; the workers' gloo is told to listen there, too."""
    from paddle_ft.agent.net import address_towards, interface_of

    host = config.job.host or address_towards(targets)
    if interface := interface_of(host):
        # Left to itself it listens where the host's name resolves to: often at 127.0.1.1.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    return host


def _chaos(
    command: Command, node: str, say: Callable[[str], None]
) -> contextlib.AbstractContextManager[None]:
    """What ``--chaos`` asks for, while it is entered."""
    if command.chaos is None:
        return contextlib.nullcontext()
    from paddle_ft.chaos.drive import own_chaos

    return own_chaos(command.chaos, node, os.getpid(), command.loaded.config.job.log_dir, say)


def cpu_only() -> bool:
    """Whether the installed Paddle can use no accelerator; told from its files, since to import it
    takes seconds. False where it cannot be told."""
    found = importlib.util.find_spec("paddle")
    if found is None or found.origin is None or importlib.util.find_spec("paddle_custom_device"):
        return False  # custom devices are plugins of the build for the CPU
    try:
        told = Path(found.origin).with_name("version").joinpath("__init__.py").read_text()
    except OSError:
        return False
    names = ("cuda_version", "hip_version", "xpu_version", "xpu_xre_version")
    values = re.findall(rf"^(?:{'|'.join(names)})\s*=\s*(\S+)", told, re.MULTILINE)
    return bool(values) and all(value in ("'False'", "None") for value in values)


def _temporary_directory() -> str:
    try:
        return tempfile.gettempdir()
    except OSError as error:  # none can be written
        raise MachineError(f"{error.strerror}; {SHORTAGES[errno.ENOSPC]}") from error


def check(config: Config) -> None:
    """Raises ConfigError for settings that do not go together."""
    job = config.job
    if job.nodes_max > 1 and not config.etcd.endpoints:
        raise ConfigError(
            f"--nnodes {job.nodes_min}:{job.nodes_max} needs an etcd that all nodes reach: give "
            "--etcd host:port (a private one serves a single launcher)"
        )
    if job.devices and len(job.devices) < job.nproc_per_node:
        raise ConfigError(
            f"--nproc_per_node {job.nproc_per_node} needs as many devices, but --devices names "
            f"{len(job.devices)}: give one for each process"
        )
    if job.devices and cpu_only():
        raise ConfigError(
            f"--devices {','.join(job.devices)} needs a Paddle that can use them, and the one that "
            f"is installed is for the CPU alone: install paddlepaddle-gpu instead, or leave "
            f"--devices out"
        )
    if config.checkpoint.when:
        policies.parse(config.checkpoint.when)
    if config.checkpoint.cache:
        cache = Path(config.checkpoint.cache)
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--cache {cache} cannot be used: {error.strerror}") from error
    try:
        os.makedirs(job.log_dir, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--log_dir {job.log_dir} cannot be used: {error.strerror}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; operating errors end in one sentence and their exit code."""

    def begin() -> int:
        command = parse(sys.argv[1:] if arguments is None else arguments, dict(os.environ))
        if command.print_config:
            sys.stdout.writelines(f"{line}\n" for line in command.loaded.describe())
            return EXIT_DONE
        return run(command)

    return entry(begin)


if __name__ == "__main__":
    sys.exit(main())
