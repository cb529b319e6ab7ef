"""Plans of faults: what they say, and one sentence for what they must not say."""

from __future__ import annotations

import math

import pytest

from paddle_ft.chaos.plan import (
    ANSWERS,
    OPTIONS,
    duration_s,
    from_table,
    of_own_job,
    parse,
    random_plan,
)
from paddle_ft.errors import ConfigError


def test_a_plan_is_in_the_order_of_time() -> None:
    plan = parse("kill-node@1min:node=vm-2:back=never, kill-worker@500ms ,stop-worker@45s:for=3s")
    told = [(f.kind, f.at_s) for f in plan.faults]
    assert told == [("kill-worker", 0.5), ("stop-worker", 45.0), ("kill-node", 60.0)]
    assert plan.faults[2].get("node") == "vm-2"
    assert math.isinf(plan.faults[2].seconds("back"))
    assert plan.faults[1].seconds("for") == 3.0
    assert plan.faults[0].get("rank") == ""


def test_what_a_fault_says_is_read_again_the_same() -> None:
    plan = parse("kill-worker@1.5s:rank=1,full-disk@2s:dir=/mnt/x,store-errors@3s:answer=reset")
    again = parse(",".join(str(f) for f in plan.faults))
    assert [str(f) for f in again.faults] == [str(f) for f in plan.faults]


@pytest.mark.parametrize("kind", OPTIONS)
def test_every_kind_has_its_defaults(kind: str) -> None:
    (fault,) = parse(f"{kind}@1s{':dir=/mnt/x' if kind == 'full-disk' else ''}").faults
    for name in OPTIONS[kind]:
        if name in ("for", "back", "latency"):
            assert fault.seconds(name) > 0


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no fault"),
        ("kill-worker", "says no time"),
        ("kill-worker@soon", "'soon' is not a length of time"),
        ("kill-moon@3s", "there is no fault kill-moon"),
        ("kill-worker@3s:for=1s", "has no option for"),
        ("kill-worker@3s:rank", "rank is not an option"),
        ("kill-worker@3s:rank=x", "is not a rank"),
        ("stop-worker@3s:for=x", "'x' is not a length"),
        ("store-errors@3s:answer=404", "answer=404"),
        ("full-disk@3s", "needs dir"),
        ("random:seed=7", "faults="),
        ("random:seed=x,faults=3", "seed=x"),
        ("random:seed=1,faults=3,colour=red", "no option colour"),
        ("random:seed=1,faults=3,kinds=kill-moon", "no fault kill-moon"),
    ],
)
def test_a_mistake_is_one_sentence(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as error:
        parse(text)
    assert "\n" not in str(error.value)


def test_random_plans_come_from_their_seed_alone() -> None:
    one = parse("random:seed=7,faults=20,over=120s")
    assert one == parse("random:seed=7:faults=20:over=120s")
    assert one.faults == random_plan(7, 20, 120.0)
    assert one.seeds == (7,)
    assert one.faults != parse("random:seed=8,faults=20,over=120s").faults
    assert len(one.faults) == 20
    assert all(0 <= f.at_s < 120 for f in one.faults)
    assert {f.kind for f in one.faults} == {"kill-worker", "stop-worker"}
    assert len({f.pick % 2 for f in one.faults}) == 2


def test_random_faults_last_differently_and_have_what_their_kind_needs() -> None:
    kinds = "+".join(OPTIONS)
    plan = parse(f"random:seed=3,faults=200,over=99s,kinds={kinds},dir=/mnt/x")
    assert {f.kind for f in plan.faults} == set(OPTIONS)
    partitions = {f.seconds("for") for f in plan.faults if f.kind == "partition"}
    assert min(partitions) < 2 < max(partitions)
    assert {f.get("dir") for f in plan.faults if f.kind == "full-disk"} == {"/mnt/x"}
    assert {f.get("answer") for f in plan.faults if f.kind == "store-errors"} == set(ANSWERS)


def test_random_faults_and_named_ones_go_together() -> None:
    plan = parse("random:seed=1,faults=2,over=10s,kinds=kill-node+stop-node,kill-worker@99s")
    assert len(plan.faults) == 3
    assert plan.faults[-1].kind == "kill-worker"
    assert {f.kind for f in plan.faults[:2]} <= {"kill-node", "stop-node"}


def test_a_launcher_hurts_its_own_workers_only() -> None:
    assert of_own_job("kill-worker@1s").faults
    with pytest.raises(ConfigError, match="paddle-ft chaos run"):
        of_own_job("kill-worker@1s,kill-node@2s")


def test_a_table_has_nodes_and_etcd_members() -> None:
    plan = from_table(
        {
            "faults": ["kill-node@1s:node=b", "kill-etcd-leader@2s", "partition@3s"],
            "compare": True,
            "node": [{"name": "a"}, {"name": "b", "namespace": "ns1", "arguments": ["--quiet"]}],
            "etcd": [{"endpoint": "127.0.0.1:1", "pid": 12}],
        }
    )
    assert [n.name for n in plan.nodes] == ["a", "b"]
    assert plan.nodes[1].arguments == ("--quiet",)
    assert plan.etcd[0].pid == 12
    assert plan.compare


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"fault": "kill-worker@1s"}, "no key fault"),
        ({"faults": "kill-node@1s:node=c"}, "names node c"),
        ({"faults": "kill-etcd-leader@1s"}, r"needs \[\[etcd\]\]"),
        ({"faults": "partition@1s"}, "network namespace"),
        ({"faults": "kill-worker@1s", "node": [{"nom": "a"}]}, "name, namespace"),
        ({"faults": "kill-worker@1s", "node": [{}]}, "needs name"),
        ({"faults": "kill-worker@1s", "etcd": [{"endpoint": "a:1", "pid": "x"}]}, "process id"),
        ({"faults": "kill-worker@1s", "compare": 1}, "true or false"),
    ],
)
def test_a_mistake_in_a_table_is_one_sentence(table: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        from_table(table)


def test_lengths_of_time() -> None:
    assert [duration_s(t) for t in ("500ms", "1.5s", "2min", "1h")] == [0.5, 1.5, 120.0, 3600.0]
