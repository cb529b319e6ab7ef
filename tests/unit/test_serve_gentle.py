from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from paddle_ft.serve.gentle import import_gently


def test_a_module_is_imported_at_a_low_priority_and_ours_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_to_import.py").write_text(
        "import os, threading\nnice = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    before = os.getpriority(os.PRIO_PROCESS, 0)
    import_gently("slow_to_import")
    assert sys.modules.pop("slow_to_import").nice == 19
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_what_an_import_raises_is_raised() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        import_gently("json", "no_such_module_at_all")


def test_what_serves_loads_nothing_of_training_and_the_public_names_are_there() -> None:
    script = """
import sys
import paddle_ft.serve.worker
assert not {"paddle_ft.session", "paddle_ft.policies"} & set(sys.modules)
import paddle_ft.serve.replica
assert not {"paddle_ft.session", "paddle"} & set(sys.modules)
import paddle_ft.session
import paddle_ft as ft
assert ft.session is sys.modules["paddle_ft.session"].session
assert all(getattr(ft, name) for name in ft.__all__)
assert not hasattr(ft, "nothing")
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=100)
