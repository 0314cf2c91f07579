"""How long a real link takes: what is sent, and that nothing is changed by it."""

from __future__ import annotations

import pytest
from workers.serving import BLOCK_SIZE, MIX, assert_nothing_leaked, assert_tokens_equal_reference, serve_mix

from nanopd.workers.transfer import Arrived, TransferError, time_sends


class FakeCache:
    num_blocks, num_layers, block_size, bytes_per_block = 64, 4, 16, 400
    num_synchronized = 0

    def synchronize(self):
        self.num_synchronized += 1


class FakeLink:
    name = "fake"

    def __init__(self):
        self.sent = []

    def send(self, layers, source_blocks, destination_blocks):
        assert len(source_blocks) == len(set(source_blocks)) == len(destination_blocks)
        self.sent.append((len(layers), len(source_blocks)))
        return Arrived()


def test_sends_grow_fourfold_up_to_all_and_begin_with_one_layer():
    link, cache, now = FakeLink(), FakeCache(), iter(range(10_000))
    sends = time_sends(link, cache, list(range(100, 120)), lambda: next(now) * 0.01)
    sizes = list(dict.fromkeys(link.sent))
    assert sizes == [(1, 1), (4, 1), (4, 4), (4, 16), (4, 20)]
    assert list(dict.fromkeys(num_bytes for num_bytes, _ in sends)) == [100, 400, 1600, 6400, 8000]
    assert all(seconds == pytest.approx(0.01) for _, seconds in sends)  # from call to arrival
    assert len(sends) == len(link.sent) == cache.num_synchronized
    assert all(2 <= link.sent.count(size) <= 8 for size in sizes)


def test_blocks_go_whole_however_many_tokens_they_hold():
    link, cache = FakeLink(), FakeCache()
    cache.block_size = 10_000  # of which a worker that computes would send each layer by itself
    time_sends(link, cache, list(range(4)))
    assert list(dict.fromkeys(link.sent)) == [(1, 1), (4, 1), (4, 4)]


def test_no_more_is_sent_than_the_source_has():
    link, cache = FakeLink(), FakeCache()
    cache.num_blocks = 3
    time_sends(link, cache, list(range(10)))
    assert max(count for _, count in link.sent) == 3


def test_timing_leaves_what_others_cached_as_it_is(reference):
    """Its blocks come from the same cache as everybody's."""
    with reference.cluster() as cluster:
        outputs = serve_mix(cluster)
        for _ in range(3):
            times = cluster.time_link("P0", "D0", 20)
            assert times.transport == "local" and max(size for size, _ in times.sends) == 5 * (
                cluster.spec.kv_bytes_per_token(4) * BLOCK_SIZE)
            assert_tokens_equal_reference(outputs, MIX, reference)
            outputs = serve_mix(cluster)
        assert_tokens_equal_reference(outputs, MIX, reference)
        assert_nothing_leaked(cluster)


def test_what_can_t_be_timed_is_said(reference, monkeypatch):
    from nanopd.workers.transfer import LocalTransport

    def broken(*args):
        raise TransferError("the wire is cut")

    with reference.cluster() as cluster:
        monkeypatch.setattr(LocalTransport, "send", broken)
        with pytest.raises(RuntimeError, match="from P0 to D0 can't be timed: the wire is cut"):
            cluster.time_link("P0", "D0", 8)
        monkeypatch.undo()
        with pytest.raises(RuntimeError, match="D0 has no room"):
            cluster.time_link("P0", "D0", 1000)
        assert cluster.time_link("P0", "D0", 8).sends
        assert_nothing_leaked(cluster)


def test_roles_are_not_changed_under_open_requests(reference):
    with reference.cluster() as cluster:
        stream = cluster.submit({"prompt_token_ids": [1, 2, 3]})
        with pytest.raises(RuntimeError, match="requests are open"), cluster.cast({"D0": "C"}):
            pass
        stream.close()
        with cluster.cast({"D0": "C"}):
            other = cluster.submit({"prompt_token_ids": [1, 2, 3]}, mode="collocated")
            other.result()
        assert cluster.timeline(other.request_id).path == ["D0"]
