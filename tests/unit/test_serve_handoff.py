"""What the thread that publishes meets is told at the end of the session."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from paddle_ft.errors import MachineError
from paddle_ft.serve.handoff import Publishing, _Handoff


@pytest.mark.parametrize(
    ("met", "told"),
    [
        (OSError(28, "No space left on device"), MachineError),
        (ZeroDivisionError("a defect"), ZeroDivisionError),
    ],
)
def test_no_version_is_lost_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, met: Exception, told: type[Exception]
) -> None:
    def fails(*_args: object, **_more: object) -> None:
        raise met

    monkeypatch.setattr("paddle_ft.serve.publish.publish", fails)
    context = cast(Any, SimpleNamespace(env=None, store_url=str(tmp_path / "store")))
    handoff = _Handoff(context, "digits", "", 3)
    handoff.begin(None, lambda: 3, {})
    session = Publishing()
    session._handoffs = [handoff]
    with pytest.raises(told, match="No space left" if told is MachineError else "a defect"):
        session._finish_publishing()
