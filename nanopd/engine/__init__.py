"""Continuous batching: the scheduler decides each step's plan, a runner carries it out, the engine ties both."""
