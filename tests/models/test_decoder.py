"""Our decoder against Hugging Face's, for every family and option."""

from __future__ import annotations

import itertools

import pytest
import torch
from checkpoints import GRID, make_checkpoint

from nanopd.models.decoder import Decoder
from nanopd.models.loader import load_model, load_spec

LENGTH = 75  # beyond the 64 positions that the scaled ropes take for the original context


def prompt(length: int = LENGTH, seed: int = 3, vocab: int = 128) -> list[int]:
    return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def hf_logits(model, tokens: list[int]) -> torch.Tensor:
    return model(torch.tensor([tokens])).logits[0].float()


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    scale = theirs.abs().max().item()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * scale)


@pytest.fixture(scope="module", params=GRID.values(), ids=GRID.keys())
def pair(request, tmp_path_factory):
    """(Hugging Face's model, ours), from the same checkpoint."""
    path = tmp_path_factory.mktemp("checkpoint")
    model = make_checkpoint(path, **request.param)
    assert (path / "model.safetensors.index.json").exists() == ("shard_size" in request.param)
    return model, load_model(path, device="cpu")


def test_whole_prompt(pair, cached):
    theirs, ours = pair
    assert_same(cached(ours).run({0: prompt()}), hf_logits(theirs, prompt()))


def test_chunks_then_decodes(pair, cached):
    theirs, ours = pair
    tokens, runner = prompt(), cached(ours, block_size=5)
    cuts = [0, 7, 8, 40, 72, 73, 74, 75]
    logits = [runner.run({0: tokens[start:end]}) for start, end in itertools.pairwise(cuts)]
    assert_same(torch.cat(logits), hf_logits(theirs, tokens))


def test_rows_of_different_lengths_in_one_step(pair, cached):
    theirs, ours = pair
    runner = cached(ours)
    sequences = {number: prompt(length, seed=number) for number, length in enumerate([31, 9, 30, 9])}
    cuts = {0: [0, 20, 30, 31], 1: [0, 7, 8, 9], 2: [0, 1, 29, 30], 3: [0, 7, 8, 9]}
    logits: dict[int, list[torch.Tensor]] = {number: [] for number in sequences}
    for step in range(3):
        rows = {number: tokens[cuts[number][step] : cuts[number][step + 1]] for number, tokens in sequences.items()}
        parts = runner.run(rows).split([len(tokens) for tokens in rows.values()])
        for number, part in zip(rows, parts):
            logits[number].append(part)
    for number, tokens in sequences.items():
        assert_same(torch.cat(logits[number]), hf_logits(theirs, tokens))


def test_greedy_tokens_are_the_same(pair, cached):
    theirs, ours = pair
    tokens, runner = prompt(12), cached(ours)
    step, written = tokens, []
    for _ in range(20):
        step = [int(runner.run({0: step})[-1].argmax())]
        written += step
    expected = theirs.generate(torch.tensor([tokens]), attention_mask=torch.ones(1, 12, dtype=torch.long),
                               do_sample=False, max_new_tokens=20, pad_token_id=0)
    assert written == expected[0, 12:].tolist()
    assert len(set(written)) > 2  # a model that repeats one token would agree with anything


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_bfloat16_is_as_far_from_float32_as_theirs(family, tmp_path, cached):
    model = make_checkpoint(tmp_path, family)
    exact = hf_logits(model, prompt())
    theirs = hf_logits(model.bfloat16(), prompt())
    ours = cached(load_model(tmp_path, device="cpu", dtype="bfloat16")).run({0: prompt()})
    scale = exact.std()
    assert (ours - theirs).abs().mean() < 0.03 * scale
    assert (ours - exact).abs().mean() < 1.2 * (theirs - exact).abs().mean()


def test_on_layer_follows_the_store_of_each_layer(tmp_path, cached):
    make_checkpoint(tmp_path, layers=3)
    runner = cached(load_model(tmp_path, device="cpu"))
    stored = []

    def on_layer(index: int) -> None:
        block = runner.tables[0][0]
        stored.append((index, [bool(runner.cache.data[layer, :, block].isfinite().all()) for layer in range(3)]))

    runner.run({0: prompt(4)}, on_layer)
    assert stored == [(0, [True, False, False]), (1, [True, True, False]), (2, [True, True, True])]


def test_logits_come_in_the_models_dtype(tmp_path, cached):
    make_checkpoint(tmp_path, tie=True)
    decoder = load_model(tmp_path, device="cpu", dtype=torch.bfloat16)
    assert cached(decoder).run({0: [1, 2]}).dtype == torch.bfloat16


@pytest.mark.parametrize("name, billions", [("qwen3-8b", 8.19), ("qwen3-0.6b", 0.596), ("qwen2-1.5b", 1.544),
                                            ("llama-3.1-8b", 8.03)])
def test_presets_have_the_published_number_of_parameters(name, billions):
    decoder = Decoder(load_spec(name), device="meta", dtype=torch.bfloat16)
    assert sum(p.numel() for p in decoder.parameters()) / 1e9 == pytest.approx(billions, rel=0.002)


def test_decoder_follows_torchs_default_device():
    with torch.device("meta"):
        decoder = Decoder(load_spec("qwen3-0.6b"))
    assert {tensor.device.type for tensor in decoder.state_dict().values()} == {"meta"}
