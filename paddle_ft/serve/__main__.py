"""``python -m paddle_ft.serve [flags]``: arguments and settings -> replica."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
from collections.abc import Sequence

from paddle_ft.agent.bootstrap import allow_descriptors
from paddle_ft.config import Config
from paddle_ft.entry import entry
from paddle_ft.errors import EXIT_DONE
from paddle_ft.exits import end
from paddle_ft.serve.command import parse
from paddle_ft.serve.gentle import import_gently


def _is_news(record: logging.LogRecord) -> bool:
    """False for what grpc says of calls under way when a server is stopped."""
    return not (record.exc_info and record.exc_info[0] is asyncio.CancelledError)


def run(config: Config) -> int:
    """Runs a replica until it is asked to stop; gives the exit code. Raises PaddleFTError."""
    from paddle_ft.serve.forks import Forks

    allow_descriptors()  # connections take some, too
    # Paddle is imported beside all that is imported here.
    forks = Forks() if config.serve.device == "cpu" else None
    try:
        # Heavy imports (grpc, boto3, uvicorn) come after the command line was found good.
        import_gently("paddle_ft.serve.replica")
        from paddle_ft.serve.own_etcd import with_etcd
        from paddle_ft.serve.replica import Replica

        gc.freeze()  # modules stay: the collector need not go through them while requests wait
        replica = Replica(config, forks)  # what is wrong with the settings is told at once
        with with_etcd(config) as settled:
            asyncio.run(replica.run(settled.etcd))
        return EXIT_DONE
    finally:
        if forks is not None:
            forks.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; operating errors end in one sentence and their exit code."""

    def begin() -> int:
        logging.getLogger("grpc._cython.cygrpc").addFilter(_is_news)
        command = parse(sys.argv[1:] if arguments is None else arguments, dict(os.environ))
        if command.print_config:
            sys.stdout.writelines(f"{line}\n" for line in command.loaded.describe())
            return EXIT_DONE
        level = logging.WARNING if command.quiet else logging.INFO
        logging.getLogger("paddle_ft").setLevel(level)
        return run(command.loaded.config)

    return entry(begin)


if __name__ == "__main__":
    end(main())
