"""Messages as Modal carries them: plain bytes, since no descriptor can be passed to a container."""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from interp_kernel.backends import Message
from interp_kernel.protocol import BLOB_MIN, BlobFile, Buffer, Head, Packed, content_digest, known_digest, stripe_bytes

FINAL = {"reply", "missing", "unknown", "forgotten"}  # after these nothing more is expected
LARGEST = 1 << 30  # bytes of one message; Modal stores larger ones in parts, which costs memory on both sides
PIECE = 16 << 20  # bytes of a result that one exchange brings; several exchanges travel at a time

Wire = tuple[bytes, list[bytes], list[bytes]]  # the head, small frames, large frames in the order of its table


class Loose(Packed):
    """A message whose large frames are copied into bytes, not into a file that Modal could not pass on."""

    def __init__(self, head: Head, frames: Sequence[Buffer], known: Collection[str] | None) -> None:
        """As `Packed`, for frames that may be changed later."""
        super().__init__(head, [])
        self.large: list[bytes] = []
        table: list[tuple[int, int, int | None, str | None]] = []
        for index, frame in enumerate(frames):
            view = memoryview(frame).cast("B")
            if view.nbytes < BLOB_MIN:
                self.inline.append(bytes(view))
            elif known and (digest := known_digest(view, known)):
                table.append((index, view.nbytes, None, digest))
            else:
                self.large.append(bytes(view))
                table.append((index, view.nbytes, 0, None if known is None else content_digest(view)))
        self.head = {**head, "blobs": table} if table else head


class Held(BlobFile):
    """The large frames of a message that came as bytes, in pieces, by their place in its table."""

    def __init__(self, contents: Mapping[int, list[bytes]]) -> None:
        super().__init__(())
        self._contents = contents

    def map(self, offset: int, nbytes: int) -> bytearray:  # type: ignore[override]
        """A copy, which its reader may change."""
        return bytearray().join(self._contents[offset])


def to_wire(head: Head, inline: Sequence[Buffer], file: BlobFile | None) -> Wire:
    """A message as it is sent."""
    places = [] if file is None else [(offset, n) for _, n, offset, _ in head["blobs"] if offset is not None]
    large = [bytes(file.map(*place)) for place in places] if file is not None else []
    return json.dumps(head).encode(), [bytes(frame) for frame in inline], large


@dataclass(frozen=True)
class Part:
    """A message, or a piece of one of its large frames; `make` takes memory only when it is handed over."""

    nbytes: int
    is_final: bool
    make: Callable[[], Wire]


def in_parts(message: Message) -> list[Part]:
    """What to send of a message, in this order: pieces, which have no head, and then the rest."""
    head, inline, file = message
    parts = []
    for _, nbytes, offset, _ in head.get("blobs", ()):
        if file is not None and offset is not None:
            frame = file.map(offset, nbytes)
            starts = range(0, nbytes, PIECE)
            parts += [Part(min(PIECE, nbytes - start), False, partial(_piece, frame, start)) for start in starts]
    return [*parts, Part(0, is_final(head), partial(to_wire, head, inline, None))]


def _piece(frame: mmap.mmap, start: int) -> Wire:
    return b"", [], [frame[start : start + PIECE]]


def is_final(head: Head) -> bool:
    """Whether a client waits for nothing more once it has this message."""
    return bool(head.get("last")) or head["event"] in FINAL


def wire_of(packed: Packed) -> Wire:
    """The same of a message that was packed here."""
    if isinstance(packed, Loose):
        return json.dumps(packed.head).encode(), packed.inline, packed.large
    return to_wire(packed.head, packed.inline, packed.file)


def from_wire(wire: Wire, *, in_file: bool = False) -> Message:
    """The message that was sent; its frames may be written to. A worker takes large ones from a memory file only."""
    text, inline, large = wire
    head: Head = json.loads(text)
    frames = [bytearray(frame) for frame in inline]
    if not large:
        return head, frames, None
    contents, end, place = iter(large), 0, dict[int, list[bytes]]()
    table = []
    for index, nbytes, offset, digest in head["blobs"]:
        if offset is not None:
            place[end], offset = _take(contents, nbytes), end
            end += stripe_bytes(nbytes)
        table.append((index, nbytes, offset, digest))
    return {**head, "blobs": table}, frames, in_memory_file(place) if in_file else Held(place)


def _take(pieces: Iterator[bytes], nbytes: int) -> list[bytes]:
    taken = [next(pieces)]
    while sum(map(len, taken)) < nbytes:
        taken.append(next(pieces))
    return taken


def in_memory_file(contents: Mapping[int, list[bytes]]) -> BlobFile:
    """A memory file with these frames at these places."""
    file = BlobFile.create()
    for place, pieces in contents.items():
        file.write(memoryview(b"".join(pieces)), place)
    return file


def repack(message: Message) -> Packed:
    """A message that was received, ready to be passed on as it is."""
    head, inline, file = message
    packed = Packed(head, inline)
    packed.file = file
    return packed


def nbytes(wire: Wire) -> int:
    """Size of a message."""
    return len(wire[0]) + sum(map(len, wire[1])) + sum(map(len, wire[2]))
