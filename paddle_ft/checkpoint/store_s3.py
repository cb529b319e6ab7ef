"""An S3 bucket as a store. The only module that knows boto3.

Credentials, region and proxies come by boto3's own chain (environment, profile, role). Every
request has a connect and a read time-out; repetition is ours (``store.retry``), so boto3's own is
off and an outage costs at most attempts x (connect + read time-out) and the pauses between.
Memory: ``_PART_BYTES`` for each thread that is in ``put``.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import closing, suppress
from typing import Any, NoReturn, TypeVar

from paddle_ft.checkpoint import layout
from paddle_ft.checkpoint.store import SWEEP_AGE_S, Buffers, ObjectInfo, probe, retry, views
from paddle_ft.config import CheckpointConfig
from paddle_ft.errors import (
    ConfigError,
    StoreDenied,
    StoreError,
    StoreFull,
    StoreMissing,
    StoreUnavailable,
)
from paddle_ft.failpoints import failpoint

_log = logging.getLogger(__name__)
T = TypeVar("T")

_PART_BYTES = 16 * 2**20
"""Larger objects are sent in parts of this size."""
_CHECK_ATTEMPTS = 2
_CONNECTIONS = 32

_MISSING = {"NoSuchBucket", "NoSuchKey", "NotFound", "404", "NoSuchUpload"}
_DENIED = {
    "AccessDenied", "AllAccessDisabled", "AccountProblem", "AuthorizationHeaderMalformed",
    "ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch",
    "RequestTimeTooSkewed", "InvalidObjectState", "PermanentRedirect", "InvalidBucketName",
    "TokenRefreshRequired", "UnauthorizedAccess", "401", "403", "Forbidden",
}  # fmt: skip
_FULL = {"QuotaExceeded", "XMinioStorageFull", "EntityTooLarge", "InsufficientStorage", "507"}
_EXISTS = {"PreconditionFailed", "412"}


class S3Store:
    """``Store`` in ``bucket`` below ``prefix``. The client is made by the first request."""

    def __init__(self, bucket: str, prefix: str, config: CheckpointConfig) -> None:
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._config = config
        self._lock = threading.Lock()
        self._made: Any = None

    @property
    def url(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    # ------------------------------------------------------------ the Store

    def put(self, name: str, data: Buffers, *, if_absent: bool = False) -> bool:
        parts = _cut(views(data))
        if len(parts) > 1 and not if_absent:
            self._put_parts(name, parts)
            return True
        return self._put_whole(name, b"".join(views(data)), if_absent)

    def get(self, name: str) -> bytes:
        def attempt() -> bytes:
            answer = self._call("get_object", name)
            content: bytes = self._read(name, answer["Body"], lambda body: body.read())
            if len(content) != answer["ContentLength"]:
                raise StoreUnavailable(f"{self._at(name)} came incompletely; check the network.")
            return content

        return self._retry(attempt)

    def read_into(self, name: str, offset: int, targets: Sequence[memoryview]) -> None:
        total = sum(t.nbytes for t in targets)
        if total == 0:
            return

        def attempt() -> None:
            answer = self._call("get_object", name, Range=f"bytes={offset}-{offset + total - 1}")
            if answer["ContentLength"] < total:
                answer["Body"].close()  # its connection is not used again
                raise StoreMissing(f"{self._at(name)} ends before byte {offset + total}.")
            self._read(name, answer["Body"], lambda body: self._fill(name, body, targets))

        self._retry(attempt)

    def find(self, prefix: str) -> list[ObjectInfo]:
        result: list[ObjectInfo] = []
        token: dict[str, str] = {}
        while True:
            page = self._try("list_objects_v2", None, prefix, **token)
            for item in page.get("Contents", ()):
                name = item["Key"][len(self._prefix) :]
                result.append(ObjectInfo(name, item["Size"], item["LastModified"].timestamp()))
            if not page.get("IsTruncated"):
                return sorted(result, key=lambda info: info.name)
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def delete(self, names: Iterable[str]) -> None:
        pending = list(names)
        for at in range(0, len(pending), 1000):
            keys = [{"Key": self._prefix + name} for name in pending[at : at + 1000]]
            answer = self._try("delete_objects", None, Delete={"Objects": keys, "Quiet": True})
            for failure in answer.get("Errors", ()):
                if failure.get("Code") not in _MISSING:
                    name = str(failure.get("Key", ""))[len(self._prefix) :]
                    self._raise(str(failure.get("Code")), str(failure.get("Message")), 0, name)

    def check(self) -> None:
        quick = self._config.model_copy(
            update={"attempts": min(self._config.attempts, _CHECK_ATTEMPTS)}
        )
        probe(S3Store(self._bucket, self._prefix.rstrip("/"), quick))

    def sweep(self) -> None:
        page = self._try("list_multipart_uploads", None, "")
        for upload in page.get("Uploads", ()):
            age_s = time.time() - upload["Initiated"].timestamp()
            name = upload["Key"][len(self._prefix) :]
            if age_s > SWEEP_AGE_S and layout.parse(name):
                with suppress(StoreMissing):
                    self._try("abort_multipart_upload", name, UploadId=upload["UploadId"])

    def abandon(self, names: Collection[str]) -> None:
        """Gives up what a process that is gone has left of uploads of ``names``, which nobody else
        writes; raises StoreError."""
        for folder in sorted({name.rpartition("/")[0] for name in names}):
            page = self._try("list_multipart_uploads", None, f"{folder}/")
            for upload in page.get("Uploads", ()):
                name = upload["Key"][len(self._prefix) :]
                if name in names:
                    with suppress(StoreMissing):
                        self._try("abort_multipart_upload", name, UploadId=upload["UploadId"])

    # ------------------------------------------------------------ writing

    def _put_whole(self, name: str, body: bytes, if_absent: bool) -> bool:
        condition = {"IfNoneMatch": "*"} if if_absent else {}
        tries = 0

        def attempt() -> bool:
            nonlocal tries
            tries += 1
            try:
                self._call("put_object", name, Body=body, **condition, **self._encryption())
            except _Exists:
                # The answer to an earlier attempt that took effect may have been lost.
                return tries > 1 and self.get(name) == body
            return True

        return self._retry(attempt)

    def _put_parts(self, name: str, parts: list[list[memoryview]]) -> None:
        answer = self._try("create_multipart_upload", name, **self._encryption())
        upload = {"UploadId": answer["UploadId"]}
        try:
            done = []
            for number, part in enumerate(parts, 1):
                body = b"".join(part)
                sent = self._try("upload_part", name, Body=body, PartNumber=number, **upload)
                done.append({"PartNumber": number, "ETag": sent["ETag"]} | _checksums(sent))
                failpoint("s3.part")
            self._complete(name, upload, done, sum(v.nbytes for part in parts for v in part))
        except BaseException:
            try:
                self._call("abort_multipart_upload", name, **upload)
            except StoreError as error:
                _log.warning("An unfinished upload stays behind: %s", error)
            raise

    def _complete(
        self, name: str, upload: dict[str, str], done: list[dict[str, Any]], nbytes: int
    ) -> None:
        def attempt() -> None:
            try:
                self._call(
                    "complete_multipart_upload", name, MultipartUpload={"Parts": done}, **upload
                )
            except StoreMissing:
                # An earlier attempt may have completed it, its answer being lost.
                if self._call("head_object", name)["ContentLength"] != nbytes:
                    raise

        self._retry(attempt)

    def _encryption(self) -> dict[str, str]:
        asked = {
            "ServerSideEncryption": self._config.sse,
            "SSEKMSKeyId": self._config.sse_kms_key_id,
        }
        return {name: value for name, value in asked.items() if value}

    # ------------------------------------------------------------ one request

    def _retry(self, attempt: Callable[[], T]) -> T:
        return retry(self._config.attempts, attempt)

    def _try(self, *args: Any, **kwargs: Any) -> Any:
        return retry(self._config.attempts, self._call, *args, **kwargs)

    def _at(self, name: str) -> str:
        return f"s3://{self._bucket}/{self._prefix}{name}"

    def _client(self) -> Any:
        with self._lock:
            if self._made is None:
                self._made = _connect(self._config)
            return self._made

    def _call(
        self, operation: str, name: str | None, prefix: str | None = None, **arguments: Any
    ) -> Any:
        """One request; raises one of the typed errors, or _Exists."""
        from botocore.exceptions import BotoCoreError, ClientError

        where: dict[str, str] = {"Bucket": self._bucket}
        if name is not None:
            where["Key"] = self._prefix + name
        if prefix is not None:
            where["Prefix"] = self._prefix + prefix
        try:
            return getattr(self._client(), operation)(**where, **arguments)
        except ClientError as error:
            details = error.response.get("Error", {})
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            self._raise(
                str(details.get("Code", "")), str(details.get("Message", "")), status, name or ""
            )
        except BotoCoreError as error:
            self._raise_botocore(error, name or "")

    def _read(self, name: str, body: Any, read: Callable[[Any], T]) -> T:
        from botocore.exceptions import BotoCoreError, HTTPClientError

        try:
            with closing(body):
                return read(body)
        except (BotoCoreError, HTTPClientError, OSError) as error:
            raise StoreUnavailable(
                f"{self._at(name)} came incompletely ({type(error).__name__}); check the network."
            ) from error

    def _fill(self, name: str, body: Any, targets: Sequence[memoryview]) -> None:
        for target in targets:
            while target.nbytes:
                count = body.readinto(target)
                if not count:
                    raise StoreUnavailable(
                        f"{self._at(name)} came incompletely; check the network."
                    )
                target = target[count:]

    def _raise(self, code: str, message: str, status: int, name: str) -> NoReturn:
        at = self._at(name)
        said = f"{code}: {message}".rstrip(": ")
        if code in _EXISTS or status == 412:
            raise _Exists(at)
        if code == "NoSuchBucket" or (code in _MISSING and not name):
            raise StoreMissing(
                f"The bucket {self._bucket} of {self.url} does not exist; create it or correct "
                f"the checkpoint URL."
            )
        if code in _MISSING or status == 404:
            raise StoreMissing(f"{at} is not there.")
        if code == "InvalidRange" or status == 416:
            raise StoreMissing(f"{at} ends too early.")
        if code in _FULL or status == 507:
            raise StoreFull(f"{at} cannot be written ({said}); free space or raise the quota.")
        if code in _DENIED or status in (301, 401, 403):
            raise StoreDenied(
                f"{at} refused the request ({said}); check the credentials, the region and the "
                f"permissions of the bucket."
            )
        raise StoreUnavailable(f"{at} answered {status or 'with'} {said}; check the store.")

    def _raise_botocore(self, error: Exception, name: str) -> NoReturn:
        from botocore import exceptions as known

        text = str(error).rstrip(".")
        denied = (
            known.NoCredentialsError, known.PartialCredentialsError,
            known.CredentialRetrievalError, known.TokenRetrievalError, known.SSOError,
            known.UnauthorizedSSOTokenError,
        )  # fmt: skip
        wrong = (
            known.ProfileNotFound, known.ParamValidationError, known.InvalidRegionError,
            known.NoRegionError, known.InvalidEndpointConfigurationError,
            known.UnknownEndpointError, known.ConfigParseError, known.InvalidConfigError,
        )  # fmt: skip
        if isinstance(error, known.SSLError):
            raise StoreDenied(
                f"{self.url} failed the TLS check ({text}); set checkpoint.ca_file to the "
                f"certificate of its authority."
            ) from error
        if isinstance(error, denied):
            raise StoreDenied(
                f"{self.url}: {text}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile "
                f"or a role."
            ) from error
        if isinstance(error, wrong):
            raise ConfigError(f"{self.url}: {text}; correct the checkpoint settings.") from error
        raise StoreUnavailable(
            f"{self._at(name)} cannot be reached ({text}); check the endpoint and the network."
        ) from error


class _Exists(Exception):
    """The object of a conditional put is there already."""


def _connect(config: CheckpointConfig) -> Any:
    import boto3
    from botocore.config import Config

    settings = Config(
        connect_timeout=config.connect_timeout_s,
        read_timeout=config.read_timeout_s,
        retries={"total_max_attempts": 1, "mode": "standard"},
        max_pool_connections=_CONNECTIONS,
        s3={"addressing_style": "path"} if config.endpoint_url else {},
    )
    try:
        return boto3.session.Session().client(
            "s3",
            config=settings,
            endpoint_url=config.endpoint_url or None,
            region_name=config.region or None,
            verify=config.ca_file or None,
        )
    except ValueError as error:
        raise ConfigError(
            f"The S3 endpoint {config.endpoint_url!r} is not a URL ({error}); correct "
            f"checkpoint.endpoint_url."
        ) from error


def _cut(data: list[memoryview]) -> list[list[memoryview]]:
    """``data`` in parts of ``_PART_BYTES``, the last one shorter; one part if there is none."""
    parts: list[list[memoryview]] = [[]]
    room = _PART_BYTES
    for view in data:
        while view.nbytes:
            if room == 0:
                parts.append([])
                room = _PART_BYTES
            parts[-1].append(view[:room])
            taken = min(room, view.nbytes)
            view, room = view[taken:], room - taken
    return parts


def _checksums(answer: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in answer.items() if k.startswith("Checksum") and k != "ChecksumType"}
