"""Placeholder until the kernels' wrappers are here."""


def usable(x) -> bool:
    return False
