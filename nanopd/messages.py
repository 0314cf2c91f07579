"""What the central scheduler and the workers say to each other. Plain data, so that any wire can carry it."""

from __future__ import annotations

from dataclasses import dataclass, field

from nanopd.core import FinishReason, Request, TokenEvent


@dataclass(frozen=True)
class Destination:
    """Where a prompt's KV has to go: the decode worker's leased blocks.

    `block_ids` is the whole block table for the prompt; the first `num_cached` tokens are there already.
    """

    worker_id: str
    lease_id: int
    block_ids: list[int]
    num_cached: int


@dataclass(frozen=True)
class FirstToken:
    """What the prefill worker drew for one answer, or for one beam (whose `index` means nothing yet)."""

    index: int
    token_id: int
    logprob: float
    finish_reason: FinishReason | None = None


# ------------------------------------------------------------------------------------- to a worker


@dataclass(frozen=True)
class Serve:
    """Do the whole request (collocated)."""

    request: Request


@dataclass(frozen=True)
class Reserve:
    """Set blocks aside for a prompt that will be computed elsewhere; answer Granted or Refused."""

    request: Request


@dataclass(frozen=True)
class Prefill:
    """Compute the prompt, write its KV to the destination, draw the first token; answer Prefilled."""

    request: Request
    destination: Destination


@dataclass(frozen=True)
class Resume:
    """The KV is in the lease's blocks: decode from the first tokens on."""

    request: Request
    lease_id: int
    first_tokens: list[FirstToken]


@dataclass(frozen=True)
class ReleaseLease:
    """`holder` ("request" or "writer") has no more use for the lease."""

    lease_id: int
    holder: str


@dataclass(frozen=True)
class Cancel:
    """End a request, or one of its answers."""

    request_id: str
    index: int | None = None


# ----------------------------------------------------------------------------------- from a worker


@dataclass(frozen=True)
class Tokens:
    """Tokens drawn in a step."""

    events: list[TokenEvent]


@dataclass(frozen=True)
class Granted:
    """The blocks asked for by Reserve."""

    request_id: str
    destination: Destination


@dataclass(frozen=True)
class Refused:
    """No room for the prompt now: backpressure."""

    request_id: str


@dataclass(frozen=True)
class Prefilled:
    """The prompt's KV is at its destination and its first tokens are drawn."""

    request_id: str
    destination: Destination
    first_tokens: list[FirstToken] = field(default_factory=list)


@dataclass(frozen=True)
class WriteEnded:
    """The request ended on the prefill worker before its hand-over: nobody writes to the lease any more."""

    request_id: str
    destination: Destination


ToWorker = Serve | Reserve | Prefill | Resume | ReleaseLease | Cancel
FromWorker = Tokens | Granted | Refused | Prefilled | WriteEnded
