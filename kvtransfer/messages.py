"""Worker -> decode worker: the handoff protocol (`Offer -> Grant | Refuse -> Pages* -> Commit -> Ack`).

`Abort` may come from either side at any point. Each message names its (request, attempt); within one, `Pages` carry a
sequence number and are applied once. They travel on data lines of their own, several at a time, so they may arrive in
any order, and after the Commit; all other messages travel on the mesh.

Any message may be lost: a line that breaks takes some with it, and one that is silent says nothing. Every `Renew` is
answered with what its handoffs may have missed, and a Commit is repeated until it is acknowledged, so a loss costs one
renewal and not the request's deadline. Pages that have not come when they usually have are asked for by a Renew, too,
and sent again where they are lost; a handoff in which nothing comes any more ends with its lease.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from headrace.messages.request import MAX_PROMPT_TOKENS, SamplingParams
from headrace.messages.stream import TokenLogprobs
from headrace.wire import Attempt, Count, MeshId, Message, Record, RequestId, TokenId, TraceParent

PageCount = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
MAX_PAGES_PER_MESSAGE = 65536
MAX_PARTS = 4096
MAX_COMING = 4096
MAX_RENEWED = 1024
"""Handoffs in one `Renew`: more than a prefill worker can have open."""


class Layout(Record, frozen=True, kw_only=True):
    """The shape of the pages, the same on all ranks of a worker.

    Two workers can hand over to each other where all of it agrees but page size and tensor-parallel degree.
    """

    model_fingerprint: Annotated[str, msgspec.Meta(max_length=64)]
    dtype: Annotated[str, msgspec.Meta(max_length=32)]
    num_layers: Count
    kv_heads: Count
    """Of the model; each rank holds its share."""
    head_dim: Count
    page_size: Annotated[int, msgspec.Meta(ge=1, le=65536)]
    """In tokens."""
    tensor_parallel_size: Annotated[int, msgspec.Meta(ge=1, le=65536)]
    vocab_size: Count
    """Token ids are below it."""


class Host(Record, frozen=True, kw_only=True):
    """Where a process runs, so that two can tell what they share."""

    machine: Annotated[str, msgspec.Meta(max_length=128)]
    """The boot of the kernel, and the namespaces in which processes see each other."""
    pid: PageCount
    process: Annotated[str, msgspec.Meta(max_length=64)]
    """Random, drawn at the process's start: a number may be used again."""


class SharedMemory(Record, frozen=True, kw_only=True):
    """`shm`: a sealed memory file of the sender, which processes of its machine and user may map to read."""

    descriptor: Count
    """File descriptor in the sender's process."""
    num_blocks: PageCount
    """Pages of one layer that the file holds."""


class CudaMemory(Record, frozen=True, kw_only=True):
    """`cuda_ipc`: the sender's cache on a device of the same machine."""

    device: Annotated[str, msgspec.Meta(max_length=64)]
    """UUID of the device."""
    handle: Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]
    """CUipcMemHandle of the allocation that holds the cache."""
    offset: Annotated[int, msgspec.Meta(ge=0, le=2**48)]
    """Where the cache begins in it, in bytes."""
    num_blocks: PageCount


class NixlMemory(Record, frozen=True, kw_only=True):
    """`nixl`: the sender's cache, registered with its agent."""

    metadata: Annotated[bytes, msgspec.Meta(min_length=1, max_length=65536)]
    """The agent's own description of itself, by which others connect to it."""
    address: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
    """Where the cache begins, in the sender's process or on its GPU."""
    num_blocks: PageCount
    kind: Literal["DRAM", "VRAM"]
    gpu: Count
    """Number of the GPU; 0 for host memory."""


WireDtype = Literal["auto", "fp8"]
TransportName = Literal["local", "cuda_ipc", "shm", "nixl", "tcp"]


class Offer(Message, frozen=True, kw_only=True):
    """The sender is about to compute this prompt's KV, or decodes it and wants to stop. All that decoding needs to know
    is here.
    """

    request_id: RequestId
    attempt: Attempt
    gateway: MeshId
    layout: Layout
    token_ids: Annotated[list[TokenId], msgspec.Meta(min_length=1, max_length=MAX_PROMPT_TOKENS)]
    """The prompt, followed by the `generated` tokens of earlier attempts."""
    generated: Count
    sampling: SamplingParams
    deadline: float
    """Unix time in seconds."""
    host: Host | None = None
    cuda_ipc: CudaMemory | None = None
    shm: SharedMemory | None = None
    nixl: NixlMemory | None = None
    """None: the sender can't use this transport. `tcp` it always can."""
    wire_dtype: WireDtype = "auto"
    """How the sender would have pages travel where they travel over a network."""
    traceparent: TraceParent | None = None
    """The queue entry's."""
    coming: Annotated[int, msgspec.Meta(ge=0, le=MAX_COMING)] = 0
    """So many tokens the sender will have added when it commits; their KV travels, too."""
    may_wait: bool = True
    """Whether to queue for pages. A request that runs where it is need not: refuse it where there is no room now."""
    in_place: bool = False
    """The receiver is to compute the prompt itself: after the Grant nothing comes, and it acknowledges when it is
    done.
    """


class Part(Record, frozen=True, kw_only=True):
    """What one rank of the receiver takes of each page of one rank of the sender."""

    rank: Count
    """The sender's."""
    first_head: Count
    """Among the KV heads of that rank."""
    num_heads: PageCount


class Grant(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Pages are reserved: send. The first `held_pages` pages of the prompt are already here and need not travel.

    Pages are the sender's, here and in all that follows.
    """

    request_id: RequestId
    attempt: Attempt
    held_pages: Count
    window_bytes: Count
    """Page bytes that may be on the way, unacknowledged by a `Credit`, at any time."""
    transport: TransportName = "tcp"
    wire_dtype: WireDtype = "auto"
    parts: Annotated[list[Part], msgspec.Meta(max_length=MAX_PARTS)] = []
    """Each part of each page travels by itself. Empty: pages travel whole, as part 0 of rank 0."""


RefuseCause = Literal["layout", "full", "duplicate", "stale", "stopping", "too_long", "invalid"]


class Refuse(Message, frozen=True, kw_only=True):
    """Nothing is reserved and nothing may be sent."""

    request_id: RequestId
    attempt: Attempt
    cause: RefuseCause
    message: str


class Pages(Message, frozen=True, kw_only=True, omit_defaults=True):
    """KV of the same consecutive pages of some layers, or of one part of each; their bytes follow, layer by layer."""

    request_id: RequestId
    attempt: Attempt
    sequence: Count
    layer: Count
    first_page: Count
    """Index within the prompt, not a page id of either cache."""
    num_pages: PageCount
    checksum: Annotated[bytes, msgspec.Meta(min_length=8, max_length=8)]
    """XXH3-64 of the payload."""
    credit_wanted: bool = True
    """The window is half empty: tell when this has been written."""
    part: Count = 0
    """Which of the Grant's."""
    num_layers: PageCount = 1
    """From `layer` on."""


class PagesInPlace(Message, frozen=True, kw_only=True, omit_defaults=True):
    """The same, but the bytes stay where they are: the receiver copies them out of memory that it shares, or reads."""

    request_id: RequestId
    attempt: Attempt
    sequence: Count
    layer: Count
    first_page: Count
    blocks: Annotated[list[Count], msgspec.Meta(min_length=1, max_length=MAX_PAGES_PER_MESSAGE)]
    """Each page's place in the sender's memory, in pages of one layer; layer by layer."""
    credit_wanted: bool = True
    part: Count = 0
    num_layers: PageCount = 1
    checksum: Annotated[bytes, msgspec.Meta(max_length=8)] = b""
    """XXH3-64 of the bytes where they come over a network out of host memory."""

    @property
    def num_pages(self) -> int:
        """How many pages of each layer."""
        return len(self.blocks) // self.num_layers


class Credit(Message, frozen=True, kw_only=True):
    """All `Pages` below `sequence` have been written; their bytes are no longer on the way."""

    request_id: RequestId
    attempt: Attempt
    sequence: Count


class Commit(Message, frozen=True, kw_only=True):
    """All pages have been sent (`sequence` messages of them) and here is the token that follows: decode."""

    request_id: RequestId
    attempt: Attempt
    sequence: Count
    token_id: TokenId | None
    """None: it is not drawn yet. The receiver computes the last token before it once more, or for the first time."""
    logprobs: TokenLogprobs | None
    came: Annotated[list[TokenId], msgspec.Meta(max_length=MAX_COMING)] = []
    """The tokens before it that were coming when it was offered."""


class Ack(Message, frozen=True, kw_only=True):
    """The request is the receiver's now; the sender may free its pages."""

    request_id: RequestId
    attempt: Attempt


class Renew(Message, frozen=True, kw_only=True):
    """These handoffs are still wanted: the leases of those start again of which nothing is on the way.

    The receiver repeats the `Grant`, or says by a `Credit` how much has come, and aborts those that it doesn't know.
    """

    handoffs: Annotated[list[tuple[RequestId, Attempt, Count]], msgspec.Meta(max_length=MAX_RENEWED)]
    """Request, attempt, and how many `Pages` have been sent."""


AbortCause = Literal["cancelled", "lease", "checksum", "sequence", "unknown", "sender_failed", "receiver_failed"]


class Abort(Message, frozen=True, kw_only=True):
    """This attempt is over; both sides free what they hold for it."""

    request_id: RequestId
    attempt: Attempt
    cause: AbortCause
    message: str = ""


class Released(Message, frozen=True, kw_only=True):
    """The answer to a sender's Abort: nothing of this attempt will be read or decoded, so its pages may be freed."""

    request_id: RequestId
    attempt: Attempt


ToReceiver = Offer | Commit | Renew | Abort
ToSender = Grant | Refuse | Credit | Ack | Abort | Released
OnDataLine = Pages | PagesInPlace
