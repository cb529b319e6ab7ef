"""The messages and service stubs of etcd3, rebuilt in memory.

The generated files of ``etcd3`` 0.12.0 do not import with protobuf 4 or newer, but the serialized
descriptors inside them are as good as ever. They are read out without executing those files, and
the classes are built from them in a descriptor pool of their own. Nothing is written, no module of
``etcd3`` is imported, and ``sys.modules`` stays as it was. Works with protobuf 4.25 to 7.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from google.protobuf import (  # type: ignore[import-untyped]
    descriptor_pb2,
    descriptor_pool,
    message_factory,
)

from paddle_ft.coordination.etcd_grpc import grpc
from paddle_ft.errors import ConfigError

_SERIALIZED = re.compile(r"^  serialized_pb=(?:_b\()?(b?'.*')\)?,?$", re.MULTILINE)
_FILES = ("kv", "auth", "rpc")
"""In the order in which they import one another."""


@cache
def load() -> Any:
    """A namespace with every message class (``TxnRequest``) and stub (``KVStub``) of etcd's API.

    Raises ConfigError if the package ``etcd3`` is not installed or carries no descriptors.
    """
    api = SimpleNamespace()
    pool = descriptor_pool.DescriptorPool()
    for serialized in _descriptors():
        file = pool.AddSerializedFile(serialized)
        for name, message in file.message_types_by_name.items():
            setattr(api, name, message_factory.GetMessageClass(message))
        proto = descriptor_pb2.FileDescriptorProto.FromString(serialized)
        for service in proto.service:
            setattr(api, f"{service.name}Stub", _stub(api, proto.package, service))
    return api


def _descriptors() -> Iterator[bytes]:
    spec = importlib.util.find_spec("etcd3")  # finds the package without importing it
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("the Python package etcd3 is not installed: run 'pip install etcd3'")
    folder = Path(spec.submodule_search_locations[0]) / "etcdrpc"
    for name in _FILES:
        path = folder / f"{name}_pb2.py"
        found = _SERIALIZED.search(path.read_text()) if path.is_file() else None
        if found is None:
            version = importlib.metadata.version("etcd3")
            raise ConfigError(
                f"etcd3 {version} has no descriptor in {path}: run 'pip install etcd3==0.12.0'"
            )
        literal = ast.literal_eval(found.group(1))
        yield literal if isinstance(literal, bytes) else literal.encode("latin1")


def _stub(api: Any, package: str, service: descriptor_pb2.ServiceDescriptorProto) -> type[Any]:
    """A class like the one the grpc compiler generates: an attribute for each method."""

    def init(self: Any, channel: grpc.Channel) -> None:
        for method in service.method:
            make = {
                (False, False): channel.unary_unary,
                (False, True): channel.unary_stream,
                (True, False): channel.stream_unary,
                (True, True): channel.stream_stream,
            }[method.client_streaming, method.server_streaming]
            request = getattr(api, method.input_type.rpartition(".")[2])
            response = getattr(api, method.output_type.rpartition(".")[2])
            call = make(
                f"/{package}.{service.name}/{method.name}",
                request_serializer=request.SerializeToString,
                response_deserializer=response.FromString,
            )
            setattr(self, method.name, call)

    return type(f"{service.name}Stub", (), {"__init__": init})
