"""The real scheduler, workers and central scheduler on a virtual clock: only what takes time is made up. No torch.

A step takes as long as a cost model says, and so does a transfer. Everything that is decided is decided by the engine's own
code, so what a simulation teaches is true of the engine, as far as the costs are.
"""

from nanopd.simulator.clock import VirtualClock
from nanopd.simulator.cost_runner import LinearCosts, ModelCosts, StepCosts
from nanopd.simulator.simulate import Result, Served, Simulation
from nanopd.simulator.workload import Arrival, lengths, poisson

__all__ = ["Arrival", "LinearCosts", "ModelCosts", "Result", "Served", "Simulation", "StepCosts", "VirtualClock", "lengths",
           "poisson"]
