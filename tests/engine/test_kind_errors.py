"""What a user may get wrong with chats, options and memory: an error that says so, and nothing held."""

from __future__ import annotations

import pytest
import torch

from nanopd import LLM, BeamSearchParams, Cluster, ConfigError, InvalidRequest, ModelError, SamplingParams
from nanopd.block_manager.cache import KVCache
from nanopd.engine import factory
from nanopd.models.loader import load_spec

GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("tiny", device="cpu")


@pytest.mark.parametrize("messages", [
    [], "hello", ["hello"], {"role": "user", "content": "x"}, [{"role": "user"}], [{"role": "user", "content": None}], [[]],
], ids=repr)
def test_a_conversation_of_another_form(llm, messages) -> None:
    with pytest.raises(InvalidRequest, match="role"):
        llm.chat(messages, GREEDY)
    assert not llm.has_work


def test_text_that_is_not_unicode(llm) -> None:
    with pytest.raises(InvalidRequest, match="Unicode"):
        llm.generate("\ud800abc", GREEDY)


def test_stream_complains_at_once(llm) -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        llm.stream("", GREEDY)


@pytest.mark.parametrize("options", [
    {"block_size": "16"}, {"block_size": 1.5}, {"block_size": True}, {"max_model_len": "100"},
    {"num_gpu_blocks_override": 2.5}, {"max_num_seqs": 2.5}, {"max_num_batched_tokens": None},
], ids=repr)
def test_an_option_of_another_type(options) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        LLM("tiny", device="cpu", **options)


def test_a_topology_that_is_no_text() -> None:
    with pytest.raises(ConfigError, match="topology"):
        Cluster("tiny", topology=None)


def test_the_stop_token_is_no_part_of_the_text(llm) -> None:
    three = llm.tokenizer("3")["input_ids"][0]
    params = SamplingParams(temperature=0, max_tokens=20, stop_token_ids=[three])
    answer = llm.generate("Sort these numbers: 72, 97, 8, 32.", params, use_tqdm=False)[0].outputs[0]
    assert (answer.text, answer.token_ids[-1], answer.stop_reason) == ("8, ", three, three)


def test_beams_have_ranks_of_their_own(llm) -> None:
    start = llm.engine.num_steps
    llm.beam_search("What is 4+3?", BeamSearchParams(3, 6), use_tqdm=False)
    last = [record for record in llm.engine.history if record.step >= start][-1]
    assert len({row.index for row in last.rows}) == len(last.rows) > 1


def test_a_large_model_does_not_take_the_whole_memory_of_a_cpu() -> None:
    spec = load_spec("qwen3-0.6b")
    options = factory.EngineOptions()
    blocks = factory._num_blocks(spec, torch.float32, torch.device("cpu"), spec.max_position, options, 1.0)
    assert 0 < blocks * spec.kv_bytes_per_token(4) * options.block_size <= factory.CPU_CACHE_BYTES


def test_no_room_for_the_cache(monkeypatch) -> None:
    def out_of_memory(*_: object) -> KVCache:
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(factory, "KVCache", out_of_memory)
    with pytest.raises(ConfigError, match="num_gpu_blocks_override"):
        LLM("tiny", device="cpu")


def test_an_eos_token_beyond_the_vocabulary(checkpoint, tmp_path) -> None:
    with pytest.raises(ModelError, match="eos_token_id"):
        LLM(checkpoint("qwen3", eos=9999).path, device="cpu")


def test_shut_down_means_closed() -> None:
    with LLM("tiny", device="cpu") as llm:
        stream = llm.submit("Tell a story about a sad lion and a lamp in 14 sentences.", GREEDY)
        llm.step()
    assert stream.result().outputs[0].finish_reason == "abort"
    with pytest.raises(RuntimeError, match="shut down"):
        llm.generate("What is 1+1?", GREEDY)


def test_a_timeline_nobody_has() -> None:
    with Cluster("tiny", "C:cpu", "collocated") as cluster, pytest.raises(KeyError, match="no request"):
        cluster.timeline("zz")
