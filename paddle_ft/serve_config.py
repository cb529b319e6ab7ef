"""Settings of a replica, the group ``[serve]`` of ``config``."""

from __future__ import annotations

from typing import Literal

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
    json_bytes_max: int = Field(4 * 2**20, ge=1024, le=2**31 - 1)
    """Of the JSON of a request, without tensors that are binary data. Nobody else is answered while
    it is parsed, some 25 ms for each 2**20 bytes."""
    elements_max: int = Field(2**20, ge=1)
    """Of a request, and of an answer, written one by one: as JSON, or typed contents of gRPC."""
    strings_max: int = Field(65_536, ge=1)
    """Elements of BYTES of a request, in whatever form, and of an answer in JSON."""
    request_timeout_s: float = Field(30.0, gt=0)
    """For a request, which may itself ask for less."""
    requests_max: int = Field(512, ge=1)
    """Under way at once over HTTP and gRPC; more get 503. Health checks are not counted."""
    in_flight_bytes_max: int = Field(2**30, ge=2**20)
    """Of bodies and answers under way; a request that would go beyond it gets 503."""
    connections_max: int = Field(1024, ge=1)
    """Of HTTP, for one more the one that has been idle for longest is closed; and of gRPC, which
    refuses one more."""
    silent_timeout_s: float = Field(10.0, gt=0)
    """A connection of HTTP that brings no whole request line and headers by then is closed, and
    one of either that has not begun to speak (TLS, HTTP/2)."""
    send_timeout_s: float = Field(30.0, gt=0)
    """A client that reads nothing of its answer for so long is given up."""
    drain_s: float = Field(30.0, ge=0)
    """How long what was taken may last after a request to stop, or to swap the version."""
    notice_s: float = Field(1.0, ge=0)
    """In a group, how long a replica still takes requests after it has said that it leaves, until
    all who route to it have heard of it."""
    memory_used_max: float = Field(0.9, gt=0, le=1)
    """Share of the machine's memory, or of its container's, above which a replica is degraded."""
    cert_file: str = ""
    """Certificate chain (PEM) for clients over HTTP and gRPC; empty: no TLS."""
    key_file: str = ""
    client_ca_file: str = ""
    """Whose certificates clients may show; empty: they are not asked for one."""
    client_ca_required: bool = False
    """Whoever shows none is not answered, health checks included. Over gRPC certificates are asked
    for only then."""
    admin_clients: tuple[str, ...] = ()
    """Common names of client certificates whose holders administer without the token. That of a
    gateway does not belong here: it shows its own for whatever client."""
    plain: bool = False
    """Without TLS, although other machines reach the replica."""
    admin_token: str = Field("", repr=False)
    """Who loads and unloads models over the network sends it; empty: nobody does."""
    level: Literal["active-active", "hot-standby", "cold-standby"] = "active-active"
    """Of a new group: all replicas answer; only the primary, and the others are ready to; or the
    others have the files and start workers once they are needed. Later: paddle-ft serving --level.
    """
    weight: int = Field(1, ge=1, le=1000)
    """Requests that this replica takes, relative to others."""
    follow: bool = True
    """A model without a number is changed to the version that is registered when it is published.
    """
    follow_store_s: float = Field(0.0, ge=0)
    """And so often the store is looked at for a newer one; 0: never."""
    ramp_s: float = Field(10.0, ge=0, le=86_400)
    """From a tenth of its share to the whole of it, for a replica that comes to others that serve,
    and for a primary that takes the place of one that was lost; 0: at once."""
    in_sync_min: int = Field(1, ge=1, le=64)
    """In a group, so many replicas, with the primary, must have a change of the shared state before
    it is acknowledged."""
    session_ttl_s: float = Field(3600.0, ge=0)
    """In a group, a session that has not been written to for so long is deleted; 0: none is."""
    session_bytes_max: int = Field(16 * 2**20, ge=1024)
    """Of what a group keeps for one session."""
    state_bytes_max: int = Field(256 * 2**20, ge=2**20, le=2**29)
    """Of all that a group keeps."""
    heartbeat_s: float = Field(5.0, ge=0.1, le=3600)
    """In a group, how often a replica renews its lease in etcd."""
    misses: int = Field(3, ge=2, le=100)
    """After so many missed heartbeats it is out of the group, and no longer the primary. A process
    that ends, and a stream that breaks, are noticed at once."""
    observe_s: float = Field(0.5, ge=0.5, le=3600)
    """How long a primary whose lease has ended must have been silent on its streams, too, before
    another takes its place; no matter if its process is known to have ended."""
    patience_s: float = Field(0.5, gt=0, le=3600)
    """How long a change waits for a replica that does not keep up, which is not in sync then."""
    peer_port: int = Field(0, ge=0, le=65534)
    """For the other replicas; the next one, too, where they notice its death. 0: any two."""
    peer_ca_file: str = ""
    """Mutual TLS between replicas: PEM files of the authority, this replica's certificate, its key.
    Each certificate names the host it is for."""
    peer_cert_file: str = ""
    peer_key_file: str = ""
    peer_plain: bool = False
    """Without TLS, although the replicas can be reached from other machines."""

    @model_validator(mode="after")
    def _ports(self) -> Self:
        if self.http_port and self.http_port == self.grpc_port:
            raise ValueError(f"http_port and grpc_port are both {self.http_port}: give two ports")
        return self

    @model_validator(mode="after")
    def _clients(self) -> Self:
        if self.drain_s < self.request_timeout_s:
            raise ValueError(
                f"drain_s ({self.drain_s:g}) must be at least request_timeout_s "
                f"({self.request_timeout_s:g}), or a stop or swap ends requests that have been "
                "taken: set both"
            )
        if bool(self.cert_file) != bool(self.key_file):
            raise ValueError("cert_file and key_file go together: give both")
        if self.client_ca_file and not self.cert_file:
            raise ValueError("client_ca_file needs TLS: give cert_file and key_file")
        if (self.client_ca_required or self.admin_clients) and not self.client_ca_file:
            raise ValueError("client_ca_required and admin_clients need client_ca_file")
        return self

    @model_validator(mode="after")
    def _peers(self) -> Self:
        given = [self.peer_ca_file, self.peer_cert_file, self.peer_key_file]
        if any(given) and not all(given):
            raise ValueError("peer_ca_file, peer_cert_file and peer_key_file go together")
        return self
