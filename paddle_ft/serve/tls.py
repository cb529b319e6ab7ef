"""TLS of a replica towards its clients, over HTTP and gRPC, and when it may do without."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paddle_ft.errors import ConfigError
from paddle_ft.serve.stream import is_loopback
from paddle_ft.serve_config import ServeConfig


@dataclass(frozen=True, slots=True)
class ServerTls:
    """PEM files; ``ca_file`` is whose certificates clients may show, "": they are not asked."""

    cert_file: str
    key_file: str
    ca_file: str = ""
    required: bool = False
    """Who shows no certificate is not answered at all."""

    def check(self) -> None:
        """Raises ConfigError: grpc ends the process on a bad file, and uvicorn with a traceback."""
        for path in filter(None, (self.cert_file, self.key_file, self.ca_file)):
            try:
                Path(path).read_bytes()
            except OSError as error:
                raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.cert_file, self.key_file, password=lambda: b"")
        except ssl.SSLError as error:
            raise ConfigError(
                f"serve.cert_file {self.cert_file} and serve.key_file {self.key_file} are not a "
                f"certificate and its key in PEM form ({error.reason or 'unreadable'})"
            ) from None
        if self.ca_file:
            try:
                context.load_verify_locations(self.ca_file)
            except ssl.SSLError as error:
                raise ConfigError(
                    f"serve.client_ca_file {self.ca_file} holds no certificate in PEM form "
                    f"({error.reason or 'unreadable'})"
                ) from None

    @property
    def of_uvicorn(self) -> dict[str, Any]:
        how = ssl.CERT_REQUIRED if self.required else ssl.CERT_OPTIONAL
        return {
            "ssl_certfile": self.cert_file,
            "ssl_keyfile": self.key_file,
            "ssl_ca_certs": self.ca_file or None,
            "ssl_cert_reqs": how if self.ca_file else ssl.CERT_NONE,
        }

    def read(self) -> tuple[bytes, bytes, bytes | None]:
        """Certificate, key, authority."""
        authority = Path(self.ca_file).read_bytes() if self.ca_file else None
        return Path(self.cert_file).read_bytes(), Path(self.key_file).read_bytes(), authority


def server_tls(config: ServeConfig) -> ServerTls | None:
    """What ``config`` asks for; None: no TLS. Raises ConfigError, also where others could listen
    in and nobody has said that they may."""
    if config.cert_file:
        found = ServerTls(
            config.cert_file, config.key_file, config.client_ca_file, config.client_ca_required
        )
        found.check()
        return found
    if not config.plain and not is_loopback(config.host):
        raise ConfigError(
            f"clients would reach this replica on {config.host} without TLS: give serve.cert_file "
            "and serve.key_file, or say that the network is trusted with serve.plain = true"
        )
    return None
