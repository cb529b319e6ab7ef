"""A certificate authority for tests."""

from __future__ import annotations

import datetime as dt
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

HOST = "127.0.0.1"


@dataclass(frozen=True)
class Authority:
    """A certificate authority in a directory."""

    folder: Path
    key: ec.EllipticCurvePrivateKey
    name: x509.Name

    @classmethod
    def make(cls, folder: Path) -> Authority:
        folder.mkdir()
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"ca of {folder.name}")])
        authority = cls(folder, ec.generate_private_key(ec.SECP256R1()), name)
        ca = x509.BasicConstraints(ca=True, path_length=None)
        authority._write("ca", authority._sign(name, authority.key, ca), authority.key)
        return authority

    def issue(self, who: str) -> None:
        """Writes ``who.crt`` and ``who.key``, good for a client, and a server on the loopback."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, who)])
        names = x509.SubjectAlternativeName(
            [x509.IPAddress(ipaddress.ip_address(HOST)), x509.DNSName(who)]
        )
        self._write(who, self._sign(name, key, names), key)

    def file(self, name: str) -> str:
        return str(self.folder / name)

    def _sign(
        self, name: x509.Name, key: ec.EllipticCurvePrivateKey, extension: x509.ExtensionType
    ) -> x509.Certificate:
        now = dt.datetime.now(dt.timezone.utc)
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(hours=1))
            .not_valid_after(now + dt.timedelta(hours=1))
            .add_extension(extension, critical=False)
        )
        return builder.sign(self.key, hashes.SHA256())

    def _write(
        self, who: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey
    ) -> None:
        pem = serialization.Encoding.PEM
        (self.folder / f"{who}.crt").write_bytes(certificate.public_bytes(pem))
        (self.folder / f"{who}.key").write_bytes(
            key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        )
