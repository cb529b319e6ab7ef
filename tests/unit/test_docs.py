"""What the documents say of flags, settings, exit codes and files is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from paddle_ft import errors
from paddle_ft.command_line import build_parser
from paddle_ft.config import Config

ROOT = Path(__file__).parents[2]
READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def shown_flags() -> set[str]:
    """Flags that --help tells of, in their form with underscores."""
    actions = [a for a in build_parser()._actions if a.help != "==SUPPRESS=="]
    options = {option for action in actions for option in action.option_strings}
    return {o for o in options if o.startswith("--") and "-" not in o[2:]} - {"--help"}


def table_flags(text: str) -> set[str]:
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `--")]
    return {flag for row in rows for flag in re.findall(r"--[a-z_]+", row)}


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_every_flag_is_in_the_table(readme: Path) -> None:
    assert table_flags(readme.read_text()) == shown_flags()


def test_a_missing_flag_is_noticed() -> None:
    assert table_flags("| `--etcd X`, `--gpus` | a | b |\n| c | --no | d |") == {"--etcd", "--gpus"}


def test_the_readmes_have_the_same_parts() -> None:
    one, two = ([line.split(" ")[0] for line in r.read_text().splitlines()] for r in READMES)
    marks = ("#", "##", "|", "```python", "```", "-")
    assert [m for m in one if m in marks] == [m for m in two if m in marks]


def test_settings_named_in_documents_exist() -> None:
    known = {f"{group}.{key}" for group, table in Config() for key in type(table).model_fields}
    for document in DOCUMENTS:
        pattern = r"`((?:job|etcd|checkpoint|health|serve)\.[a-z_0-9]+)`"
        named = re.findall(pattern, document.read_text())
        assert set(named) <= known, document.name


def test_every_exit_code_is_documented() -> None:
    codes = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    text = (ROOT / "docs/exit-codes.md").read_text()
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)} == codes


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", document.read_text()):
        if not target.startswith("http"):
            assert (document.parent / target.split("#")[0]).exists(), target
