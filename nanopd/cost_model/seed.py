"""The earlier system's cost model: five parameters, kept exactly as published so that others can be compared with it.

    t_prefill  = alpha L
    t_transfer = L bytes_per_token / bandwidth
    t_decode   = beta max(1, B / batch_thresh)                          for each token of the answer
    collocated adds gamma L min(load, batch_thresh) / batch_thresh      the decodes that its prefill holds up
    disaggregated wins when gamma / transfer_rate > batch_thresh / load, where transfer_rate = t_transfer / L

Its faults stand here as they were. `analytical` is the model without them.

- gamma was measured on steps that held the prefill too, so a collocated request pays for its prefill twice: by alpha
  and by gamma.
- Nothing waits: there is no term for a queue, neither of prompts nor for the link.
- `load` is summed over both GPUs, though a request shares only one of them.
- Attention makes prefill quadratic and decode dependent on the context; both are missing here.
- The rule that decides leaves out the minimum that the costs have. The two agree while gamma is above the transfer rate.
  Below it the costs never cross, but the rule still sends requests away once load is above batch_thresh transfer_rate / gamma.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nanopd.cost_model.checks import Checked, CostModelError
from nanopd.cost_model.measurements import Measurements

PRESETS = Path(__file__).parent / "presets" / "seed"


@dataclass(frozen=True)
class SeedModel(Checked):
    """The five parameters and the size of a token's keys and values, in the units of their publication."""

    alpha_ms_per_token: float  # prefill
    beta_ms: float  # a decode step of at most batch_thresh sequences
    batch_thresh: float  # sequences
    gamma_ms_per_token: float  # what a prompt's token costs those that decode beside it
    bandwidth_gb_s: float  # 1e9 bytes a second
    bytes_per_token: float

    # What each term takes, in seconds.

    def prefill_seconds(self, prompt_tokens: int) -> float:
        return self.alpha_ms_per_token * prompt_tokens / 1e3

    def transfer_seconds(self, prompt_tokens: int) -> float:
        return prompt_tokens * self.bytes_per_token / (self.bandwidth_gb_s * 1e9)

    def decode_step_seconds(self, batch: int) -> float:
        return self.beta_ms / 1e3 * max(1, batch / self.batch_thresh)

    def interference_seconds(self, prompt_tokens: int, load: int) -> float:
        return self.gamma_ms_per_token / 1e3 * prompt_tokens * min(load, self.batch_thresh) / self.batch_thresh

    # What a request takes on either path, in seconds.

    def collocated_seconds(self, prompt_tokens: int, output_tokens: int, batch: int, load: int) -> float:
        return (self.prefill_seconds(prompt_tokens) + self.interference_seconds(prompt_tokens, load)
                + output_tokens * self.decode_step_seconds(batch))

    def disaggregated_seconds(self, prompt_tokens: int, output_tokens: int, batch: int) -> float:
        return (self.prefill_seconds(prompt_tokens) + self.transfer_seconds(prompt_tokens)
                + output_tokens * self.decode_step_seconds(batch))

    # The rule that decides.

    @property
    def gamma_over_transfer_rate(self) -> float:
        """How much dearer a prompt's token is to those beside it than to move."""
        return self.gamma_ms_per_token / (self.transfer_seconds(1) * 1e3)

    def prefers_disaggregated(self, load: int) -> bool:
        """Whatever the prompt's length. `load`: sequences being decoded, in the whole system."""
        return self.gamma_over_transfer_rate * load > self.batch_thresh

    @property
    def crossover_load(self) -> int:
        """The least load, of at least one sequence, at which the rule disaggregates."""
        return max(1, math.floor(self.batch_thresh / self.gamma_over_transfer_rate) + 1)


def seed_preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.json"))


def seed_preset(name: str) -> SeedModel:
    """The published parameters of Qwen3-8B on a kind of GPU. Raises CostModelError where there are none."""
    if name not in seed_preset_names():
        raise CostModelError(f"no parameters of the seed's model for {name!r}; there are {', '.join(seed_preset_names())}")
    return SeedModel(**json.loads((PRESETS / f"{name}.json").read_text(encoding="utf-8")))


# ------------------------------------------------------------------------------------------------------ the fit

MOST_SEQUENCES = 256  # that batch_thresh is looked for up to


def fit_seed(measurements: Measurements, bytes_per_token: float) -> SeedModel:
    """The five parameters by least squares, gamma as it was measured then: all that a step with a prompt takes longer than
    one of its decodes alone. The bandwidth is the quickest transport's.

    Raises:
        CostModelError: a kind of row is missing; the message says which.
    """
    missing = [kind for kind in ("prefill", "decode", "mixed", "transfer") if not getattr(measurements, kind)]
    if missing:
        raise CostModelError(f"the seed's five parameters need rows of each kind; there are none of {', '.join(missing)}")
    alpha, _ = _slope((row.new_tokens, row.seconds) for row in measurements.prefill)
    by_thresh = {thresh: _slope((max(1, row.decodes / thresh), row.seconds) for row in measurements.decode)
                 for thresh in range(1, MOST_SEQUENCES + 1)}
    thresh = min(by_thresh, key=lambda thresh: by_thresh[thresh][1])
    beta = by_thresh[thresh][0]
    gamma, _ = _slope((row.new_tokens * min(row.decodes, thresh) / thresh, row.seconds - beta * max(1, row.decodes / thresh))
                      for row in measurements.mixed)
    links = {(row.source, row.destination, row.transport) for row in measurements.transfer}
    byte_seconds = min(_slope((row.num_bytes, row.seconds) for row in measurements.transfer
                              if (row.source, row.destination, row.transport) == link)[0] for link in links)
    return SeedModel(alpha_ms_per_token=alpha * 1e3, beta_ms=beta * 1e3, batch_thresh=thresh,
                     gamma_ms_per_token=gamma * 1e3, bandwidth_gb_s=1 / (byte_seconds * 1e9), bytes_per_token=bytes_per_token)


def _slope(points: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Of the line through 0 with the least squares, and their sum."""
    points = list(points)
    slope = sum(x * y for x, y in points) / sum(x * x for x, _ in points)
    return slope, sum((y - slope * x) ** 2 for x, y in points)
