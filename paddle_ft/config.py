"""All settings in a few small frozen groups, and the one place where they are read.

Precedence: command line > environment (``PADDLE_FT_<GROUP>__<KEY>``) > file (TOML) > default.
A key that does not exist is an error that names its source, never silently dropped.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Self


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
    spares: int = Field(0, ge=0, le=256)
    """Worker processes kept ready on this node, with paddle imported already."""
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
    every_n_steps: int = Field(0, ge=0)
    every_s: float = Field(30.0, ge=0)
    """0 switches the rule off. The end of training and a requested stop always save."""
    mode: Literal["rank0", "sharded"] = "sharded"
    keep_last: int = Field(3, ge=1)
    block_bytes: int = Field(4 * 2**20, ge=4096)
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


class Config(_Group):
    job: JobConfig = JobConfig()
    etcd: EtcdConfig = EtcdConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
