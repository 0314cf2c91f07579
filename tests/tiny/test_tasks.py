"""The embedded model's questions and files. That the weights answer rightly is for the engine's tests."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys

import pytest
from tokenizers import Tokenizer

from nanopd.tiny import WEIGHTS_DIR, demo_prompts, recall_prompt, tasks
from nanopd.tiny.tasks import KINDS, LANGS, Kind, Lang, Task, is_right, make_recall, make_task

SEEDS = range(40)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(WEIGHTS_DIR / "tokenizer.json"))


def solve(task: Task) -> str:
    """The answer, worked out from the prompt's text alone."""
    prompt = task.prompt
    numbers = re.findall(r"\d+", prompt)
    if task.kind == "recall":
        asked = re.search(r"code of (.+)\?|“(.+)”的密码", prompt)
        assert asked is not None
        key = asked.group(1) or asked.group(2)
        (code,) = re.findall(rf"(?:[:;] |[：；]){key}=(\d{{4}})", prompt)
        return code
    if task.kind == "arithmetic":
        left, right = map(int, numbers)
        return str(left + right if "+" in prompt else left - right)
    separator = ", " if task.lang == "en" else "、"
    words = re.split("[:：] ?", prompt)[1][:-1].split(separator)
    if task.kind == "count":
        asked = re.search(r"times does (.+) appear|“(.+)”在", prompt)
        assert asked is not None
        return str(words.count(asked.group(1) or asked.group(2)))
    if task.kind == "sort":
        words.sort(key=int)
    elif task.kind == "reverse":
        words.reverse()
    return separator.join(words)


@pytest.mark.parametrize("lang", LANGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_one_task(kind: Kind, lang: Lang) -> None:
    made = [make_task(random.Random(seed), kind, lang) for seed in SEEDS]
    assert made == [make_task(random.Random(seed), kind, lang) for seed in SEEDS]
    assert len({task.prompt for task in made}) > len(SEEDS) // 2
    assert all((task.kind, task.lang) == (kind, lang) for task in made)
    assert all(is_right(task, task.answer) for task in made)


@pytest.mark.parametrize("lang", LANGS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "story"])
def test_answers_are_right(kind: Kind, lang: Lang) -> None:
    for seed in SEEDS:
        task = make_task(random.Random(seed), kind, lang, num_pairs=30)
        assert task.answer == solve(task)
        assert not is_right(task, task.answer + "0")


@pytest.mark.parametrize("lang", LANGS)
def test_stories_have_the_length_asked_for(lang: Lang) -> None:
    stop = "." if lang == "en" else "。"
    for seed in SEEDS:
        task = make_task(random.Random(seed), "story", lang)
        (length,) = re.findall(r"\d+", task.prompt)
        assert task.answer.count(stop) == int(length)
        assert not is_right(task, task.answer.rsplit(stop, 2)[0] + stop)


@pytest.mark.parametrize("lang", LANGS)
def test_recall_states_each_key_once_and_asks_anywhere(lang: Lang) -> None:
    places = []
    for seed in SEEDS:
        task = make_recall(random.Random(seed), 400, lang)
        keys = re.findall(r"([^;；:：]+)=(\d{4})", task.prompt)
        assert len({key for key, _ in keys}) == 400
        places.append(task.prompt.index(f"={task.answer}") / len(task.prompt))
    assert min(places) < 0.2 and max(places) > 0.8


def test_a_dialogue_states_its_list_once() -> None:
    dialogue = tasks.make_recall_dialogue(random.Random(0), 20, 5, "en")
    assert [task.prompt.count("=") for task in dialogue] == [20, 0, 0, 0, 0]
    for task in dialogue[1:]:
        assert solve(Task("recall", "en", f"{dialogue[0].prompt}\n{task.prompt}", "")) != ""


@pytest.mark.parametrize("lang", LANGS)
@pytest.mark.parametrize("target", [100, 256, 1024, 3500, 3900])
def test_recall_prompt_fills_the_context(target: int, lang: Lang, tokenizer: Tokenizer) -> None:
    task = recall_prompt(3, target, lang)
    assert 0.9 * target <= len(tokenizer.encode(task.prompt).ids) <= target
    assert task == recall_prompt(3, target, lang, tokenizer)
    assert 2 <= len(tokenizer.encode(task.answer).ids) <= 6


def test_recall_prompt_says_when_nothing_fits() -> None:
    with pytest.raises(ValueError, match="8 tokens"):
        recall_prompt(0, 8, "en")


def test_demo_prompts_are_varied_and_short(tokenizer: Tokenizer) -> None:
    demo = demo_prompts()
    assert {task.lang for task in demo} == set(LANGS)
    assert {"recall", "arithmetic", "sort", "story"} <= {task.kind for task in demo}
    assert all(len(tokenizer.encode(task.prompt).ids) < 128 for task in demo)
    assert demo_prompts("zh") == [task for task in demo if task.lang == "zh"]


@pytest.mark.parametrize("lang", LANGS)
def test_tokenizer_round_trips(lang: Lang, tokenizer: Tokenizer) -> None:
    strangers = (
        "Anything else: naïve café, 東京, 😀\n\ttabs" if lang == "en" else "别的文字：龙凤呈祥，东京！"
    )
    texts = [strangers]
    for kind in KINDS:
        task = make_task(random.Random(1), kind, lang)
        texts += [task.prompt, task.answer]
    assert [tokenizer.decode(tokenizer.encode(text).ids) for text in texts] == texts


def test_tokenizer_keeps_digits_apart(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("4827").tokens == ["4", "8", "2", "7"]


def test_weights_are_a_small_qwen3() -> None:
    config = json.loads((WEIGHTS_DIR / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("qwen3", ["Qwen3ForCausalLM"])
    assert config["max_position_embeddings"] == 4096
    assert config["tie_word_embeddings"] is True
    assert config["num_attention_heads"] > config["num_key_value_heads"]
    assert (WEIGHTS_DIR / "model.safetensors").stat().st_size <= 12_000_000
    log = json.loads((WEIGHTS_DIR / "training_log.json").read_text())
    assert {"date", "config", "device", "training_seconds", "final", "accuracy", "versions"} <= set(log)


def test_auto_tokenizer_and_chat_template(tokenizer: Tokenizer) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(WEIGHTS_DIR)
    config = json.loads((WEIGHTS_DIR / "config.json").read_text())
    assert loaded.eos_token == "<|im_end|>" and loaded.eos_token_id == config["eos_token_id"]
    assert loaded.pad_token_id == config["pad_token_id"] and loaded.bos_token_id == config["bos_token_id"]
    for lang in LANGS:
        prompt = make_recall(random.Random(2), 20, lang).prompt
        assert loaded(prompt)["input_ids"] == tokenizer.encode(prompt).ids
        rendered = loaded.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        assert rendered == f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        assert loaded.decode(loaded(rendered)["input_ids"]) == rendered


def test_the_package_loads_without_torch() -> None:
    code = "import sys, nanopd.tiny; nanopd.tiny.demo_prompts(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=WEIGHTS_DIR.parents[2])
