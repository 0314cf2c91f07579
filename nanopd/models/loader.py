"""From a name to a decoder with weights, and to its tokenizer. Safetensors only: a pickle could run code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nanopd.config import ModelSpec
from nanopd.models.decoder import Decoder
from nanopd.models.parameters import FusedLinear
from nanopd.models.resolve import ModelError, resolve_model
from nanopd.models.spec import DTYPES, load_spec, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ModelError", "load_model", "load_spec", "load_tokenizer", "resolve_dtype", "resolve_model"]

LOAD_FORMATS = ("auto", "dummy")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_model(
    model: str | Path,
    *,
    device: torch.device | str,
    shape: ModelSpec | None = None,
    dtype: torch.dtype | str | None = None,
    load_format: str = "auto",
    seed: int = 0,
) -> Decoder:
    """A decoder on `device` with the checkpoint's weights, or with random ones for `load_format="dummy"`.

    `shape`: what `load_spec` says of the model, where that is known.
    `dtype`: None or "auto" takes float32 on a CPU and the checkpoint's own elsewhere.
    `seed` is for dummy weights.

    Raises:
        ModelError: as `load_spec` does; or the weights are missing, not safetensors, or don't fit the
            configuration.
    """
    if load_format not in LOAD_FORMATS:
        raise ModelError(f"unknown load_format {load_format!r}; there are {', '.join(LOAD_FORMATS)}")
    device = torch.device(device)
    spec = shape or load_spec(model)
    shards = [] if load_format == "dummy" else _shards(resolve_model(model), model)
    decoder = Decoder(spec, device=device, dtype=resolve_dtype(dtype, spec, device)).eval()
    if load_format == "dummy":
        _fill_with_noise(decoder, seed)
    else:
        _load_weights(decoder, shards)
    return decoder


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer; None where it has none, as presets don't.

    Raises:
        ModelError: the model is not there, or its tokenizer can't be read.
    """
    path = resolve_model(model, weights=False)
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        return None

    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raise plain Exception for a broken file
        raise ModelError(f"the tokenizer in {path} can't be read: {error}") from error


def resolve_dtype(dtype: torch.dtype | str | None, spec: ModelSpec, device: torch.device) -> torch.dtype:
    """As `load_model` does. Raises ModelError for one that is not supported."""
    if dtype in (None, "auto"):
        dtype = "float32" if device.type == "cpu" else spec.dtype
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ModelError(f"unsupported dtype {name!r}; supported are auto, {', '.join(DTYPES)}")
    return getattr(torch, name)


def _fill_with_noise(decoder: Decoder, seed: int) -> None:
    """Random weights that keep activations at a scale of 1, so that nothing overflows and logits differ."""
    generators: dict[torch.device, torch.Generator] = {}
    for name, parameter in decoder.named_parameters():
        if parameter.device not in generators:
            generators[parameter.device] = torch.Generator(parameter.device).manual_seed(seed)
        if "norm" in name:
            parameter.fill_(1.0)
        else:
            std = 0.02 if name.endswith("bias") else parameter.shape[-1] ** -0.5
            parameter.normal_(std=std, generator=generators[parameter.device])


# ------------------------------------------------------------------------------------------------ checkpoints


def _shards(path: Path, model: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint: a single one, or those that the index names."""
    if path.is_file():
        hub_name = read_json(path)["_name_or_path"]
        raise ModelError(f"the preset {str(model)!r} is a shape without weights: use load_format='dummy' for "
                         f"random ones, or load {hub_name!r} from the hub")
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        return _shards_of_index(index)
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
    if pickles:
        raise ModelError(f"{path} has weights as pickle only ({_listing(pickles)}), and a pickle is refused, "
                         "because loading one can run any code. Convert it where you trust it: "
                         "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR) writes safetensors")
    raise ModelError(f"{path} has no weights: expected model.safetensors, or model.safetensors.index.json with "
                     "its shards; use load_format='dummy' to run with random weights")


def _shards_of_index(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map from tensors to files: fetch the file again")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise ModelError(f"{index} names the shard {name!r}; a shard must be a .safetensors file right "
                             "beside the index")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ModelError(f"{index} names shards that are not there: {_listing(missing)}; fetch them again")
    return [index.parent / name for name in names]


def _load_weights(decoder: Decoder, shards: list[Path]) -> None:
    """Copy every tensor to its place, one at a time. Names and shapes are checked before any is read."""
    from safetensors import SafetensorError, safe_open

    targets = _targets(decoder)
    try:
        shapes = {}
        for shard in shards:
            with safe_open(shard, framework="pt") as file:
                shapes.update({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118
        _check_tensors(shapes, targets, decoder.spec, shards[0].parent)
        for shard in shards:
            with safe_open(shard, framework="pt") as file:
                for name in targets.keys() & set(file.keys()):
                    targets[name].copy_(_checked_dtype(file.get_tensor(name), name))
    except SafetensorError as error:
        raise ModelError(f"{shard} is not a valid safetensors file ({error}): fetch it again") from error


def _targets(decoder: Decoder) -> dict[str, Tensor]:
    """Where each of the checkpoint's tensors goes, by its name there: parameters, or a fused one's parts."""
    targets: dict[str, Tensor] = {}
    for module_name, module in decoder.named_modules():
        prefix = module_name if module_name == "lm_head" else f"model.{module_name}"
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, FusedLinear):
                parent = prefix.rpartition(".")[0]
                views = module.split(parameter.data, dim=0)
                targets.update({f"{parent}.{part}.{name}": view for part, view in zip(module.parts, views)})
            else:
                targets[f"{prefix}.{name}"] = parameter.data
    return targets


def _check_tensors(shapes: dict[str, tuple[int, ...]], targets: dict[str, Tensor], spec: ModelSpec,
                   directory: Path) -> None:
    missing = sorted(targets.keys() - shapes.keys())
    if missing:
        raise ModelError(f"{directory} lacks tensors that its configuration asks for: {_listing(missing)}; "
                         "the checkpoint is incomplete, or config.json is another model's")
    for name, target in targets.items():
        if shapes[name] != tuple(target.shape):
            raise ModelError(f"{directory}: tensor {name} has shape {list(shapes[name])}, and its configuration "
                             f"asks for {list(target.shape)}; config.json is another model's")
    extra = sorted(name for name in shapes.keys() - targets.keys() if not _is_redundant(name, spec))
    if extra:
        raise ModelError(f"{directory} has tensors that a {spec.architecture} model of its configuration has no "
                         f"use for: {_listing(extra)}; config.json is another model's, or lacks a bias option")


def _is_redundant(name: str, spec: ModelSpec) -> bool:
    """Older checkpoints save rotary frequencies, and some the head that is tied to the embeddings."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and spec.tie_word_embeddings)


def _checked_dtype(tensor: Tensor, name: str) -> Tensor:
    if str(tensor.dtype).removeprefix("torch.") not in DTYPES:
        raise ModelError(f"tensor {name} is {tensor.dtype}; supported are {', '.join(DTYPES)}: take the "
                         "checkpoint that is not quantized")
    return tensor


def _listing(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
