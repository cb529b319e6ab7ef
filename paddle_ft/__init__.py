"""Fault-tolerant, elastic training for PaddlePaddle.

``session`` is what a training script uses; ``python -m paddle_ft.launch`` runs it on one machine or
many. Importing this package loads neither Paddle nor grpc nor boto3.
"""

from __future__ import annotations

from paddle_ft.errors import (
    CheckpointDamaged,
    CheckpointError,
    CheckpointMismatch,
    CollectiveFailed,
    ConfigError,
    CoordinationError,
    EtcdUnavailable,
    LeaseLost,
    MachineError,
    MembersMissing,
    PaddleFTError,
    StoreDenied,
    StoreError,
    StoreFull,
    StoreMissing,
    StoreUnavailable,
    WorkerFailed,
)
from paddle_ft.policies import (
    AnyOf,
    Automatic,
    EveryNSteps,
    EverySeconds,
    OnBetter,
    OnPreemption,
    OnSignal,
)

# Here, not on first use: `paddle_ft.session` is to be the function, not the module of that name.
from paddle_ft.session import Session, session
from paddle_ft.types import ShardOf

__all__ = [
    "AnyOf",
    "Automatic",
    "CheckpointDamaged",
    "CheckpointError",
    "CheckpointMismatch",
    "CollectiveFailed",
    "ConfigError",
    "CoordinationError",
    "EtcdUnavailable",
    "EveryNSteps",
    "EverySeconds",
    "LeaseLost",
    "MachineError",
    "MembersMissing",
    "OnBetter",
    "OnPreemption",
    "OnSignal",
    "PaddleFTError",
    "Session",
    "ShardOf",
    "StoreDenied",
    "StoreError",
    "StoreFull",
    "StoreMissing",
    "StoreUnavailable",
    "WorkerFailed",
    "session",
]
