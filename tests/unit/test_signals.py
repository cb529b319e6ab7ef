"""Signals that ask a launcher to leave."""

from __future__ import annotations

import os
import signal

import pytest

from paddle_ft.agent import signals


def test_a_signal_that_comes_again_at_once_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """`timeout` sends one to the process and one to its group."""
    said: list[str] = []
    with signals.Signals(lambda _: None, said.append, 60.0) as asked:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            asked.take()
        assert asked.leaving_code == 143
        assert not asked.hurried
        assert len(said) == 1
        monkeypatch.setattr(signals, "REPEAT_S", 0.0)
        os.kill(os.getpid(), signal.SIGTERM)
        asked.take()
        assert asked.hurried
