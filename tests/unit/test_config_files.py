"""The files in configs/ say what the code does."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from paddle_ft.config import Config, load

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CONFIGS = Path(__file__).parents[2] / "configs"


def test_default_toml_names_every_setting_and_its_default() -> None:
    written = tomllib.loads((CONFIGS / "default.toml").read_text())
    assert written == Config().model_dump(mode="json")


def test_default_toml_is_ordered_like_the_code() -> None:
    written = tomllib.loads((CONFIGS / "default.toml").read_text())
    meant = Config().model_dump(mode="json")
    assert [(g, list(table)) for g, table in written.items()] == [
        (g, list(table)) for g, table in meant.items()
    ]


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.name)
def test_every_file_loads(file: Path) -> None:
    loaded = load({}, {}, str(file))
    assert loaded.sources
    assert all(source == f"file {file}" for source in loaded.sources.values())


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.name)
def test_no_file_holds_a_secret(file: Path) -> None:
    secrets = re.compile(r'(password|secret|token|access_key)\w*\s*=\s*"[^"]+"', re.IGNORECASE)
    assert not secrets.search(file.read_text())
    assert secrets.search('password = "hunter2"')
