"""``grpc``, imported in the one right way: from here.

Two things must come first. Paddle 2.6.2 brings a zlib of its own: loaded before Python's, it
crashes the first decompress that grpc makes. And grpc reads at its import whether it shall write
to stderr; what it would write about a failed connection stands in our exceptions already. Who
sets GRPC_VERBOSITY gets grpc's own log.
"""

from __future__ import annotations

import os
import zlib  # noqa: F401

_unset = "GRPC_VERBOSITY" not in os.environ
if _unset:
    os.environ["GRPC_VERBOSITY"] = "NONE"
import grpc  # noqa: E402

if _unset:  # it is our wish, not that of the processes we start
    del os.environ["GRPC_VERBOSITY"]

__all__ = ["grpc"]
