"""TLS credentials for etcd, from files that were checked.

grpc aborts the whole process on a certificate without its key, and names no file in its errors.
So everything is loaded by Python's ssl first, which refuses politely.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from paddle_ft.config import EtcdConfig
from paddle_ft.coordination.etcd_grpc import grpc
from paddle_ft.errors import ConfigError


def channel_credentials(config: EtcdConfig) -> grpc.ChannelCredentials:
    """Credentials for a channel; without ``ca_file``, the machine's own authorities count.

    Raises ConfigError, naming the file, if one is missing or is not what it should be.
    """
    ca, cert, key = config.ca_file, config.cert_file, config.key_file
    if bool(cert) != bool(key):
        given, missing = ("cert_file", "key_file") if cert else ("key_file", "cert_file")
        raise ConfigError(f"etcd.{given} is set without etcd.{missing}: a client needs both")
    contents = [
        _content(name, path)
        for name, path in (("ca_file", ca), ("key_file", key), ("cert_file", cert))
    ]
    context = ssl.create_default_context()
    if ca:
        try:
            context.load_verify_locations(ca)
        except ssl.SSLError:
            raise ConfigError(f"etcd.ca_file {ca} holds no certificate in PEM form") from None
    if cert:
        try:
            context.load_cert_chain(cert, key, password=lambda: b"")
        except ssl.SSLError as error:
            raise ConfigError(
                f"etcd.cert_file {cert} and etcd.key_file {key} are not a certificate and its "
                f"key, unencrypted and in PEM form ({error.reason or 'unreadable'})"
            ) from None
    return grpc.ssl_channel_credentials(*contents)


def _content(name: str, path: str) -> bytes | None:
    if not path:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"etcd.{name} {path} cannot be read: {error.strerror}") from None
