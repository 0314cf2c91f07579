"""nanoPD: a small LLM inference engine with a paged KV cache and prefill/decode disaggregation.

    from nanopd import LLM, SamplingParams

    llm = LLM("tiny")
    llm.generate(["What is 47+35?"], SamplingParams(temperature=0, max_tokens=16))

Importing the package loads nothing else: each public name brings its module in when it is first used, so
that the torch-free parts stay free of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanopd.cluster import Cluster
    from nanopd.config import SLO, ConfigError, Topology
    from nanopd.core import (
        BeamSearchParams,
        CompletionOutput,
        FinishReason,
        InvalidRequest,
        Overloaded,
        Request,
        RequestMetrics,
        RequestOutput,
        SamplingParams,
        TokenEvent,
    )
    from nanopd.llm import LLM
    from nanopd.models.resolve import ModelError
    from nanopd.workbook.check import check
    from nanopd.workbook.predict import predict

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "SLO",
    "BeamSearchParams",
    "Cluster",
    "CompletionOutput",
    "ConfigError",
    "FinishReason",
    "InvalidRequest",
    "ModelError",
    "Overloaded",
    "Request",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "TokenEvent",
    "Topology",
    "__version__",
    "check",
    "predict",
]

_HOMES = {
    "nanopd.cluster": ("Cluster",),
    "nanopd.config": ("SLO", "ConfigError", "Topology"),
    "nanopd.core": (
        "BeamSearchParams", "CompletionOutput", "FinishReason", "InvalidRequest", "Overloaded", "Request",
        "RequestMetrics", "RequestOutput", "SamplingParams", "TokenEvent",
    ),
    "nanopd.llm": ("LLM",),
    "nanopd.models.resolve": ("ModelError",),
    "nanopd.workbook.check": ("check",),
    "nanopd.workbook.predict": ("predict",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value  # the next look-up no longer comes here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
