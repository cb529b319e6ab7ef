"""The log that nginx writes of its tries, read as it grows and kept small."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

LOG_BYTES_MAX = 16 * 2**20


class Log:
    """What nginx has written about requests since the last look; the file stays small."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._rest = b""

    def lines(self) -> Iterator[str]:
        if self._file is None:
            with suppress(FileNotFoundError):
                self._file = self._path.open("rb")
                self._file.seek(0, os.SEEK_END)
            return
        *lines, self._rest = (self._rest + self._file.read(2**20)).split(b"\n")
        if self._file.tell() > LOG_BYTES_MAX:  # nginx appends, wherever the end is
            os.truncate(self._path, 0)
            self._file.seek(0)
            self._rest = b""
        yield from (line.decode(errors="replace") for line in lines)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
