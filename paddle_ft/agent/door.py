"""The door of a worker in reserve: it runs the script until that asks for its rank, and waits.

Invariant: nothing in such a process has seen a rank before its agent gave it one.

The variables that tell a rank or a world are sealed. Who asks for one of them first
(``init_parallel_env``, ``fleet.init``, ``DataParallel``, ``get_rank``, a data loader, the script
itself) waits until the order has come, and finds what that says. A session waits by itself, later:
what it does before needs no rank. Who was started before cannot be told any more: a process that
was forked ends when it asks, and ends the one in reserve; a program finds a word there that is no
number.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping

from paddle_ft.agent.worker_env import SEALED, SESSION_VARIABLE
from paddle_ft.errors import EXIT_WORKER_FAILED
from paddle_ft.exits import end, say


class _Seal:
    """What is sealed in this process, and since when."""

    def __init__(self) -> None:
        self.names = frozenset(name for name, value in os.environ.items() if value == SEALED)
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._exempt = 0
        """The thread to which sealed variables are not there at all; 0: none."""

    @contextlib.contextmanager
    def exempted(self) -> Iterator[None]:
        before, self._exempt = self._exempt, threading.get_ident()
        try:
            yield
        finally:
            self._exempt = before

    def hides(self, name: str) -> bool:
        """Somebody asks for ``name``, or sets it; returns once it is what it will be.

        Whether it is not to be found.
        """
        if name not in self.names or not is_sealed():
            return False
        if threading.get_ident() == self._exempt:
            return True
        if os.getpid() != self._pid:
            say(f"a process started by a worker in reserve asks for {name}, too early: both end")
            os.kill(self._pid, signal.SIGKILL)
            os._exit(EXIT_WORKER_FAILED)
        with self._lock:
            if is_sealed():
                with self.exempted():
                    _wait()
        return False


class _Environ(os._Environ[str]):
    """``os.environ`` with variables that are sealed.

    Without ``super``: the object is of another class when the order has come.
    """

    def __getitem__(self, name: str) -> str:
        if _seal.hides(name):
            raise KeyError(name)
        return os._Environ.__getitem__(self, name)

    def __setitem__(self, name: str, value: str) -> None:
        _seal.hides(name)
        os._Environ.__setitem__(self, name, value)

    def __delitem__(self, name: str) -> None:
        _seal.hides(name)
        os._Environ.__delitem__(self, name)


_seal = _Seal()


def seal() -> None:
    """Closes the door, if this process was started to wait."""
    global _seal
    told = os.environ.get(SESSION_VARIABLE)
    if told and json.loads(told).get("waits"):
        _seal = _Seal()
        _turn_into(_Environ)


def is_sealed() -> bool:
    """This process is in reserve and has not been given a rank yet."""
    return type(os.environ) is _Environ


def unasked() -> contextlib.AbstractContextManager[None]:
    """In it, this thread finds no sealed variable, as in a process outside of any job.

    For the import of Paddle: it asks for the rank only to keep the log of ``paddle.hapi`` quiet on
    all but the first one.
    """
    return _seal.exempted()


def take(env: Mapping[str, str]) -> None:
    """The order has come: ``env`` is what this process is from now on."""
    for name, value in env.items():
        os._Environ.__setitem__(os.environ, name, value)
    if is_sealed():
        _turn_into(os._Environ)


def _turn_into(kind: type) -> None:
    # The object itself stays: others may hold it already.
    object.__setattr__(os.environ, "__class__", kind)


def _wait() -> None:
    from paddle_ft.agent.ipc import Channel, Hello, Order

    _prepare()
    channel = Channel.connect(json.loads(os.environ[SESSION_VARIABLE])["socket"])
    channel.send(Hello(-1, 0, os.getpid()))
    while not isinstance(message := channel.receive(), Order):
        if message is None:
            end(EXIT_WORKER_FAILED)
    take(message.env)
    channel.close()


def _prepare() -> None:
    """What is sure to be needed later and takes long."""
    paddle = sys.modules.get("paddle")
    if paddle is None or not getattr(paddle, "in_dynamic_mode", lambda: False)():
        return
    from paddle_ft.context import session_env
    from paddle_ft.rehearsal import rehearse

    importlib.import_module("paddle_ft.session")
    session_env()
    rehearse()
