"""How many processes a node holds in reserve, and of what kind. Pure."""

from __future__ import annotations

from paddle_ft.agent.supervise import LocalView
from paddle_ft.config import JobConfig


def spares_due(view: LocalView, config: JobConfig) -> tuple[int, int]:
    """Processes to hold in reserve: imported only, and waiting at the door of their session.

    A node without a place prepares all of its workers, so that those of the others do not wait.
    """
    generation = view.state.generation.value if view.state.generation else None
    if generation is None or view.leaving_since_s is not None or view.state.outcome is not None:
        return config.spares, 0
    records = (view.state.live.get(m) for m in generation.member_ids())
    running = [r.value.status for r in records if r is not None]
    if not any(s.recovery == "in_place" for s in running):
        return config.spares, 0
    if any(s.recovery == "restart" for s in running):
        return config.spares, 0
    prepares = view.me not in generation.member_ids()
    return 0, config.nproc_per_node if prepares else config.spares
