"""What shall go wrong, and when: plans as a text, as a TOML file, or at random from a seed.

    kill-worker@30s, stop-worker@45s:rank=1:for=2s, kill-node@60s:node=vm-2
    random:seed=7:faults=20:over=120s:kinds=kill-worker+stop-worker

Pure: the same text gives the same plan, random ones too. A fault that names no victim has a
``pick``, a number that chooses among those that are there when it strikes.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from paddle_ft.errors import ConfigError

WORKER_KINDS = ("kill-worker", "stop-worker")
"""What a launcher may do to its own job."""
OPTIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "kill-worker": ("rank", "node"),
        "stop-worker": ("rank", "node", "for"),
        "kill-node": ("node", "back"),
        "stop-node": ("node", "for"),
        "kill-etcd-leader": ("back",),
        "stop-etcd-leader": ("for",),
        "kill-etcd": ("member", "back"),
        "partition": ("node", "for"),
        "slow-network": ("node", "for", "rate", "latency"),
        "full-disk": ("dir", "for"),
        "store-errors": ("for", "answer"),
    }
)
"""What each kind of fault can be told. ``for``: how long; ``back``: started again after."""
DEFAULTS: Mapping[str, str] = MappingProxyType(
    {"for": "2s", "back": "1s", "rate": "1mbit", "latency": "100ms", "answer": "503"}
)
ANSWERS = ("503", "reset", "stall")
FAULTS_MAX = 100_000
_LENGTHS = ("500ms", "1s", "2s", "4s", "8s")
"""Of random faults: below and beyond what a lease lasts."""
_UNITS_S = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|min|h)")


@dataclass(frozen=True, slots=True)
class Fault:
    kind: str
    at_s: float
    """After the first step that all ranks have made."""
    options: tuple[tuple[str, str], ...] = ()
    pick: int = 0

    def get(self, name: str) -> str:
        """An option, or its default; "" if it has none."""
        return dict(self.options).get(name, DEFAULTS.get(name, ""))

    def seconds(self, name: str) -> float:
        """An option that is a length of time; infinite for ``never``."""
        value = self.get(name)
        return math.inf if value == "never" else duration_s(value)

    def __str__(self) -> str:
        told = "".join(f":{name}={value}" for name, value in self.options)
        return f"{self.kind}@{self.at_s:g}s{told}"


@dataclass(frozen=True, slots=True)
class Node:
    """A launcher that the runner starts, in network namespace ``namespace`` if it has one."""

    name: str
    namespace: str = ""
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EtcdMember:
    """A server that the runner may hurt: ``pid``, or the file that holds it."""

    endpoint: str
    pid: int = 0
    pid_file: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    faults: tuple[Fault, ...]
    """In the order of time."""
    nodes: tuple[Node, ...] = (Node(""),)
    """One without a name: the launcher's own choice of a name."""
    etcd: tuple[EtcdMember, ...] = ()
    compare: bool = False
    """The same command runs undisturbed first, and the weights are compared."""
    seeds: tuple[int, ...] = field(default=())


def of_own_job(text: str) -> Plan:
    """A plan that a launcher can do to its own job; raises ConfigError."""
    plan = parse(text)
    for fault in plan.faults:
        if fault.kind not in WORKER_KINDS:
            raise ConfigError(
                f"--chaos does {' and '.join(WORKER_KINDS)} alone, not {fault.kind}: write it "
                f"into a plan and start that with paddle-ft chaos run"
            )
    return plan


def duration_s(text: str) -> float:
    """``30s``, ``500ms``, ``1.5min``; raises ConfigError."""
    found = _DURATION.fullmatch(text.strip())
    if found is None:
        raise ConfigError(f"{text!r} is not a length of time: write 30s, 500ms or 2min")
    return float(found[1]) * _UNITS_S[found[2]]


def number(*parts: object) -> int:
    """A number that is a function of ``parts`` and of nothing else; 64 bits."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


# ---------------------------------------------------------------- as a text


def parse(text: str) -> Plan:
    """The plan that ``text`` describes; raises ConfigError in one sentence."""
    faults: list[Fault] = []
    seeds: list[int] = []
    for index, part in enumerate(filter(None, (p.strip() for p in _parts(text)))):
        if part.startswith("random:"):
            seed, more = _random(part, _options(part.removeprefix("random:"), part))
            seeds.append(seed)
            faults += more
        else:
            faults.append(_fault(part, number("pick", index, part)))
    if not faults:
        raise ConfigError("the plan has no fault: write one such as kill-worker@30s")
    return Plan(tuple(sorted(faults, key=lambda f: f.at_s)), seeds=tuple(seeds))


def _parts(text: str) -> Iterator[str]:
    """Commas part faults; those within ``random:`` part its options."""
    gathered = ""
    for piece in text.split(","):
        inner = gathered.startswith("random:") and "@" not in piece and "=" in piece
        if inner and not piece.strip().startswith("random:"):
            gathered += f":{piece.strip()}"
        else:
            yield gathered
            gathered = piece.strip()
    yield gathered


def _options(text: str, whole: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in filter(None, text.split(":")):
        name, equals, value = pair.partition("=")
        if not equals or not value:
            raise ConfigError(f"{whole}: {pair} is not an option: write name=value")
        found[name] = value
    return found


def _fault(text: str, pick: int) -> Fault:
    kind, at, rest = text.partition("@")
    if not at:
        raise ConfigError(f"{text} says no time: write {kind}@30s")
    when, _, told = rest.partition(":")
    return make(kind.strip(), when, _options(told, text), pick)


def make(kind: str, at: str, options: Mapping[str, str], pick: int) -> Fault:
    """A fault whose kind and options are allowed; raises ConfigError."""
    if kind not in OPTIONS:
        raise ConfigError(f"there is no fault {kind}: there are {', '.join(OPTIONS)}")
    for name in options:
        if name not in OPTIONS[kind]:
            allowed = ", ".join(OPTIONS[kind])
            raise ConfigError(f"{kind} has no option {name}: it has {allowed}")
    fault = Fault(kind, duration_s(at), tuple(sorted(options.items())), pick)
    for name in ("for", "back"):
        if name in OPTIONS[kind]:
            fault.seconds(name)
    if "latency" in OPTIONS[kind]:
        fault.seconds("latency")
    rank = options.get("rank", "0")
    if not rank.isdigit():
        raise ConfigError(f"{kind}: rank={rank} is not a rank: write a whole number from 0")
    if fault.get("answer") not in ANSWERS:
        raise ConfigError(f"{kind}: answer={fault.get('answer')} is not {' or '.join(ANSWERS)}")
    if kind == "full-disk" and "dir" not in options:
        raise ConfigError("full-disk needs dir=DIRECTORY, on a file system of its own")
    return fault


# ---------------------------------------------------------------- at random


def random_plan(
    seed: int, faults: int, over_s: float, kinds: Sequence[str] = WORKER_KINDS, directory: str = ""
) -> tuple[Fault, ...]:
    """``faults`` of ``kinds``, each at a random time within ``over_s``, in the order of time.

    How long they last and what the store answers is random too; ``directory`` is for full-disk.
    """
    made = []
    for index in range(faults):
        kind = kinds[number(seed, index, "kind") % len(kinds)]
        at_s = number(seed, index, "at") / 2**64 * over_s
        choices = {"for": _LENGTHS, "answer": ANSWERS, "dir": (directory,) if directory else ()}
        options = {
            name: values[number(seed, index, name) % len(values)]
            for name, values in choices.items()
            if values and name in OPTIONS.get(kind, ())
        }
        made.append(make(kind, f"{at_s:.3f}s", options, number(seed, index, "pick")))
    return tuple(sorted(made, key=lambda f: f.at_s))


def _random(whole: str, options: Mapping[str, str]) -> tuple[int, tuple[Fault, ...]]:
    unknown = set(options) - {"seed", "faults", "over", "kinds", "dir"}
    if unknown:
        raise ConfigError(
            f"{whole}: random has no option {min(unknown)}: it has seed, faults, over, kinds, dir"
        )
    numbers = {
        name: options.get(name, default) for name, default in (("seed", "0"), ("faults", ""))
    }
    for name, value in numbers.items():
        if not value.isdigit() or (name == "faults" and not 0 < int(value) <= FAULTS_MAX):
            raise ConfigError(f"{whole}: {name}={value} must be a whole number, as in {name}=7")
    kinds = tuple(options.get("kinds", "+".join(WORKER_KINDS)).split("+"))
    over_s = duration_s(options.get("over", "60s"))
    return int(numbers["seed"]), random_plan(
        int(numbers["seed"]), int(numbers["faults"]), over_s, kinds, options.get("dir", "")
    )


# ---------------------------------------------------------------- as a file

_TOP = ("faults", "compare", "node", "etcd")


def from_table(table: Mapping[str, object]) -> Plan:
    """The plan of a TOML file that was read; raises ConfigError.

    ``faults`` is a text as above, or a list of such texts; ``[[node]]`` has name, namespace and
    arguments; ``[[etcd]]`` has endpoint and pid or pid_file.
    """
    for key in table:
        if key not in _TOP:
            raise ConfigError(f"the plan has no key {key}: it has {', '.join(_TOP)}")
    faults = table.get("faults", "")
    listed = [str(f) for f in faults] if isinstance(faults, list) else [str(faults)]
    compare = table.get("compare", False)
    if not isinstance(compare, bool):
        raise ConfigError("compare in the plan must be true or false")
    nodes = tuple(
        Node(
            _text(entry, "node", "name"),
            str(entry.get("namespace", "")),
            tuple(str(a) for a in _list(entry.get("arguments", []))),
        )
        for entry in _tables(table, "node", ("name", "namespace", "arguments"))
    )
    etcd = tuple(
        EtcdMember(
            _text(entry, "etcd", "endpoint"),
            _pid(entry.get("pid", 0)),
            str(entry.get("pid_file", "")),
        )
        for entry in _tables(table, "etcd", ("endpoint", "pid", "pid_file"))
    )
    plan = replace(parse(",".join(listed)), etcd=etcd, compare=compare)
    return _checked(replace(plan, nodes=nodes) if nodes else plan)


def _checked(plan: Plan) -> Plan:
    names = [node.name for node in plan.nodes]
    for fault in plan.faults:
        node = fault.get("node")
        if node and node not in names:
            raise ConfigError(f"{fault} names node {node}: the plan has {', '.join(names)}")
        if "etcd" in fault.kind and not plan.etcd:
            raise ConfigError(f"{fault} needs [[etcd]] in the plan, with endpoint and pid")
        if fault.kind in ("partition", "slow-network") and not any(
            n.namespace for n in plan.nodes if node in ("", n.name)
        ):
            raise ConfigError(f"{fault} needs a [[node]] with a network namespace in the plan")
    return plan


def _tables(
    table: Mapping[str, object], key: str, known: tuple[str, ...]
) -> Iterator[Mapping[str, object]]:
    for entry in _list(table.get(key, [])):
        if not isinstance(entry, dict) or set(entry) - set(known):
            raise ConfigError(f"[[{key}]] in the plan has {', '.join(known)} and nothing else")
        yield entry


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise ConfigError(f"{value!r} in the plan must be a list")
    return value


def _text(entry: Mapping[str, object], table: str, key: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value:
        raise ConfigError(f"[[{table}]] in the plan needs {key}")
    return value


def _pid(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ConfigError(f"pid = {value!r} in the plan must be a process id")
    return value
