"""``python -m paddle_ft.serve [flags]``: arguments and settings -> replica."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Sequence

from paddle_ft.config import Config
from paddle_ft.errors import EXIT_BUG, EXIT_DONE, EXIT_SIGINT, PaddleFTError
from paddle_ft.exits import end
from paddle_ft.launch import one_sentence_for_shortages, stop_before_it_runs
from paddle_ft.serve.command import parse
from paddle_ft.serve.gentle import import_gently


def _is_news(record: logging.LogRecord) -> bool:
    """False for what grpc says of calls under way when a server is stopped."""
    return not (record.exc_info and record.exc_info[0] is asyncio.CancelledError)


def run(config: Config) -> int:
    """Runs a replica until it is asked to stop; gives the exit code. Raises PaddleFTError."""
    # Heavy imports (grpc, boto3, uvicorn) come after the command line was found good.
    import_gently("paddle_ft.serve.replica")
    from paddle_ft.serve.own_etcd import with_etcd
    from paddle_ft.serve.replica import Replica

    gc.freeze()  # modules stay: the collector need not go through them while requests wait
    replica = Replica(config)  # what is wrong with the settings is told before anything starts
    with with_etcd(config) as settled:
        asyncio.run(replica.run(settled.etcd))
    return EXIT_DONE


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; operating errors end in one sentence and their exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  as long as the process
    logging.basicConfig(format="[paddle_ft] %(message)s", level=logging.WARNING)
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_news)
    before = signal.signal(signal.SIGTERM, stop_before_it_runs)
    try:
        command = parse(sys.argv[1:] if arguments is None else arguments, dict(os.environ))
        if command.print_config:
            sys.stdout.writelines(f"{line}\n" for line in command.loaded.describe())
            return EXIT_DONE
        level = logging.WARNING if command.quiet else logging.INFO
        logging.getLogger("paddle_ft").setLevel(level)
        with one_sentence_for_shortages():
            return run(command.loaded.config)
    except PaddleFTError as error:
        sys.stderr.write(f"paddle_ft: error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_SIGINT
    except Exception:
        logging.getLogger("paddle_ft").exception("a defect of paddle_ft; please report this")
        return EXIT_BUG
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    end(main())
