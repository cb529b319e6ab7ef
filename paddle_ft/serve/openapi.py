"""The OpenAPI description of the HTTP interface, made from ``http_paths``. Pure.

``docs/serving-openapi.json`` is ``document()`` as ``text()`` writes it; a test keeps it so.
"""

from __future__ import annotations

import json
import re
from typing import Any

from paddle_ft.serve.http_paths import ROUTES, VALUE, Route
from paddle_ft.serve.tensors import DIMENSIONS_MAX, DTYPES
from paddle_ft.serve.wire import TENSORS_MAX, TIMEOUT_US_MAX

Schema = dict[str, Any]

_STRING: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_REFUSALS = {
    400: "The request is wrong",
    401: "The admin token is missing or wrong",
    403: "No admin token is set on the server",
    404: "There is no such model or path",
    408: "The body or the result did not come within the limit",
    409: "The change that Paddle-Ft-Term names is lost: a forced promotion gave it up",
    413: "The body, its JSON, the number of its elements, or the state of the session is too large",
    415: "The Content-Encoding is not served",
    421: "Changes go to the primary of the group, which the error names",
    429: "Too many requests are waiting; see Retry-After",
    500: "The model is damaged, or not signed by whom it must be",
    507: "The state of the group has no room for more",
    503: "Not now: the model is being loaded, too much is under way, or this replica is leaving; "
    "see Retry-After",
}


def _record(*required: str, **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required)}


def _list(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


_DATATYPE: Schema = {"type": "string", "enum": list(DTYPES)}
_SHAPE = _list({"type": "integer", "minimum": 0}, maxItems=DIMENSIONS_MAX)
_DATA = _list({})
_FEATURE = _record(
    "name", "datatype", "shape", name=_STRING, datatype=_STRING, shape=_list({"type": "integer"})
)
_DURATION = _record("count", "ns", count=_COUNT, ns=_COUNT)
_TIMES = ("compute_input", "compute_infer", "compute_output")


def _parameters(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties}


SCHEMAS: dict[str, Schema] = {
    "Error": _record("error", error=_STRING, progress={"type": "number"}),
    "Server": _record(
        "name", "version", "extensions", name=_STRING, version=_STRING, extensions=_list(_STRING)
    ),
    "Model": _record(
        *("name", "versions", "platform", "inputs", "outputs"),
        name=_STRING,
        versions=_list(_STRING),
        platform=_STRING,
        inputs=_list(_FEATURE),
        outputs=_list(_FEATURE),
    ),
    "Config": _record(
        "name", "max_batch_size", name=_STRING, platform=_STRING, max_batch_size=_COUNT
    ),
    "Statistics": _record(
        "model_stats",
        model_stats=_list(
            _record(
                *("name", "version", "inference_count", "execution_count", "inference_stats"),
                name=_STRING,
                version=_STRING,
                last_inference=_COUNT,
                inference_count=_COUNT,
                execution_count=_COUNT,
                inference_stats=_record(
                    *(names := ("success", "fail", "queue", *_TIMES)),
                    **dict.fromkeys(names, _DURATION),
                ),
                batch_stats=_list(
                    _record(
                        "batch_size", *_TIMES, batch_size=_COUNT, **dict.fromkeys(_TIMES, _DURATION)
                    )
                ),
            )
        ),
    ),
    "Index": _list(
        _record(
            "name",
            "state",
            name=_STRING,
            version=_STRING,
            state={"type": "string", "enum": ["LOADING", "READY", "UNLOADING", "UNAVAILABLE"]},
            reason=_STRING,
        )
    ),
    "Settings": _parameters(
        batch_rows_max={"type": "integer", "minimum": 1, "maximum": 65_536, "nullable": True},
        batch_wait_ms={"type": "number", "minimum": 0, "maximum": 60_000, "nullable": True},
        queue_max={"type": "integer", "minimum": 1, "nullable": True},
    ),
    "IndexRequest": _parameters(ready={"type": "boolean"}),
    "Parameters": _parameters(parameters={"type": "object"}),
    "InferRequest": _record(
        "inputs",
        id=_STRING,
        parameters=_parameters(
            timeout={"type": "integer", "minimum": 0, "maximum": TIMEOUT_US_MAX},
            binary_data_output={"type": "boolean"},
        ),
        inputs=_list(
            _record(
                *("name", "datatype", "shape", "data"),
                name=_STRING,
                datatype=_DATATYPE,
                shape=_SHAPE,
                data=_DATA,
            ),
            maxItems=TENSORS_MAX,
        ),
        outputs=_list(
            _record("name", name=_STRING, parameters=_parameters(binary_data={"type": "boolean"})),
            maxItems=TENSORS_MAX,
        ),
    ),
    "InferResponse": _record(
        *("model_name", "model_version", "outputs"),
        model_name=_STRING,
        model_version=_STRING,
        id=_STRING,
        outputs=_list(
            _record(
                *("name", "datatype", "shape"),
                name=_STRING,
                datatype=_DATATYPE,
                shape=_SHAPE,
                data=_DATA,
                parameters=_parameters(binary_data_size=_COUNT),
            )
        ),
    ),
}


def document() -> dict[str, Any]:
    paths: dict[str, Any] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.0.3",
        "info": {
            "title": "paddle_ft: Open Inference Protocol",
            "version": "2",
            "description": "Tensors also go as raw bytes after the JSON: "
            "Inference-Header-Content-Length, binary_data_size, binary_data.",
        },
        "paths": paths,
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {"admin": {"type": "http", "scheme": "bearer"}},
        },
    }


def text() -> str:
    return json.dumps(document(), indent=1) + "\n"


def _content(schema: str) -> dict[str, Any]:
    if schema == VALUE:
        return {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    return {"application/json": {"schema": _ref(schema)}}


def _header(name: str, schema: Schema) -> dict[str, Any]:
    return {"name": name, "in": "header", "schema": schema}


def _operation(route: Route) -> dict[str, Any]:
    parts = [part.split("/")[0] for part in route.path.split("{")[1:]]
    names = [part.rstrip("}") for part in parts]
    answer: dict[str, Any] = {"description": "Done"}
    if route.answer:
        media = _content(route.answer)
        if route.operation == "infer":
            media |= _content(VALUE)
        answer = {"description": "The answer", "content": media}
    refused = {"application/json": {"schema": _ref("Error")}}
    found: dict[str, Any] = {
        "operationId": "_".join(re.findall(r"\w+", f"{route.method} {route.path}")).lower(),
        "summary": route.summary,
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in names
        ],
        "responses": {
            "200": answer,
            **{
                str(status): {"description": _REFUSALS[status], "content": refused}
                for status in route.refusals
            },
        },
    }
    if route.operation == "infer" or "{key}" in route.path:
        limit = {"type": "integer", "minimum": 1, "maximum": 3_600_000}
        found["parameters"].append(_header("x-request-timeout-ms", limit))
    if route.operation == "infer":
        found["parameters"].append(_header("x-session-id", {"type": "string"}))
    if route.operation == "state_get":
        found["parameters"].append(
            _header("paddle-ft-term", {"type": "string", "pattern": r"^\d{1,19}\.\d{1,19}$"})
        )
    if route.body:
        needed = route.operation in ("infer", "change_settings")
        found["requestBody"] = {"required": needed, "content": _content(route.body)}
    if route.admin:
        found["security"] = [{"admin": []}]
    return found
