"""Reads a state from the store, as long as it is wanted and may still come."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from paddle_ft.errors import EXIT_BUG, CheckpointDamaged, PaddleFTError, StoreError
from paddle_ft.types import CommitRef

log = logging.getLogger("paddle_ft")

RETRY_INTERVAL_S = 2.0
T = TypeVar("T")


def loaded(
    load: Callable[[], T],
    ref: CommitRef,
    over: Callable[[], bool],
    coming: Callable[[], bool],
    failed: Callable[[bool, str, int], None],
) -> T | None:
    """What ``load`` gives, tried until the store answers; None if it cannot be had or is ``over``.

    ``ref`` names the checkpoint. ``coming()``: what it lacks may still come. ``failed`` is told
    whether its bytes are damaged, the reason and an exit code.
    """
    complained = ""
    while not over():
        try:
            return load()
        except CheckpointDamaged as error:
            if coming():
                time.sleep(RETRY_INTERVAL_S)
                continue
            failed(True, str(error), 0)
            return None
        except StoreError as error:
            if str(error) != complained:
                complained = str(error)
                log.warning("step %d cannot be loaded yet: %s", ref.step, error)
            time.sleep(RETRY_INTERVAL_S)
        except PaddleFTError as error:
            failed(False, str(error), error.exit_code)
            return None
        except Exception as error:
            log.exception("step %d cannot be loaded: a defect of paddle_ft", ref.step)
            failed(False, repr(error), EXIT_BUG)
            return None
    return None
