"""What every store must do, on the model and on the real ones alike (A4, B5)."""

# ruff: noqa: F811 (a test takes the fixture that is imported here)

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from paddle_ft.checkpoint.store import Store, get_range
from paddle_ft.errors import StoreMissing
from tests.contract.store_fixtures import store, store_place  # noqa: F401


def names(store: Store, prefix: str = "") -> list[str]:
    return [info.name for info in store.find(prefix)]


def test_what_was_put_is_got_back(store: Store) -> None:
    assert store.put("a/b/c.json", b"hello") is True
    assert store.get("a/b/c.json") == b"hello"


def test_an_empty_object_is_an_object(store: Store) -> None:
    store.put("empty", b"")
    assert store.get("empty") == b""
    assert store.find("empty")[0].nbytes == 0


def test_views_are_put_one_behind_the_other(store: Store) -> None:
    content = bytearray(range(256))
    view = memoryview(content)
    store.put("v", [view[10:20], view[:0], view[200:], view[5:6]])
    assert store.get("v") == bytes(view[10:20]) + bytes(view[200:]) + bytes(view[5:6])


def test_a_later_put_replaces_the_whole(store: Store) -> None:
    store.put("a", b"a long first content")
    store.put("a", b"short")
    assert store.get("a") == b"short"


def test_a_conditional_put_does_not_replace(store: Store) -> None:
    assert store.put("a", b"first", if_absent=True) is True
    assert store.put("a", b"second", if_absent=True) is False
    assert store.get("a") == b"first"


def test_of_many_conditional_puts_at_once_one_wins(store: Store) -> None:
    contents = [b"%d" % i for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda c: store.put("race", c, if_absent=True), contents))
    assert won.count(True) == 1
    assert store.get("race") == contents[won.index(True)]


def test_what_is_not_there_is_missing(store: Store) -> None:
    store.put("there", b"x")
    with pytest.raises(StoreMissing, match="nowhere"):
        store.get("nowhere")
    with pytest.raises(StoreMissing, match="nowhere"):
        get_range(store, "nowhere", 0, 1)


def test_ranges(store: Store) -> None:
    store.put("r", bytes(range(100)))
    assert get_range(store, "r", 0, 100) == bytes(range(100))
    assert get_range(store, "r", 7, 3) == bytes([7, 8, 9])
    assert get_range(store, "r", 99, 1) == bytes([99])


@pytest.mark.parametrize(("offset", "nbytes"), [(90, 11), (100, 1), (5000, 1)])
def test_a_range_beyond_the_end_is_missing(store: Store, offset: int, nbytes: int) -> None:
    store.put("r", bytes(100))
    with pytest.raises(StoreMissing):
        get_range(store, "r", offset, nbytes)


def test_a_range_fills_several_targets(store: Store) -> None:
    store.put("r", bytes(range(100)))
    first, second, third = bytearray(3), bytearray(0), bytearray(10)
    store.read_into("r", 20, [memoryview(b) for b in (first, second, third)])
    assert bytes(first + third) == bytes(range(20, 33))


def test_find_gives_names_and_sizes_below_a_prefix(store: Store) -> None:
    for name in ("data/x/2", "data/x/1", "data/xy/3", "parts/1", "data.json"):
        store.put(name, name.encode())
    assert names(store) == ["data.json", "data/x/1", "data/x/2", "data/xy/3", "parts/1"]
    assert names(store, "data/") == ["data/x/1", "data/x/2", "data/xy/3"]
    assert names(store, "data/x") == ["data/x/1", "data/x/2", "data/xy/3"]
    assert names(store, "nothing/") == []
    assert [i.nbytes for i in store.find("data/x/")] == [8, 8]


def test_an_empty_store_is_no_error(store: Store) -> None:
    assert store.find("") == []
    assert store.find("data/") == []
    store.delete(["nothing", "no/thing"])


def test_delete(store: Store) -> None:
    for name in ("a/1", "a/2", "b"):
        store.put(name, b"x")
    store.delete(["a/1", "not there", "b"])
    assert names(store) == ["a/2"]
    store.put("a/1", b"again")
    assert store.get("a/1") == b"again"


def test_more_objects_than_one_page_or_one_request_holds(store: Store) -> None:
    wanted = [f"many/{i:04d}" for i in range(1100)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: store.put(name, b""), wanted))
    assert names(store, "many/") == wanted
    store.delete(wanted)
    assert names(store) == []


def test_an_object_of_several_parts(store: Store) -> None:
    content = os.urandom(35 * 2**20 + 1)
    view = memoryview(content)
    store.put("large", [view[:100], view[100 : 17 * 2**20], view[17 * 2**20 :]])
    assert store.find("large")[0].nbytes == len(content)
    assert store.get("large") == content
    assert get_range(store, "large", 16 * 2**20 - 5, 2**20) == content[16 * 2**20 - 5 :][: 2**20]


def test_check_leaves_nothing_behind(store: Store) -> None:
    store.check()
    assert store.find("") == []


def test_sweep_leaves_objects_alone(store: Store) -> None:
    store.put("data/a", b"x")
    store.sweep()
    assert store.get("data/a") == b"x"


def test_readers_never_see_half_an_object(store: Store) -> None:
    contents = {bytes([i]) * 300_000 for i in range(20)}
    store.put("turning", next(iter(contents)))
    with ThreadPoolExecutor(4) as pool:
        puts = [pool.submit(store.put, "turning", c) for c in contents]
        seen = [store.get("turning") for _ in range(40)]
        for put in puts:
            put.result()
    assert set(seen) <= contents
