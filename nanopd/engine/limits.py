"""What one engine can take, checked before a request is let in. No torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import astuple, dataclass, replace

from nanopd.core import InvalidRequest, Request


@dataclass(frozen=True)
class Limits:
    """The bounds of an engine: vocabulary, context, blocks and batch."""

    vocab_size: int
    max_model_len: int
    num_blocks: int
    block_size: int
    max_num_seqs: int

    @classmethod
    def tightest(cls, limits: Iterable[Limits]) -> Limits:
        """What every one of several engines can take."""
        return cls(*map(min, zip(*map(astuple, limits), strict=True)))

    @property
    def max_len(self) -> int:
        """The longest sequence, prompt and answer together, in tokens."""
        return min(self.max_model_len, self.num_blocks * self.block_size)

    def check(self, request: Request) -> None:
        """Raise InvalidRequest where this engine could never serve the request, however long it waits."""
        self._check_prompt(request.prompt_token_ids)
        self._check_vocabulary("stop token id", request.sampling.stop_token_ids)
        self._check_answers(request)

    def bound(self, request: Request) -> Request:
        """The request, asking for no more tokens than there is room for: its answers end at the same length wherever they
        are served, and what is written of them always fits."""
        room = self.max_len - len(request.prompt_token_ids)
        if request.max_tokens is not None and request.max_tokens <= room:
            return request
        if request.beam:
            return replace(request, beam=replace(request.beam, max_tokens=room))
        sampling = request.sampling
        return replace(request, sampling=replace(sampling, max_tokens=room, min_tokens=min(sampling.min_tokens, room)))

    def _check_prompt(self, token_ids: list[int]) -> None:
        if not token_ids:
            raise InvalidRequest("the prompt is empty: give at least one token")
        self._check_vocabulary("token id", token_ids)
        length = len(token_ids)
        if length >= self.max_model_len:
            raise InvalidRequest(f"the prompt has {length} tokens; the context holds {self.max_model_len}, one of "
                                 "which is for the answer: shorten the prompt or raise max_model_len")
        if length >= self.max_len:
            raise InvalidRequest(f"the prompt has {length} tokens; the KV cache holds {self.num_blocks} blocks of "
                                 f"{self.block_size} = {self.max_len} tokens, one of which is for the answer: "
                                 "shorten the prompt or give the cache more blocks")

    def _check_vocabulary(self, name: str, token_ids: Collection[int]) -> None:
        if set(map(type, token_ids)) <= {int} and min(token_ids, default=0) >= 0 and max(token_ids, default=0) < self.vocab_size:
            return
        for token in token_ids:
            if type(token) is not int:
                raise InvalidRequest(f"{name} {token!r} is not an integer: the vocabulary goes from 0 to {self.vocab_size - 1}")
            if not 0 <= token < self.vocab_size:
                raise InvalidRequest(f"{name} {token} is out of range: the vocabulary goes from 0 to {self.vocab_size - 1}")

    def _check_answers(self, request: Request) -> None:
        """Answers share the prompt's full blocks; in the worst case nothing else is shared. An answer's last token is
        never run, so it takes no room."""
        answers = request.num_answers
        if answers > self.max_num_seqs:
            raise InvalidRequest(f"{answers} answers were asked for; a batch holds {self.max_num_seqs} sequences: "
                                 "ask for fewer or raise max_num_seqs")
        if request.beam and 2 * answers > self.vocab_size:
            raise InvalidRequest(f"beam_width {answers} is too wide: a vocabulary of {self.vocab_size} tokens allows "
                                 f"up to {self.vocab_size // 2} beams")
        if answers == 1:
            return  # it ends with "length" where the blocks end
        shared = len(request.prompt_token_ids) // self.block_size
        longest = min(len(request.prompt_token_ids) + (request.max_tokens or self.max_len), self.max_len)
        needed = shared + answers * (-(-(longest - 1) // self.block_size) - shared)
        if needed > self.num_blocks:
            raise InvalidRequest(f"{answers} answers of up to {longest - len(request.prompt_token_ids)} tokens may need "
                                 f"{needed} blocks; the KV cache has {self.num_blocks}: ask for fewer or shorter answers")
