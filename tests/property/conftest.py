"""Property tests judge behaviour, not speed: a busy machine must not fail them."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile("paddle_ft", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("paddle_ft")
