"""Which checkpoint is complete where: the pure part of commits that are durable locally first."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddle_ft.checkpoint import backlog, layout
from paddle_ft.types import CommitRef, Head

sequences = st.integers(1, 30)


def ref(sequence: int) -> CommitRef:
    return CommitRef(sequence, 10 * sequence, 1, layout.manifest_name(sequence, 1, "o", "0f"), "")


def names_of(sequence: int, packs: int = 2) -> list[str]:
    prefix = layout.write_prefix("o", sequence, 1, "0f")
    manifest = ref(sequence).manifest
    return [
        *(f"data/{prefix}n.{i}" for i in range(packs)),
        f"parts/{prefix}n.json",
        manifest,
        layout.signature_name(manifest),
        layout.commit_name(manifest),
    ]


@given(st.lists(sequences, unique=True), st.randoms())
def test_everything_has_its_turn_after_what_it_refers_to(found: list[int], random: object) -> None:
    names = [name for s in found for name in names_of(s)]
    random.shuffle(names)  # type: ignore[attr-defined]
    turns = backlog.turns([*names, "owner", "store.json", ".lock"])
    assert sorted(n for turn in turns for n in turn) == sorted(names)
    at = {name: i for i, turn in enumerate(turns) for name in turn}
    for sequence in found:
        *before, marker = names_of(sequence)
        assert all(at[name] < at[marker] for name in before)
        earlier = [layout.commit_name(ref(s).manifest) for s in found if s < sequence]
        assert all(at[name] < at[marker] for name in earlier)
    markers = [turn for turn in turns if any(n.startswith(layout.COMMITS) for n in turn)]
    assert all(len(turn) == 1 for turn in markers)


def test_what_is_short_or_absent_is_missing() -> None:
    assert backlog.missing({"a": 3, "b": 3, "c": 3}, {"a": 3, "b": 2, "d": 1}) == ("b", "c")
    assert backlog.missing({"a": 3}, {"a": 4}) == ()


@pytest.mark.parametrize("shared", [False, True])
def test_pins_and_notes_of_owners_never_wait(shared: bool) -> None:
    assert not any(backlog.waits(kind, shared) for kind in ("pin", "owner", "over"))
    assert all(backlog.waits(kind, shared) for kind in ("data", "commit"))
    assert backlog.waits("manifest", shared) is not shared


@given(
    st.lists(sequences, unique=True, min_size=1),
    st.integers(0, 31),
    st.data(),
)
def test_the_newest_settled_checkpoint_stays(
    kept: list[int], settled: int, data: st.DataObject
) -> None:
    newest, *older = sorted(kept, reverse=True)
    head = Head(ref(newest), tuple(ref(s) for s in older))
    base = ref(data.draw(st.sampled_from(kept)))
    chain = [ref(s) for s in (newest, *older) if s <= base.sequence]
    count = data.draw(st.integers(1, len(chain)))
    found = backlog.protected(head, base, chain[:count], settled)
    assert list(found) == sorted(set(found), key=lambda c: -c.sequence)
    assert set(chain[:count]) <= set(found) <= set(chain)
    safe = [c for c in chain if c.sequence <= settled]
    assert safe[0] in found if safe else set(found) == set(chain)


def test_the_beginning_has_no_lineage() -> None:
    assert backlog.protected(None, None, (), 3) == ()


def test_a_lineage_fits_into_etcd() -> None:
    head = Head(ref(5000), tuple(ref(s) for s in range(4999, 0, -1)))
    found = backlog.protected(head, head.newest, (head.newest,), 0)
    assert len(found) == backlog.LINEAGE_MAX
    assert (found[0], found[-1]) == (ref(5000), ref(1))
