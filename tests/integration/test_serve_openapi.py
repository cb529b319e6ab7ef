"""Whatever requests the OpenAPI file gives rise to, good and bad, no answer is a 5xx, and each has
the status and the form that the file says (schemathesis makes the requests)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.integration.serve_world import DOUBLE, ECHO, TOKEN, Running, doubled, echoed, front
from tests.test_tidy import ROOT

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is in the extra test")

DOCUMENT = json.loads((ROOT / "docs/serving-openapi.json").read_text())
REQUESTS = [
    (mode, path, method)
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
    for mode in ("positive", "negative")
    # A name in a path is never wrong; where nothing else is given, nothing can be.
    if mode == "positive"
    or "requestBody" in operation
    or any(parameter["in"] != "path" for parameter in operation.get("parameters", ()))
]
ALLOWED = {503}
"""Of the 5xx: "not now", with Retry-After, for a model that is away for a moment."""


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with front() as made:
        made.serve(DOUBLE, doubled)
        made.serve(ECHO, echoed)
        yield made


@pytest.fixture(scope="module")
def schema(running: Running) -> Any:
    return schemathesis.openapi.from_dict(DOCUMENT)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "path", "method"), REQUESTS)
def test_nothing_that_is_sent_breaks_it(
    running: Running, schema: Any, mode: str, path: str, method: str
) -> None:
    operation = schema[path][method]
    requests = operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode))

    @settings(
        max_examples=30 if "infer" in path else 12,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(requests, st.booleans())
    def send(case: Any, known: bool) -> None:
        if known:  # most names that are made up are nobody's
            names = {"model": "double", "version": "1"}
            case.path_parameters = {k: names.get(k, v) for k, v in case.path_parameters.items()}
        case.headers["Authorization"] = f"Bearer {TOKEN}"
        answer = case.call(base_url=f"http://{running.http}", timeout=10)
        declared = DOCUMENT["paths"][path][method]["responses"]
        assert answer.status_code < 500 or answer.status_code in ALLOWED, answer.text
        if known or answer.status_code not in (404, 405):  # a name with a slash is another path
            assert str(answer.status_code) in declared, (answer.status_code, answer.text)
        if answer.status_code >= 400:
            assert json.loads(answer.text)["error"], answer.text

    send()
    assert running.ask("GET", "/v2/health/live")[0] == 200
