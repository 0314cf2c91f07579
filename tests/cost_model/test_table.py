from __future__ import annotations

from cost_model.models import MODEL
from rich.console import Console

from nanopd.cost_model.fit import Fit
from nanopd.cost_model.measurements import Measurements
from nanopd.cost_model.profile import Profile
from nanopd.cost_model.table import table


def shown(*fits):
    profile = Profile("NVIDIA H200", "qwen3-8b", "bfloat16", "2026-01-31", {}, (), Measurements(), MODEL, fits)
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table(profile))
    return [line.split() for line in capture.get().splitlines() if line.strip()]


def test_a_line_for_each_constant_with_its_interval_and_the_held_out_errors():
    lines = shown(
        Fit("prefill", {"floor_seconds": (7e-3, 9e-3), "token_seconds": (2e-5, None)}, ("sharpness",), (0.5,), (0.01, -0.02, 0.2)),
        Fit("transfer cuda:0 to cuda:1 by peer", {"latency_seconds": (0.0, 3e-5)}, (), (0.1,), ()),
        Fit("transfer cuda:0 to cuda:1 by relay", {"bytes_per_second": (4e10, 6e10)}, (), (0.1,), (0.0425,)))
    assert lines[0] == "qwen3-8b, bfloat16, on NVIDIA H200".split()
    assert "prefill floor 0.008 0.007 to 0.009 2.0% 20.0%".split() in lines
    assert "token 2.4e-05 2e-05 to any".split() in lines
    assert "sharpness 4 assumed".split() in lines
    assert "transfer cuda:0 to cuda:1 by peer latency 2e-05 0 to 3e-05 - -".split() in lines
    assert "transfer cuda:0 to cuda:1 by relay bytes/s 5e+10 4e+10 to 6e+10 4.2% 4.2%".split() in lines


def test_it_fits_on_a_terminal_of_80_columns():
    from itertools import chain

    fits = [Fit("transfer cuda:0 to cuda:1 by collective", {"bytes_per_second": (1.234e-10, 1.234e-10)}, (), (0.1,), (2.123, 2.1)),
            Fit("decode", {"context_token_seconds": (1.234e-10, 1.234e-10)}, (), (0.1,), (2.123, 2.1))]
    profile = Profile("d", "m", "f", "2026-01-31", {}, (), Measurements(), MODEL, tuple(fits))
    console = Console(width=80)
    with console.capture() as capture:
        console.print(table(profile))
    words = list(chain.from_iterable(line.split() for line in capture.get().splitlines()))
    assert {"quantity", "decode", "context_token", "bytes/s", "1.23e-10", "212.3%", "collective"} <= set(words)


def test_a_constant_that_is_too_small_to_be_seen_is_0():
    from dataclasses import replace

    profile = Profile("d", "m", "f", "2026-01-31", {}, (), Measurements(),
                      replace(MODEL, prefill=replace(MODEL.prefill, pair_seconds=1e-300)),
                      (Fit("prefill", {"pair_seconds": (0.0, 1e-9)}, (), (), (0.1,)),))
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table(profile))
    assert "pair 0 0 to 1e-09".split() == capture.get().splitlines()[-2].split()[1:6]
