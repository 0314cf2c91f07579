"""From a Hugging Face configuration to a ModelSpec. No torch; transformers only where a directory is read."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nanopd.config import ModelSpec, RopeScaling
from nanopd.models.resolve import ModelError, resolve_model

ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
ROPE_PARAMS = {  # what each kind of scaling can't do without
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("original_max_position_embeddings", "factor"),
}
DTYPES = ("float32", "float16", "bfloat16")
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "max_position_embeddings")


def load_spec(model: str | Path) -> ModelSpec:
    """The shape of a model: "tiny", a preset's name, a local directory or a hub name.

    Raises:
        ModelError: the model is not there, its configuration can't be read or is inconsistent, or it is not one
            of the supported architectures.
    """
    path = resolve_model(model, weights=False)
    return _preset_spec(path) if path.is_file() else _directory_spec(path)


def read_json(path: Path) -> dict[str, Any]:
    """Raises ModelError where the file is not a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} can't be read as JSON ({error}): fetch the file again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object, it holds a {type(content).__name__}: "
                         "fetch the file again")
    return content


def _preset_spec(path: Path) -> ModelSpec:
    # Presets are written out in full, so that transformers, which fills in defaults, isn't needed.
    raw = read_json(path)
    return _spec(SimpleNamespace(**raw), raw, _token_ids(raw, path))


def _directory_spec(directory: Path) -> ModelSpec:
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise ModelError(f"{directory} has no config.json: give the directory of a Hugging Face checkpoint "
                         "(config.json and *.safetensors)")
    raw = read_json(config_file)
    _check_supported(raw, config_file)

    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # what an invalid one raises varies with the fault and with the version
        raise ModelError(f"{config_file} is not a valid {raw['model_type']} configuration: {error}") from error

    eos_token_ids = ()
    generation_file = directory / "generation_config.json"
    if generation_file.is_file():
        eos_token_ids = _token_ids(read_json(generation_file), generation_file)
    try:
        return _spec(config, raw, eos_token_ids or _token_ids(raw, config_file))
    except ModelError as error:
        raise ModelError(f"{config_file}: {error}") from error


def _token_ids(raw: dict[str, Any], path: Path) -> tuple[int, ...]:
    ids = raw.get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(type(token) is int for token in ids):
        raise ModelError(f"{path}: eos_token_id must be an integer or a list of integers, got {ids!r}")
    return tuple(ids)


def _check_supported(raw: dict[str, Any], path: Path) -> None:
    """What transformers may read and we can't run, in words of ours and before it is imported."""
    kind, *names = map(str, [raw.get("model_type"), *(raw.get("architectures") or [])])
    if kind not in ARCHITECTURES or not set(names) <= {ARCHITECTURES[kind]}:
        raise ModelError(f"{path}: unsupported architecture {' '.join([kind, *names])}; supported are "
                         + ", ".join(f"{kind} ({name})" for kind, name in ARCHITECTURES.items()))
    if raw.get("quantization_config"):
        raise ModelError(f"{path}: quantized checkpoints are not supported; take the original one "
                         f"({', '.join(DTYPES)})")
    if raw.get("use_sliding_window") or set(raw.get("layer_types") or ()) - {"full_attention"}:
        raise ModelError(f"{path}: sliding window attention is not supported, only full attention; set "
                         "use_sliding_window to false if the context stays within the window")
    if raw.get("hidden_act", "silu") != "silu":
        raise ModelError(f"{path}: unsupported hidden_act {raw['hidden_act']!r}; supported is 'silu'")


def _spec(config: Any, raw: dict[str, Any], eos_token_ids: tuple[int, ...]) -> ModelSpec:
    """`config` has the defaults filled in; `raw` is the JSON as written."""
    architecture = raw["model_type"]
    attention_bias = bool(getattr(config, "attention_bias", False))
    head_dim = getattr(config, "head_dim", None)
    if head_dim is None:
        head_dim = config.hidden_size // max(config.num_attention_heads, 1)
    _check_sizes(config, head_dim)
    if any(not 0 <= token < config.vocab_size for token in eos_token_ids):
        raise ModelError(f"eos_token_id {list(eos_token_ids)} is out of range: the vocabulary has {config.vocab_size} tokens")
    rope_theta, rope_scaling, max_position = _rope(config)
    return ModelSpec(
        architecture=architecture,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        max_position=max_position,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tie_word_embeddings=config.tie_word_embeddings,
        qkv_bias=architecture == "qwen2" or attention_bias,
        output_bias=architecture != "qwen2" and attention_bias,
        mlp_bias=architecture == "llama" and config.mlp_bias,
        qk_norm=architecture == "qwen3",
        eos_token_ids=eos_token_ids,
        dtype=_dtype(raw),
    )


def _check_sizes(config: Any, head_dim: Any) -> None:
    for name, size in [*((name, getattr(config, name)) for name in SIZES), ("head_dim", head_dim)]:
        if type(size) is not int or size < 1:
            raise ModelError(f"{name} must be a positive integer, got {size!r}")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:
        raise ModelError(f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({kv_heads})")
    if head_dim % 2:
        raise ModelError(f"head_dim must be even for rotary embeddings, got {head_dim}")


def _dtype(raw: dict[str, Any]) -> str:
    dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    if dtype not in DTYPES:
        raise ModelError(f"unsupported dtype {dtype!r}; supported are {', '.join(DTYPES)}")
    return dtype


def _rope(config: Any) -> tuple[float, RopeScaling, int]:
    """Base, scaling, and how many positions the model is good for.

    transformers 5 gathers all of it in `rope_parameters`, also from the older `rope_theta` and `rope_scaling`.
    """
    params = dict(config.rope_parameters or {})
    theta = params.pop("rope_theta", 10000.0)
    kinds = {params.pop("rope_type", None), params.pop("type", None)} - {None} or {"default"}
    kind = kinds.pop()
    if kind not in ROPE_PARAMS or kinds or any(isinstance(value, dict) for value in params.values()):
        raise ModelError(f"unsupported rope scaling {kind!r}; supported are {', '.join(ROPE_PARAMS)}, "
                         "the same in all layers")
    if params.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError("partial_rotary_factor is not supported: the whole head must be rotated")
    max_position = config.max_position_embeddings
    if kind in ("llama3", "yarn"):
        params.setdefault("original_max_position_embeddings", max_position)
    _check_positive(kind, "rope_theta", theta)
    for name in ROPE_PARAMS[kind]:
        if kind == "yarn" and name == "factor" and params.get(name) is None:
            params[name] = max_position / params["original_max_position_embeddings"]
        _check_positive(kind, name, params.get(name))
    if kind == "yarn":  # checkpoints that offer it as an option leave max_position_embeddings as it was
        max_position = max(max_position, int(params["factor"] * params["original_max_position_embeddings"]))
    return float(theta), RopeScaling(kind, params), max_position


def _check_positive(kind: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise ModelError(f"rope scaling {kind!r} needs {name}, a number above 0; got {value!r}")
