"""The models that the serving benchmark serves, and the environment that its processes get."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paddle_ft.serve.publish import publish

HERE = Path(__file__).parent


@dataclass
class Model:
    """Versions of one model: exported all, published one after the other."""

    name: str
    exported: Path
    store: Path
    published: int = 0

    def publish(self) -> int:
        """The next version; gives its number."""
        self.store.mkdir(parents=True, exist_ok=True)
        path = self.exported / str(self.published + 1)
        found = publish(path, self.name, str(self.store), outputs=("scores",))
        self.published += 1
        return found.ref.version

    @property
    def samples(self) -> Path:
        return self.exported / "samples.json"


def make_model(folder: Path, name: str, versions: int, hidden: int) -> Model:
    """Exports it, in a process of its own, and publishes its first version."""
    exported = folder / f"{name}-exported"
    if not exported.exists():
        script = HERE / "scripts" / "serving_digits.py"
        exported.mkdir(parents=True)
        command = [sys.executable, str(script), str(exported), str(versions), str(hidden)]
        subprocess.run(
            command, check=True, timeout=300, env=environment({}), stderr=subprocess.PIPE
        )
    made = Model(name, exported, folder / "store")
    shutil.rmtree(made.store, ignore_errors=True)
    made.publish()
    return made


def environment(settings: Mapping[str, Any]) -> dict[str, str]:
    """With settings of paddle_ft as ``serve.batch_rows_max``."""
    own = {f"PADDLE_FT_{k.upper().replace('.', '__')}": str(v) for k, v in settings.items()}
    return os.environ | {"PYTHONPATH": str(HERE.parent)} | own
