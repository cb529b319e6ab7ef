"""Recognition of the example `examples/ocr` at 16 clients, and what the processors allow."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from bench.drive import Line
from bench.recovery_analysis import percentile
from bench.report import Row
from bench.serving_analysis import failed
from bench.serving_hop import below_s, own_s
from bench.serving_model import HERE, Model, environment
from bench.serving_rows import Say
from bench.serving_speed import CLIENTS, alone, bare, closed, rate
from bench.serving_world import Broken

NAME = "ocr_rec"
STRIP = (3, 48, 320)
ROWS = 4
"""Of a batch of the server, and of the bare predictors."""
MEAN_MS_MAX, P95_MS_MAX = 200.0, 210.0
ROUNDS = 2


def ocr(folder: Path, for_s: float, say: Say) -> list[Row]:
    """A worker for each processor, and then a bare predictor for each; in turn."""
    group, count = f"OCR recognition, {CLIENTS} clients", os.cpu_count() or 1
    say(f"{group}: publishing")
    model = Model(NAME, folder, published(folder / "ocr-store"), 1)
    took: list[float] = []
    rates: dict[str, list[float]] = {"ours": [], "bare": []}
    used_s = {"workers": 0.0, "front": 0.0}
    bad, told, shares = 0, [], []
    with ExitStack() as stack:
        node = stack.enter_context(alone(folder / "ocr", model, workers=count))
        request = folder / "line.http"
        request.write_bytes(line())
        (program,) = (folder / "ocr").rglob("inference.pdmodel")
        lines = [stack.enter_context(bare(program.parent, (ROWS, *STRIP))) for _ in range(count)]
        for number in range(ROUNDS):
            say(f"{group}: round {number + 1} of {ROUNDS}, {for_s / ROUNDS:g} s")
            before = below_s(node.pid), own_s(node.pid)
            found = closed(folder, node.http_port, NAME, str(request), for_s / ROUNDS)
            for kind, then, now in zip(
                used_s, before, (below_s(node.pid), own_s(node.pid)), strict=True
            ):
                used_s[kind] += now - then
            took += [1000 * r.took_s for r in found.requests]
            bad += failed(found.requests)
            told += list(found.told)[:2]
            shares.append(found.core_share)
            rates["ours"].append(rate(found))
            rates["bare"].append(together(lines, for_s / ROUNDS / 2))
    if not took:
        raise Broken("nobody was answered")
    limit = f"{count} bare predictors at once, {ROWS} rows"
    floor_ms = 1000 * CLIENTS / statistics.median(rates["bare"])
    note = (
        f"of a core for each request: workers {1000 * used_s['workers'] / len(took):.1f} ms, front "
        f"{1000 * used_s['front'] / len(took):.1f} ms; the load took {max(shares):.0%} of a core"
    )
    goal_note = (
        f"so many clients wait {floor_ms:.0f} ms on average if nothing but predictors runs on the "
        f"{count} processors"
    )
    return [
        Row(group, "success", "share", [1 - bad / len(took)], goal=0.998, sense=">=",
            note=f"of {len(took)} requests {'; '.join(told[:2])}"),
        Row(group, "mean", "ms", [statistics.fmean(took)], goal=MEAN_MS_MAX, note=goal_note),
        Row(group, "P95", "ms", [percentile(took, 0.95)], goal=P95_MS_MAX),
        Row(group, "throughput", "strips/s", rates["ours"], rates["bare"], limit, note=note),
    ]  # fmt: skip


def published(store: Path) -> Path:
    """The store, with the models of the example in it. Raises Broken."""
    script = HERE.parent / "examples" / "ocr" / "publish.py"
    store.mkdir(exist_ok=True)
    run = subprocess.run([sys.executable, str(script), "--store", str(store)], text=True,
                         capture_output=True, env=environment({}), timeout=400)  # fmt: skip
    if run.returncode:
        raise Broken(f"examples/ocr/publish.py ended with {run.returncode}: {run.stderr[-300:]}")
    return store


def together(lines: list[Line], for_s: float) -> float:
    """Rows a second of all predictors, each working for ``for_s``."""
    with ThreadPoolExecutor(len(lines)) as threads:
        answers = threads.map(lambda line: line.ask(for_s=for_s)["rows_per_s"], lines)
        return float(sum(answers))


def line() -> bytes:
    """A request with a picture of one line of text."""
    import cv2
    import numpy as np

    picture = np.full((STRIP[1], STRIP[2], STRIP[0]), 255, np.uint8)
    cv2.putText(picture, "Sum 1234.56 EUR", (8, 34), cv2.FONT_HERSHEY_SIMPLEX, 1.0, (0, 0, 0), 2)
    file = cv2.imencode(".png", picture)[1].tobytes()
    raw = len(file).to_bytes(4, "little") + file
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1]}
    wanted = {"inputs": [tensor | {"parameters": {"binary_data_size": len(raw)}}]}
    head = json.dumps(wanted).encode()
    lines = [
        f"POST /v2/models/{NAME}/infer HTTP/1.1",
        "Host: bench",
        f"Content-Length: {len(head) + len(raw)}",
        f"Inference-Header-Content-Length: {len(head)}",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + head + raw
