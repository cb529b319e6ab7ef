"""All settings in a few small frozen groups, and the one place where they are read.

Precedence: command line > environment (``PADDLE_FT_<GROUP>__<KEY>``) > file (TOML) > default.
A key that does not exist is an error that names its source, never silently dropped.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Self

from paddle_ft.errors import ConfigError
from paddle_ft.gateway_config import GatewayConfig
from paddle_ft.serve_config import ServeConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class _Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class JobConfig(_Group):
    """Who takes part, and what happens when somebody is lost."""

    id: str = Field("default", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Name of the job; launchers with the same etcd and id are one job."""
    nodes_min: int = Field(1, ge=1)
    nodes_max: int = Field(1, ge=1)
    nproc_per_node: int = Field(1, ge=1, le=256)
    devices: tuple[str, ...] = ()
    """Accelerators of this node, one or more for each process; empty: CPU."""
    host: str = ""
    """Address under which other nodes reach this one; empty: found out."""
    node: str = ""
    """Name of this node; empty: the host name."""
    recovery: Literal["in_place", "restart"] = "in_place"
    """What becomes of the workers that are left when one is lost: they go on with what they have in
    memory, where the script allows it, or all are started again."""
    spares: int = Field(0, ge=0, le=256)
    """Worker processes kept ready on this node, with the script run until it needs its rank."""
    max_restart: int = Field(3, ge=0)
    """Worker failures within ``restart_window_s`` that are answered by a restart."""
    restart_window_s: float = Field(300.0, gt=0)
    join_window_s: float = Field(1.0, ge=0)
    """How long membership must be stable before the job starts below, or grows towards, its
    maximum."""
    members_timeout_s: float = Field(600.0, gt=0)
    """How long to wait for the minimum of nodes."""
    stop_grace_s: float = Field(60.0, gt=0)
    """How long a stop may take for the last checkpoint before everything is ended."""
    log_dir: str = "log"

    @model_validator(mode="after")
    def _range(self) -> Self:
        if self.nodes_max < self.nodes_min:
            raise ValueError("nodes_max must not be below nodes_min")
        return self


class EtcdConfig(_Group):
    """How to reach etcd, and the arithmetic of time."""

    endpoints: tuple[str, ...] = ()
    """host:port of the members; empty: a private etcd for this launcher alone."""
    lease_ttl_s: int = Field(5, ge=2)
    """A node that says nothing for so long is dead to the others. etcd grants no less than 2."""
    renew_interval_s: float = Field(1.0, gt=0)
    rpc_timeout_s: float = Field(1.0, gt=0)
    """For one try at one member."""
    call_timeout_s: float = Field(5.0, gt=0)
    """For one call over all members."""
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    user: str = ""
    password: str = Field("", repr=False)

    @model_validator(mode="after")
    def _arithmetic(self) -> Self:
        slack = self.lease_ttl_s - self.renew_interval_s - self.rpc_timeout_s
        if slack <= 0:
            raise ValueError(
                "lease_ttl_s must be more than renew_interval_s + rpc_timeout_s, or a leader "
                f"could act after its lease: {self.lease_ttl_s} - {self.renew_interval_s} - "
                f"{self.rpc_timeout_s} = {slack:g}"
            )
        return self


class CheckpointConfig(_Group):
    """Where the state is kept, how often, and how much of it."""

    url: str = ""
    """A directory, ``file:///dir`` or ``s3://bucket/prefix``; empty: ./checkpoints/<job id>."""
    cache: str = ""
    """Directory of the local SSD cache in front of the store; empty: none."""
    cache_bytes_max: int = Field(20 * 2**30, ge=2**20)
    durable: Literal["local", "remote"] = "remote"
    """Where a checkpoint must be to be committed: in the store, or, synced, in the caches of the
    nodes that wrote it; the store then gets it in the background."""
    when: str = ""
    """When to save: ``auto``, ``never``, or any of ``100`` (steps), ``30s``, ``10min`` and
    ``SIGUSR1``, joined by commas; empty: what the script asks for, or ``auto``. The end of training
    and a requested stop save in any case."""
    mode: Literal["rank0", "sharded"] = "sharded"
    keep_last: int = Field(3, ge=1)
    """How many checkpoints stay, if ``keep`` says nothing else."""
    keep: str = ""
    """Which checkpoints stay: ``last 3, every 1000 steps, best loss 1``; what any of the rules
    wants is kept. Empty: the ``keep_last`` newest."""
    block_bytes: int = Field(4 * 2**20, ge=4096)
    space_ratio: float = Field(2.3, ge=1.1, le=10)
    """A checkpoint is spread over objects of at most so many times its bytes, and what the last one
    wrote. With less, restores read less and rows that change at random are written more often
    (docs/bench-checkpoint.md)."""
    buffers: int = Field(2, ge=1, le=4)
    """Snapshots of one worker in flight; host memory = buffers x its share of the state."""
    persist_grace_s: float = Field(5.0, ge=0)
    """How long recovery waits for a snapshot that is still being written."""
    connect_timeout_s: float = Field(3.0, gt=0)
    read_timeout_s: float = Field(10.0, gt=0)
    attempts: int = Field(5, ge=1, le=50)
    """Tries of one request to the store, with exponential back-off and jitter."""
    endpoint_url: str = ""
    """S3 endpoint, for stores other than AWS."""
    region: str = ""
    ca_file: str = ""
    sse: Literal["", "AES256", "aws:kms"] = ""
    """Server-side encryption asked of S3; empty: the bucket's own default."""
    sse_kms_key_id: str = ""
    """Key for ``aws:kms``; empty: the account's default key."""
    sign_key: str = Field("", repr=False)
    """ed25519 private key that signs checkpoints: path of a PEM file, or its content."""
    trusted_keys: tuple[str, ...] = ()
    """PEM files with the public keys of those whose checkpoints are loaded."""
    verify: Literal["required", "if-present", "off"] = "if-present"
    """Whether a checkpoint must be signed by a trusted key to be loaded."""

    @model_validator(mode="after")
    def _encryption(self) -> Self:
        if self.sse_kms_key_id and self.sse != "aws:kms":
            raise ValueError("sse_kms_key_id needs sse = aws:kms")
        return self

    @model_validator(mode="after")
    def _locality(self) -> Self:
        if self.durable == "local" and not self.cache:
            raise ValueError("durable = local needs a directory on a local disk: give --cache DIR")
        return self


class HealthConfig(_Group):
    """When a worker that stands still is ended, and a node is no longer asked."""

    enabled: bool = True
    hang_floor_s: float = Field(0.9, gt=0)
    """A worker that the others wait for may take 3 times as long as the slowest normal step, and so
    much more; it is named, then, within 1 s of that."""
    hang_cap_s: float = Field(600.0, gt=0)
    """The bound for what has not been seen often enough to know how long it takes (the first steps,
    an evaluation), and the largest one."""
    quarantine_after: int = Field(3, ge=0)
    """So many hung workers within ``quarantine_window_s`` put a node in quarantine; 0: never."""
    quarantine_window_s: float = Field(3600.0, gt=0)
    probe: Literal["off", "local"] = "off"
    """Whether a node is measured before it joins, which takes some two seconds: it stays out if a
    figure is below half of the median of the nodes that came before."""


class Config(_Group):
    job: JobConfig = JobConfig()
    etcd: EtcdConfig = EtcdConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    health: HealthConfig = HealthConfig()
    serve: ServeConfig = ServeConfig()
    gateway: GatewayConfig = GatewayConfig()


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration, and where each value that is not a default came from."""

    config: Config
    sources: Mapping[str, str]
    """``group.key`` -> ``command line``, ``environment PADDLE_FT_…`` or ``file …``."""

    def describe(self) -> Iterator[str]:
        """Lines of a TOML file: each setting, its source as a comment; secrets are left out."""
        for group, settings in self.config:
            yield f"[{group}]"
            for key, value in settings:
                source = json.dumps(self.sources.get(f"{group}.{key}", "default")).strip('"')
                if type(settings).model_fields[key].repr:
                    yield f"{key} = {_toml(value)}  # {source}"
                elif value:
                    yield f"# {key} is set and kept secret: {source}"
            yield ""


def load(
    command_line: Mapping[str, object],
    environ: Mapping[str, str],
    file: str | None = None,
    flags: Mapping[str, str] | None = None,
) -> Loaded:
    """The configuration from all its sources.

    Args:
        command_line: ``group.key`` -> value, for what was given.
        environ: environment; ``PADDLE_FT_<GROUP>__<KEY>`` counts, lists are separated by commas.
        file: path of a TOML file with a table for each group.
        flags: ``group.key`` -> the flag that it came from, to be named in errors.

    Raises:
        ConfigError: an unknown key or a bad value; the sentence names it and its source.
    """
    values: dict[str, object] = {}
    sources: dict[str, str] = {}
    layers = ((_from_file(file), f"file {file}"), (_from_environment(environ), "environment"))
    for layer, source in (*layers, (command_line, "command line")):
        for path, value in layer.items():
            name = _variable(path) if source == "environment" else ""
            if source == "command line":
                name = (flags or {}).get(path, "")
            values[path], sources[path] = value, f"{source} {name}".strip()
    return Loaded(_validate(values, sources), sources)


def without_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """``environ`` for a process that runs a user's code, which neither signs, nor administers,
    nor talks to etcd."""
    secrets = {
        _variable(f"{group}.{key}")
        for group, settings in Config()
        for key, field in type(settings).model_fields.items()
        if not field.repr
    }
    return {name: value for name, value in environ.items() if name not in secrets}


def _variable(path: str) -> str:
    group, _, key = path.partition(".")
    return f"PADDLE_FT_{group}__{key}".upper()


def _from_file(file: str | None) -> dict[str, object]:
    if file is None:
        return {}
    try:
        with open(file, "rb") as stream:
            tables = tomllib.load(stream)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {file}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file} is not valid TOML: {error}") from error
    flat: dict[str, object] = {}
    for group, table in tables.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{file}: {group} stands outside a table such as [job]: move it")
        flat |= {f"{group}.{key}": value for key, value in table.items()}
    return flat


def _from_environment(environ: Mapping[str, str]) -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in environ.items():
        group, separator, key = name.removeprefix("PADDLE_FT_").lower().partition("__")
        if name.startswith("PADDLE_FT_") and separator:
            path = f"{group}.{key}"
            flat[path] = tuple(filter(None, value.split(","))) if path in _LISTS else value
    return flat


_LISTS = {"job.devices", "etcd.endpoints", "checkpoint.trusted_keys", "serve.models"}


def _validate(values: Mapping[str, object], sources: Mapping[str, str]) -> Config:
    tree: dict[str, dict[str, object]] = {}
    for path, value in values.items():
        group, _, key = path.partition(".")
        settings = Config.model_fields.get(group)
        known = getattr(settings.annotation, "model_fields", {}) if settings else {}
        if key not in known:
            every = [f"{g}.{k}" for g, s in Config() for k in type(s).model_fields]
            near = difflib.get_close_matches(path, every, n=1)
            hint = f": did you mean {near[0]}?" if near else f": settings are {', '.join(every)}"
            raise ConfigError(f"there is no setting {path} ({sources[path]}){hint}")
        tree.setdefault(group, {})[key] = value
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"][:2])
        message = first["msg"]
        if first["type"] == "value_error":  # settings that do not go together
            raise ConfigError(f"{path}: {message.removeprefix('Value error, ')}") from None
        source = sources.get(path, "default")
        name = source.split()[-1]  # the flag or the variable, where it is one
        given = f"{path} = {first['input']!r} ({source})"
        if source.startswith(("command line --", "environment")):
            given = f"{name}{' ' if name.startswith('-') else '='}{first['input']}"
        raise ConfigError(f"{given} is not allowed: it must be {allowed(path)}") from None


def allowed(path: str) -> str:
    """What a setting may be, in words: ``a whole number from 1 to 256``."""
    group, _, key = path.partition(".")
    field = type(getattr(Config(), group)).model_fields[key]
    kind = field.annotation
    if get_origin(kind) is Literal:
        return " or ".join(json.dumps(choice) for choice in get_args(kind))
    if kind is str and field.metadata:
        return "1 to 100 letters, digits, dots, hyphens and _, the first a letter or a digit"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(
        kind, "a list of texts"
    )
    for limit in field.metadata:
        for name, word in (("ge", "from"), ("gt", "above"), ("le", "to")):
            bound = getattr(limit, name, None)
            words += "" if bound is None else f" {word} {bound:g}"
    return words


def _toml(value: object) -> str:
    """A text, a number or a list of texts as TOML writes it, which is as JSON does."""
    return json.dumps(value).replace("\x7f", "\\u007f")
