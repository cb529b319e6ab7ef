"""Sizes, ages and moments in words."""

from __future__ import annotations

import time


def moment(wall_s: float) -> str:
    """Seconds since 1970 as local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(wall_s))


def size(nbytes: float) -> str:
    """``nbytes`` for people: 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def age(seconds: float) -> str:
    """``seconds`` for people, in the two largest units: 3 h 12 min."""
    left = max(0, int(seconds))
    words = []
    for name, length in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, length)
        if count:
            words.append(f"{count} {name}")
    return " ".join(words[:2]) or "0 s"
