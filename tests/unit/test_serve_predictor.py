"""What Paddle Inference is told for each device."""

from __future__ import annotations

from typing import Any

import pytest

from paddle_ft.errors import ConfigError
from paddle_ft.serve.deadline import Bounds, verdict
from paddle_ft.serve.predictor import Settings, _place


class Config:
    """Notes the calls; a machine with each device is not to be had."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *given: self.calls.append((name, *given))


@pytest.mark.parametrize(
    ("settings", "calls"),
    [
        (Settings(device="gpu:1", memory_pool_mb=64), [("enable_use_gpu", 64, 1)]),
        (Settings(device="npu:0"), [("enable_custom_device", "npu", 0)]),
        (
            Settings(threads=3),
            [
                ("disable_gpu",),
                ("set_cpu_math_library_num_threads", 3),
                ("set_mkldnn_cache_capacity", 16),
                ("enable_mkldnn",),
            ],
        ),
        (
            Settings(exact=True),
            [("disable_gpu",), ("set_cpu_math_library_num_threads", 1), ("disable_mkldnn",)],
        ),
    ],
)
def test_a_device_is_one_line(settings: Settings, calls: list[tuple[Any, ...]]) -> None:
    config = Config()
    _place(config, settings)
    assert config.calls == calls


@pytest.mark.parametrize("device", ["gpu", "gpu:x", "npu", "cpu:x", ""])
def test_what_is_no_device_is_told(device: str) -> None:
    with pytest.raises(ConfigError, match="give cpu, gpu:0 or npu:0"):
        _place(Config(), Settings(device=device))


def test_one_that_may_wait_is_given_up_at_the_hard_bound_only() -> None:
    bounds = Bounds(soft_s=1, hard_s=5)
    assert "done nothing" in verdict(2, bounds, 0, 1)
    assert not verdict(2, bounds, 0, 1, may_wait=True)
    assert "longer than" in verdict(6, bounds, 0, 1, may_wait=True)
    assert "stopped" in verdict(2, bounds, 1, 1, may_wait=True)
