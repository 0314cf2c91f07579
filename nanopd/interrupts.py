"""Ctrl-C at moments that bookkeeping can bear. No torch."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_before: Callable[..., Any] | None = None  # whom Ctrl-C called before it was held back; None: it is not
_caught: list[tuple[Any, ...]] = []


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C is held back until the block is over: what is half noted, or half sent, would stay so. Other threads than the
    main one never hear of it."""
    if _before is not None or threading.current_thread() is not threading.main_thread():
        yield  # a block within another is on every message's way, and to ask for a handler takes as long as to send it
        return
    before = signal.getsignal(signal.SIGINT)
    if not callable(before):
        yield
        return
    try:
        _hold_back(before)
        yield
    finally:
        _let_through()


@contextmanager
def interruptible() -> Iterator[None]:
    """Within an uninterrupted block, what may take long and notes nothing: Ctrl-C comes through, also one that was held back."""
    before = _before
    if before is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        _let_through()
        yield
    finally:
        _hold_back(before)


def _hold_back(before: Callable[..., Any]) -> None:
    global _before
    _caught.clear()
    _before = before
    signal.signal(signal.SIGINT, lambda *arguments: _caught.append(arguments))


def _let_through() -> None:
    global _before
    before, _before = _before, None
    if before is not None:  # else an interrupt came before it could be held back
        signal.signal(signal.SIGINT, before)
        if _caught:
            before(*_caught[0])
