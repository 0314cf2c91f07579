"""Both pipelines on a real model: the tokens, the bytes that travel, and what is left when something goes wrong."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from workers.serving import (
    BLOCK_SIZE,
    MIX,
    NUM_LAYERS,
    Reference,
    assert_nothing_leaked,
    assert_tokens_equal_reference,
    greedy,
    ids,
    prompt,
    sampled,
    serve_mix,
    settle,
)

from nanopd.block_manager.cache import KVCache
from nanopd.cluster import Cluster
from nanopd.config import ConfigError
from nanopd.core import BeamSearchParams, FinishReason, InvalidRequest, SamplingParams
from nanopd.engine.limits import Limits
from nanopd.engine.runner import ModelRunner
from nanopd.workers.transfer import LocalTransport


@pytest.fixture
def cluster(reference):
    """A disaggregated cluster, P0 and D0. What a test leaves in it shows at the end."""
    with reference.cluster() as cluster:
        yield cluster
        assert_nothing_leaked(cluster)


@pytest.fixture
def sends(monkeypatch):
    """(layer, source blocks, destination blocks) of all sends, as they happen."""
    log, send = [], LocalTransport.send

    def spy(self, layers, source_blocks, destination_blocks):
        log.extend((layer, list(source_blocks), list(destination_blocks)) for layer in layers)
        return send(self, layers, source_blocks, destination_blocks)

    monkeypatch.setattr(LocalTransport, "send", spy)
    return log


def submit(cluster, token_ids, sampling):
    return cluster.submit(*ids(token_ids), sampling)


def step_until(cluster, condition, max_steps=200):
    for _ in range(max_steps):
        if condition():
            return
        cluster.step()
    raise AssertionError(f"it did not come to that in {max_steps} steps")


def stage(cluster, stream):
    return cluster._central._entries[stream.request_id].stage.value


# ----------------------------------------------------------------------------------------------- the tokens


@pytest.mark.parametrize("options", [
    dict(mode="collocated"),
    dict(mode="collocated", topology="C:cpu C:cpu", prefill_chunk_size=5),
    dict(),
    dict(topology="P:cpu P:cpu D:cpu D:cpu", prefill_chunk_size=7),
    dict(topology="D:cpu P:cpu", enable_prefix_caching=False, prefill_chunk_size=1),
    dict(topology="P:cpu C:cpu D:cpu", num_gpu_blocks_override=16, max_num_seqs=3),
], ids=str)
def test_both_pipelines_give_the_references_tokens(reference, options):
    with reference.cluster(**options) as cluster:
        assert_tokens_equal_reference(serve_mix(cluster), MIX, reference)
        assert_tokens_equal_reference(serve_mix(cluster), MIX, reference)  # now from a warm prefix cache
        assert_nothing_leaked(cluster)


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_beams_are_the_same_in_both_pipelines_and_on_one_engine(tmp_path, ignore_eos):
    reference = Reference(tmp_path, eos=3)
    params = BeamSearchParams(3, 7, length_penalty=0.7, ignore_eos=ignore_eos)
    prompts = ids(prompt(9), prompt(14, 2), prompt(3, 3))
    expected = answers(reference.llm().beam_search(prompts, params, use_tqdm=False))
    for mode in ("collocated", "disaggregated"):
        with reference.cluster(mode, num_gpu_blocks_override=24) as cluster:
            assert answers(cluster.beam_search(prompts, params, use_tqdm=False)) == expected
            assert_nothing_leaked(cluster)


def answers(outputs):
    return [[(answer.token_ids, answer.finish_reason, round(answer.cumulative_logprob, 3)) for answer in output.outputs]
            for output in outputs]


def test_a_beam_search_that_ends_on_p_never_reaches_d(reference, cluster):
    prompts, params = ids(prompt(9)), BeamSearchParams(2, 1)
    expected = answers(reference.llm().beam_search(prompts, params, use_tqdm=False))
    assert answers(cluster.beam_search(prompts, params, use_tqdm=False)) == expected
    assert str(cluster.timeline("0")) == "P0"


def test_max_tokens_of_one_ends_on_p(reference, cluster):
    asked = [(prompt(9), greedy(1)), (prompt(9), sampled(3, max_tokens=1))]
    assert_tokens_equal_reference(serve_mix(cluster, asked), asked, reference)
    assert str(cluster.timeline("0")) == str(cluster.timeline("1")) == "P0"


def test_an_eos_as_first_token_ends_on_p_and_the_lease_goes_back(reference, tmp_path):
    first = reference.answer(prompt(9), greedy(1))[0][0]
    with_eos = Reference(tmp_path, eos=first)
    with with_eos.cluster() as cluster:
        stream = submit(cluster, prompt(9), greedy())
        step_until(cluster, lambda: stream.finished)
        assert (stream.result().outputs[0].token_ids, stream.result().outputs[0].finish_reason) == ([first], FinishReason.STOP)
        assert str(cluster.timeline(stream.request_id)) == "P0"
        assert_nothing_leaked(cluster)


def test_of_several_answers_some_end_on_p_and_the_others_go_on(reference):
    asked = [(prompt(10), sampled(3))]
    firsts = [reference.answer(*asked[0], index)[0][0] for index in range(3)]
    ends = sampled(3, stop_token_ids=(firsts[1],))
    asked = [(prompt(10), ends)]
    with reference.cluster() as cluster:
        assert_tokens_equal_reference(serve_mix(cluster, asked), asked, reference)
        assert str(cluster.timeline("0")) == "P0 -> D0"
        assert_nothing_leaked(cluster)


def test_stepping_is_deterministic(reference):
    def run():
        with reference.cluster(topology="P:cpu P:cpu D:cpu D:cpu", num_gpu_blocks_override=20, prefill_chunk_size=6) as cluster:
            streams = [submit(cluster, *asked) for asked in MIX]
            steps = []
            while cluster.has_work:
                if len(steps) == 4:
                    streams[3].close()
                events = cluster.step()
                steps.append([(e.request_id, e.index, e.token_id, e.logprob, e.finish_reason) for e in events])
            return steps

    assert run() == run()


# ------------------------------------------------------------------------------------------------ the bytes


def poison(cluster):
    for worker in cluster.workers.values():
        worker.cache.poison(range(worker.cache.num_blocks))


@pytest.mark.parametrize("chunk", [None, 5])
def test_d_holds_the_very_bytes_of_p_and_no_others(reference, monkeypatch, chunk):
    with reference.cluster(prefill_chunk_size=chunk) as cluster:
        p, d = cluster.workers["P0"], cluster.workers["D0"]
        poison(cluster)
        compared = []
        release = p.engine.scheduler.release_handed_off

        def compare_then_release(request_id):
            """P still has its blocks, and D does not run yet."""
            sequence = p.engine.scheduler.find(request_id).sequences[0]
            (lease, _), = d._leases.values()
            table = p.manager.block_table(sequence)
            theirs, ours = (slots(worker, blocks, sequence.prompt_len) for worker, blocks in ((p, table), (d, lease.block_ids)))
            assert not theirs.isnan().any() and torch.equal(theirs, ours)
            others = [block for block in range(d.cache.num_blocks) if block not in lease.block_ids]
            assert d.cache.data[:, :, others].isnan().all()
            compared.append(request_id)
            release(request_id)

        monkeypatch.setattr(p.engine.scheduler, "release_handed_off", compare_then_release)
        asked = [(prompt(26), greedy(3))]
        assert_tokens_equal_reference(serve_mix(cluster, asked), asked, reference)
        assert compared == ["0"]
        assert_nothing_leaked(cluster)


def slots(worker, block_ids, num_tokens):
    """Keys and values of the first tokens, all layers: [layers, 2, tokens, heads, head_dim]."""
    return worker.cache.data[:, :, block_ids].flatten(2, 3)[:, :, :num_tokens]


@pytest.mark.parametrize("length", [3, 23])
def test_every_chunk_sends_every_layer_once(reference, cluster, sends, length):
    """23 tokens fit into one chunk: as many sends as for 3."""
    stream = submit(cluster, prompt(length), greedy(2))
    step_until(cluster, lambda: stream.finished)
    assert [layer for layer, _, _ in sends] == list(range(NUM_LAYERS))
    assert {len(source) for _, source, _ in sends} == {-(-length // BLOCK_SIZE)}


def test_a_prompt_of_several_chunks_is_sent_as_it_is_computed(reference, sends):
    """6 tokens a chunk: tokens 0-5, 6-11, 12-13. The second block is sent half full, then again full."""
    with reference.cluster(prefill_chunk_size=6) as cluster:
        stream = submit(cluster, prompt(14), greedy(2))
        counts = []
        while not stream.finished:
            before = len(sends)
            cluster.step()
            counts.append(len(sends) - before)
        assert [count for count in counts if count] == [NUM_LAYERS] * 3
        assert [layer for layer, _, _ in sends] == list(range(NUM_LAYERS)) * 3
        table = sends[0][2] + sends[2 * NUM_LAYERS - 1][2][1:] + sends[-1][2]
        assert [destination for _, _, destination in sends[::NUM_LAYERS]] == [table[0:2], table[1:3], table[3:4]]


def test_a_layer_is_sent_before_the_next_one_is_computed(reference, cluster, sends, monkeypatch):
    monkeypatch.setattr("nanopd.workers.transfer.SEND_TOKENS", 9)
    decoder = cluster.workers["P0"].engine.runner.model
    computed = []
    for index, layer in enumerate(decoder.layers):
        attend = layer.attend

        def spy(*args, index=index, attend=attend):
            computed.append((index, len(sends)))
            return attend(*args)

        monkeypatch.setattr(layer, "attend", spy)
    stream = submit(cluster, prompt(9), greedy(1))
    step_until(cluster, lambda: stream.finished)
    assert computed == [(0, 0), (1, 1), (2, 2)]


@pytest.mark.parametrize(("send_tokens", "expected"), [
    (9, [range(1), range(1, 2), range(2, 3)]), (10, [range(2), range(2, 3)]), (27, [range(3)]), (99, [range(3)])])
def test_layers_of_a_short_chunk_are_sent_together(reference, cluster, monkeypatch, send_tokens, expected):
    monkeypatch.setattr("nanopd.workers.transfer.SEND_TOKENS", send_tokens)
    layers_sent = []
    transport_send = LocalTransport.send
    monkeypatch.setattr(LocalTransport, "send",
                        lambda self, layers, *blocks: layers_sent.append(layers) or transport_send(self, layers, *blocks))
    asked = [(prompt(9), greedy(3))]
    assert_tokens_equal_reference(serve_mix(cluster, asked), asked, reference)
    assert layers_sent == expected


def test_a_send_makes_as_many_launches_for_one_block_as_for_many(reference, cluster):
    class CountOps(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += 1
            return func(*args, **(kwargs or {}))

    transport = LocalTransport(cluster.workers["P0"].cache, cluster.workers["D0"].cache)
    counts = []
    for number in (1, 40):
        with CountOps() as ops:
            transport.send(range(1), list(range(number)), list(range(number)))
        counts.append(ops.count)
    assert counts[0] == counts[1] > 0


def test_what_d_has_cached_is_not_sent(reference, cluster, sends):
    shared = prompt(17)
    serve_mix(cluster, [(shared, greedy(2))])
    assert {len(source) for _, source, _ in sends} == {5}
    for token_ids, num_sent in ((shared + prompt(6, 2), 2), (shared, 1), (prompt(5, 3), 2)):
        sends.clear()
        asked = [(token_ids, greedy(2))]
        assert_tokens_equal_reference(serve_mix(cluster, asked), asked, reference)
        assert [len(source) for _, source, _ in sends] == [num_sent] * NUM_LAYERS


def test_what_p_has_cached_is_sent_all_the_same(reference, cluster, sends):
    """D's cache was lost: P computes one chunk of what is new and sends everything."""
    asked = [(prompt(17), greedy(2))]
    serve_mix(cluster, asked)
    cluster.workers["D0"].manager.reset_prefix_cache()
    cluster.workers["D0"].cache.poison(range(cluster.workers["D0"].cache.num_blocks))
    sends.clear()
    assert_tokens_equal_reference(serve_mix(cluster, asked), asked, reference)
    assert [len(source) for _, source, _ in sends] == [5] * NUM_LAYERS
    assert cluster.workers["P0"].engine.history[-1].rows[0].num_cached == 16


# ------------------------------------------------------------------------------------------- backpressure


@pytest.mark.parametrize("options", [dict(num_gpu_blocks_override=9), dict(max_num_seqs=2)], ids=["blocks", "seats"])
def test_requests_wait_while_d_is_full_and_all_finish(reference, options):
    asked = [(prompt(12, start), greedy(8)) for start in range(6)]
    with reference.cluster(**options) as cluster:
        assert_tokens_equal_reference(serve_mix(cluster, asked), asked, reference)
        timelines = [cluster.timeline(str(number)) for number in range(6)]
        assert timelines[0].num_refusals == 0
        refused = sum(timeline.num_refusals for timeline in timelines) > 0
        assert refused == ("num_gpu_blocks_override" in options)  # that seats are taken is known without asking
        granted = [dict(timeline.marks)["blocks granted by D0"] for timeline in timelines]
        assert granted == sorted(granted)
        assert_nothing_leaked(cluster)


def test_seats_are_never_passed_on_any_worker(reference):
    asked = [(prompt(5 + start, start), sampled(2)) for start in range(5)]
    with reference.cluster(max_num_seqs=4) as cluster:
        streams = [submit(cluster, *each) for each in asked]
        while cluster.has_work:
            cluster.step()
            for worker in cluster.workers.values():
                assert worker.engine.scheduler.num_seats_taken <= 4
                assert not worker.engine.history or len(worker.engine.history[-1].rows) <= 4
        assert_tokens_equal_reference([stream.result() for stream in streams], asked, reference)
        assert_nothing_leaked(cluster)


def test_a_refused_request_holds_back_those_behind_it(reference):
    """The long prompt waits for room. The short one behind it would fit, and waits too."""
    with reference.cluster(num_gpu_blocks_override=12) as cluster:
        first, long, short = (submit(cluster, prompt(length, length), greedy(6)) for length in (18, 34, 3))
        step_until(cluster, lambda: cluster.timeline(long.request_id).num_refusals > 0)
        assert cluster.timeline(short.request_id).path in ([], ["P0"])  # sent out before the first refusal, or not at all
        later = submit(cluster, prompt(2), greedy(2))
        while not cluster.timeline(long.request_id).path:
            assert not cluster.timeline(later.request_id).path
            cluster.step()
        settle(cluster)
        assert all(stream.finished for stream in (first, long, short, later))
        assert_nothing_leaked(cluster)


def test_d_preempts_and_recomputes(reference):
    asked = [(prompt(7, start), greedy(20)) for start in range(3)] + [(prompt(9), sampled(3, max_tokens=12))]
    with reference.cluster(num_gpu_blocks_override=15) as cluster:
        assert_tokens_equal_reference(serve_mix(cluster, asked), asked, reference)
        scheduler = cluster.workers["D0"].engine.scheduler
        assert scheduler.num_preemptions > 0
        assert any(row.kind == "prefill" for record in cluster.workers["D0"].engine.history for row in record.rows)
        assert_nothing_leaked(cluster)


# --------------------------------------------------------------------------------------------- cancelling


def test_cancel_at_every_phase_leaves_nothing(reference):
    """One victim at a time, between two that go on."""
    for phase in ("queued", "refused", "first chunk", "between prefill and decode", "decode"):
        with reference.cluster(prefill_chunk_size=6, num_gpu_blocks_override=16) as cluster:
            before = submit(cluster, prompt(9), greedy(12))
            if phase == "refused":
                hog = submit(cluster, prompt(30, 9), greedy(2))
            victim = submit(cluster, prompt(26, 2), greedy(12))
            after = submit(cluster, prompt(5, 3), greedy(12))
            bring_to(cluster, victim, phase)
            victim.close()
            assert victim.finished and victim.result().outputs[0].finish_reason is FinishReason.ABORT
            victim.close()  # no effect
            others = [(prompt(9), greedy(12)), (prompt(5, 3), greedy(12))]
            assert_tokens_equal_reference([before.result(), after.result()], others, reference)
            if phase == "refused":
                hog.result()
            assert_nothing_leaked(cluster)


def bring_to(cluster, stream, phase):
    p, d = cluster.workers["P0"], cluster.workers["D0"]
    if phase == "queued":
        return
    if phase == "refused":
        step_until(cluster, lambda: cluster.timeline(stream.request_id).num_refusals)
        assert stage(cluster, stream) == "queued"
    elif phase == "first chunk":
        step_until(cluster, lambda: stage(cluster, stream) == "prefill")
        step_until(cluster, lambda: p.engine.scheduler.find(stream.request_id))
        assert 0 < p.transfers[stream.request_id].num_sent < 26
    else:
        step_until(cluster, lambda: stage(cluster, stream) == "decode")
        assert p.engine.scheduler.find(stream.request_id) is None and d.engine.scheduler.find(stream.request_id) is None
        if phase == "decode":
            cluster.step()
            assert d.engine.scheduler.find(stream.request_id).live[0].num_output > 1


def test_one_of_several_answers_is_cancelled_in_mid_decode(reference, cluster):
    asked = (prompt(10), sampled(3, max_tokens=10))
    stream = submit(cluster, *asked)
    step_until(cluster, lambda: stage(cluster, stream) == "decode")
    cluster.step()
    events, _ = cluster._outputs.process(cluster._central.cancel(stream.request_id, 1))  # as a stop string would
    assert [(event.index, event.finish_reason) for event in events] == [(1, FinishReason.ABORT)]
    cluster.step()
    assert [sequence.index for sequence in cluster.workers["D0"].engine.scheduler.find(stream.request_id).live] == [0, 2]
    got = [(answer.token_ids, answer.finish_reason) for answer in stream.result().outputs]
    whole = [reference.answer(*asked, index) for index in range(3)]
    assert got == [whole[0], (whole[1][0][:2], FinishReason.ABORT), whole[2]]


def test_leaving_a_stream_early_cancels_it(reference, cluster):
    for event in cluster.stream({"prompt_token_ids": list(prompt(9))}, greedy(30)):
        assert event.token_id is not None
        break
    assert not cluster.has_work


# ------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("worker_id", ["P0", "D0"])
def test_a_step_that_breaks_ends_its_own_requests_only(reference, monkeypatch, worker_id):
    """On P the victim breaks while the other decodes on D; on D the victim decodes while the other is on P."""
    with reference.cluster(prefill_chunk_size=6) as cluster:
        other = victim = None
        if worker_id == "P0":
            other = submit(cluster, prompt(9), greedy(12))
            step_until(cluster, lambda: stage(cluster, other) == "decode")
            victim = submit(cluster, prompt(26, 2), greedy(12))
            step_until(cluster, lambda: stage(cluster, victim) == "prefill")
        else:
            victim = submit(cluster, prompt(9), greedy(12))
            step_until(cluster, lambda: stage(cluster, victim) == "decode")
            cluster.step()
            other = submit(cluster, prompt(26, 2), greedy(12))
            step_until(cluster, lambda: stage(cluster, other) == "prefill")
        broken, execute = cluster.workers[worker_id].engine.runner, ModelRunner.execute

        def break_once(self, plan, on_layer=None):
            if self is broken:
                monkeypatch.setattr(ModelRunner, "execute", execute)
                raise RuntimeError("out of luck")
            return execute(self, plan, on_layer)

        monkeypatch.setattr(ModelRunner, "execute", break_once)
        assert victim.result().error == "RuntimeError: out of luck"
        assert victim.result().outputs[0].finish_reason is FinishReason.ERROR
        asked = (prompt(9), greedy(12)) if worker_id == "P0" else (prompt(26, 2), greedy(12))
        assert_tokens_equal_reference([other.result()], [asked], reference)
        assert_nothing_leaked(cluster)
        again = [(prompt(26, 2), greedy(12)), (prompt(9), greedy(12))]  # from whatever the prefix caches hold now
        assert_tokens_equal_reference(serve_mix(cluster, again), again, reference)
        assert_nothing_leaked(cluster)


def test_a_send_that_breaks_in_mid_step_gives_both_sides_blocks_back(reference, monkeypatch):
    with reference.cluster() as cluster:
        send = LocalTransport.send

        def break_at_layer_1(self, layers, *blocks):
            if layers.start == 1:
                raise OSError("the wire is cut")
            return send(self, layers, *blocks)

        monkeypatch.setattr("nanopd.workers.transfer.SEND_TOKENS", 1)
        monkeypatch.setattr(LocalTransport, "send", break_at_layer_1)
        victim = submit(cluster, prompt(9), greedy())
        assert victim.result().error == "OSError: the wire is cut"
        assert_nothing_leaked(cluster)
        monkeypatch.setattr(LocalTransport, "send", send)
        asked = [(prompt(9), greedy())]
        assert_tokens_equal_reference(serve_mix(cluster, asked), asked, reference)
        assert_nothing_leaked(cluster)


def test_nan_in_one_requests_cache_ends_that_request_only(reference, cluster):
    victim, other = submit(cluster, prompt(9), greedy(12)), submit(cluster, prompt(10, 2), greedy(12))
    step_until(cluster, lambda: stage(cluster, victim) == stage(cluster, other) == "decode")
    cluster.step()
    d = cluster.workers["D0"]
    d.cache.poison(d.manager.block_table(d.engine.scheduler.find(victim.request_id).live[0])[:1])
    assert "NaN" in victim.result().error
    assert_tokens_equal_reference([other.result()], [(prompt(10, 2), greedy(12))], reference)


def test_the_prefix_cache_survives_a_broken_copy_of_blocks(reference, monkeypatch):
    """The step breaks after blocks were promised copies; what was cached before must still be right."""
    asked = [(prompt(9), sampled(3)), (prompt(9), greedy())]
    with reference.cluster("collocated") as cluster:
        serve_mix(cluster, asked)
        copy_blocks = KVCache.copy_blocks

        def break_once(self, pairs):
            if pairs:
                monkeypatch.setattr(KVCache, "copy_blocks", copy_blocks)
                raise RuntimeError("no copy today")

        monkeypatch.setattr(KVCache, "copy_blocks", break_once)
        broken = serve_mix(cluster, [(prompt(9), sampled(3, seed=6))])
        assert broken[0].error == "RuntimeError: no copy today"
        assert_nothing_leaked(cluster)
        assert_tokens_equal_reference(serve_mix(cluster, asked), asked, reference)


# ------------------------------------------------------------------------------------- what the client sees


def test_a_timeline_tells_the_path_and_its_marks_in_order(reference, cluster):
    stream = submit(cluster, prompt(9), greedy(4))
    stream.result()
    timeline = cluster.timeline(stream.request_id)
    assert timeline.path == ["P0", "D0"] and str(timeline) == "P0 -> D0"
    assert [what for what, _ in timeline.marks] == [
        "queued", "blocks granted by D0", "sent to P0", "KV transferred", "sent to D0", "finished"]
    times = [when for _, when in timeline.marks]
    assert times == sorted(times) and timeline.num_refusals == 0


def test_a_collocated_timeline_has_one_worker(reference):
    with reference.cluster("collocated", "C:cpu C:cpu") as cluster:
        serve_mix(cluster, [(prompt(5, start), greedy(2)) for start in range(4)])
        assert [str(cluster.timeline(str(number))) for number in range(4)] == ["C0", "C1", "C0", "C1"]
        assert [what for what, _ in cluster.timeline("0").marks] == ["queued", "sent to C0", "finished"]


def test_the_first_token_comes_from_p_in_the_step_that_reads_the_prompt(reference, cluster):
    stream = submit(cluster, prompt(9), greedy(4))
    step_until(cluster, lambda: stage(cluster, stream) == "decode")
    expected = reference.answer(prompt(9), greedy(4))[0]
    assert [event.token_id for event in stream._events] == expected[:1]
    assert [event.token_id for event in stream] == expected


@pytest.mark.parametrize(("options", "message"), [
    (dict(topology="X:cpu"), "unknown role 'X'"),
    (dict(topology="P:gpu0 D:cpu"), "not ROLE:DEVICE"),
    (dict(topology=" "), "at least one worker"),
    (dict(topology="P:cpu"), "needs workers of role D and P"),
    (dict(topology="P:cpu D:cpu", mode="collocated"), "needs workers of role C"),
    (dict(mode="adaptively"), "unknown mode 'adaptively'"),
    (dict(max_seqs=3), "unknown option max_seqs"),
    (dict(watermark=1.5), "watermark"),
    (dict(topology="P:cpu D:99"), "torch sees"),
])
def test_what_is_not_understood_is_refused(reference, options, message):
    with pytest.raises(ConfigError, match=message):
        Cluster(reference.path, **options)


def test_a_request_that_can_never_be_served_is_refused_at_once(reference, cluster):
    for token_ids, params, message in (
        ((), greedy(), "empty"), (prompt(64), greedy(), "the context holds 64"), ((64,), greedy(), "out of range"),
        (prompt(3), sampled(7), "a batch holds 6")):
        with pytest.raises(InvalidRequest, match=message):
            submit(cluster, token_ids, params)
    assert not cluster.has_work


def test_shutdown_ends_what_is_open(reference):
    cluster = reference.cluster()
    streams = [submit(cluster, prompt(9, start), greedy(20)) for start in range(8)]
    for _ in range(3):
        cluster.step()
    cluster.shutdown()
    assert all(stream.finished and stream.result().outputs[0].finish_reason is FinishReason.ABORT for stream in streams)
    assert not cluster.has_work and cluster.workers == {}
    cluster.shutdown()  # no effect


# -------------------------------------------------------------------------------------------- any order


asked = st.tuples(
    st.tuples(st.integers(1, 22), st.integers(1, 3)).map(lambda drawn: prompt(*drawn)),
    st.one_of(st.builds(greedy, st.integers(1, 9)), st.builds(sampled, st.integers(2, 3), st.integers(1, 9), st.integers(1, 3))))


def test_answers_that_end_in_one_step_all_reach_their_stream(reference, cluster):
    stream = submit(cluster, prompt(9), sampled(3, max_tokens=2))
    assert sorted(event.index for event in stream if event.finish_reason is not None) == [0, 1, 2]


def check_any_requests(reference, **options):
    @settings(deadline=None, database=None, suppress_health_check=list(HealthCheck), **options)
    @given(requests=st.lists(asked, min_size=1, max_size=6), chunk=st.sampled_from([None, 3]), blocks=st.integers(12, 16),
           cancels=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 5)), max_size=4), caching=st.booleans())
    def check(requests, chunk, blocks, cancels, caching):
        with reference.cluster(prefill_chunk_size=chunk, num_gpu_blocks_override=blocks, enable_prefix_caching=caching,
                               max_num_seqs=4) as cluster:
            served = {}
            for token_ids, sampling in requests:
                try:
                    served[submit(cluster, token_ids, sampling)] = token_ids, sampling
                except InvalidRequest:
                    continue
            streams = list(served)
            cancelled, ends = set(), []
            for now in range(500):
                for moment, index in cancels:
                    if moment == now and index < len(streams) and not streams[index].finished:
                        streams[index].close()
                        cancelled.add(streams[index])
                if not cluster.has_work:
                    break
                ends += [(event.request_id, event.index) for event in cluster.step() if event.finish_reason is not None]
            assert all(stream.finished for stream in streams)
            whole = [stream for stream in streams if stream not in cancelled]
            every_answer = {(stream.request_id, index) for stream in whole for index in range(served[stream][1].n)}
            assert len(set(ends)) == len(ends) and every_answer <= set(ends)
            assert_tokens_equal_reference([stream.result() for stream in whole], [served[stream] for stream in whole], reference)
            assert_nothing_leaked(cluster)

    check()


def test_any_requests_and_cancels_end_once_and_leave_nothing(reference):
    check_any_requests(reference, max_examples=12, derandomize=True)


@pytest.mark.nightly
def test_any_requests_and_cancels_for_long(reference):
    check_any_requests(reference, max_examples=200, print_blob=True)


def test_nothing_is_held_once_the_last_request_has_ended() -> None:
    """Without another step: what a notebook prints after `generate` must not look like a leak."""
    for params in (SamplingParams(temperature=0, max_tokens=1), SamplingParams(temperature=0, max_tokens=8)):
        with Cluster("tiny", "P:cpu D:cpu", "disaggregated") as cluster:
            cluster.generate(["What is 47+35?", "What is 1+1?"], params, use_tqdm=False)
            assert [worker.manager.num_used_blocks for worker in cluster.workers.values()] == [0, 0]
            stream = cluster.submit("Tell a story about a sad lion and a lamp in 14 sentences.")
            cluster.step()
            stream.close()
            assert [worker.manager.num_used_blocks for worker in cluster.workers.values()] == [0, 0]


def test_a_cluster_that_was_shut_down_says_so() -> None:
    cluster = Cluster("tiny", "C:cpu", "collocated")
    cluster.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        cluster.submit("What is 1+1?")


def test_limits_are_those_of_the_smallest_worker() -> None:
    large, small = Limits(100, 512, 64, 16, 8), Limits(100, 512, 40, 16, 8)
    assert Limits.tightest([large, small]) == small


def test_a_checksum_is_of_what_travelled(reference):
    """What D had in its prefix cache may differ in its last bits, as after other batches; that is no corruption."""
    with reference.cluster(checksums=True) as cluster:
        serve_mix(cluster, [(prompt(9), greedy())])
        cluster.workers["D0"].cache.data.mul_(1 + 1e-6)
        asked = [(prompt(30), greedy()), (prompt(8), greedy())]  # of which D has the first 8 tokens: a part, and all
        outputs = serve_mix(cluster, asked)
        assert_tokens_equal_reference(outputs, asked, reference)
        for output in outputs:
            assert not [what for what, _ in cluster.timeline(output.request_id).marks if "not what was sent" in what]
        assert_nothing_leaked(cluster)
