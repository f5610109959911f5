"""Which way pages come, by what the sender offers and how both workers cut."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest

from headrace.kvtransfer.base import Done
from headrace.kvtransfer.host import this_host
from headrace.kvtransfer.messages import CudaMemory, Layout, Offer
from headrace.kvtransfer.reshard import plan_landings
from headrace.kvtransfer.transports import Transports
from tests.kvtransfer.parts import LAYOUT, MemoryStore, make_offer


class OnOneGpu(MemoryStore):
    """A cache whose GPU the sender's lies on, too. What it opens copies whole pages alone."""

    def open(self, device: str, handle: bytes, offset: int, num_blocks: int) -> OnOneGpu:
        """See `PageStore`."""
        return self

    def copy(self, blocks: Sequence[int], layers: range, page_ids: Sequence[int], done: Done) -> None:
        """See `Source`."""
        raise AssertionError


def offer_of(layout: Layout) -> Offer:
    """One that names memory of a GPU."""
    memory = CudaMemory(device="GPU-0", handle=bytes(64), offset=0, num_blocks=30)
    return msgspec.structs.replace(make_offer([1], layout=layout), host=this_host(), cuda_ipc=memory)


@pytest.mark.parametrize(
    ("change", "expected"),
    [({}, "cuda_ipc"), ({"page_size": 8}, "tcp"), ({"tensor_parallel_size": 2}, "tcp")],
    ids=["alike", "other pages", "more ranks"],
)
def test_memory_of_a_gpu_is_read_where_pages_stay_whole(change: dict[str, int], expected: str) -> None:
    """What must be cut anew, or lies in several caches, travels."""
    refused: list[str] = []
    transports = Transports(LAYOUT, OnOneGpu(4), lambda sender, reason: refused.append(reason))
    assert transports.choose("prefill-1", offer_of(msgspec.structs.replace(LAYOUT, **change)))[0] == expected
    assert not refused


def test_a_source_of_whole_pages_alone_can_not_be_cut_anew() -> None:
    """Should it ever be chosen, the attempt ends instead of decoding what is not there."""
    store = OnOneGpu(4)
    other = msgspec.structs.replace(LAYOUT, page_size=8)
    ends: list[Exception | None] = []
    destination = plan_landings(other, LAYOUT, [store], 8, [0, 1], 0).destinations[0]
    with pytest.raises(ValueError, match="cut anew"):
        destination.copy(store.open("", b"", 0, 1), range(1), 0, [0], ends.append)
    assert not ends
