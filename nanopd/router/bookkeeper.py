"""Keeps the books of all workers: what each step of a request's way means for what they have in hand."""

from __future__ import annotations

from collections.abc import Callable

from nanopd.router.entry import Entry, Stage
from nanopd.router.fleet import Fleet
from nanopd.router.prefix_index import hash_prompt


class Bookkeeper:
    """Notes what workers are sent and what they say, in the books of the fleet.

    Args:
        block_size: tokens in a block of the workers' caches.
    """

    def __init__(self, fleet: Fleet, clock: Callable[[], float], block_size: int) -> None:
        self.fleet = fleet
        self.clock = clock
        self.block_size = block_size

    def hashes(self, entry: Entry) -> list[int]:
        """Of the prompt's full blocks. Nothing where no prefixes are remembered."""
        if entry.hashes is None:
            entry.hashes = hash_prompt(entry.request.prompt_token_ids, self.block_size) if self.fleet.prefix_blocks else []
        return entry.hashes

    def cached_tokens(self, num_blocks: int, prompt_len: int) -> int:
        """How many of a prompt's first tokens a worker has kept that has so many blocks of it. Never the last: that is run
        again."""
        return min(num_blocks, (prompt_len - 1) // self.block_size) * self.block_size

    # --------------------------------------------------------------------------------------- a request's way

    def serve(self, entry: Entry) -> None:
        """A collocated worker is given all of it. What is written already is computed again, with the prompt."""
        self.fleet.seat(entry.server, entry.job, len(entry.answers))
        if entry.request.beam:  # it says nothing until it is over: for most of the time it writes
            book = self.fleet.workers[entry.server].book
            book.hold(entry.job, len(entry.request.prompt_token_ids))
            self._write(entry)
        else:
            self._queue(entry, entry.server, sum(len(answer.token_ids) for answer in entry.answers.values()))
            self._count(entry, entry.server)

    def reserve(self, entry: Entry) -> None:
        """A decode worker is asked for room. Who is to compute the prompt has it in line from now on: whoever comes at the same
        moment sees it there."""
        self.fleet.seat(entry.server, entry.job, len(entry.answers))
        self.fleet.workers[entry.server].book.hold(entry.job, len(entry.request.prompt_token_ids))
        if entry.route is not None:
            self._queue(entry, entry.route.prefill)

    def prefill(self, entry: Entry) -> None:
        """A prefill worker is to compute the prompt."""
        self.fleet.write(entry.prefiller, entry.job, entry.destination)
        if entry.job not in self.fleet.workers[entry.prefiller].book.pages:
            self._queue(entry, entry.prefiller)
        self._count(entry, entry.prefiller)

    def resume(self, entry: Entry) -> None:
        """The prompt's KV is at the decode worker."""
        book = self.fleet.workers[entry.server].book
        book.prefixes.add(self.hashes(entry))
        book.hold(entry.job, sum(len(answer.token_ids) for answer in entry.answers.values()))
        self._write(entry)

    def token(self, entry: Entry) -> None:
        """A token has been drawn, and is not among those that are written yet."""
        if entry.stage is Stage.PREFILL:
            self.computed(entry)
            return
        book = self.fleet.workers[entry.server].book
        if not book.pages[entry.job].decodes:
            book.compute(entry.job, self.clock())
            self._write(entry)
        book.grow(entry.job)

    def computed(self, entry: Entry) -> None:
        """Its prompt is computed, and is about to leave for the decode worker."""
        book = self.fleet.workers[entry.prefiller].book
        if book.pages[entry.job].queued:
            book.compute(entry.job, self.clock())
            book.send(entry.job, len(entry.request.prompt_token_ids) - entry.destination.num_cached)

    def end(self, entry: Entry, index: int) -> None:
        """One of the open answers ends."""
        if entry.stage is Stage.DECODE:
            book = self.fleet.workers[entry.server].book
            if book.pages[entry.job].decodes:
                written = len(entry.answers[index].token_ids)
                book.end(entry.job, len(entry.request.prompt_token_ids) + written, written)

    # ------------------------------------------------------------------------------------------------- parts

    def _queue(self, entry: Entry, worker_id: str, num_written: int = 0) -> None:
        book, hashes, prompt_len = self.fleet.workers[worker_id].book, self.hashes(entry), len(entry.request.prompt_token_ids)
        cached = self.cached_tokens(book.prefixes.match(hashes), prompt_len)
        book.queue(entry.job, prompt_len + num_written - cached, cached, self.clock())
        book.prefixes.add(hashes)

    def _count(self, entry: Entry, worker_id: str) -> None:
        book = self.fleet.workers[worker_id].book
        book.count(book.pages[entry.job].queued, self.clock())

    def _write(self, entry: Entry) -> None:
        contexts = sum(len(entry.request.prompt_token_ids) + len(answer.token_ids) for answer in entry.answers.values())
        self.fleet.workers[entry.server].book.write(entry.job, len(entry.answers), contexts)
