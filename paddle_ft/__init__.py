"""Fault-tolerant, elastic training for PaddlePaddle.

``session`` is what a training script uses; ``python -m paddle_ft.launch`` runs it on one machine or
many. Importing this package loads neither Paddle nor grpc nor boto3.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from paddle_ft.policies import (
        AnyOf,
        Automatic,
        EveryNSteps,
        EverySeconds,
        OnBetter,
        OnPreemption,
        OnSignal,
    )
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

_HOMES = {"Session": "paddle_ft.session", "ShardOf": "paddle_ft.types"}


class _Package(ModuleType):
    """Loads what training uses once it is asked for: replicas and their workers start without."""

    def __getattr__(self, name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(import_module(_HOMES.get(name, "paddle_ft.policies")), name)
        setattr(self, name, found)
        return found

    @property
    def session(self) -> Any:
        """The function, not the module of that name, which an import of it would set here."""
        return import_module("paddle_ft.session").session

    @session.setter
    def session(self, module: ModuleType) -> None:
        """Of the import system."""


sys.modules[__name__].__class__ = _Package
