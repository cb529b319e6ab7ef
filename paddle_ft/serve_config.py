"""Settings of a replica, the group ``[serve]`` of ``config``."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Self


class ServeConfig(BaseModel):
    """What a replica serves, how it answers, and what it takes on."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    group: str = Field("default", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Name of the serving group; replicas with the same etcd and name are one group."""
    alone: bool = False
    """Without an etcd for others to join it by; else a replica for which none is named has its
    own."""
    models: tuple[str, ...] = ()
    """Each a NAME, of which the newest version is served, or NAME=VERSION."""
    cache: str = ""
    """Directory of this machine for the files of models; empty: paddle_ft/models in the user's
    cache."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    http_port: int = Field(8000, ge=0, le=65535)
    """0: any free one."""
    grpc_port: int = Field(8001, ge=0, le=65535)
    workers: int = Field(1, ge=1, le=256)
    """Worker processes of each model; so many batches of it run at once."""
    spares: int = Field(1, ge=0, le=16)
    """Further ones, loaded and warm, to take the place of one that is lost."""
    threads: int = Field(0, ge=0, le=1024)
    """Of one worker, for the CPU's kernels; 0: the processors divided among the workers."""
    device: str = "cpu"
    """Or ``gpu:0``, or a custom one such as ``npu:0``."""
    device_memory_mb: int = Field(256, ge=0)
    """Reserved on a GPU by each worker when it starts."""
    exact: bool = False
    """The very bits of the dynamic graph, at a fraction of the speed."""
    tensor_bytes_max: int = Field(256 * 2**20, ge=2**20, le=2**40)
    """Inputs of one batch, and its outputs."""
    batch_timeout_s: float = Field(60.0, gt=0)
    """No batch may take longer; the bound for sizes of which little has been seen."""
    start_timeout_s: float = Field(600.0, gt=0)
    """A worker that is not ready by then is started anew."""
    batch_rows_max: int = Field(4, ge=1, le=65536)
    """Rows of several requests that run together; 1: none are joined."""
    batch_wait_ms: float = Field(20.0, ge=0, le=60_000)
    """How long a request may be passed over for others that fill a batch better. While a worker is
    idle nothing waits."""
    queue_max: int = Field(256, ge=1)
    """Requests that wait for one version; more are refused with 429."""
    queue_bytes_max: int = Field(256 * 2**20, ge=2**20)
    body_bytes_max: int = Field(64 * 2**20, ge=1024, le=2**31 - 1)
    """Of one request, unpacked."""
    body_timeout_s: float = Field(30.0, gt=0)
    request_timeout_s: float = Field(60.0, gt=0)
    """For a request, which may itself ask for less."""
    connections_max: int = Field(1024, ge=1)
    drain_s: float = Field(30.0, ge=0)
    """How long what was taken may last after a request to stop."""
    notice_s: float = Field(1.0, ge=0)
    """In a group, how long a replica still takes requests after it has said that it leaves, until
    all who route to it have heard of it."""
    memory_used_max: float = Field(0.9, gt=0, le=1)
    """Share of the machine's memory, or of its container's, above which a replica is degraded."""
    admin_token: str = Field("", repr=False)
    """Who loads and unloads models over the network sends it; empty: nobody does."""
    in_sync_min: int = Field(1, ge=1, le=64)
    """In a group, so many replicas, with the primary, must have a change of the shared state before
    it is acknowledged."""
    peer_ca_file: str = ""
    """Mutual TLS between replicas: PEM files of the authority, this replica's certificate, its key.
    Each certificate names the host it is for."""
    peer_cert_file: str = ""
    peer_key_file: str = ""
    peer_plain: bool = False
    """Without TLS, although the replicas can be reached from other machines."""

    @model_validator(mode="after")
    def _peers(self) -> Self:
        given = [self.peer_ca_file, self.peer_cert_file, self.peer_key_file]
        if any(given) and not all(given):
            raise ValueError("peer_ca_file, peer_cert_file and peer_key_file go together")
        return self
