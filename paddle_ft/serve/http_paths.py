"""The paths of the HTTP interface: what is served is what the OpenAPI file says. Pure data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import unquote_to_bytes

from paddle_ft.serve.ledger import VALUE_BYTES_MAX
from paddle_ft.serve.tensors import BadRequest


@dataclass(frozen=True, slots=True)
class Route:
    method: str
    path: str
    operation: str
    """Name of the method of ``HttpApi`` that answers."""
    summary: str
    answer: str
    """Schema of the body of a 200; empty: there is none."""
    body: str = ""
    """Schema of the request's body; empty: it has none."""
    admin: bool = False
    refusals: tuple[int, ...] = ()
    body_bytes_max: int = 2**62
    """Besides the bound for all."""


_MODEL = (400, 404, 503)
_INFER = (400, 401, 404, 408, 413, 415, 421, 429, 503, 507)
_ADMIN = (400, 401, 403, 404, 408, 413, 415, 421, 500, 503)
_KEY = "/v2/state/{session}/{key}"
_CHANGE = (400, 404, 408, 413, 415, 421, 503, 507)
_SETTINGS = "/v2/admin/settings"
VALUE = "Bytes"
"""Stands for a body that is no JSON."""


def _model(path: str, operation: str, summary: str, answer: str, **more: str) -> list[Route]:
    """The same with and without a version."""
    infer = operation == "infer"
    return [
        Route(
            "POST" if infer else "GET",
            f"/v2/models/{{model}}{version}{path}",
            operation,
            summary,
            answer,
            more.get("body", ""),
            refusals=_INFER if infer else _MODEL,
        )
        for version in ("", "/versions/{version}")
    ]


ROUTES: tuple[Route, ...] = (
    Route("GET", "/v2", "server", "Name and version of the server", "Server", refusals=(503,)),
    Route("GET", "/v2/health/live", "live", "The process answers", ""),
    Route("GET", "/v2/health/ready", "ready", "Every model is answered", "", refusals=(503,)),
    *_model("", "model", "Inputs and outputs of a model", "Model"),
    *_model("/ready", "model_ready", "The model is answered", ""),
    *_model("/config", "config", "How requests for a model are batched", "Config"),
    *_model("/stats", "stats", "What a model has done", "Statistics"),
    *_model("/infer", "infer", "Outputs for inputs", "InferResponse", body="InferRequest"),
    Route(
        "GET",
        "/v2/models/stats",
        "stats",
        "What all models have done",
        "Statistics",
        refusals=(503,),
    ),
    Route(
        "POST",
        "/v2/repository/index",
        "index",
        "Models and their states",
        "Index",
        "IndexRequest",
        refusals=(400, 408, 413, 415, 503),
    ),
    *(
        Route(
            "POST",
            f"/v2/repository/models/{{model}}/{what}",
            what,
            summary,
            "",
            "Parameters",
            True,
            _ADMIN,
        )
        for what, summary in (("load", "Load a model"), ("unload", "Take a model out"))
    ),
    Route(
        "GET",
        _KEY,
        "state_get",
        "A value that the group keeps for a session",
        VALUE,
        refusals=(400, 404, 409, 503),
    ),
    Route(
        "PUT",
        _KEY,
        "state_put",
        "Keep a value for a session",
        "",
        VALUE,
        refusals=_CHANGE,
        body_bytes_max=VALUE_BYTES_MAX,
    ),
    Route("DELETE", _KEY, "state_delete", "Remove a value", "", refusals=_CHANGE),
    Route("GET", _SETTINGS, "settings", "What is in force", "Settings", "", True, (401, 403)),
    Route(
        "PUT",
        _SETTINGS,
        "change_settings",
        "Change some of them; null: back to the configured",
        "Settings",
        "Settings",
        True,
        (400, 401, 403, 408, 413, 415, 421, 503),
        2**16,
    ),
)


def _pattern(path: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^/]+)", re.escape(path)))


_PATTERNS = [
    # Without names first: /v2/models/stats is not the model "stats".
    (_pattern(route.path), route)
    for route in sorted(ROUTES, key=lambda route: route.path.count("{"))
]


def _unquoted(name: str) -> str:
    try:
        return unquote_to_bytes(name.encode("latin1")).decode()
    except UnicodeError:
        raise BadRequest(f"{name[:60]!a} is not percent-encoded UTF-8") from None


def find(method: str, path: str) -> tuple[Route, Mapping[str, str]]:
    """The route for a request, and the names in its path, which is as it was sent (latin1).

    Raises BadRequest (400, 404, 405).
    """
    return (_kept if len(path) <= _KEPT_CHARACTERS_MAX else _find)(method, path)


def _find(method: str, path: str) -> tuple[Route, Mapping[str, str]]:
    path = path.rstrip("/") or "/"
    allowed: list[str] = []
    for pattern, route in _PATTERNS:
        if (match := pattern.fullmatch(path)) is not None:
            if route.method == method:
                return route, {k: _unquoted(v) for k, v in match.groupdict().items()}
            allowed.append(route.method)
    if allowed:
        raise NotAllowed(", ".join(allowed))
    raise BadRequest(f"there is nothing at {path[:100]!a}: see /v2", 404)


_KEPT_CHARACTERS_MAX = 256
_kept = lru_cache(256)(_find)
"""Most requests are for a few paths."""


class NotAllowed(BadRequest):
    """Another method would do."""

    def __init__(self, allowed: str) -> None:
        super().__init__(f"use {allowed} here", 405)
        self.allowed = allowed
