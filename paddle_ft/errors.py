"""Everything that can go wrong in operation, one class for each reaction a caller can have.

    PaddleFTError                       exit code
    ├── ConfigError                     2   what was typed or configured is wrong: correct it
    ├── CoordinationError               3   etcd cannot do what is needed: look at it or the network
    │   ├── EtcdUnavailable             3   no answer in time: check the address, wait, try again
    │   ├── LeaseLost                   3   this node was taken for dead: join again as a newcomer
    │   └── MembersMissing              3   too few nodes came: start more or lower --nnodes
    ├── StoreError                      4   the checkpoint store cannot do what is needed
    │   ├── StoreUnavailable            4   transient faults did not end: check the store, try again
    │   ├── StoreDenied                 4   credentials or permissions are wrong
    │   ├── StoreMissing                4   the bucket, directory or object is not there
    │   └── StoreFull                   4   no space left
    ├── CheckpointError                 5   a checkpoint exists but cannot be used
    │   ├── CheckpointDamaged           5   bytes are missing or altered: use an older one
    │   └── CheckpointMismatch          5   it belongs to another model, dataset or job
    ├── NodeUnfit                       7   this node is much slower than the others: see why
    ├── ServeError (serve.types)        8   serving cannot do what is asked: see the message
    ├── MachineError                    71  this machine is short of something, or refuses it
    ├── WorkerFailed                    1   workers failed more often than --max_restart allows
    └── CollectiveFailed                75  a peer was lost in a collective: the generation restarts

Bugs assert; operating faults are one of these. ``str(error)`` is one sentence that says what
happened, to what, and what to do next; nobody needs a traceback for it.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_WORKER_FAILED = 1
EXIT_CONFIG = 2
EXIT_COORDINATION = 3
EXIT_STORE = 4
EXIT_CHECKPOINT = 5
EXIT_SAME_FAILURE = 6
EXIT_UNFIT = 7
EXIT_SERVING = 8
EXIT_BUG = 70
"""An exception that is none of the above: a defect of paddle_ft, reported with its traceback."""
EXIT_MACHINE = 71
EXIT_COLLECTIVE = 75
"""Used between a worker and its agent only: this worker did not fail, a peer did."""
EXIT_PAUSED = 76
"""Used between a worker and its agent only: the state was saved and the worker left on request."""
EXIT_SIGINT = 130
EXIT_SIGTERM = 143


class PaddleFTError(Exception):
    """Base of all operating errors of paddle_ft."""

    exit_code = EXIT_BUG


class ConfigError(PaddleFTError):
    """A flag, key, file or value is wrong."""

    exit_code = EXIT_CONFIG


class CoordinationError(PaddleFTError):
    """etcd cannot do what is needed."""

    exit_code = EXIT_COORDINATION


class EtcdUnavailable(CoordinationError):
    """No etcd member answered in time; whether a request took effect is not known."""


class LeaseLost(CoordinationError):
    """The lease of this node has ended: to the others it is dead."""


class MembersMissing(CoordinationError):
    """Not enough nodes joined in time."""


class StoreError(PaddleFTError):
    """The checkpoint store cannot do what is needed."""

    exit_code = EXIT_STORE


class StoreUnavailable(StoreError):
    """The store did not answer, or answered with transient faults until the retries ran out."""


class StoreDenied(StoreError):
    """Wrong credentials or missing permission."""


class StoreMissing(StoreError):
    """The bucket, directory or object does not exist."""


class StoreFull(StoreError):
    """No space or quota left."""


class CheckpointError(PaddleFTError):
    """A checkpoint exists but cannot be used."""

    exit_code = EXIT_CHECKPOINT


class CheckpointDamaged(CheckpointError):
    """Bytes of a checkpoint are missing or are not those that were saved."""


class CheckpointMismatch(CheckpointError):
    """A checkpoint belongs to another model, optimizer, dataset or job."""


class NodeUnfit(PaddleFTError):
    """This node, or a link of it, is much slower than those of the others."""

    exit_code = EXIT_UNFIT


class MachineError(PaddleFTError):
    """This machine is short of processes, descriptors, memory or disk space, or refuses them."""

    exit_code = EXIT_MACHINE


class WorkerFailed(PaddleFTError):
    """Workers failed more often than is allowed."""

    exit_code = EXIT_WORKER_FAILED


class CollectiveFailed(PaddleFTError):
    """A collective operation ended without a result because a peer was lost."""

    exit_code = EXIT_COLLECTIVE


def exit_code_of(error: BaseException) -> int:
    """The documented exit code for ``error``; EXIT_BUG for anything that is not a PaddleFTError."""
    return error.exit_code if isinstance(error, PaddleFTError) else EXIT_BUG
