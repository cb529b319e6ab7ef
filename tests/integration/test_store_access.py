"""How one gets at an S3 store: TLS with a private authority, credentials by boto3's own chain,
server-side encryption (B8)."""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from botocore.config import Config
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pydantic import ValidationError

from paddle_ft.checkpoint.store import open_store
from paddle_ft.config import CheckpointConfig
from paddle_ft.errors import ConfigError, StoreDenied
from tests.contract.store_fixtures import Bucket, served_bucket
from tests.integration.fault_proxy import FaultProxy
from tests.integration.s3_server import ACCESS_KEY, SECRET_KEY, S3Server

pytestmark = pytest.mark.s3


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    yield from served_bucket()


# ---------------------------------------------------------------- TLS


class Authority:
    """A certificate authority of its own, with its certificate in ``file``."""

    def __init__(self, place: Path, name: str) -> None:
        self._place = place
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.file = place / f"{name}.pem"
        usage = x509.KeyUsage(
            digital_signature=True, content_commitment=False, key_encipherment=False,
            data_encipherment=False, key_agreement=False, key_cert_sign=True, crl_sign=True,
            encipher_only=False, decipher_only=False,
        )  # fmt: skip
        made = self._builder(self._name, self._key).add_extension(
            x509.BasicConstraints(ca=True, path_length=0), critical=True
        )
        made = made.add_extension(usage, critical=True)
        self.file.write_bytes(self._signed(made))

    def issue(self, address: str) -> tuple[Path, Path]:
        """Certificate and key of a server at ``address``."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "server")])
        names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))])
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        made = self._builder(name, key).add_extension(names, critical=False)
        made = made.add_extension(issuer, critical=False)
        paths = self._place / "server.pem", self._place / "server.key"
        paths[0].write_bytes(self._signed(made))
        paths[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return paths

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.timezone.utc)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
        )

    def _signed(self, builder: x509.CertificateBuilder) -> bytes:
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def test_tls_with_a_private_authority(tmp_path: Path, bucket: Bucket) -> None:
    authority, stranger = Authority(tmp_path, "authority"), Authority(tmp_path, "stranger")
    with S3Server(tls=authority.issue("127.0.0.1")) as server:  # the credentials are the same
        url = server.bucket("checkpoints")
        assert server.endpoint.startswith("https://")
        store = open_store(url, server.config(ca_file=str(authority.file)))
        store.check()
        store.put("a", b"x" * 100_000)
        assert store.get("a") == b"x" * 100_000
        for ca_file in ("", str(stranger.file)):
            with pytest.raises(StoreDenied, match=r"TLS check .* checkpoint\.ca_file"):
                open_store(url, server.config(ca_file=ca_file)).check()
        by_name = server.endpoint.replace("127.0.0.1", "localhost")  # not in the certificate
        wrong_name = server.config(ca_file=str(authority.file), endpoint_url=by_name)
        with pytest.raises(StoreDenied, match="TLS check"):
            open_store(url, wrong_name).check()


# ---------------------------------------------------------------- credentials


@pytest.fixture
def nothing_known(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No credentials anywhere but where the test puts them."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def profile(place: Path, name: str, secret: str) -> str:
    lines = [f"[{name}]", f"aws_access_key_id = {ACCESS_KEY}", f"aws_secret_access_key = {secret}"]
    file = place / f"credentials-{name}"
    file.write_text("\n".join(lines) + "\n")
    return str(file)


def test_credentials_of_a_profile(
    bucket: Bucket, nothing_known: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(StoreDenied, match="profile"):
        bucket.fresh().check()
    nothing_known.setenv("AWS_SHARED_CREDENTIALS_FILE", profile(tmp_path, "train", SECRET_KEY))
    with pytest.raises(StoreDenied):  # it is not the default profile
        bucket.fresh().check()
    nothing_known.setenv("AWS_PROFILE", "train")
    bucket.fresh().check()
    nothing_known.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(ConfigError, match="nobody"):
        bucket.fresh().check()


def test_the_default_profile_and_the_environment_before_it(
    bucket: Bucket, nothing_known: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nothing_known.setenv("AWS_SHARED_CREDENTIALS_FILE", profile(tmp_path, "default", SECRET_KEY))
    bucket.fresh().check()
    nothing_known.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    nothing_known.setenv("AWS_SECRET_ACCESS_KEY", "another")
    with pytest.raises(StoreDenied):
        bucket.fresh().check()
    nothing_known.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    nothing_known.setenv("AWS_SHARED_CREDENTIALS_FILE", profile(tmp_path, "default", "another"))
    bucket.fresh().check()


def test_credentials_that_a_program_gives(
    bucket: Bucket, nothing_known: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answer = tmp_path / "answer.json"
    answer.write_text(
        f'{{"Version": 1, "AccessKeyId": "{ACCESS_KEY}", "SecretAccessKey": "{SECRET_KEY}"}}'
    )
    file = tmp_path / "config"
    file.write_text(f"[default]\ncredential_process = cat {answer}\n")
    nothing_known.setenv("AWS_CONFIG_FILE", str(file))
    bucket.fresh().check()


# ---------------------------------------------------------------- server-side encryption


def test_encryption_is_asked_for_in_every_write(bucket: Bucket) -> None:
    with FaultProxy(bucket.server.endpoint) as proxy:
        config = bucket.server.config(endpoint_url=proxy.endpoint, sse="AES256")
        store = open_store(f"{bucket.url}/{os.urandom(4).hex()}", config)
        large = os.urandom(17 * 2**20)
        store.put("small", b"x")
        store.put("once", b"x", if_absent=True)
        store.put("large", large)
        asked = [
            h.get("x-amz-server-side-encryption")
            for request, h in zip(proxy.requests, proxy.headers, strict=True)
            if (request.startswith("PUT") and "partNumber" not in request) or "uploads" in request
        ]
        assert asked == ["AES256"] * 3
        assert (store.get("small"), store.get("large")) == (b"x", large)
    client = boto3.session.Session().client(
        "s3", endpoint_url=bucket.server.endpoint, config=Config(s3={"addressing_style": "path"})
    )
    name = store.url.partition("checkpoints/")[2]
    head = client.head_object(Bucket="checkpoints", Key=f"{name}/small")
    client.close()
    assert head["ServerSideEncryption"] == "AES256"


def test_the_key_of_kms_is_passed_on(bucket: Bucket) -> None:
    with FaultProxy(bucket.server.endpoint) as proxy:
        config = bucket.server.config(
            endpoint_url=proxy.endpoint, sse="aws:kms", sse_kms_key_id="key-7", attempts=1
        )
        proxy.faults[:] = ["503"]
        with pytest.raises(Exception, match="SlowDown"):
            open_store(f"{bucket.url}/x", config).put("a", b"x")
        assert proxy.headers[0]["x-amz-server-side-encryption"] == "aws:kms"
        assert proxy.headers[0]["x-amz-server-side-encryption-aws-kms-key-id"] == "key-7"


def test_nothing_is_asked_for_by_default(bucket: Bucket) -> None:
    with FaultProxy(bucket.server.endpoint) as proxy:
        config = bucket.server.config(endpoint_url=proxy.endpoint)
        open_store(f"{bucket.url}/{os.urandom(4).hex()}", config).put("a", b"x")
        assert not [h for headers in proxy.headers for h in headers if "encryption" in h]


def test_a_key_without_its_kind_of_encryption_is_refused() -> None:
    with pytest.raises(ValidationError, match="sse_kms_key_id needs sse"):
        CheckpointConfig(sse="AES256", sse_kms_key_id="key-7")
