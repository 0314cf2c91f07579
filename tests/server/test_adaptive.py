"""A server in adaptive mode: the router chooses the way of each request, and no client can tell which it was."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from server.harness import running, until

from nanopd.cluster import Cluster
from nanopd.core import SamplingParams
from nanopd.cost_model.presets import preset

PROMPTS = [f"What is {number}+35?" for number in range(40, 52)]


def test_requests_take_both_ways_and_are_answered_as_by_one_engine(llm):
    """By the costs of another device, so that nothing has to be measured: with some requests at C, the others are better off at P, D."""
    expected = [each.outputs[0].text for each in llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))]
    with running("C:cpu P:cpu D:cpu", profile=preset("nvidia-h200/qwen3-8b").cost) as server:
        def streamed(prompt):
            chunks = server.openai.completions.create(model="tiny", prompt=prompt, max_tokens=24, temperature=0, stream=True,
                                                      extra_body={"ignore_eos": True})
            return "".join(chunk.choices[0].text for chunk in chunks)

        with ThreadPoolExecutor(len(PROMPTS)) as clients:
            assert list(clients.map(streamed, PROMPTS)) == expected
        history = server.driver.call(Cluster.history).result(30)
        assert {worker_id for worker_id, done in history.items() if done.steps} == {"C0", "P0", "D0"}
        until(server.is_empty)
