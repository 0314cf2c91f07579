"""From measured rows to the constants of the cost model, with what is known about their error. Needs scipy.

Residuals are relative, predicted / measured - 1: a step of 1 ms counts as much as one of 1 s. Those beyond ROBUST_FROM
count less than by their square, so that a hiccup of the machine doesn't pull everything along.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from nanopd.cost_model.analytical import (
    LINK_SHARPNESS,
    CostModel,
    DecodeCost,
    MixedCost,
    Parameters,
    PrefillCost,
    Shape,
    StepWork,
    TransferCost,
    attended_pairs,
    soft_max,
)
from nanopd.cost_model.checks import CostModelError
from nanopd.cost_model.measurements import (
    DecodeRow,
    Measurement,
    Measurements,
    MixedRow,
    PrefillRow,
    TransferRow,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROBUST_FROM = 0.02
CONFIDENCE = 0.95
SHARPEST = 8.0  # from here on it is a maximum, as far as one can measure
USUAL_SHARPNESS = 3.0  # where there are too few rows to see it: of matrix products on an H200 from 1 to 2048 tokens
ROWS_FOR_EACH = 2  # constant, where sharpness is one of them: it bends to whatever noise there is
FOLDS = 5
DEGENERATE = 1e-6  # least to largest singular value of what the rows vary


@dataclass(frozen=True)
class Fit:
    """How well constants are known. Errors are predicted / measured - 1, in the order of the rows."""

    quantity: str
    intervals: dict[str, tuple[float, float | None]]  # of 95% confidence; None: the rows set no upper bound
    assumed: tuple[str, ...]  # constants that too few rows were there for
    errors: tuple[float, ...]
    held_out_errors: tuple[float, ...]  # of rows in turn left out of the fit; without those that it can't do without

    @property
    def median_error(self) -> float:
        return error_quantile(self.errors, 0.5)

    @property
    def p95_error(self) -> float:
        return error_quantile(self.errors, 0.95)

    @property
    def held_out_median_error(self) -> float:
        """nan where no row could be left out."""
        return error_quantile(self.held_out_errors, 0.5)

    @property
    def held_out_p95_error(self) -> float:
        """nan where no row could be left out."""
        return error_quantile(self.held_out_errors, 0.95)


def error_quantile(errors: Sequence[float], share: float) -> float:
    """The least size of error that so large a share of them does not exceed; nan of none."""
    return sorted(map(abs, errors))[math.ceil(share * len(errors)) - 1] if errors else math.nan


# ------------------------------------------------------------------------------------------- what is fitted


def fit(measurements: Measurements, shape: Shape) -> tuple[CostModel, tuple[Fit, ...]]:
    """A cost model and how well each of its parts is known.

    Without mixed rows, decodes are taken to add to a prompt's step what they add to a step of decodes.

    Raises:
        CostModelError: rows are too few, or don't vary what they have to.
    """
    prefill, of_prefill = fit_prefill(measurements.prefill)
    decode, of_decode = fit_decode(measurements.decode)
    fits = [of_prefill, of_decode]
    mixed = MixedCost.assumed(prefill, decode)
    if measurements.mixed:
        mixed, of_mixed = fit_mixed(measurements.mixed)
        fits.append(of_mixed)
    links = sorted({(row.source, row.destination, row.transport) for row in measurements.transfer})
    transfers = [fit_transfer([row for row in measurements.transfer if (row.source, row.destination, row.transport) == link])
                 for link in links]
    fits += [of_transfer for _, of_transfer in transfers]
    message = median(row.seconds for row in measurements.messages) if measurements.messages else 0.0
    return CostModel(prefill, decode, mixed, tuple(cost for cost, _ in transfers), shape, message), tuple(fits)


def fit_prefill(rows: Sequence[PrefillRow]) -> tuple[PrefillCost, Fit]:
    tokens = _column(row.new_tokens for row in rows)
    pairs = _column(attended_pairs(row.new_tokens, row.cached_tokens) for row in rows)
    return _Problem("prefill", PrefillCost(1, 1, 1, USUAL_SHARPNESS), ("floor_seconds", "token_seconds", "pair_seconds"),
                    (tokens, pairs), _column(row.seconds for row in rows),
                    "prompts of several lengths, from the quickest to the longest").solve()


def fit_decode(rows: Sequence[DecodeRow]) -> tuple[DecodeCost, Fit]:
    decodes, contexts = _column(row.decodes for row in rows), _column(row.context_tokens for row in rows)
    return _Problem("decode", DecodeCost(1, 1, 1, USUAL_SHARPNESS),
                    ("floor_seconds", "sequence_seconds", "context_token_seconds"),
                    (decodes, contexts), _column(row.seconds for row in rows),
                    "several batches and, in batches of one size, several contexts").solve()


def fit_mixed(rows: Sequence[MixedRow]) -> tuple[MixedCost, Fit]:
    tokens = _column(row.new_tokens + row.decodes for row in rows)
    pairs = _column(attended_pairs(row.new_tokens, row.cached_tokens) for row in rows)
    decodes, contexts = _column(row.decodes for row in rows), _column(row.context_tokens for row in rows)
    return _Problem("mixed", MixedCost(1, 1, 1, 1, 1, USUAL_SHARPNESS),
                    ("floor_seconds", "token_seconds", "pair_seconds", "sequence_seconds", "context_token_seconds"),
                    (tokens, pairs, decodes, contexts), _column(row.seconds for row in rows),
                    "prompts of several lengths beside several batches and, beside batches of one size, several contexts").solve()


def fit_transfer(rows: Sequence[TransferRow]) -> tuple[TransferCost, Fit]:
    """Of one pair of devices and one transport."""
    links = {(row.source, row.destination, row.transport) for row in rows}
    _require(len(links) == 1, f"transfer: fit the rows of one pair of devices and one transport at a time, not of {len(links)}")
    link, = links
    cost, found = _Problem(f"transfer {link[0]} to {link[1]} by {link[2]}", _Send(1, 1), ("latency_seconds", "byte_seconds"),
                           (_column(row.num_bytes for row in rows),), _column(row.seconds for row in rows),
                           "sends of several sizes").solve()
    intervals = dict(found.intervals)
    intervals["bytes_per_second"] = _inverse(intervals.pop("byte_seconds"))
    return TransferCost(*link, cost.latency_seconds, 1 / cost.byte_seconds), replace(found, intervals=intervals)


@dataclass(frozen=True)
class _Send(Parameters):
    """A transfer's constants as they stand before what they are multiplied with."""

    latency_seconds: float
    byte_seconds: float

    def seconds(self, num_bytes: float) -> float:
        return soft_max(self.latency_seconds, num_bytes * self.byte_seconds, LINK_SHARPNESS)


def _inverse(interval: tuple[float, float | None]) -> tuple[float, float | None]:
    low, high = interval
    return 0.0 if high is None else 1 / high, 1 / low if low else None


# ------------------------------------------------------------------------------------------- how it is fitted


@dataclass(frozen=True)
class _Problem:
    """To find the constants of which `template.seconds(*columns)` comes nearest to `measured`.

    Arrays have a number for each row. `linear` names the constants that stand before 1 and before each of the columns,
    as far as nothing hides behind anything else.
    """

    quantity: str
    template: Any  # a dataclass of constants, to be replaced
    linear: tuple[str, ...]
    columns: tuple[NDArray, ...]
    measured: NDArray
    to_vary: str

    def solve(self) -> tuple[Any, Fit]:
        import numpy as np

        num_rows = len(self.measured)
        every = np.arange(num_rows)
        _require(num_rows > len(self.linear), f"{self.quantity}: {num_rows} rows are too few for {len(self.linear)} "
                 f"constants; measure at least {len(self.linear) + 1}: {self.to_vary}")
        _require(self._determines(every), f"{self.quantity}: the {num_rows} rows don't tell {', '.join(self.linear)} apart; "
                 f"measure {self.to_vary}")
        names, assumed = self.linear, ()
        if hasattr(self.template, "sharpness"):
            is_seen = num_rows >= ROWS_FOR_EACH * (len(names) + 1)
            names, assumed = (names + ("sharpness",), ()) if is_seen else (names, ("sharpness",))
        cost, jacobian, loss = self._least_squares(names, every)
        held_out: dict[int, float] = {}
        for fold in _folds(num_rows):
            kept = np.setdiff1d(every, fold)
            if len(kept) >= len(names) and self._determines(kept):
                without, _, _ = self._least_squares(names, kept, near=cost)
                held_out |= zip(fold, self._errors(without, fold).tolist())
        return cost, Fit(self.quantity, _intervals(cost, names, jacobian, loss), assumed,
                         tuple(self._errors(cost, every).tolist()), tuple(held_out[row] for row in sorted(held_out)))

    def _errors(self, cost: Any, rows: NDArray | list[int]) -> NDArray:
        return cost.seconds(*(column[rows] for column in self.columns)) / self.measured[rows] - 1

    def _determines(self, rows: NDArray) -> bool:
        """Whether these rows are enough, and differ in enough ways."""
        import numpy as np

        weighted = self._design(rows)
        values = np.linalg.svd(weighted / np.linalg.norm(weighted, axis=0), compute_uv=False)
        return len(rows) >= len(self.linear) and values[-1] > DEGENERATE * values[0]

    def _design(self, rows: NDArray) -> NDArray:
        """[rows, len(linear)] shares of the measured time that each constant explains, were it 1."""
        import numpy as np

        return np.stack([np.ones(len(rows)), *(column[rows] for column in self.columns)], axis=1) / self.measured[rows, None]

    def _least_squares(self, names: tuple[str, ...], rows: NDArray, near: Any = None) -> tuple[Any, NDArray, float]:
        """The cost, the residuals' Jacobian by its constants, and twice the loss. `near`: a cost to begin from."""
        import numpy as np
        from scipy.optimize import least_squares

        has_sharpness = len(names) > len(self.linear)
        # What a constant would be if it explained all.
        scales = np.append(1 / np.median(self._design(rows), axis=0), [1.0] * has_sharpness)
        starts = self._starts(rows, scales, has_sharpness) if near is None else [[getattr(near, name) for name in names] / scales]
        low = [0.0] * len(self.linear) + [1.0] * has_sharpness
        high = [np.inf] * len(self.linear) + [SHARPEST] * has_sharpness

        def cost_at(x: NDArray) -> Any:
            # Kept off 0, where bounds may leave a constant.
            return replace(self.template, **dict(zip(names, map(float, np.maximum(x * scales, 1e-300)))))

        found = min((least_squares(lambda x: self._errors(cost_at(x), rows), start, bounds=(low, high),
                                   loss="soft_l1", f_scale=ROBUST_FROM) for start in starts),
                    key=lambda each: each.cost)
        return cost_at(found.x), found.jac / scales, 2 * found.cost

    def _starts(self, rows: NDArray, scales: NDArray, has_sharpness: bool) -> list[list[float]]:
        """In units of `scales`: as if everything added up, with the sharpness here and there."""
        import numpy as np
        from scipy.optimize import nnls

        added = nnls(self._design(rows) * scales[: len(self.linear)], np.ones(len(rows)))[0]
        begin = np.maximum(added, 1e-3).tolist()  # not on a bound
        return [[*begin, sharpness] for sharpness in (1.2, 3.0, 6.0)] if has_sharpness else [begin]


def _intervals(cost: Parameters, names: tuple[str, ...], jacobian: NDArray, loss: float) -> dict[str, tuple[float, float | None]]:
    """From the covariance that the Jacobian and the spread of the residuals give."""
    import numpy as np
    from scipy.special import stdtrit

    freedom = len(jacobian) - len(names)
    norms = np.maximum(np.linalg.norm(jacobian, axis=0), 1e-150)  # a constant may not be seen at all
    _, values, axes = np.linalg.svd(jacobian / norms, full_matrices=False)
    spread = np.linalg.norm(axes.T / np.maximum(values, 1e-12), axis=1) / norms
    reach = spread * np.sqrt(loss / freedom) * stdtrit(freedom, (1 + CONFIDENCE) / 2)
    return {name: _interval(name, getattr(cost, name), by) for name, by in zip(names, reach.tolist())}


def _interval(name: str, value: float, reach: float) -> tuple[float, float | None]:
    """What is uncertain by more than a thousand times itself is not known at all."""
    least, most = (1.0, SHARPEST) if name == "sharpness" else (0.0, math.inf)
    low, high = (max(least, value - reach), min(most, value + reach)) if reach < 1e3 * value else (least, most)
    return low, high if math.isfinite(high) else None


def _folds(num_rows: int) -> list[list[int]]:
    """Rows that are left out together, each once, in no order that a grid could have."""
    order = random.Random(0).sample(range(num_rows), num_rows)
    count = min(FOLDS, num_rows)
    return [order[fold::count] for fold in range(count)]


def _column(values: Iterable[float]) -> NDArray:
    import numpy as np

    return np.array(list(values), dtype=float)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise CostModelError(message)


# ------------------------------------------------------------------------------------------ on other rows


def prediction_errors(model: CostModel, measurements: Measurements) -> dict[str, tuple[float, ...]]:
    """Predicted / measured - 1 of rows that need not be those it was fitted to, by quantity."""
    rows = {"prefill": measurements.prefill, "decode": measurements.decode, "mixed": measurements.mixed,
            "transfer": measurements.transfer}
    return {quantity: tuple(predicted_seconds(model, row) / row.seconds - 1 for row in those)
            for quantity, those in rows.items() if those}


def predicted_seconds(model: CostModel, row: Measurement) -> float:
    if isinstance(row, TransferRow):
        return model.transfer(row.source, row.destination, row.transport).seconds(row.num_bytes)
    work = StepWork()
    if isinstance(row, (PrefillRow, MixedRow)):
        work += StepWork.chunk(row.new_tokens, row.cached_tokens)
    if isinstance(row, (DecodeRow, MixedRow)):
        work += StepWork(decodes=row.decodes, context_tokens=row.context_tokens)
    return model.step_seconds(work)
