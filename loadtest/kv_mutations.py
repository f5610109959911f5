"""Messages that no receiver may accept, made from good ones by knowing their structure."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
import xxhash

from headrace.kvtransfer.messages import Abort, Commit, Offer, OnDataLine, Pages, PagesInPlace, Renew, ToReceiver
from headrace.loadtest.keyed_model import LAYOUT, NUM_LAYERS, PAGE_BYTES, PAGE_SIZE, VOCABULARY
from headrace.messages.control import Cancel
from headrace.messages.request import SamplingParams
from headrace.wire import HEAD_BYTES, WIRE_VERSION, Decoder, Message, WireError, encode, seal

Frame = tuple[bytes, bytes]
"""Header and payload."""
Key = tuple[str, int]

VALUES: list[Any] = [
    *(None, True, -1, 0, 1, 7, 2**31 - 1, 2**31, 2**63 - 1, -(2**63), 2**64 - 1),
    *(float("nan"), float("inf"), -0.5, "", "x", "x" * 129, "\x00", "../../etc", b"", b"\xff" * 8, b"\0" * 17),
    *([], [0], [[]], [["r", 0, 0]], [None] * 3, {}, {"type": "Offer"}, {"x": {}}),
]
"""What a field is changed to."""
SEEN = 256
"""Messages of honest workers that are remembered to be repeated or changed."""


class Mutations:
    """Makes bad messages for a sender that is nobody's honest worker; all follow from the seed and from what it saw."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self._decode: Decoder[ToReceiver | OnDataLine | Cancel] = Decoder(ToReceiver | OnDataLine | Cancel)
        self._seen: deque[Frame] = deque(maxlen=SEEN)
        self._over: deque[Frame] = deque(maxlen=SEEN)
        self._keys: deque[Key] = deque(maxlen=SEEN)
        self._numbers = 0
        self.kinds: dict[str, Callable[[], Frame]] = {
            "random bytes": self._random_bytes,
            "unknown version": self._unknown_version,
            "truncated": self._truncated,
            "flipped bit": self._flipped_bit,
            "changed field": self._changed_field,
            "unusable offer": self._unusable_offer,
            "others' handoffs": self._others_handoff,
            "replayed": self._replayed,
        }

    def offered(self, offer: Offer) -> None:
        """An honest worker has offered this."""
        self._keys.append((offer.request_id, offer.attempt))

    def saw(self, header: bytes, payload: bytes = b"") -> None:
        """An honest worker has sent this, which is no Offer."""
        self._seen.append((header, payload))

    def is_over(self, offer: Offer) -> None:
        """The handoff of this offer has ended: offering it again is a replay."""
        self._over.append((encode(offer), b""))

    def _key(self) -> Key:
        """Of an honest worker's handoff, or of none."""
        if self._keys and self.random.random() < 0.7:
            return self.random.choice(self._keys)
        self._numbers += 1
        return f"unknown-{self._numbers}", self.random.randrange(3)

    def _good(self) -> tuple[Message, bytes]:
        """A message that would be right if it came from the right worker at the right time."""
        request_id, attempt = self._key()
        key: dict[str, Any] = {"request_id": request_id, "attempt": attempt}
        number = self.random.randrange(9)
        match self.random.randrange(7):
            case 0:
                return self.offer(request_id, attempt, self.random.randrange(1, 4 * PAGE_SIZE)), b""
            case 1:
                payload = self.random.randbytes(PAGE_BYTES)
                return self.pages(request_id, attempt, payload), payload
            case 2:
                return PagesInPlace(**key, sequence=number, layer=0, first_page=0, blocks=[number]), b""
            case 3:
                return Commit(**key, sequence=number, token_id=3, logprobs=None), b""
            case 4:
                return Renew(handoffs=[(request_id, attempt, number)]), b""
            case 5:
                return Abort(**key, cause="cancelled"), b""
            case _:
                return Cancel(**key), b""

    def offer(self, request_id: str, attempt: int, num_tokens: int) -> Offer:
        """A good one, of random tokens."""
        tokens = [self.random.randrange(VOCABULARY) for _ in range(num_tokens)]
        return Offer(
            request_id=request_id,
            attempt=attempt,
            gateway="nobody",
            layout=LAYOUT,
            token_ids=tokens,
            generated=0,
            sampling=SamplingParams(max_tokens=2),
            deadline=1e12,
        )

    def pages(self, request_id: str, attempt: int, payload: bytes = b"", **changes: Any) -> Pages:
        """The first page of the first layer, but for `changes`."""
        fields: dict[str, Any] = {"sequence": 0, "layer": 0, "first_page": 0, "num_pages": 1}
        fields["checksum"] = xxhash.xxh3_64_digest(payload)
        return Pages(request_id=request_id, attempt=attempt, **(fields | changes))

    def _random_bytes(self) -> Frame:
        data = self.random.randbytes(self.random.randrange(1, 200))
        header = self.random.choice([data, bytes([WIRE_VERSION]) + data, seal(data)])
        return header, self.random.randbytes(self.random.choice([0, 1, 600]))

    def _unknown_version(self) -> Frame:
        message, payload = self._good()
        header = bytearray(encode(message))
        header[0] = (WIRE_VERSION + self.random.randrange(1, 256)) % 256
        return bytes(header), payload

    def _truncated(self) -> Frame:
        message, payload = self._good()
        header = encode(message)
        body = header[HEAD_BYTES:]
        cut = seal(body[: self.random.randrange(len(body))])
        return self.random.choice([cut, header[: self.random.randrange(1, len(header))]]), payload

    def _flipped_bit(self) -> Frame:
        message, payload = self._good()
        header = bytearray(encode(message))
        bit = self.random.randrange(8 * len(header))
        header[bit // 8] ^= 1 << bit % 8
        return bytes(header), payload

    def _changed_field(self) -> Frame:
        """One field, at any depth, is changed, missing, or one too many; what is still good stays out."""
        while True:
            message, payload = self._good()
            plain = msgspec.to_builtins(message, builtin_types=(bytes,))
            parent = plain
            if isinstance(message, Offer) and self.random.random() < 0.5:
                parent = plain[self.random.choice(["layout", "sampling"])]
            name = self.random.choice([*parent, "more"])
            if self.random.random() < 0.1:
                parent.pop(name, None)
            else:
                parent[name] = self.random.choice(VALUES)
            header = seal(msgspec.msgpack.encode(plain))
            if not self._might_be_good(header):
                return header, payload

    def _might_be_good(self, header: bytes) -> bool:
        """So is a well-formed offer of a registered worker, whatever was changed, and a Renew of nothing."""
        try:
            message = self._decode(header)
        except WireError:
            return False
        return isinstance(message, Offer) or message == Renew(handoffs=[])

    def _unusable_offer(self) -> Frame:
        self._numbers += 1
        offer = self.offer(f"unusable-{self._numbers}", 0, self.random.randrange(1, 20))
        field = self.random.choice([*LAYOUT.__struct_fields__, "token", "generated", "length"])
        if field == "token":
            offer.token_ids[self.random.randrange(len(offer.token_ids))] = VOCABULARY
        elif field == "generated":
            offer = msgspec.structs.replace(offer, generated=len(offer.token_ids) + 1)
        elif field == "length":
            offer = msgspec.structs.replace(offer, token_ids=[1] * 20_000)
        else:
            old = getattr(LAYOUT, field)
            if field in ("page_size", "tensor_parallel_size"):
                new: Any = self.random.choice([-1, 0, 2**31])
            else:
                new = "other" if isinstance(old, str) else self.random.choice([0, old - 1, old ^ 8])
            offer = msgspec.structs.replace(offer, layout=msgspec.structs.replace(LAYOUT, **{field: new}))
        return encode(offer), b""

    def _others_handoff(self) -> Frame:
        """Pages, commits, aborts and renewals of handoffs that are not this sender's."""
        while True:
            message, payload = self._good()
            if not isinstance(message, Offer):
                return encode(message), payload

    def _replayed(self) -> Frame:
        """What an honest worker sent, byte for byte."""
        return self.replay() or self._random_bytes()

    def replay(self) -> Frame | None:
        """What an honest worker sent, should it have sent anything yet."""
        frames = self.random.choice([self._seen, self._over])
        return self.random.choice(frames) if frames else None

    def spoil(self, request_id: str, attempt: int, num_pages: int) -> tuple[bytes, bytes, bool]:
        """The next message of an open handoff of this sender, which has sent nothing yet, with one thing wrong.

        Returns header, payload, and whether it goes to the mailbox.
        """
        good = self.random.randbytes(PAGE_BYTES)
        payload = good
        changes: dict[str, Any] = {}
        match self.random.randrange(11):
            case 0:
                changes["layer"] = self.random.choice([NUM_LAYERS, 2**31 - 1])
            case 1:
                changes["first_page"] = self.random.choice([num_pages, 2**31 - 1])
            case 2:
                changes["num_pages"] = self.random.choice([num_pages + 1, 2**31 - 1])
            case 3:
                changes["checksum"] = self.random.randbytes(8)
            case 4:
                payload = self.random.choice([b"", good[:-1], good + b"\0", good * 2, bytes(2**20)])
            case 5:
                token, sequence = self.random.choice([(VOCABULARY, 9), (5, 0)])
                key: dict[str, Any] = {"request_id": request_id, "attempt": attempt}
                return encode(Commit(**key, sequence=sequence, token_id=token, logprobs=None)), b"", True
            case 6:
                in_place = PagesInPlace(
                    request_id=request_id, attempt=attempt, sequence=0, layer=0, first_page=0, blocks=[0]
                )
                return encode(in_place), self.random.choice([b"", good]), False
            case 7:
                data = bytearray(good)
                data[self.random.randrange(PAGE_BYTES)] ^= 1 << self.random.randrange(8)
                payload = bytes(data)
            case 8:
                changes["part"] = self.random.choice([1, 2**31 - 1])
            case 10:
                changes["num_layers"] = self.random.choice([NUM_LAYERS + 1, 2**31 - 1])
            case 9:
                changes["sequence"] = 2**31 - 1
                changes["checksum"] = bytes(8)
        header = encode(self.pages(request_id, attempt, good, **changes))
        return header, payload, False
