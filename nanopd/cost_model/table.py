"""A profile as a table: what was fitted, how well it is known, and how far off its predictions are."""

from __future__ import annotations

import math
from itertools import zip_longest
from textwrap import wrap
from typing import TYPE_CHECKING

from nanopd.cost_model.analytical import CostModel, Parameters

if TYPE_CHECKING:
    from rich.table import Table

    from nanopd.cost_model.fit import Fit
    from nanopd.cost_model.profile import Profile


QUANTITY_WIDTH = 16  # of a terminal's 80 columns
NAMES = {"bytes_per_second": "bytes/s"}


def table(profile: Profile) -> Table:
    """A row for each constant, in seconds where its name has no other unit, and one for messages where they were measured.
    Errors are |predicted / measured - 1| of rows left out of the fit."""
    from rich import box
    from rich.table import Table

    title = f"{profile.model}, {profile.dtype}, on {profile.device}"
    result = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold",
                   pad_edge=False, show_edge=False, collapse_padding=True)
    result.add_column("quantity", no_wrap=True)
    for heading in ("constant", "value", "95% interval"):
        result.add_column(heading, justify="left" if heading == "constant" else "right", no_wrap=True)
    for heading in ("median\nerror", "p95\nerror"):
        result.add_column(heading, justify="right", no_wrap=True)
    for fit, constants in zip(profile.fits, _fitted(profile.cost, profile.fits), strict=True):
        errors = [_percent(fit.held_out_median_error), _percent(fit.held_out_p95_error)]
        of_each = [(NAMES.get(name, name.removesuffix("_seconds")), _number(getattr(constants, name)), _interval(fit, name))
                   for name in (*fit.intervals, *fit.assumed)]
        # A link's name goes on beside its second constant.
        for quantity, cells in zip_longest(wrap(fit.quantity.removeprefix("transfer "), QUANTITY_WIDTH), of_each, fillvalue=""):
            result.add_row(quantity, *(cells or ("", "", "")), *errors)
            errors = []
        result.add_section()
    if profile.cost.message_seconds:
        result.add_row("message", "median", _number(profile.cost.message_seconds))
    return result


def _fitted(cost: CostModel, fits: tuple[Fit, ...]) -> list[Parameters]:
    """What each of the fits is of: the transfers' come last, in their order."""
    by_name = {"prefill": cost.prefill, "decode": cost.decode, "mixed": cost.mixed}
    transfers = iter(cost.transfers)
    return [by_name.get(fit.quantity) or next(transfers) for fit in fits]


def _interval(fit: Fit, name: str) -> str:
    if name in fit.assumed:
        return "assumed"
    low, high = fit.intervals[name]
    return f"{_number(low)} to {'any' if high is None else _number(high)}"


def _number(value: float) -> str:
    """A constant that is 0 but for how it was found is 0."""
    return f"{value:.3g}" if value > 1e-15 else "0"


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.1%}"
