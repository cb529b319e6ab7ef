"""The command line of a replica: flags and what they mean as settings."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from paddle_ft.command_line import Parser, add_flags
from paddle_ft.config import Loaded, load
from paddle_ft.errors import ConfigError

EPILOG = """exit codes:
  0    asked to stop by SIGTERM or Ctrl-C, and everything taken was answered
  2    a flag, key, file or value is wrong, a port is taken, or a model cannot be loaded
  3    etcd cannot be reached
  4    the store cannot be used, or does not hold the model
  5    a model is damaged, or not signed by whom it must be
  70   a defect of paddle_ft (please report its traceback)
  71   this machine is short of disk space, memory, descriptors or processes
  130  stopped by a second Ctrl-C, 143 by a second SIGTERM: at once

Reached from other machines it needs TLS: cert_file and key_file of [serve], or plain = true there.

Models are loaded and unloaded over the network by who sends the admin token, which is never a flag:
set PADDLE_FT_SERVE__ADMIN_TOKEN, or admin_token of [serve] in the configuration.

examples:
  python -m paddle_ft.serve --model digits --store s3://bucket/models
  python -m paddle_ft.serve --model digits=3 --model ocr --store /mnt/models --workers 4 \\
      --etcd 10.0.0.1:2379 --group readers --host 0.0.0.0
"""

_FLAGS = (
    # group, flags, what stands for the value ("" for a switch), help
    ("models", "--model", "NAME[=VERSION]", ("a published model, its newest version if none is "
     "given; for several models give it several times")),
    ("models", "--store", "URL", ("where models are published: a directory, file:///dir or "
     "s3://bucket/prefix")),
    ("models", "--cache", "DIR", ("directory of this machine for the files of models "
     "(paddle_ft/models in the user's cache)")),
    ("workers", "--workers", "N", ("processes that compute, for each model: so many batches of it "
     "at once (1)")),
    ("workers", "--spares", "N", "further ones, loaded and warm, to replace one that is lost (1)"),
    ("workers", "--threads", "N", "of each worker (the processors divided among the workers)"),
    ("workers", "--device", "DEVICE", "cpu, gpu:0, npu:0 (cpu)"),
    ("addresses", "--host", "HOST", "address to listen on (127.0.0.1)"),
    ("addresses", "--http_port", "PORT", "0: any free one (8000)"),
    ("addresses", "--grpc_port", "PORT", "0: any free one (8001)"),
    ("group", "--etcd", "ENDPOINTS", ("etcd members, host:port,… (a private one, by which "
     "others on this machine can join)")),
    ("group", "--alone", "", "no private etcd: nobody can join this replica"),
    ("group", "--group", "NAME", ("replicas with the same etcd and name are one serving group "
     "(default)")),
    ("group", "--node", "NAME", "name of this node (name of the host)"),
    ("group", "--address", "HOST", ("address under which others reach this replica (--host; found "
     "out if that is 0.0.0.0)")),
    ("other", "--config", "FILE", ("TOML file of settings, as configs/default.toml; flags win "
     "over it")),
    ("other", "--print_config", "", "print every setting and where it came from, and end"),
    ("other", "--quiet", "", "tell of warnings alone"),
)  # fmt: skip

_DIRECT = {
    "model": "serve.models",
    "store": "checkpoint.url",
    "cache": "serve.cache",
    "workers": "serve.workers",
    "spares": "serve.spares",
    "threads": "serve.threads",
    "device": "serve.device",
    "host": "serve.host",
    "http_port": "serve.http_port",
    "grpc_port": "serve.grpc_port",
    "etcd": "etcd.endpoints",
    "group": "serve.group",
    "node": "job.node",
    "address": "job.host",
}


@dataclass(frozen=True, slots=True)
class Command:
    """What the command line asks for."""

    loaded: Loaded
    quiet: bool
    print_config: bool


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m paddle_ft.serve",
        usage="python -m paddle_ft.serve --model NAME --store URL [flags]",
        description="Serves published models over HTTP and gRPC (Open Inference Protocol). Flags "
        "may be written with - or _.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_flags(parser, _FLAGS, repeated=("--model",))
    return parser


def parse(arguments: Sequence[str], environ: dict[str, str]) -> Command:
    """The command that ``arguments`` ask for; raises ConfigError."""
    parser = build_parser()
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=1)
        hint = f": did you mean {near[0]}?" if near else " (see --help)"
        what = "flag" if unknown[0].startswith("-") else "argument"
        raise ConfigError(f"there is no {what} {unknown[0]}{hint}")
    values: dict[str, object] = {}
    for name, path in _DIRECT.items():
        value = getattr(given, name)
        if value is not None:
            values[path] = tuple(value) if isinstance(value, list) else value
    if given.alone:
        values["serve.alone"] = True
    if given.etcd is not None:
        values["etcd.endpoints"] = tuple(
            filter(None, given.etcd.removeprefix("etcd://").split(","))
        )
    flags = {path: f"--{name}" for name, path in _DIRECT.items()} | {"serve.alone": "--alone"}
    loaded = load(values, environ, given.config, flags)
    return Command(loaded, given.quiet, given.print_config)
