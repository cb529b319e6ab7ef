"""Reads a picture through a replica or the gateway, and prints its text.

    python examples/ocr/client.py letter.png --url http://127.0.0.1:8080

Needs Python alone: the picture goes as it is, in the protocol's binary form.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any


def request_for(picture: bytes) -> tuple[bytes, dict[str, str]]:
    """Body and headers of an inference request for one picture."""
    size = 4 + len(picture)
    image = {"name": "image", "datatype": "BYTES", "shape": [1]}
    head = json.dumps({"inputs": [image | {"parameters": {"binary_data_size": size}}]}).encode()
    headers = {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(head)),
    }
    return head + len(picture).to_bytes(4, "little") + picture, headers


def read(
    url: str, picture: bytes, model: str = "ocr", timeout_s: float = 60.0
) -> list[tuple[str, float]]:
    """The lines in the picture and how sure the model is of each.

    Raises urllib.error.URLError, TimeoutError, http.client.HTTPException.
    """
    body, headers = request_for(picture)
    request = urllib.request.Request(f"{url}/v2/models/{model}/infer", body, headers)
    with urllib.request.urlopen(request, timeout=timeout_s) as reply:
        outputs: dict[str, Any] = {o["name"]: o["data"] for o in json.load(reply)["outputs"]}
    return list(zip(outputs["text"], outputs["score"], strict=True))


def said_by(error: urllib.error.HTTPError) -> str:
    """Why a request is refused; what stands between here and a replica may answer without JSON."""
    try:
        return str(json.load(error)["error"])
    except (OSError, ValueError, LookupError, TypeError, http.client.HTTPException):
        return error.reason


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("picture", type=Path, help="a PNG or JPEG file")
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="default: %(default)s")
    parser.add_argument("--line", action="store_true", help="it is one line: asks ocr_rec alone")
    options = parser.parse_args()
    model = "ocr_rec" if options.line else "ocr"
    try:
        lines = read(options.url.rstrip("/"), options.picture.read_bytes(), model)
    except urllib.error.HTTPError as error:
        print(f"client.py: {options.url} answers {error.code}: {said_by(error)}", file=sys.stderr)
        return 1
    except urllib.error.URLError as error:
        print(f"client.py: {options.url} cannot be reached: {error.reason}", file=sys.stderr)
        return 1
    except (OSError, ValueError, http.client.HTTPException) as error:
        print(f"client.py: {error}", file=sys.stderr)
        return 1
    for text, score in lines:
        print(f"{score:.2f}  {text}")
    if not lines:
        print("no text found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
