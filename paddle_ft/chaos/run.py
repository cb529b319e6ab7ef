"""``paddle-ft chaos run``: starts the launchers of a job, does the faults of a plan, reports."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from paddle_ft.agent.tether import tethered
from paddle_ft.chaos import plan as plans
from paddle_ft.chaos.drive import TURN_S, Driver
from paddle_ft.chaos.plan import Node, Plan
from paddle_ft.chaos.proxy import StoreProxy
from paddle_ft.chaos.report import Result, as_record, lines
from paddle_ft.chaos.strike import Hands
from paddle_ft.chaos.watch import Launcher, Watch
from paddle_ft.checkpoint import commit
from paddle_ft.checkpoint.cli import differences
from paddle_ft.checkpoint.sign import Trust
from paddle_ft.checkpoint.store import open_store
from paddle_ft.command_line import parse
from paddle_ft.config import CheckpointConfig, Config
from paddle_ft.errors import EXIT_COORDINATION, EXIT_STORE, ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

STOP_TIMEOUT_S = 20.0
EXIT_NOT_RECOVERED = 1
UNREACHABLE = (EXIT_COORDINATION, EXIT_STORE)
AGAIN_S = 1.0


def read_plan(path: Path) -> Plan:
    """Raises ConfigError."""
    try:
        return plans.from_table(tomllib.loads(path.read_text()))
    except OSError as error:
        raise ConfigError(f"the plan {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the plan {path} is not a text file: give a TOML file") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the plan {path} is not valid TOML: {error}") from error


class Job:
    """The launchers of one job, as the plan has them; ``name`` is that of this run of it."""

    def __init__(
        self, plan: Plan, arguments: Sequence[str], flags: Sequence[str], environ: dict[str, str]
    ) -> None:
        self._plan = plan
        self._nodes = {node.name: node for node in plan.nodes}
        self._arguments = list(arguments)
        self._flags = list(flags)
        self._environ = environ
        self._config = settings(arguments)
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._eras: dict[str, int] = {}
        self._codes: dict[str, int] = {}
        self._killed: set[str] = set()
        """Nodes that are being killed on purpose."""
        self._owed: set[str] = set()
        """Those of them that are still to come back."""
        self._again: dict[str, float] = {}
        """When a launcher is started once more that could not begin."""
        self._ended_s = 0.0
        """When the first launcher ended by itself."""

    def start(self, name: str) -> None:
        """Starts the launcher of node ``name``, which is not running."""
        node = self._nodes[name]
        self._eras[name] = self._eras.get(name, -1) + 1
        argv = self._argv(node)
        if node.namespace:
            argv = ["ip", "netns", "exec", node.namespace, *argv]
        with contextlib.ExitStack() as stack:
            output = None
            if name:
                self._log_dir(name).mkdir(parents=True, exist_ok=True)
                file = self._log_dir(name) / "launcher.txt"
                output = stack.enter_context(file.open("ab"))
            self._running[name] = subprocess.Popen(
                tethered(argv),
                env={**os.environ, **self._environ},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def _argv(self, node: Node) -> list[str]:
        script = len(parse(self._arguments, dict(os.environ)).worker)
        module = script and "--module" in self._arguments[: len(self._arguments) - script + 1]
        script -= bool(module)
        split = len(self._arguments) - script
        own = ["--node", node.name, "--log_dir", str(self._log_dir(node.name))] if node.name else []
        flags = [*self._arguments[:split], *node.arguments, *self._flags, *own]
        return [sys.executable, "-m", "paddle_ft.launch", *flags, *self._arguments[split:]]

    def _log_dir(self, name: str) -> Path:
        return Path(self._config.job.log_dir) / name

    def launchers(self) -> list[Launcher]:
        """Those that run now. A private etcd begins anew with its launcher, hence the era."""
        private = not self._config.etcd.endpoints
        return [
            Launcher(name, p.pid, self._log_dir(name), self._eras[name] if private else 0)
            for name, p in list(self._running.items())  # called while others start and end
            if name not in self._killed and p.poll() is None
        ]

    def expect(self, name: str, back: bool) -> None:
        """Node ``name`` is about to be killed, and to be started again or not."""
        self._killed.add(name)
        if back:
            self._owed.add(name)

    def start_again(self, name: str) -> None:
        """Unless the others have come to the end of the job meanwhile."""
        self._owed.discard(name)
        if name not in self._running and not self._ended_s:
            self.start(name)

    def ended(self) -> bool:
        """Whether every launcher has ended, and none is to come back.

        As a service manager would, it starts one again that came back too early, while etcd or the
        store could not be reached.
        """
        now_s = time.monotonic()
        for name in [n for n, at_s in self._again.items() if at_s <= now_s]:
            del self._again[name]
            self.start_again(name)
        for name, process in list(self._running.items()):
            code = process.poll()
            if code is not None:
                del self._running[name]
                if name in self._killed and code < 0:
                    self._killed.discard(name)
                    continue
                if code in UNREACHABLE and self._eras[name]:
                    self._owed.add(name)
                    self._again[name] = now_s + AGAIN_S
                    continue
                self._codes[name] = code
                self._ended_s = self._ended_s or time.monotonic()
        if self._ended_s and time.monotonic() - self._ended_s > STOP_TIMEOUT_S:
            return True  # who came back too late waits for a job that has ended
        return not self._running and not self._owed

    @property
    def exit_code(self) -> int:
        """0 if all ended well; else the first that did not."""
        return next((code for code in self._codes.values() if code), 0)

    def close(self) -> None:
        for process in self._running.values():
            if process.poll() is None:
                process.terminate()
        for process in self._running.values():
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def settings(arguments: Sequence[str]) -> Config:
    return parse(arguments, dict(os.environ)).loaded.config


def run(plan: Plan, arguments: Sequence[str], to: Path | None = None) -> tuple[list[str], int]:
    """Runs the job under the plan; gives the report and the exit code.

    ``to``: a JSON file with the same. Raises PaddleFTError.
    """
    config = settings(arguments)
    _check(plan, config)
    url = config.checkpoint.url or f"checkpoints/{config.job.id}"
    flags: list[str] = []
    if plan.compare:
        for end in ("undisturbed", "disturbed"):
            if commit.list_commits(open_store(f"{url}/{end}", config.checkpoint)):
                raise ConfigError(
                    f"{url}/{end} holds checkpoints already, and the runs to compare must begin "
                    f"anew: give another --checkpoint"
                )
        calm = replace(plan, faults=())
        own = ["--checkpoint", f"{url}/undisturbed", "--job_id", f"{config.job.id}-undisturbed"]
        _, result = _run(calm, arguments, own, config)
        if result.exit_code:
            raise ConfigError(
                f"the undisturbed run ended with {result.exit_code}: mend the command first"
            )
        flags = ["--checkpoint", f"{url}/disturbed"]
    driver, result = _run(plan, arguments, flags, config)
    if plan.compare and not result.exit_code:
        told = compare(f"{url}/undisturbed", f"{url}/disturbed", config.checkpoint)
        result = replace(result, weights=told)
    outcomes = driver.outcomes()
    never = any(o.struck.victim and o.recovered_s is None for o in outcomes)
    wrong = result.weights not in ("", "equal")
    if to is not None:
        record = as_record(outcomes, driver.began_s, result)
        to.write_text(json.dumps(record, indent=1) + "\n")
    code = result.exit_code or (EXIT_NOT_RECOVERED if wrong or never else 0)
    return list(lines(outcomes, driver.began_s, result)), code


def _check(plan: Plan, config: Config) -> None:
    if len(plan.nodes) > 1 and not config.etcd.endpoints:
        raise ConfigError("a plan of several nodes needs an etcd: give --etcd host:port")
    kills = sum(f.kind == "kill-worker" for f in plan.faults)
    if kills > config.job.max_restart:
        raise ConfigError(
            f"the plan kills {kills} workers, and --max_restart {config.job.max_restart} may end "
            f"the job for it: give --max_restart {kills} or more"
        )


def _run(
    plan: Plan, arguments: Sequence[str], flags: Sequence[str], config: Config
) -> tuple[Driver, Result]:
    began_s = time.monotonic()
    with contextlib.ExitStack() as stack:
        environ: dict[str, str] = {}
        proxy = None
        if any(f.kind == "store-errors" for f in plan.faults) and config.checkpoint.endpoint_url:
            proxy = stack.enter_context(StoreProxy(config.checkpoint.endpoint_url))
            environ["PADDLE_FT_CHECKPOINT__ENDPOINT_URL"] = proxy.endpoint
        job = Job(plan, arguments, flags, environ)
        stack.callback(job.close)
        watch = Watch(job.launchers)
        hands = Hands(plan, job.launchers, job.start_again, job.expect, proxy)
        stack.callback(hands.close)
        for node in plan.nodes:
            job.start(node.name)
        watch.start()
        stack.callback(watch.close)
        driver = Driver(plan, hands, watch)
        while not job.ended():
            driver.turn()
            time.sleep(TURN_S)
    seconds = time.monotonic() - began_s
    return driver, Result(job.exit_code, driver.steps(), seconds, "")


def compare(one: str, other: str, config: CheckpointConfig) -> str:
    """``equal``, or in a sentence how the newest checkpoints of two stores differ."""
    found = []
    for url in (one, other):
        store = open_store(url, config)
        commits = commit.list_commits(store)
        if not commits:
            return f"not compared, {url} holds no checkpoint"
        found.append((commits[0].step, commit.read_manifest(store, commits[0], Trust.of(config))))
    (step, first), (other_step, second) = found
    if step != other_step:
        return f"not compared, the last checkpoints are of steps {step} and {other_step}"
    differ = list(_names(differences(first.tensors, second.tensors)))
    return f"DIFFERENT in {len(differ)} tensors, {differ[0]} among them" if differ else "equal"


def _names(rows: Sequence[tuple[str, int, str, int]]) -> Iterator[str]:
    for name, rank, *_ in rows:
        yield name if rank < 0 else f"{name} of rank {rank}"
