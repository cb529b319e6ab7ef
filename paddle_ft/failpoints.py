"""Named places where a test can make the program crash, fail or wait. Switched off they cost a look
at an empty dictionary.

``PADDLE_FT_FAILPOINTS="write.objects=crash;commit.marker=raise:StoreUnavailable@2"`` switches
them on in a child process; ``switched`` does so within one. ``@n``: at the n-th passing, and not
before. Actions:

    crash          os._exit(86): no clean-up of any kind, as after SIGKILL
    raise[:Class]  raises that class of paddle_ft.errors (default StoreUnavailable)
    sleep:SECONDS  waits
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from paddle_ft import errors

VARIABLE = "PADDLE_FT_FAILPOINTS"
EXIT_CRASHED = 86


@dataclass(slots=True)
class _Armed:
    action: Callable[[], None]
    passings_left: int


_armed: dict[str, _Armed] = {}
_seen: list[str] | None = None
_lock = threading.Lock()


def failpoint(name: str) -> None:
    """Does nothing, unless a test has armed ``name``."""
    if _seen is not None:
        _seen.append(name)
    if not _armed:
        return
    with _lock:
        armed = _armed.get(name)
        if armed is None:
            return
        armed.passings_left -= 1
        if armed.passings_left != 0:
            return
    armed.action()


@contextmanager
def switched(spec: str | None = None, **actions: Callable[[], None]) -> Iterator[None]:
    """Arms the failpoints of ``spec`` (as in the variable) and ``actions`` (a__b means a.b)."""
    before = dict(_armed)
    _armed.update(parse(spec or ""))
    _armed.update({n.replace("__", "."): _Armed(a, 1) for n, a in actions.items()})
    try:
        yield
    finally:
        _armed.clear()
        _armed.update(before)


@contextmanager
def recorded() -> Iterator[list[str]]:
    """The names that are passed within the block, so that a test can walk all of them."""
    global _seen
    names: list[str] = []
    _seen = names
    try:
        yield names
    finally:
        _seen = None


def parse(spec: str) -> dict[str, _Armed]:
    """The failpoints ``spec`` describes; raises ConfigError for what it does not understand."""
    armed: dict[str, _Armed] = {}
    for item in filter(None, (part.strip() for part in spec.split(";"))):
        name, equals, rest = item.partition("=")
        action, _, passing = rest.partition("@")
        if not (name and equals and action) or (passing and not passing.isdigit()):
            raise errors.ConfigError(f"{VARIABLE}: {item!r} is not name=action or name=action@n.")
        armed[name] = _Armed(_action(name, action), int(passing or 1))
    return armed


def _action(name: str, text: str) -> Callable[[], None]:
    kind, _, argument = text.partition(":")
    if kind == "crash" and not argument:
        return lambda: os._exit(EXIT_CRASHED)
    if kind == "raise":
        error = getattr(errors, argument or "StoreUnavailable", None)
        if isinstance(error, type) and issubclass(error, errors.PaddleFTError):
            return _raiser(error, name)
    if kind == "sleep":
        try:
            seconds = float(argument)
        except ValueError:
            seconds = -1.0
        if seconds >= 0:
            return lambda: time.sleep(seconds)
    raise errors.ConfigError(
        f"{VARIABLE}: {text!r} is not crash, raise[:Class of paddle_ft.errors] or sleep:SECONDS."
    )


def _raiser(error: type[errors.PaddleFTError], name: str) -> Callable[[], None]:
    def act() -> None:
        raise error(f"The failpoint {name} was switched on; switch it off.")

    return act


_armed.update(parse(os.environ.get(VARIABLE, "")))
