"""What a client adds to requests for a cluster, and how it gets on with one that lets only so many in."""

from __future__ import annotations

import math

import pytest
from workers.fake_cluster import FakeCluster

from nanopd.client import Client, PromptReader
from nanopd.core import FinishReason, InvalidRequest, SamplingParams


class FakeClient(Client):
    """A client of fake workers, without text."""

    def __init__(self, **options):
        super().__init__(None, seed=0)
        self.cluster = FakeCluster("P:cpu D:cpu C:cpu", **options)
        self.central = self.cluster.central

    @property
    def limits(self):
        return self.central.limits

    def submit(self, prompt, sampling_params=None, *, timeout=None, mode=None):
        request = self._make_request(prompt, sampling_params or SamplingParams(), timeout=timeout)
        self.cluster.clock.now = request.arrival_time
        return self._submit(request, mode=mode)

    def _start(self, request, mode=None):
        self.cluster.submit(request, mode)

    def _advance(self):
        return self.cluster.ledger.take(self.central.step())

    def _cancel(self, request_id):
        return self.cluster.cancel(request_id)

    def _stop_answer(self, request_id, index):
        self.cluster.cancel(request_id, index)

    def _release(self):
        self.cluster.assert_empty()


def ids(*token_ids):
    return {"prompt_token_ids": list(token_ids)}


def test_a_timeout_ends_the_request_with_what_is_written_and_says_so():
    with FakeClient() as client:
        stream = client.submit(ids(1, 2, 3), SamplingParams(max_tokens=30, ignore_eos=True), timeout=1.5)
        next(iter(stream))
        client.cluster.clock.now += 1.5
        output = stream.result()
    assert output.error == "timed out after 1.5 s (deadline given at submission)"
    assert output.outputs[0].finish_reason is FinishReason.ERROR and output.outputs[0].token_ids


@pytest.mark.parametrize("timeout", [0, -1, "2", True, math.nan])
def test_a_timeout_is_a_number_of_seconds(timeout):
    with FakeClient() as client, pytest.raises(InvalidRequest, match="timeout must be a number of seconds above 0"):
        client.submit(ids(1), timeout=timeout)


def test_a_stream_takes_what_submit_takes():
    with FakeClient() as client:
        events = list(client.stream(ids(1, 2), SamplingParams(max_tokens=3), mode="collocated"))
        assert events[-1].finish_reason is not None
        assert str(client.central.timelines["0"]) == "C0"


def test_more_prompts_than_may_be_open_are_fed_in_as_others_end():
    with FakeClient(max_queued=3) as client:
        outputs = client.generate([ids(1, number) for number in range(11)], SamplingParams(max_tokens=4), use_tqdm=False)
        assert [output.prompt_token_ids[1] for output in outputs] == list(range(11))
        assert all(output.finished and output.error is None for output in outputs)


class PickyTokenizer:
    """Its chat template takes no system message, as those of some models."""

    chat_template = "there is one"

    def apply_chat_template(self, messages, **options):
        import jinja2

        return jinja2.Template("{{ fail() }}").render(fail=self.fail) if messages[0]["role"] == "system" else "fine"

    @staticmethod
    def fail():
        import jinja2

        raise jinja2.TemplateError("System role not supported")

    def __call__(self, text, **options):
        return {"input_ids": [1]}


def test_a_conversation_that_the_chat_template_does_not_take():
    reader = PromptReader(PickyTokenizer())
    assert reader.read_chat([{"role": "user", "content": "x"}]) == ("fine", [1])
    with pytest.raises(InvalidRequest, match="does not take this conversation: System role not supported"):
        reader.read_chat([{"role": "system", "content": "x"}])
