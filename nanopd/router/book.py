"""What one worker has in hand, as far as messages tell: kept up with each of them, in the same short time whatever there is.

Every job that a worker has is a page; the sums over all pages are kept beside them. Numbers are whole or halves, so that
what is added and taken away again leaves exactly nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from nanopd.cost_model.analytical import StepWork, attended_pairs
from nanopd.router.prefix_index import PrefixIndex

RECENT = 5.0  # seconds after which a prompt counts 1/e for how many come
SHORTEST = 1.0  # second: in less, it is not told how many come in one
FORGOTTEN = 1e-3  # prompts that still count: so few are none


@dataclass(slots=True)
class Page:
    """A job, or the sum of several. All but `seats`, `decodes` and `pairs` in tokens."""

    seats: int = 0  # answers that it may write at once
    held: int = 0  # room in the cache that it takes, or was promised
    queued: int = 0  # of its prompt, to be computed before the first token
    pairs: float = 0.0  # (query, key) pairs of these
    sending: int = 0  # of its prompt, computed here and on the way to another worker
    decodes: int = 0  # answers that are being written
    contexts: int = 0  # of these together: prompt, and what is written


class Book:
    """The pages of one worker, by job; and the prompts that it was sent last, as far as `num_blocks` hold them."""

    def __init__(self, num_blocks: int = 0) -> None:
        self.prefixes = PrefixIndex(num_blocks)
        self.pages: dict[str, Page] = {}
        self.total = Page()
        self.queue_work = StepWork()  # all that is queued
        self._running: StepWork | None = StepWork()  # until it changes
        self.queued_since = -math.inf
        self._recent_prompts = self._recent_tokens = 0.0
        self._recent_until = self._recent_since = -math.inf

    # ------------------------------------------------------------------------------------------ what is noted

    def seat(self, job: str, num_answers: int) -> None:
        """It is to write so many answers: from now on, or still."""
        page = self._page(job)
        self.total.seats += num_answers - page.seats
        page.seats = num_answers

    def hold(self, job: str, tokens: int) -> None:
        """Room for so many tokens more is given away."""
        page = self._page(job)
        page.held += tokens
        self.total.held += tokens

    def queue(self, job: str, new_tokens: int, cached_tokens: int, now: float) -> None:
        """A prompt is to be computed. Its last token always is, so there are new ones."""
        self.hold(job, new_tokens + cached_tokens)
        page, total = self.pages[job], self.total
        if not total.queued:
            self.queued_since = now
        page.queued, page.pairs = new_tokens, attended_pairs(new_tokens, cached_tokens)
        total.queued += page.queued
        total.pairs += page.pairs
        self.queue_work = StepWork(total.queued, total.pairs)

    def count(self, new_tokens: int, now: float) -> None:
        """A prompt of so many new tokens has come to be computed here."""
        fading = self._fading(now)
        if self._recent_prompts * fading < FORGOTTEN:
            self._recent_since = now
        self._recent_prompts = self._recent_prompts * fading + 1
        self._recent_tokens = self._recent_tokens * fading + new_tokens
        self._recent_until = now

    def compute(self, job: str, now: float) -> None:
        """A prompt is computed, so the next one in line has its turn. No effect on one that was already."""
        page, total = self.pages[job], self.total
        if page.queued:
            total.queued -= page.queued
            total.pairs -= page.pairs
            page.queued, page.pairs = 0, 0.0
            self.queue_work = StepWork(total.queued, total.pairs)
            self.queued_since = now

    def send(self, job: str, tokens: int) -> None:
        """So much of a prompt's KV is still to leave for another worker."""
        page = self.pages[job]
        self.total.sending += tokens - page.sending
        page.sending = tokens

    def write(self, job: str, answers: int, contexts: int) -> None:
        """Answers begin to be written."""
        page, total = self.pages[job], self.total
        page.decodes, page.contexts = answers, contexts
        total.decodes += answers
        total.contexts += contexts
        self._running = None

    def grow(self, job: str) -> None:
        """One of its answers has a token more."""
        page, total = self.pages[job], self.total
        page.contexts += 1
        page.held += 1
        total.contexts += 1
        total.held += 1
        self._running = None

    def end(self, job: str, context: int, written: int) -> None:
        """One of its answers has ended."""
        page, total = self.pages[job], self.total
        page.decodes -= 1
        page.contexts -= context
        page.held -= written
        total.decodes -= 1
        total.contexts -= context
        total.held -= written
        self._running = None

    def close(self, job: str) -> None:
        """The worker has nothing to do with a job any more. No effect where it never had."""
        page = self.pages.pop(job, None)
        if page is not None:
            total = self.total
            for name in FIELDS:
                setattr(total, name, getattr(total, name) - getattr(page, name))
            self.queue_work, self._running = StepWork(total.queued, total.pairs), None

    def _page(self, job: str) -> Page:
        page = self.pages.get(job)
        if page is None:
            page = self.pages[job] = Page()
        return page

    # ------------------------------------------------------------------------------------------ what is asked

    @property
    def running(self) -> StepWork:
        """A step of all that is being written: the token that each is about to run is in its context."""
        if self._running is None:
            self._running = StepWork(0, 0.0, self.total.decodes, self.total.contexts)
        return self._running

    def prompts_per_second(self, now: float) -> tuple[float, float]:
        """Prompts that were lately to be computed here, and their new tokens."""
        seconds = RECENT * -math.expm1((self._recent_since - now) / RECENT)  # that count, of those since they come
        share = self._fading(now) / max(seconds, SHORTEST)
        return self._recent_prompts * share, self._recent_tokens * share

    def _fading(self, now: float) -> float:
        return math.exp((self._recent_until - now) / RECENT)


FIELDS = tuple(field.name for field in fields(Page))
