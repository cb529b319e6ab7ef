"""How many processes a node holds in reserve, and of what kind. Pure."""

from __future__ import annotations

from paddle_ft.agent.supervise import LocalView
from paddle_ft.config import JobConfig


def spares_due(view: LocalView, config: JobConfig) -> tuple[int, int] | None:
    """Processes to hold in reserve: imported only, and waiting where they need their rank.

    None: as many as there are, for now. Workers on their way to their first step need the
    processors more. A node without a place prepares all of its workers, so that those of the others
    do not wait. Whose workers start anew takes them from the reserve as well, where a script waits
    that has a session (its state comes from there, not from what the script has read before).
    """
    generation = view.state.generation.value if view.state.generation else None
    if generation is None or view.leaving_since_s is not None or view.state.outcome is not None:
        return config.spares, 0
    if view.group is not None and view.group.told and not view.group.stepping:
        return None
    records = (view.state.live.get(m) for m in generation.member_ids())
    running = [r.value.status for r in records if r is not None]
    restarts = any(s.recovery == "restart" for s in running)
    if not restarts and not any(s.recovery == "in_place" for s in running):
        return config.spares, 0
    if config.devices:  # which of them is known with the rank alone
        return config.spares, 0
    prepares = view.me not in generation.member_ids()
    return 0, config.nproc_per_node if prepares else config.spares
