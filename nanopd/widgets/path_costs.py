"""What a request is predicted to take on either path, term by term: by the seed's five parameters, or by a fitted cost model.

Both take every worker to be free: nothing queues. Where a request disaggregates, it has a prefill worker to itself. No figures.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from nanopd.cost_model.analytical import CostModel, StepWork
from nanopd.cost_model.fit import predicted_seconds
from nanopd.cost_model.measurements import DecodeRow, Measurement, MixedRow, PrefillRow
from nanopd.cost_model.profile import Profile
from nanopd.cost_model.seed import SeedModel, fit_seed

MODES = ("collocated", "disaggregated")
TERMS = ("prefill", "transfer", "decode", "interference", "others")
Terms = dict[str, float]  # seconds by name; names from TERMS


@dataclass(frozen=True)
class Request:
    """What the sliders say. Every sequence of the load is taken to be like it."""

    prompt_tokens: int
    output_tokens: int
    load: int  # sequences that decode meanwhile


class PathCosts(Protocol):
    def paths(self, request: Request) -> dict[str, Terms]:
        """By mode, in the order of MODES."""

    def row_seconds(self, row: Measurement) -> float:
        """What is predicted for something that was measured."""


@dataclass(frozen=True)
class FiveParameters:
    """The seed's formula. A mixed step is charged what the formula charges its prompt, and one step of decodes."""

    model: SeedModel

    def paths(self, request: Request) -> dict[str, Terms]:
        model, length = self.model, request.prompt_tokens
        prefill = model.prefill_seconds(length)
        decode = request.output_tokens * model.decode_step_seconds(request.load + 1)
        return {"collocated": {"prefill": prefill, "interference": model.interference_seconds(length, request.load), "decode": decode},
                "disaggregated": {"prefill": prefill, "transfer": model.transfer_seconds(length), "decode": decode}}

    def row_seconds(self, row: Measurement) -> float:
        model = self.model
        if isinstance(row, PrefillRow):
            return model.prefill_seconds(row.new_tokens)
        if isinstance(row, DecodeRow):
            return model.decode_step_seconds(row.decodes)
        assert isinstance(row, MixedRow)
        return (model.prefill_seconds(row.new_tokens) + model.interference_seconds(row.new_tokens, row.decodes)
                + model.decode_step_seconds(row.decodes))


@dataclass(frozen=True)
class FittedModel:
    """The cost model that the router uses. "others": by how much the request holds up all of the load together."""

    model: CostModel

    def paths(self, request: Request) -> dict[str, Terms]:
        model, length, steps = self.model, request.prompt_tokens, request.output_tokens - 1
        mean_context = length + request.output_tokens // 2
        running = StepWork(decodes=request.load, context_tokens=request.load * mean_context)
        here, there = model.request(length, 0, steps, running), model.request(0, length, steps, running)
        alone = model.request(length, 0, 0).prefill_seconds
        return {"collocated": {"prefill": here.prefill_seconds, "decode": here.decode_seconds,
                               "others": request.load * (here.delay_by_prefill_seconds + here.delay_by_decode_seconds)},
                "disaggregated": {"prefill": alone, "transfer": self._transfer_seconds(length, alone),
                                  "decode": there.decode_seconds, "others": request.load * there.delay_by_decode_seconds}}

    def _transfer_seconds(self, length: int, prefill_seconds: float) -> float:
        link = max(self.model.transfers, key=lambda each: each.bytes_per_second)
        return self.model.transfer_seconds(link, length, prefill_seconds)

    def row_seconds(self, row: Measurement) -> float:
        return predicted_seconds(self.model, row)


def five_of(profile: Profile) -> SeedModel:
    """The seed's five parameters, fitted to a profile's rows. Where no mixed steps were measured, gamma is fitted to what
    the profile's model predicts for some.

    Raises:
        CostModelError: nothing was transferred.
    """
    measured = profile.measurements
    if not measured.mixed:
        rows = [MixedRow(1.0, length, 0, decodes, decodes * length) for length in (512, 2048) for decodes in (4, 16)]
        predicted = tuple(replace(row, seconds=predicted_seconds(profile.cost, row)) for row in rows)
        measured = replace(measured, mixed=predicted)
    return fit_seed(measured, profile.cost.shape.kv_bytes_per_token)
