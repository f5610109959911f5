"""The wire: what is refused before any code sees it."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.kvtransfer.messages import Abort, ToReceiver
from headrace.messages.control import Cancel
from headrace.messages.request import QueueEntry, SamplingParams
from headrace.messages.stream import ToGateway
from headrace.wire import WIRE_VERSION, Decoder, WireError, encode, seal

decode_cancel: Decoder[Cancel] = Decoder(Cancel)
DECODERS = [decode_cancel, Decoder(ToReceiver), Decoder(ToGateway), Decoder(QueueEntry)]


def test_a_message_survives_the_trip() -> None:
    """Encode, decode, equal."""
    message = Cancel(request_id="r", attempt=3)
    assert decode_cancel(encode(message)) == message


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes([WIRE_VERSION + 1]) + encode(Cancel(request_id="r", attempt=3))[1:],
        encode(Abort(request_id="r", attempt=3, cause="lease")),
        seal(msgspec.msgpack.encode({"type": "Cancel", "request_id": "r", "attempt": -1})),
        seal(msgspec.msgpack.encode({"type": "Cancel", "request_id": "", "attempt": 1})),
        seal(msgspec.msgpack.encode({"type": "Cancel", "request_id": "r", "attempt": 1, "x": 1})),
        seal(msgspec.msgpack.encode({"type": "Cancel", "request_id": "r"})),
    ],
    ids=["empty", "version", "foreign type", "negative", "empty id", "extra field", "missing field"],
)
def test_what_breaks_the_schema_is_refused(data: bytes) -> None:
    """Always by the one error."""
    with pytest.raises(WireError):
        decode_cancel(data)


@given(st.binary(max_size=200), st.booleans())
def test_random_bytes_raise_nothing_but_the_wire_error(data: bytes, versioned: bool) -> None:
    """Whatever arrives, a receiver lives on."""
    for decoder in DECODERS:
        with pytest.raises(WireError):
            decoder(seal(data) if versioned else data)


@given(st.integers(0, 7), st.data())
def test_a_flipped_bit_is_refused(bit: int, data: st.DataObject) -> None:
    """Wherever it is, even where another valid message would come out."""
    message = bytearray(encode(Cancel(request_id="r", attempt=3)))
    message[data.draw(st.integers(0, len(message) - 1))] ^= 1 << bit
    with pytest.raises(WireError):
        decode_cancel(bytes(message))


def test_sampling_parameters_out_of_range_are_refused() -> None:
    """The limits hold for what comes over the wire, too."""
    data = msgspec.msgpack.encode(SamplingParams(max_tokens=1, temperature=0.5))
    assert msgspec.msgpack.decode(data, type=SamplingParams).temperature == 0.5
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode({"max_tokens": 1, "top_p": 2.0}), type=SamplingParams)
