"""Checkpoints with their Hugging Face references, and clients that are looked over when the test is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache

import pytest
import torch
from checkpoints import GRID, make_checkpoint

from nanopd import LLM, Cluster
from nanopd.core import RowResult, StepPlan, StepResult
from nanopd.engine.engine import Engine

MARGIN = 2e-3  # between the two best logits: far more than rounding, so that greedy tokens must agree
TOKENS = 10


@dataclass
class Checkpoint:
    """A saved model, and what transformers makes of it."""

    path: str
    model: torch.nn.Module
    vocab: int
    _greedy: dict = field(default_factory=dict)

    def random_prompt(self, length: int, seed: int = 0) -> list[int]:
        generator = torch.Generator().manual_seed(1000 * seed + length)
        return torch.randint(0, self.vocab, (length,), generator=generator).tolist()

    def greedy(self, prompt: list[int], num_tokens: int = TOKENS) -> list[int]:
        return self._generate(prompt, num_tokens)[0]

    def prompt(self, length: int, num_tokens: int = TOKENS) -> list[int]:
        """A prompt whose greedy answer holds no near tie, and is not one token over and over."""
        for seed in range(100):
            prompt = self.random_prompt(length, seed)
            answer, margin = self._generate(prompt, num_tokens)
            if margin > MARGIN and len(set(answer)) > num_tokens // 2:
                return prompt
        raise AssertionError("no such prompt")

    def logprobs(self, prompt: list[int], output: list[int]) -> torch.Tensor:
        """[output tokens, vocabulary], teacher-forced."""
        with torch.no_grad():
            logits = self.model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
        return logits.float().log_softmax(-1)

    def _generate(self, prompt: list[int], num_tokens: int) -> tuple[list[int], float]:
        key = (tuple(prompt), num_tokens)
        if key not in self._greedy:
            out = self.model.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False,
                max_new_tokens=num_tokens, eos_token_id=None, pad_token_id=0, output_logits=True,
                return_dict_in_generate=True)
            best = torch.cat(out.logits).topk(2).values
            self._greedy[key] = out.sequences[0, len(prompt) :].tolist(), (best[:, 0] - best[:, 1]).min().item()
        return self._greedy[key]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Checkpoint]:
    """checkpoint("qwen3-yarn", eos=5): by its name in GRID, with changes; each is made once."""

    @cache
    def make(name: str = "qwen3", **changes) -> Checkpoint:
        path = tmp_path_factory.mktemp(name)
        options = {key: list(value) if isinstance(value, tuple) else value for key, value in changes.items()}
        model = make_checkpoint(path, **{**GRID[name], **options})
        return Checkpoint(str(path), model, model.config.vocab_size)

    return make


def engines_of(client: LLM | Cluster) -> list[Engine]:
    return [client.engine] if isinstance(client, LLM) else [worker.engine for worker in client.workers.values()]


def assert_clean(client: LLM | Cluster) -> None:
    """Nothing is open, every block is back and the books balance."""
    if isinstance(client, Cluster):
        for _ in range(20):  # messages still on their way
            client._central.step()
        assert client._executor.idle and not client._central.has_work
        assert all(not worker.transfers and not worker._leases for worker in client.workers.values())
    for engine in engines_of(client):
        scheduler = engine.scheduler
        scheduler.manager.check()
        assert scheduler.manager.num_used_blocks == 0 and scheduler.manager.leases == []
        assert not (scheduler.waiting or scheduler.running or scheduler.handed_off or scheduler.beams)
    assert not client._streams and not client._outputs._open


def prepare(client: LLM | Cluster) -> LLM | Cluster:
    """Fill the caches with NaN, so that a read of what was never written shows."""
    for engine in engines_of(client):
        engine.runner.cache.poison(range(engine.scheduler.manager.num_blocks))
    return client


@pytest.fixture
def clean() -> Callable[[LLM | Cluster], None]:
    """assert_clean, the function."""
    return assert_clean


@pytest.fixture
def make_llm() -> Iterator[Callable[..., LLM]]:
    made: list[LLM] = []

    def make(model: Checkpoint | str, **options) -> LLM:
        path = model if isinstance(model, str) else model.path
        options = {"num_gpu_blocks_override": 256, **options}
        made.append(prepare(LLM(path, device="cpu", **options)))
        return made[-1]

    yield make
    for llm in made:
        assert_clean(llm)


@pytest.fixture
def make_cluster() -> Iterator[Callable[..., Cluster]]:
    made: list[Cluster] = []

    def make(model: Checkpoint | str, topology: str = "P:cpu D:cpu", **options) -> Cluster:
        path = model if isinstance(model, str) else model.path
        mode = "collocated" if "C" in topology else "disaggregated"
        options = {"num_gpu_blocks_override": 256, **options}
        made.append(prepare(Cluster(path, topology, mode, **options)))
        return made[-1]

    yield make
    for cluster in made:
        assert_clean(cluster)
        cluster.shutdown()


class ScriptedRunner:
    """Draws what it is told to: `scripts[request id][answer]` are the tokens; "*" stands for every request.

    What lies past a script's end is `filler`. Log-probabilities are -(position + 1).
    """

    def __init__(self, runner, scripts: dict[str, list[list[int]]], filler: int = 5) -> None:
        self.model, self.cache = runner.model, runner.cache
        self.scripts = scripts
        self.filler = filler

    def execute(self, plan: StepPlan, on_layer=None) -> StepResult:
        for layer in range(self.model.spec.num_layers):
            if on_layer is not None:
                on_layer(layer)
        return StepResult([self._draw(row) for row in plan.rows])

    def _draw(self, row) -> RowResult:
        answers = self.scripts.get(row.request.request_id) or self.scripts["*"]
        position = row.sequence.num_output
        tokens = [(answers[(row.sequence.index + i) % len(answers)] + [self.filler] * 10000)[position]
                  for i in range(row.num_samples)]
        return RowResult(tokens, [-float(position + 1)] * len(tokens))


@pytest.fixture
def script() -> Callable[..., None]:
    """script(client, {"0": [[token ids of the first answer], ...]}): its engines draw these from now on."""

    def install(client: LLM | Cluster, scripts: dict[str, list[list[int]]], filler: int = 5) -> None:
        for engine in engines_of(client):
            engine.runner = ScriptedRunner(engine.runner, scripts, filler)

    return install
