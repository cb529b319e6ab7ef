"""From a generation to the environment of one worker: the PADDLE_* contract.

Pure. The variables are those ``paddle.distributed.launch`` sets (its collective controller), so
that ``paddle.distributed``, ``fleet`` and ``paddle.DataParallel`` work in a script that knows
nothing of paddle_ft; ``PADDLE_FT`` carries what the session needs besides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from paddle_ft.types import Generation, Recovery

SESSION_VARIABLE = "PADDLE_FT"
SEALED = "not-known-yet"
"""Value of what tells a rank, for a worker in reserve (``agent.door``)."""
_BACKEND = "PADDLE_DISTRI_BACKEND"


@dataclass(frozen=True, slots=True)
class SessionEnv:
    """Value of ``PADDLE_FT``: what a session must know about the job it runs in."""

    job: str
    generation: int
    restarts: int
    socket: str
    """Unix socket of the agent."""
    beacon: str
    """File of this worker's beacon page."""
    mode: str
    """``rank0`` or ``sharded``: who copies the replicated tensors."""
    block_bytes: int
    when: str = ""
    """When to save, as ``policies.parse`` reads it; empty: as the script says."""
    mtbf_s: float = 0.0
    """Mean time between failures so far; 0.0 if not known."""
    in_place: bool = False
    """Other ranks bring their state along: it is taken from them, if one of them has any."""
    restored_step: int = -1
    """Step of the checkpoint the generation starts from at least; -1 if there is none."""
    recovery: Recovery = "in_place"
    """What the user wants to be done when the group changes, where the script allows it."""
    store: str = ""
    """Where the checkpoints are kept, for what is published beside them."""
    waits: bool = False
    """A worker in reserve: it waits for its first generation where it needs its rank."""


def worker_env(
    generation: Generation,
    member_id: str,
    slot: int,
    *,
    devices: tuple[str, ...] = (),
    device_variable: str = "FLAGS_selected_gpus",
) -> Mapping[str, str]:
    """Variables of the worker in ``slot`` of ``member_id``; ``devices`` empty means CPU (gloo)."""
    endpoints = [
        f"{member.host}:{port}"
        for member in generation.members
        for port in member.ports[1 : member.slots + 1]
    ]
    first = generation.first_rank(member_id)
    rank = first + slot
    slots = next(m.slots for m in generation.members if m.id == member_id)
    env = {
        "PADDLE_MASTER": generation.endpoint,
        "PADDLE_GLOBAL_SIZE": str(generation.world_size),
        "PADDLE_LOCAL_SIZE": str(slots),
        "PADDLE_GLOBAL_RANK": str(rank),
        "PADDLE_LOCAL_RANK": str(slot),
        "PADDLE_NNODES": str(len(generation.members)),
        "PADDLE_CURRENT_ENDPOINT": endpoints[rank],
        "PADDLE_TRAINER_ID": str(rank),
        "PADDLE_TRAINERS_NUM": str(generation.world_size),
        "PADDLE_RANK_IN_NODE": str(slot),
        "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
    }
    if devices:
        env[device_variable] = devices[slot] if slots > 1 else ",".join(devices)
    else:
        env[_BACKEND] = "gloo"
    return env


def sealed_env(generation: Generation) -> Mapping[str, str]:
    """Variables of a worker in reserve, on the CPU: nothing in them tells a rank or a world."""
    like = worker_env(generation, generation.members[0].id, 0)
    return {name: value if name == _BACKEND else SEALED for name, value in like.items()}
