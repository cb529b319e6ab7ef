"""Messages of the Open Inference Protocol and of grpc.health.v1, built when first asked for.

They live in a descriptor pool of their own: a process that has imported ``tritonclient`` or any
other generated copy of the protocol keeps it, and no two versions of protobuf have to agree. Names
and numbers are those of KServe's and Triton's ``grpc_service.proto``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

from google.protobuf import (  # type: ignore[import-untyped]
    descriptor_pb2,
    descriptor_pool,
    message_factory,
)
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from paddle_ft.serve.tensors import BadRequest

INFERENCE = """
ServerLiveRequest:
ServerLiveResponse: live=1 bool
ServerReadyRequest:
ServerReadyResponse: ready=1 bool
ModelReadyRequest: name=1 string, version=2 string
ModelReadyResponse: ready=1 bool
ServerMetadataRequest:
ServerMetadataResponse: name=1 string, version=2 string, extensions=3 string*
ModelMetadataRequest: name=1 string, version=2 string
ModelMetadataResponse.TensorMetadata: name=1 string, datatype=2 string, shape=3 int64*
ModelMetadataResponse: name=1 string, versions=2 string*, platform=3 string,
  inputs=4 .ModelMetadataResponse.TensorMetadata*, outputs=5 .ModelMetadataResponse.TensorMetadata*
InferParameter: bool_param=1 bool?, int64_param=2 int64?, string_param=3 string?,
  double_param=4 double?, uint64_param=5 uint64?
InferTensorContents: bool_contents=1 bool*, int_contents=2 int32*, int64_contents=3 int64*,
  uint_contents=4 uint32*, uint64_contents=5 uint64*, fp32_contents=6 float*,
  fp64_contents=7 double*, bytes_contents=8 bytes*
ModelInferRequest.InferInputTensor: name=1 string, datatype=2 string, shape=3 int64*,
  parameters=4 .InferParameter#, contents=5 .InferTensorContents
ModelInferRequest.InferRequestedOutputTensor: name=1 string, parameters=2 .InferParameter#
ModelInferRequest: model_name=1 string, model_version=2 string, id=3 string,
  parameters=4 .InferParameter#, inputs=5 .ModelInferRequest.InferInputTensor*,
  outputs=6 .ModelInferRequest.InferRequestedOutputTensor*, raw_input_contents=7 bytes*
ModelInferResponse.InferOutputTensor: name=1 string, datatype=2 string, shape=3 int64*,
  parameters=4 .InferParameter#, contents=5 .InferTensorContents
ModelInferResponse: model_name=1 string, model_version=2 string, id=3 string,
  parameters=4 .InferParameter#, outputs=5 .ModelInferResponse.InferOutputTensor*,
  raw_output_contents=6 bytes*
ModelStreamInferResponse: error_message=1 string, infer_response=2 .ModelInferResponse
ModelConfigRequest: name=1 string, version=2 string
ModelInput: name=1 string, data_type=2 int32, dims=4 int64*
ModelOutput: name=1 string, data_type=2 int32, dims=3 int64*
ModelDynamicBatching: preferred_batch_size=1 int32*, max_queue_delay_microseconds=2 uint64
ModelConfig: name=1 string, platform=2 string, max_batch_size=4 int32, input=5 .ModelInput*,
  output=6 .ModelOutput*, dynamic_batching=11 .ModelDynamicBatching
ModelConfigResponse: config=1 .ModelConfig
ModelStatisticsRequest: name=1 string, version=2 string
StatisticDuration: count=1 uint64, ns=2 uint64
InferStatistics: success=1 .StatisticDuration, fail=2 .StatisticDuration,
  queue=3 .StatisticDuration, compute_input=4 .StatisticDuration,
  compute_infer=5 .StatisticDuration, compute_output=6 .StatisticDuration
InferBatchStatistics: batch_size=1 uint64, compute_input=2 .StatisticDuration,
  compute_infer=3 .StatisticDuration, compute_output=4 .StatisticDuration
ModelStatistics: name=1 string, version=2 string, last_inference=3 uint64,
  inference_count=4 uint64, execution_count=5 uint64, inference_stats=6 .InferStatistics,
  batch_stats=7 .InferBatchStatistics*
ModelStatisticsResponse: model_stats=1 .ModelStatistics*
ModelRepositoryParameter: bool_param=1 bool?, int64_param=2 int64?, string_param=3 string?,
  bytes_param=4 bytes?
RepositoryIndexRequest: repository_name=1 string, ready=2 bool
RepositoryIndexResponse.ModelIndex: name=1 string, version=2 string, state=3 string,
  reason=4 string
RepositoryIndexResponse: models=1 .RepositoryIndexResponse.ModelIndex*
RepositoryModelLoadRequest: repository_name=1 string, model_name=2 string,
  parameters=3 .ModelRepositoryParameter#
RepositoryModelLoadResponse:
RepositoryModelUnloadRequest: repository_name=1 string, model_name=2 string,
  parameters=3 .ModelRepositoryParameter#
RepositoryModelUnloadResponse:
"""
"""``*``: repeated; ``?``: one of those so marked; ``#``: a map from string; ``.M``: a message."""

HEALTH = """
HealthCheckRequest: service=1 string
HealthCheckResponse: status=1 int32
"""
"""``status`` is an enumeration there, which is the same on the wire."""

DATA_TYPES = {
    f"TYPE_{name}": number
    for number, name in enumerate(
        "BOOL UINT8 UINT16 UINT32 UINT64 INT8 INT16 INT32 INT64 FP16 FP32 FP64 STRING".split(), 1
    )
}
"""``data_type`` of ModelConfig, an enumeration there."""

UNKNOWN, SERVING, NOT_SERVING, SERVICE_UNKNOWN = range(4)

_FIELD = re.compile(r"(\w+)=(\d+) (\.?[\w.]+)([*?#]?)")
_Proto = descriptor_pb2.FieldDescriptorProto


@cache
def inference() -> Any:
    """A namespace with every message class of the protocol, ``ModelInferRequest``."""
    return _build("inference", INFERENCE)


@cache
def health() -> Any:
    return _build("grpc.health.v1", HEALTH)


def _build(package: str, text: str) -> Any:
    file = descriptor_pb2.FileDescriptorProto(
        name=f"paddle_ft/{package}.proto", package=package, syntax="proto3"
    )
    messages: dict[str, Any] = {}
    for name, fields in _messages(text):
        outer, _, own = name.rpartition(".")
        if outer and outer not in messages:
            messages[outer] = file.message_type.add(name=outer)
        parent = messages[outer].nested_type if outer else file.message_type
        if name not in messages:
            messages[name] = parent.add(name=own)
        _fill(messages[name], f".{package}.{name}", package, fields)
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    found = pool.FindFileByName(file.name).message_types_by_name
    return SimpleNamespace(
        **{name: message_factory.GetMessageClass(message) for name, message in found.items()}
    )


def _messages(text: str) -> Iterator[tuple[str, list[tuple[str, str, str, str]]]]:
    for line in text.replace("\n  ", " ").strip().splitlines():
        name, _, fields = line.partition(":")
        yield name, _FIELD.findall(fields)


def parsing(kind: Any) -> Callable[[bytes], Any]:
    """Makes messages of ``kind``; of bytes that are none a BadRequest, which is not raised: grpc
    would write a traceback for each, and answer UNKNOWN."""

    def parsed(data: bytes) -> Any:
        try:
            return kind.FromString(data)
        except DecodeError:
            return BadRequest(f"the request is no {kind.DESCRIPTOR.name}")

    return parsed


def serialize(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data


def _fill(
    message: Any, full_name: str, package: str, fields: list[tuple[str, str, str, str]]
) -> None:
    for name, number, kind, mark in fields:
        label = _Proto.LABEL_REPEATED if mark in ("*", "#") else _Proto.LABEL_OPTIONAL
        added = message.field.add(name=name, number=int(number), label=label)
        if mark == "#":
            entry = message.nested_type.add(name=f"{name.title()}Entry")
            entry.options.map_entry = True
            for at, (part, of) in enumerate((("key", "string"), ("value", kind)), 1):
                _typed(entry.field.add(name=part, number=at, label=1), package, of)
            kind = f"{full_name}.{name.title()}Entry"
            added.type, added.type_name = _Proto.TYPE_MESSAGE, kind
            continue
        _typed(added, package, kind)
        if mark == "?":
            if not message.oneof_decl:
                message.oneof_decl.add(name="parameter_choice")
            added.oneof_index = 0


def _typed(added: Any, package: str, kind: str) -> None:
    if kind.startswith("."):
        added.type, added.type_name = _Proto.TYPE_MESSAGE, f".{package}{kind}"
    else:
        added.type = getattr(_Proto, f"TYPE_{kind.upper()}")
