"""What the central scheduler and the workers say to each other. Plain data, so that any wire can carry it."""

from __future__ import annotations

from dataclasses import dataclass, field

from nanopd.core import FinishReason, Request, StepRecord, TokenEvent, TransferRecord


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
class Written:
    """What has been written of one answer, or of one beam (whose `index` means nothing yet)."""

    index: int
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason | None = None


# ------------------------------------------------------------------------------------- to a worker


@dataclass(frozen=True)
class Serve:
    """Do the whole request (collocated), or the rest of one of which something is written already."""

    request: Request
    written: list[Written] = field(default_factory=list)


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
    """The prompt's KV is in the lease's blocks: decode from what is written on.

    With a `checksum` the worker looks first whether it is; answers Corrupted if not.
    """

    request: Request
    lease_id: int
    written: list[Written]
    checksum: int | None = None


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


@dataclass(frozen=True)
class TimeLink:
    """Send blocks to the destination's, as many as it has and fewer, and answer with LinkTimed, or TransferFailed. What they
    hold is of no account: the destination is leased for this, and nobody reads it."""

    request_id: str
    destination: Destination


@dataclass(frozen=True)
class SetRole:
    """The worker has another role from now on."""

    role: str


@dataclass(frozen=True)
class Ping:
    """Answer Pong: so that a worker that hangs is found out."""


@dataclass(frozen=True)
class AskStatus:
    """Answer with a Status."""


@dataclass(frozen=True)
class AskHistory:
    """Answer with a History of what began at `since` or later, on the monotonic clock."""

    since: float = 0.0


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
    written: list[Written] = field(default_factory=list)
    checksum: int | None = None  # of the KV as it is here, where the cluster asks for one


@dataclass(frozen=True)
class WriteEnded:
    """The request ended on the prefill worker before its hand-over: nobody writes to the lease any more."""

    request_id: str
    destination: Destination


@dataclass(frozen=True)
class TransferFailed:
    """The prompt's KV can't be brought to its destination. The request has ended here, and nobody writes to the lease."""

    request_id: str
    destination: Destination
    error: str


@dataclass(frozen=True)
class LinkTimed:
    """How long sends to the destination took, from the call to the last byte's arrival: (bytes, seconds), in order."""

    request_id: str
    destination: Destination
    transport: str
    sends: list[tuple[int, float]]


@dataclass(frozen=True)
class Corrupted:
    """What arrived is not what was sent: the request was not resumed, and its lease is given back."""

    request_id: str


@dataclass(frozen=True)
class Pong:
    """The worker is alive."""


@dataclass(frozen=True)
class Status:
    """How a worker is doing."""

    role: str
    pid: int
    num_blocks: int
    num_free_blocks: int
    num_waiting: int
    num_running: int
    num_leases: int
    num_transfers: int


@dataclass(frozen=True)
class History:
    """What a worker has done lately, oldest first: its engine's steps, and the transfers that left it."""

    steps: list[StepRecord]
    transfers: list[TransferRecord]


@dataclass(frozen=True)
class Lost:
    """The worker is gone, with all that it held. Said by the executor, once."""

    reason: str


ToWorker = (Serve | Reserve | Prefill | Resume | ReleaseLease | Cancel | TimeLink | SetRole | Ping | AskStatus
            | AskHistory)
FromWorker = (Tokens | Granted | Refused | Prefilled | WriteEnded | TransferFailed | LinkTimed | Corrupted | Pong | Status
              | History | Lost)
