"""Figures of what was measured, from JSON alone: each is a function from data to a plotly figure. No torch.

    runs = load_runs("results/nvidia-h200/sweep")    # what `nanopd bench sweep` wrote
    goodput_figure(runs)                             # a plotly figure, in the language of `widgets.strings`
    to_svg(goodput_figure(runs))                     # the same picture without a browser
    write_report(Path("report"), RECORDED)           # all that the data allow, as index.html and an SVG each
"""

from nanopd.benchmark.report.page import write_report
from nanopd.benchmark.report.recorded import (
    decode_scaling_figure,
    first_token_figure,
    interference_figure,
    lone_request_figure,
    predicted_figure,
    seed_figure,
    study_crossover_figure,
    study_regret_figure,
    transfer_bandwidth_figure,
    transfer_interference_figure,
)
from nanopd.benchmark.report.runs import load_runs
from nanopd.benchmark.report.seed import Comparison, seed_table
from nanopd.benchmark.report.svg import to_svg
from nanopd.benchmark.report.sweeps import (
    breakdown_figure,
    crossover_figure,
    goodput_figure,
    latency_figure,
    outcomes_figure,
    regret_figure,
    routing_map_figure,
    throughput_figure,
    timeline_figure,
    ttft_by_length_figure,
    violin_figure,
)

__all__ = [
    "Comparison", "breakdown_figure", "crossover_figure", "decode_scaling_figure", "first_token_figure", "goodput_figure",
    "interference_figure", "latency_figure", "load_runs", "lone_request_figure", "outcomes_figure", "predicted_figure",
    "regret_figure", "routing_map_figure", "seed_figure", "seed_table", "study_crossover_figure", "study_regret_figure",
    "throughput_figure", "timeline_figure", "to_svg", "transfer_bandwidth_figure", "transfer_interference_figure",
    "ttft_by_length_figure", "violin_figure", "write_report",
]
