"""The start of a worker process: runs a script as ``python script.py`` would, tied to its agent.

    python -m paddle_ft.agent.bootstrap script.py args…
    python -m paddle_ft.agent.bootstrap -m module args…
    python -m paddle_ft.agent.bootstrap --spare [FD]

A worker dies with its parent, even if that gets SIGKILL. It ends with the documented exit codes:
an operating error is one line on stderr, an exception of the script keeps its traceback (without
the lines of this file) and gives 1.

A warm spare has Paddle imported and waits for one line of JSON, ``{"env": {…}, "argv": […], "cwd":
"…"}``, on standard input, or on the socket or pipe ``FD``; then it becomes that worker. On a socket
it says ``ready`` first. If the other end closes without a word, it ends with 0.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.abc
import importlib.util
import json
import os
import resource
import runpy
import signal
import socket
import stat
import sys
import traceback
import warnings
import zlib
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType, TracebackType
from typing import Any

from paddle_ft.agent import door
from paddle_ft.errors import (
    EXIT_CONFIG,
    EXIT_SIGINT,
    EXIT_WORKER_FAILED,
    ConfigError,
    PaddleFTError,
)
from paddle_ft.exits import Leave, end, say

LAUNCHER_VARIABLE = "PADDLE_FT_LAUNCHER_PID"
"""Who started this process; not for what it starts in turn."""
_PR_SET_PDEATHSIG = 1
DESCRIPTORS = 65536
_USAGE = "usage: python -m paddle_ft.agent.bootstrap (script.py | -m module | --spare [FD]) [args…]"


def main() -> None:
    assert zlib  # loaded before paddle, or 2.6.2 crashes at the first decompression
    # A launcher may have been killed before this line, and the parent then is another one.
    die_with_parent(int(os.environ.pop(LAUNCHER_VARIABLE, 0)) or os.getppid())
    allow_descriptors()
    # The agent decides when a worker stops; Ctrl-C in its terminal is its business.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Paddle reports its connections at level INFO.
    os.environ.setdefault("GLOG_minloglevel", "1")
    # Said by Paddle at each import, of a compiler cache that training has no use for.
    warnings.filterwarnings("ignore", message="No ccache found")
    sys.meta_path.insert(0, _PaddleAsItIsNeeded())
    door.seal()
    arguments = sys.argv[1:]
    if arguments[:1] == ["--spare"]:
        arguments = wait_as_spare(arguments[1:])
    if not arguments or (arguments[0].startswith("-") and arguments[0] != "-m"):
        say(_USAGE)
        end(EXIT_CONFIG)
    run(arguments)


def allow_descriptors() -> None:
    """Takes what the system allows: every process group that is left keeps some of them open."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        most = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def die_with_parent(parent: int) -> None:
    """Asks the kernel to kill this process when ``parent`` ends; ends now if it has already.

    The signal comes when the *thread* that started this process ends: the agent starts workers on
    its main thread.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(EXIT_WORKER_FAILED)


class _PaddleAsItIsNeeded(importlib.abc.MetaPathFinder):
    """Imports Paddle and takes its signal handlers away, which print a C++ stack at SIGTERM.

    And the wait of 3 s from the way in which it connects to the store of its group.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "paddle":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                with door.unasked():
                    load(module)
                module.disable_signal_handler()
                core = module.base.core
                connect = core.create_or_get_global_tcp_store
                core.create_or_get_global_tcp_store = lambda: _connect_store(connect)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _connect_store(connect: Callable[[], Any]) -> Any:
    from paddle_ft.collective import connect_store

    return connect_store(connect)


def run(arguments: list[str]) -> None:
    """Runs a script or ``-m module`` as ``__main__``; returns if it ends normally."""
    try:
        if arguments[0] == "-m":
            if len(arguments) < 2:
                raise ConfigError("-m needs the name of a module.")
            sys.argv = arguments[1:]
            _search_first(os.getcwd())
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            if not os.path.exists(arguments[0]):
                raise ConfigError(f"There is no script {arguments[0]}; correct its name.")
            sys.argv = list(arguments)
            # A directory or an archive is put there by runpy itself.
            _search_first(os.path.dirname(os.path.realpath(arguments[0])))
            runpy.run_path(arguments[0], run_name="__main__")
    except Leave as leave:
        end(int(leave.code or 0))
    except PaddleFTError as error:
        say(str(error))
        end(error.exit_code)
    except KeyboardInterrupt:
        end(EXIT_SIGINT)
    except Exception as error:  # noqa: BLE001 - it is the script's, and shown as python would
        traceback.print_exception(type(error), error, _from_script(error.__traceback__))
        end(EXIT_WORKER_FAILED)


def _search_first(directory: str) -> None:
    """Puts ``directory`` where python would: in the place of the one this module was found from."""
    if getattr(sys.flags, "safe_path", False):
        return  # python -P
    sys.path[0] = directory


def _from_script(trace: TracebackType | None) -> TracebackType | None:
    """``trace`` without the frames of this file and of runpy at its beginning."""
    machinery = {__file__, runpy.__file__, "<frozen runpy>"}
    rest = trace
    while rest is not None and rest.tb_frame.f_code.co_filename in machinery:
        rest = rest.tb_next
    return rest if rest is not None else trace


# ---------------------------------------------------------------- warm spares


def wait_as_spare(arguments: list[str]) -> list[str]:
    """Imports Paddle, waits for the order, and takes on its environment; gives its arguments."""
    warm_up()
    order = _receive_order(int(arguments[0]) if arguments else 0, announce=bool(arguments))
    if order is None:
        end(0)
    os.environ.update(order["env"])
    os.chdir(order["cwd"])
    argv: list[str] = order["argv"]
    return argv


def warm_up() -> None:
    """What takes a new worker most of its time: the imports and the first kernels."""
    import paddle

    import paddle_ft.session  # noqa: F401

    paddle.disable_signal_handler()
    layer = paddle.nn.Linear(8, 8)
    layer(paddle.zeros([2, 8])).sum().backward()


def _receive_order(descriptor: int, announce: bool) -> dict[str, Any] | None:
    if announce and stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            connection.sendall(b"ready\n")
    with os.fdopen(descriptor, "rb", closefd=announce) as orders:
        line = orders.readline()
    if not line.endswith(b"\n"):
        return None
    order: dict[str, Any] = json.loads(line)
    return order


if __name__ == "__main__":
    main()
