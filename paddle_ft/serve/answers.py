"""What both HTTP and gRPC say of the server and of its models, as JSON values."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from paddle_ft.serve.batcher import Batcher, Duration
from paddle_ft.serve.catalog import Catalog, Control
from paddle_ft.serve.tensors import BadRequest
from paddle_ft.serve.types import Feature

NAME = "paddle_ft"
EXTENSIONS = ("binary_tensor_data", "model_repository", "statistics", "model_configuration")


def server() -> dict[str, Any]:
    try:
        number = version("paddle-ft")
    except PackageNotFoundError:
        number = "0"
    return {"name": NAME, "version": number, "extensions": list(EXTENSIONS)}


def model(catalog: Catalog, name: str, version: str) -> dict[str, Any]:
    info = catalog.find(name, version).info
    return {
        "name": info.name,
        "versions": catalog.versions(info.name),
        "platform": info.platform,
        "inputs": [_feature(feature) for feature in info.inputs],
        "outputs": [_feature(feature) for feature in info.outputs],
    }


def config(catalog: Catalog, name: str, version: str) -> dict[str, Any]:
    """As Triton gives it, as far as there is something to say."""
    batcher = catalog.find(name, version)
    info, limits = batcher.info, batcher.limits
    skip = 1 if info.batched else 0  # Triton leaves the dimension of rows out
    found: dict[str, Any] = {
        "name": info.name,
        "platform": info.platform,
        "max_batch_size": limits.rows_max if info.batched else 0,
    }
    for key, features in (("input", info.inputs), ("output", info.outputs)):
        found[key] = [
            {
                "name": feature.name,
                "data_type": f"TYPE_{feature.datatype.replace('BYTES', 'STRING')}",
                "dims": list(feature.shape[skip:]),
            }
            for feature in features
        ]
    if info.batched:
        found["dynamic_batching"] = {
            "max_queue_delay_microseconds": int(limits.wait_max_s * 1e6),
            "preferred_batch_size": [limits.rows_max],
        }
    return found


def statistics(catalog: Catalog, name: str = "", version: str = "") -> dict[str, Any]:
    return {"model_stats": [_statistics(each) for each in catalog.batchers(name, version)]}


def index(catalog: Catalog, ready: bool) -> list[dict[str, str]]:
    return [
        {"name": e.name, "version": e.version, "state": e.state, "reason": e.reason}
        for e in catalog.index()
        if e.state == "READY" or not ready
    ]


def control(found: Control | None) -> Control:
    if found is None:
        raise BadRequest("models are not loaded and unloaded by hand here")
    return found


def _feature(feature: Feature) -> dict[str, Any]:
    return {"name": feature.name, "datatype": feature.datatype, "shape": list(feature.shape)}


def _statistics(batcher: Batcher) -> dict[str, Any]:
    figures = batcher.figures
    nothing = Duration()
    return {
        "name": batcher.info.name,
        "version": batcher.info.version,
        "last_inference": figures.last_ms,
        "inference_count": figures.rows,
        "execution_count": figures.batches,
        "inference_stats": {
            "success": _duration(figures.success),
            "fail": _duration(figures.fail),
            "queue": _duration(figures.queue),
            "compute_input": _duration(nothing),
            "compute_infer": _duration(figures.infer),
            "compute_output": _duration(nothing),
        },
        "batch_stats": [
            {
                "batch_size": rows,
                "compute_input": _duration(nothing),
                "compute_infer": _duration(duration),
                "compute_output": _duration(nothing),
            }
            for rows, duration in sorted(figures.rows_of_batches.items())
        ],
    }


def _duration(duration: Duration) -> dict[str, int]:
    return {"count": duration.count, "ns": duration.ns}
