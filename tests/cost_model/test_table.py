from __future__ import annotations

from dataclasses import replace

from cost_model.models import MODEL
from rich.console import Console

from nanopd.cost_model.analytical import MixedCost
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
    for first, second in (("latency 2e-05 0 to 3e-05 - -", "by peer"), ("bytes/s 5e+10 4e+10 to 6e+10 4.2% 4.2%", "by relay")):
        line = lines.index(["cuda:0", "to", "cuda:1", *first.split()])
        assert lines[line + 1] == second.split()


def test_it_fits_on_a_terminal_of_80_columns():
    wide = (1.234e-10, 1.234e-10)
    constants = ("floor", "token", "pair", "sequence", "context_token")
    fits = (Fit("mixed", {f"{name}_seconds": wide for name in constants} | {"sharpness": (1.0, 8.0)}, (), (0.1,), (2.123, 2.1)),
            Fit("transfer cuda:0 to cuda:1 by collective", {"latency_seconds": wide, "bytes_per_second": wide}, (), (0.1,),
                (2.123, 2.1)))
    model = replace(MODEL, transfers=(replace(MODEL.transfers[0], latency_seconds=1.234e-10, bytes_per_second=1.234e10),),
                    mixed=MixedCost(*[1.234e-10] * 5, 1.234), message_seconds=1.234e-5)
    console = Console(width=80)
    with console.capture() as capture:
        console.print(table(Profile("d", "m", "f", "2026-01-31", {}, (), Measurements(), model, fits)))
    lines = [line.split() for line in capture.get().splitlines()]
    told = "1.23e-10 1.23e-10 to 1.23e-10".split()
    errors = ["210.0%", "212.3%"]
    assert ["mixed", "floor", *told, *errors] in lines
    assert all([name, *told] in lines for name in constants[1:])
    assert "sharpness 1.23 1 to 8".split() in lines
    assert ["cuda:0", "to", "cuda:1", "latency", *told, *errors] in lines
    assert "by collective bytes/s 1.23e+10 1.23e-10 to 1.23e-10".split() in lines
    assert "message median 1.23e-05".split() in lines


def test_messages_that_were_not_measured_have_no_line():
    assert not any("message" in line for line in shown(Fit("prefill", {"floor_seconds": (7e-3, 9e-3)}, (), (0.5,), (0.01,))))


def test_a_constant_that_is_too_small_to_be_seen_is_0():
    profile = Profile("d", "m", "f", "2026-01-31", {}, (), Measurements(),
                      replace(MODEL, prefill=replace(MODEL.prefill, pair_seconds=1e-300)),
                      (Fit("prefill", {"pair_seconds": (0.0, 1e-9)}, (), (), (0.1,)),))
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table(profile))
    assert "prefill pair 0 0 to 1e-09 10.0% 10.0%".split() in [line.split() for line in capture.get().splitlines()]
