"""Reading checkpoints: what is accepted, and a clear error for whatever is not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint
from safetensors.torch import load_file, save_file

from nanopd.models import resolve
from nanopd.models.decoder import Decoder
from nanopd.models.loader import ModelError, load_model, load_spec, load_tokenizer, resolve_model


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    make_checkpoint(tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path) -> Path:
    make_checkpoint(tmp_path, shard_size="40KB")
    return tmp_path


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(name, **kwargs):
        raise ConnectionError(f"network used for {name}")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)


def edit_json(path: Path, **changes) -> None:
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def edit_tensors(directory: Path, **changes) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors.update(changes)
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, directory / "model.safetensors")


def load(path):
    return load_model(path, device="cpu")


# ---------------------------------------------------------------------------------------------------- finding


def test_unknown_name_lists_presets_and_does_not_ask_the_hub():
    with pytest.raises(ModelError, match=r"no model 'qwen9'.*not a directory.*tiny, llama-3.1-8b.*'Qwen/Qwen3-8B'"):
        load_spec("qwen9")


@pytest.mark.parametrize("name", ["/no/such/dir", "./here", "a/b/c", "../up", "", "~/nowhere-at-all", "-x/y"])
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(name):
    with pytest.raises(ModelError, match=r"not a directory"):
        resolve_model(name)


def test_a_path_object_is_never_a_name():
    with pytest.raises(ModelError, match=r"not a directory"):
        resolve_model(Path("qwen3-8b"))
    with pytest.raises(ModelError, match=r"not a directory"):
        resolve_model(Path("Qwen/Qwen3-8B"))


def test_hub_name_offline():
    with pytest.raises(ModelError, match=r"hub did not give it: network used for Qwen/Qwen3-8B\. Check.*local directory"):
        load_spec("Qwen/Qwen3-8B")


def test_hub_gives_only_safe_files(monkeypatch, checkpoint):
    asked = []

    def download(name, *, allow_patterns, ignore_patterns):
        asked.append((name, allow_patterns))
        assert ignore_patterns == ["*/*"]
        return str(checkpoint)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert load("some/model").spec.architecture == "qwen3"
    (_, config_files), (_, all_files) = asked
    assert set(all_files) - set(config_files) == {"model*.safetensors"}
    assert not any(pattern.endswith(end) for pattern in all_files for end in ("*", ".bin", ".pt", ".pth", ".py"))


def test_directories_and_presets_need_no_network(checkpoint):
    assert load_spec(str(checkpoint)) == load_spec(checkpoint)
    assert resolve_model("qwen3-8b").is_file()


def test_tiny_missing_from_the_installation(monkeypatch, tmp_path):
    monkeypatch.setattr(resolve, "TINY", tmp_path / "weights")
    with pytest.raises(ModelError, match=r"embedded model 'tiny' is missing.*install nanopd again"):
        load_spec("tiny")
    make_checkpoint(tmp_path / "weights")
    assert load("tiny").spec.num_layers == 2


def test_names_are_tried_in_order(monkeypatch, tmp_path):
    make_checkpoint(tmp_path / "qwen3-8b")
    monkeypatch.chdir(tmp_path)
    assert load_spec("qwen3-8b").num_layers == 36  # the preset, though a directory has that name
    assert load_spec("./qwen3-8b").num_layers == 2


# ---------------------------------------------------------------------------------------------- configuration


def test_spec_of_each_family(tmp_path):
    make_checkpoint(tmp_path / "qwen2", "qwen2", tie=True)
    make_checkpoint(tmp_path / "qwen3", "qwen3", bias=True)
    make_checkpoint(tmp_path / "llama", "llama", bias="mlp", rope="llama3")
    qwen2, qwen3, llama = (load_spec(tmp_path / name) for name in ("qwen2", "qwen3", "llama"))
    flags = ("tie_word_embeddings", "qkv_bias", "output_bias", "mlp_bias", "qk_norm")
    assert [getattr(qwen2, flag) for flag in flags] == [True, True, False, False, False]
    assert [getattr(qwen3, flag) for flag in flags] == [False, True, True, False, True]
    assert [getattr(llama, flag) for flag in flags] == [False, False, False, True, False]
    assert (llama.rope_scaling.kind, llama.rope_scaling.params["factor"], llama.rope_theta) == ("llama3", 8.0, 10000.0)
    assert (qwen3.num_heads, qwen3.num_kv_heads, qwen3.head_dim, qwen3.max_position) == (4, 2, 16, 512)
    assert qwen3.dtype == "float32"


@pytest.mark.parametrize("name", resolve.preset_names())
def test_presets_mean_the_same_to_transformers(name, tmp_path):
    (tmp_path / "config.json").write_text((resolve.PRESETS / f"{name}.json").read_text())
    assert load_spec(tmp_path) == load_spec(name)


@pytest.mark.parametrize("kind_key", ["type", "rope_type"])
def test_config_of_transformers_4(kind_key, tmp_path, cached):
    """rope_theta and rope_scaling at the top, torch_dtype for dtype."""
    make_checkpoint(tmp_path, "llama", rope="llama3")
    expected = cached(load(tmp_path)).run({0: list(range(70))})
    scaling = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]
    scaling[kind_key] = scaling.pop("rope_type")
    edit_json(tmp_path / "config.json", rope_parameters=..., rope_theta=scaling.pop("rope_theta"), rope_scaling=scaling,
              dtype=..., torch_dtype="float16")
    decoder = load(tmp_path)
    assert (decoder.spec.rope_scaling.kind, decoder.spec.dtype) == ("llama3", "float16")
    torch.testing.assert_close(cached(decoder).run({0: list(range(70))}), expected, rtol=0, atol=0)


def test_config_of_transformers_4_without_scaling(checkpoint):
    edit_json(checkpoint / "config.json", rope_parameters=..., rope_theta=5e5, rope_scaling=None)
    spec = load_spec(checkpoint)
    assert (spec.rope_theta, spec.rope_scaling.kind) == (5e5, "default")


def test_yarn_reaches_beyond_max_position_embeddings(checkpoint):
    """Qwen's advice for long texts is to add the scaling to config.json, and nothing else."""
    edit_json(checkpoint / "config.json", rope_parameters=..., rope_theta=1e6, max_position_embeddings=512,
              rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256})
    assert load_spec(checkpoint).max_position == 1024


def test_yarn_without_a_factor_takes_the_ratio_of_the_contexts(checkpoint):
    edit_json(checkpoint / "config.json", rope_parameters={
        "rope_type": "yarn", "rope_theta": 1e4, "factor": None, "original_max_position_embeddings": 128})
    assert load_spec(checkpoint).rope_scaling.params["factor"] == 4.0


@pytest.mark.parametrize("config, generation, expected", [
    (3, None, (3,)), ([3, 4], None, (3, 4)), (None, None, ()), (3, 5, (5,)), (3, [5, 6], (5, 6)), (3, ..., (3,)),
])
def test_eos_token_ids(checkpoint, config, generation, expected):
    edit_json(checkpoint / "config.json", eos_token_id=config)
    (checkpoint / "generation_config.json").unlink()
    if generation is not None:
        (checkpoint / "generation_config.json").write_text("{}")
        edit_json(checkpoint / "generation_config.json", eos_token_id=generation)
    assert load_spec(checkpoint).eos_token_ids == expected


@pytest.mark.parametrize("changes, message", [
    ({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]},
     r"unsupported architecture mixtral MixtralForCausalLM; supported are qwen2 .*qwen3 .*llama \(LlamaForCausalLM\)"),
    ({"model_type": ...}, "unsupported architecture None"),
    ({"model_type": ["qwen3"]}, "unsupported architecture"),
    ({"architectures": ["Qwen3ForSequenceClassification"]}, "unsupported.*Qwen3ForSequenceClassification"),
    ({"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}, "unsupported architecture evil"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantized checkpoints are not supported"),
    ({"use_sliding_window": True, "sliding_window": 16}, "sliding window attention is not supported"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding window attention is not supported"),
    ({"hidden_act": "gelu"}, "unsupported hidden_act 'gelu'; supported is 'silu'"),
    ({"num_attention_heads": 4, "num_key_value_heads": 3}, r"num_attention_heads \(4\) must be a multiple.*\(3\)"),
    ({"num_attention_heads": 0}, "num_attention_heads must be a positive integer, got 0"),
    ({"num_hidden_layers": 0, "layer_types": ...}, "num_hidden_layers must be a positive integer, got 0"),
    ({"hidden_size": "wide"}, "config.json.*hidden_size"),
    ({"head_dim": 15}, "head_dim"),
    ({"dtype": "float64"}, "unsupported dtype 'float64'; supported are float32, float16, bfloat16"),
    ({"eos_token_id": "</s>"}, "eos_token_id"),
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
     "unsupported rope scaling 'dynamic'; supported are default, linear, llama3, yarn"),
    ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "unsupported rope scaling 'spiral'"),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": -2.0}}, "needs factor, a number above 0"),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": None,
                          "original_max_position_embeddings": 0}}, "not a valid qwen3|original_max_position_embeddings"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
     "partial_rotary_factor is not supported"),
])
def test_configurations_refused(checkpoint, changes, message):
    (checkpoint / "generation_config.json").unlink()
    edit_json(checkpoint / "config.json", **changes)
    with pytest.raises(ModelError, match=message):
        load_spec(checkpoint)


@pytest.mark.parametrize("value", ["</s>", [1, "2"], True])
def test_eos_token_of_generation_config_refused(checkpoint, value):
    edit_json(checkpoint / "generation_config.json", eos_token_id=value)
    with pytest.raises(ModelError, match=r"generation_config.json: eos_token_id must be an integer or a list of integers"):
        load_spec(checkpoint)


def test_no_config(tmp_path):
    with pytest.raises(ModelError, match=r"has no config.json: give the directory of a Hugging Face checkpoint"):
        load_spec(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content, message", [(b"{oops", "can't be read as JSON"), (b"[1]", "must hold a JSON object"),
                                              (b"\xff\xfe", "can't be read as JSON")])
def test_broken_json(checkpoint, file, content, message):
    (checkpoint / file).write_bytes(content)
    with pytest.raises(ModelError, match=f"{file} {message}.*fetch the file again"):
        load_spec(checkpoint)


# ---------------------------------------------------------------------------------------------------- weights


def test_fused_weights_are_stacked_in_order(checkpoint):
    decoder = load(checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    prefix = "model.layers.1.self_attn."
    stacked = torch.cat([tensors[f"{prefix}{part}_proj.weight"] for part in "qkv"])
    assert torch.equal(decoder.layers[1].self_attn.qkv_proj.weight, stacked)
    mlp = [tensors[f"model.layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up")]
    assert torch.equal(decoder.layers[0].mlp.gate_up_proj.weight, torch.cat(mlp))


def test_parameters_need_no_gradient(checkpoint):
    assert not any(parameter.requires_grad for parameter in load(checkpoint).parameters())


def test_redundant_tensors_are_ignored(tmp_path):
    make_checkpoint(tmp_path, tie=True)
    edit_tensors(tmp_path, **{"lm_head.weight": torch.zeros(128, 64),
                              "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)})
    assert load(tmp_path).lm_head is None


def test_other_extra_tensors_are_listed(checkpoint):
    edit_tensors(checkpoint, **{f"model.extra.{index}": torch.zeros(1) for index in range(7)})
    with pytest.raises(ModelError, match=r"model.extra.0, .*model.extra.4 and 2 more.*lacks a bias option"):
        load(checkpoint)


def test_missing_tensors_are_named(checkpoint):
    edit_tensors(checkpoint, **{"model.layers.1.self_attn.k_proj.weight": None, "lm_head.weight": None})
    with pytest.raises(ModelError, match=r"lacks tensors.*: lm_head.weight, model.layers.1.self_attn.k_proj.weight;"):
        load(checkpoint)


def test_misshapen_tensor(checkpoint):
    edit_tensors(checkpoint, **{"model.layers.1.mlp.up_proj.weight": torch.zeros(136, 63)})
    with pytest.raises(ModelError, match=r"model.layers.1.mlp.up_proj.weight has shape \[136, 63\].*\[136, 64\]"):
        load(checkpoint)


def test_integer_weights_are_refused(checkpoint):
    edit_tensors(checkpoint, **{"model.norm.weight": torch.ones(64, dtype=torch.int8)})
    with pytest.raises(ModelError, match=r"model.norm.weight is torch.int8; supported are float32"):
        load(checkpoint)


def test_truncated_safetensors(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model.safetensors is not a valid safetensors file.*fetch it again"):
        load(checkpoint)


def test_pickles_are_refused(checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickle only \(pytorch_model.bin\).*is refused.*save_pretrained"):
        load(checkpoint)


def test_no_weights_at_all(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no weights: expected model.safetensors.*load_format='dummy'"):
        load(checkpoint)
    assert load_model(checkpoint, device="cpu", load_format="dummy").spec.num_layers == 2


def test_missing_shard(sharded):
    next(sharded.glob("model-00002-*")).unlink()
    with pytest.raises(ModelError, match=r"names shards that are not there: model-00002-.*fetch them again"):
        load(sharded)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..",
                                   "..\\model.safetensors", "weights.bin", 7])
def test_index_may_not_point_elsewhere(sharded, shard):
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**weight_map, "model.norm.weight": shard})
    with pytest.raises(ModelError, match=r"a shard must be a .safetensors file right beside the index"):
        load(sharded)


@pytest.mark.parametrize("content, message", [("{", "can't be read as JSON"), ("{}", "has no weight_map"),
                                              ('{"weight_map": []}', "has no weight_map")])
def test_broken_index(sharded, content, message):
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match=message):
        load(sharded)


def test_a_preset_has_no_weights():
    with pytest.raises(ModelError, match=r"'qwen3-8b' is a shape without weights: use load_format='dummy'.*Qwen/Qwen3-8B"):
        load("qwen3-8b")


def test_unknown_load_format_and_dtype(checkpoint):
    with pytest.raises(ModelError, match=r"unknown load_format 'gguf'; there are auto, dummy"):
        load_model(checkpoint, device="cpu", load_format="gguf")
    with pytest.raises(ModelError, match=r"unsupported dtype 'int8'; supported are auto, float32"):
        load_model(checkpoint, device="cpu", dtype=torch.int8)


@pytest.mark.parametrize("dtype, expected", [(None, torch.float32), ("auto", torch.float32), ("float16", torch.float16),
                                             (torch.bfloat16, torch.bfloat16)])
def test_dtype(tmp_path, dtype, expected):
    make_checkpoint(tmp_path)
    edit_json(tmp_path / "config.json", dtype="bfloat16")
    decoder = load_model(tmp_path, device="cpu", dtype=dtype)
    assert {parameter.dtype for parameter in decoder.parameters()} == {expected}
    assert (decoder.spec.dtype, decoder.rotary.inv_freq.dtype) == ("bfloat16", torch.float32)


# ------------------------------------------------------------------------------------------------------ dummy


def dummy(path, seed=0) -> Decoder:
    return load_model(path, device="cpu", load_format="dummy", seed=seed)


def test_dummy_weights_depend_on_the_seed_alone(checkpoint):
    state = torch.random.get_rng_state()
    first = dummy(checkpoint)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(5)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), dummy(checkpoint).parameters()))
    assert not torch.equal(first.lm_head.weight, dummy(checkpoint, seed=1).lm_head.weight)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_dummy_logits_have_a_sensible_scale(family, tmp_path, cached):
    make_checkpoint(tmp_path, family, bias=True, layers=8)
    logits = cached(dummy(tmp_path)).run({0: list(range(40))})
    assert 0.5 < logits.std() < 2
    assert len(logits.argmax(-1).unique()) > 10


# -------------------------------------------------------------------------------------------------- tokenizer


def test_tokenizer(checkpoint):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    assert load_tokenizer("qwen3-8b") is None
    assert load_tokenizer(checkpoint) is None
    words = Tokenizer(WordLevel({"hello": 0, "[UNK]": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(checkpoint)
    assert load_tokenizer(checkpoint)("hello", add_special_tokens=False)["input_ids"] == [0]
    (checkpoint / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"the tokenizer in .* can't be read"):
        load_tokenizer(checkpoint)


# ---------------------------------------------------------------------------------------------------- imports


def test_presets_need_neither_torch_nor_transformers():
    code = ("import sys; from nanopd.models.spec import load_spec; load_spec('qwen3-8b'); "
            "assert not {'torch', 'transformers'} & sys.modules.keys()")
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


def test_transformers_is_imported_late():
    code = "import sys, nanopd.models.loader; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
