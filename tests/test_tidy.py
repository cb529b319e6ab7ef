"""The habits of the code that a machine can keep: who imports whom, what stays pure, how long.

Each rule is a function from source text to findings. The second half of this file shows every one
of them an example that it must reject: a checker that never failed proves nothing.
"""

from __future__ import annotations

import ast
import fnmatch
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import paddle_ft
from paddle_ft import config

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]

# ---------------------------------------------------------------- what is kept

LAYERS = (
    ("values", ["types", "errors"]),
    ("settings", ["config", "gateway_config", "serve_config", "failpoints"]),
    (
        "pure",
        [
            "plain",
            "policies",
            "progress",
            "sampling",
            "summation",
            "coordination.kv",
            "coordination.schema",
            "coordination.actions",
            "coordination.decide",
            "coordination.grouping",
            "coordination.view",
            "meeting",
            "coordination.endpoints",
            "agent.supervise",
            "agent.reserve",
            "agent.worker_env",
            "chaos.plan",
            "chaos.report",
            "checkpoint.backlog",
            "checkpoint.boxes",
            "checkpoint.content",
            "checkpoint.layout",
            "checkpoint.manifest",
            "checkpoint.plan",
            "checkpoint.reclaim",
            "checkpoint.reshard",
            "checkpoint.retention",
            "health.figures",
            "health.judge",
            "health.pace",
            "health.phases",
            "health.quarantine",
            "serve.elect",
            "serve.log",
            "serve.broadcast",
            "serve.registry",
            "serve.frames",
            "serve.seat",
            "serve.standstill",
            "serve.routes",
            "serve.routing",
            "serve.nginx_pools",
            "serve.nginx_text",
            "serve.haproxy_text",
            "serve.latency",
            "serve.lessons",
            "serve.steady",
            "serve.batching",
            "serve.breaker",
            "serve.rollout",
            "serve.cut",
            "serve.publish_rule",
            "serve.wanted",
            "serve.ramp",
            "serve.deadline",
            "observe.goodput",
            "observe.story",
        ],
    ),
    (
        "adapters",
        [
            "coordination.*",
            "checkpoint",
            "checkpoint.*",
            "agent.beacon",
            "agent.ipc",
            "agent.net",
            "agent.tether",
            "observe.events",
            "health.board",
            "serve.types",
            "serve.waiting",
            "serve.budget",
            "serve.tensors",
            "serve.wire",
            "collective",
            "gloo",
            "gradients",
            "feed",
        ],
    ),
    (
        "shells",
        [
            "agent.*",
            "chaos",
            "chaos.*",
            "session",
            "state",
            "slots",
            "nested",
            "divided",
            "local_state",
            "reproducible",
            "standing",
            "regroup",
            "rehearsal",
            "saver",
            "transfer",
            "update",
            "exits",
            "keeper",
            "recorder",
            "standalone",
            "context",
            "streams",
            "health.*",
            "serve",
            "serve.*",
        ],
    ),
    (
        "fronts",
        [
            "entry",
            "launch",
            "command_line",
            "cli",
            "checkpoint.cli",
            "observe.cli",
            "health.cli",
            "health.probe_cli",
            "serve.onnx",
            "serve.publish_cli",
            "serve.serving_cli",
            "serve.options",
            "serve.command",
            "serve.then_serve",
            "serve.__main__",
            "chaos.cli",
            "chaos.run",
            "serve.gateway_cli",
            "serve.group_cli",
            "",
        ],
    ),
)
"""Each module belongs to the most exact name that fits; it imports from its own layer or below."""

PURE_BANNED = frozenset(
    """
    paddle etcd3 grpc boto3 botocore fsspec requests urllib http socket ssl select selectors asyncio
    threading multiprocessing concurrent queue subprocess time datetime random secrets uuid os io
    shutil tempfile mmap ctypes fcntl logging warnings sys builtins importlib
    """.split()
)
PURE_BANNED_CALLS = frozenset({"open", "print", "input", "exec", "eval", "__import__"})

ONLY_IN = {
    "etcd3": ["coordination.etcd*"],
    "grpc": ["coordination.etcd*", "serve.grpc*", "serve.stream"],
    "boto3": ["checkpoint.store*"],
    "botocore": ["checkpoint.store*"],
    "fsspec": ["checkpoint.store*"],
    "paddle": [
        "session",
        "state",
        "slots",
        "nested",
        "regroup",
        "rehearsal",
        "reproducible",
        "transfer",
        "collective",
        "gloo",
        "gradients",
        "feed",
        "serve.predictor",
        "serve.program",
        "serve.export",
        "checkpoint.snapshot",
        "checkpoint.pdparams",
        "agent.bootstrap",
    ],
    # Paddle's own files are pickles: read there by a reader that admits nothing but arrays.
    "pickle": ["checkpoint.pdparams"],
    "cloudpickle": [],
    "marshal": [],
    "shelve": [],
}

MODULES_OF = {
    "boto3": ["boto3", "botocore"],
    "grpcio": ["grpc"],
    "paddlepaddle": ["paddle"],
    "protobuf": ["google"],
}
"""Modules of a distribution, where they have another name."""

FILE_LINES_MAX = 400
FUNCTION_LINES_MAX = 60
LONGER = {}
"""Files and functions (``path`` or ``path:name``) that are longer, and how long. Only shrinks."""
SHRUNK_LINES = 20
"""By how much one of them may be shorter than written down before that is to be lowered."""

EXPORTED = """
    AnyOf Automatic EveryNSteps EverySeconds OnBetter OnPreemption OnSignal CheckpointDamaged
    CheckpointError CheckpointMismatch CollectiveFailed ConfigError CoordinationError
    EtcdUnavailable LeaseLost MachineError MembersMissing PaddleFTError Session ShardOf
    StoreDenied StoreError StoreFull StoreMissing StoreUnavailable WorkerFailed session
""".split()

SECRET = re.compile(r"password|passwd|secret|token$|credential|access_key", re.IGNORECASE)
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError)\b")
MACHINE = re.compile(
    r"/(?:work|root|home)/|/tmp/setup"
    r"|\b(?:pypi\.org|pythonhosted\.org|deb\.debian\.org|registry\.npmjs\.org|proxy\.golang\.org)\b"
)

# ---------------------------------------------------------------- rules


def layer_of(module: str) -> int:
    """Index in LAYERS of the pattern that fits best; raises LookupError if none does."""
    fits = [
        ("*" not in pattern, len(pattern), index)
        for index, (_, patterns) in enumerate(LAYERS)
        for pattern in patterns
        if fnmatch.fnmatchcase(module, pattern)
    ]
    if not fits:
        raise LookupError(f"{module}: give it a layer in {Path(__file__).name}")
    return max(fits)[2]


def imports(source: str) -> Iterator[tuple[int, str]]:
    """(line, name) of every import, also inside functions; ``from a import b`` gives ``a.b``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def wrong_direction(module: str, source: str, known: set[str]) -> Iterator[str]:
    own = layer_of(module)
    for line, imported in imports(source):
        if imported.startswith("."):
            yield f"{module}:{line} imports relatively; write the full name"
        if not imported.startswith("paddle_ft."):
            continue
        name = imported.removeprefix("paddle_ft.")
        while name not in known:  # a member of a module, or of the package itself
            name = name.rpartition(".")[0]
        if layer_of(name) > own:
            yield f"{module}:{line} ({LAYERS[own][0]}) imports {name} ({LAYERS[layer_of(name)][0]})"


def impure(module: str, source: str) -> Iterator[str]:
    for line, imported in imports(source):
        if (root := imported.split(".")[0]) in PURE_BANNED:
            yield f"{module}:{line} is pure and imports {root}"
    for node in ast.walk(ast.parse(source)):
        called = getattr(node.func, "id", "") if isinstance(node, ast.Call) else ""
        if called in PURE_BANNED_CALLS:
            yield f"{module}:{node.lineno} is pure and calls {called}"
        if isinstance(node, ast.Attribute) and node.attr == "random":
            yield f"{module}:{node.lineno} is pure and uses a random generator"
    if not re.search(r"pure|invariant", ast.get_docstring(ast.parse(source)) or "", re.IGNORECASE):
        yield f"{module} is pure: say so, or its invariant, in the docstring it opens with"


def out_of_place(module: str, source: str) -> Iterator[str]:
    for line, imported in imports(source):
        root = imported.split(".")[0]
        places = ONLY_IN.get(root)
        if places is not None and not any(fnmatch.fnmatchcase(module, p) for p in places):
            yield f"{module}:{line} imports {root}; only {places or 'nobody'} may"


def declared(project: dict[str, Any], extra: str) -> set[str]:
    """Top-level modules of what ``project`` needs, with ``extra``."""
    wanted = [*project["dependencies"], *project["optional-dependencies"][extra]]
    names = [re.split(r"[^A-Za-z0-9_-]", text)[0] for text in wanted]
    return {module for name in names for module in MODULES_OF.get(name, [name.replace("-", "_")])}


def undeclared(module: str, source: str, known: set[str]) -> Iterator[str]:
    for line, imported in imports(source):
        root = imported.split(".")[0]
        if root and root not in known | sys.stdlib_module_names | {"paddle_ft", "tomllib"}:
            yield f"{module}:{line} imports {root}, which pyproject.toml does not name"


def lengths(path: str, source: str) -> dict[str, int]:
    """What is longer than it may be -> its lines."""
    found = {}
    if (lines := source.count("\n")) > FILE_LINES_MAX:
        found[path] = lines
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > FUNCTION_LINES_MAX:
                found[f"{path}:{node.name}"] = lines
    return found


def ratchet(found: dict[str, int], allowed: dict[str, int]) -> Iterator[str]:
    for name, lines in found.items():
        if lines > allowed.get(name, 0):
            yield f"{name} has {lines} lines: make it shorter"
    for name, lines in allowed.items():
        if found.get(name, 0) < lines - SHRUNK_LINES:
            yield f"{name} has shrunk to {found.get(name, 'within the limit')}: lower it in LONGER"


def told_secrets(path: str, source: str) -> Iterator[str]:
    """Secrets inside f-strings and as arguments of print and of loggers."""
    for node in ast.walk(ast.parse(source)):
        parts: list[ast.AST] = []
        if isinstance(node, ast.JoinedStr):
            parts = [v.value for v in node.values if isinstance(v, ast.FormattedValue)]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if re.search(r"\bprint$|\blog(ger|ging)?\b|^_log\b|\.write(lines)?$|Error$", called):
                parts = [*node.args]
        for part in (inner for outer in parts for inner in ast.walk(outer)):
            name = part.id if isinstance(part, ast.Name) else getattr(part, "attr", "")
            if SECRET.search(name) and name != "secrets":  # the module, which makes nonces
                yield f"{path}:{part.lineno} tells {name}"


def open_secrets(groups: dict[str, type[config._Group]]) -> Iterator[str]:
    """Settings with the name of a secret that would be printed with the others."""
    for group, kind in groups.items():
        for key, field in kind.model_fields.items():
            if SECRET.search(key) and field.repr:
                yield f"{group}.{key} is shown: Field(repr=False)"


def matches(pattern: re.Pattern[str], path: str, text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        if found := pattern.search(line):
            yield f"{path}:{number} contains {found.group()}"


# ---------------------------------------------------------------- the project


def modules() -> dict[str, str]:
    """Dotted name below paddle_ft (the package itself: "") -> source; packages without code not."""
    found = {}
    for path in sorted((ROOT / "paddle_ft").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / "paddle_ft").with_suffix("").parts)
        source = path.read_text()
        if name == "__init__" or source.strip():
            found["" if name == "__init__" else name.removesuffix(".__init__")] = source
    return found


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, timeout=20, check=True
    )
    return [ROOT / name for name in listed.stdout.decode().split("\0") if name]


def python_files(*folders: str) -> dict[str, str]:
    return {
        str(path.relative_to(ROOT)): path.read_text()
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*.py"))
    }


def report(findings: Iterator[str] | list[str]) -> None:
    listed = sorted(set(findings))
    assert not listed, "\n" + "\n".join(listed)


def test_imports_go_downward_only() -> None:
    sources = modules()
    known = set(sources)
    report([f for name, text in sources.items() for f in wrong_direction(name, text, known)])


def test_pure_modules_are_pure() -> None:
    pure = next(index for index, (name, _) in enumerate(LAYERS) if name == "pure")
    report([f for n, text in modules().items() if layer_of(n) == pure for f in impure(n, text)])


def test_libraries_are_touched_in_their_place_alone() -> None:
    report([f for name, text in modules().items() for f in out_of_place(name, text)])


def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = declared(project, "cpu") | declared(project, "serve")
    report([f for name, text in modules().items() for f in undeclared(name, text, known)])


def test_files_and_functions_are_short() -> None:
    sources = python_files("paddle_ft", "examples")
    found = {k: v for path, text in sources.items() for k, v in lengths(path, text).items()}
    report(ratchet(found, LONGER))


def test_every_module_says_what_it_is() -> None:
    report([n for n, text in modules().items() if text and not ast.get_docstring(ast.parse(text))])


def test_no_secret_is_told() -> None:
    sources = python_files("paddle_ft", "examples")
    report([f for path, text in sources.items() for f in told_secrets(path, text)])
    groups = {name: type(group) for name, group in config.Config()}
    report(open_secrets(groups))


def test_exported_members() -> None:
    assert sorted(paddle_ft.__all__) == sorted(EXPORTED)
    assert all(hasattr(paddle_ft, name) for name in EXPORTED)


def test_tracked_files_name_no_machine_and_leave_nothing_unfinished() -> None:
    findings: list[str] = []
    for path in tracked():
        if path == Path(__file__) or not path.is_file():
            continue
        name = str(path.relative_to(ROOT))
        data = path.read_bytes()
        if b"\0" in data:
            findings.append(f"{name} is binary")
            continue
        text = data.decode()
        findings += matches(MACHINE, name, text)
        if name.split("/")[0] in ("paddle_ft", "examples", "launchers", "configs"):
            findings += matches(UNFINISHED, name, text)
    report(findings)


# ---------------------------------------------------------------- the rules themselves


def test_layer_of_takes_the_most_exact_name() -> None:
    named = {name: index for index, (name, _) in enumerate(LAYERS)}
    assert layer_of("coordination.decide") == named["pure"]
    assert layer_of("coordination.etcd") == named["adapters"]
    assert layer_of("agent.agent") == named["shells"]
    assert layer_of("checkpoint.cli") == named["fronts"]
    with pytest.raises(LookupError):
        layer_of("nowhere")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("types", "from paddle_ft import errors, config"),
        ("coordination.decide", "from paddle_ft.coordination.etcd import EtcdCoordinator"),
        ("coordination.etcd", "def f():\n    import paddle_ft.agent.agent"),
        ("session", "import paddle_ft.launch"),
        ("session", "from . import launch"),
    ],
)
def test_an_upward_import_is_found(module: str, source: str) -> None:
    known = {"", "config", "errors", "coordination.etcd", "agent.agent", "launch"}
    assert len(set(wrong_direction(module, source, known))) == 1


def test_a_downward_import_is_fine() -> None:
    source = "from paddle_ft.config import Config\nfrom paddle_ft.types import Member\nimport os"
    assert not list(wrong_direction("coordination.decide", source, {"", "config", "types"}))


@pytest.mark.parametrize(
    "line",
    [
        "import time",
        "from os import path",
        "import numpy as np\nx = np.random.default_rng()",
        "def f():\n    import socket",
        "open('x')",
    ],
)
def test_an_impure_module_is_found(line: str) -> None:
    assert len(set(impure("m", f'"""Pure."""\n{line}\n'))) == 1


def test_a_pure_module_must_say_so() -> None:
    assert len(list(impure("m", '"""Decides."""\nx = 1\n'))) == 1
    assert not list(impure("m", '"""Invariant: nothing moves."""\nimport math\n'))


@pytest.mark.parametrize("line", ["import boto3", "from grpc import aio", "import pickle"])
def test_a_library_out_of_place_is_found(line: str) -> None:
    assert len(set(out_of_place("session", line))) == 1
    assert not list(out_of_place("session", "import paddle"))


def test_an_undeclared_import_is_found() -> None:
    project = {"dependencies": ["grpcio>=1.60,<2"], "optional-dependencies": {"cpu": ["numpy"]}}
    known = declared(project, "cpu")
    assert known == {"grpc", "numpy"}
    assert len(list(undeclared("m", "import os\nimport grpc\nimport yaml\n", known))) == 1


def test_what_is_too_long_is_found() -> None:
    long = "def f():\n" + "    x = 1\n" * FUNCTION_LINES_MAX + "y = 1\n" * FILE_LINES_MAX
    found = lengths("p.py", long)
    assert found == {"p.py": 461, "p.py:f": 61}
    assert not lengths("p.py", "def f():\n" + "    x = 1\n" * (FUNCTION_LINES_MAX - 1))
    assert len(list(ratchet(found, {}))) == 2
    assert not list(ratchet(found, found))
    assert len(list(ratchet(found, {"p.py": 482, "p.py:f": 61, "gone.py": 500}))) == 2


@pytest.mark.parametrize(
    "line",
    ['f"{config.password}"', "print(secret)", "log.info('%s', self.password)", 'f"{aws_secret}"'],
)
def test_a_told_secret_is_found(line: str) -> None:
    assert len(list(told_secrets("p.py", line))) == 1


def test_an_open_secret_is_found() -> None:
    class Group(config._Group):
        api_secret: str = ""

    assert len(list(open_secrets({"g": Group}))) == 1


def test_paths_hosts_and_unfinished_places_are_found() -> None:
    assert len(list(matches(MACHINE, "p", "cd /root/x\nhttps://pypi.org/simple\nfine"))) == 2
    assert len(list(matches(UNFINISHED, "p", "# TODO: later\nraise NotImplementedError\n"))) == 2
