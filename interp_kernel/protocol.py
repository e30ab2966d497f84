"""What travels between a notebook and its worker: messages on a socket, and values as pickles.

A message is a head of plain data and frames of bytes. Frames of at least BLOB_MIN bytes do not go through the socket:
they are written once into memory files whose descriptors are passed, and the receiver maps them copy-on-write. The
head's `blobs` table says where each lies, or by which digest the receiver already has it.

Values are pickled with cloudpickle, tensors out of band and on the CPU in their own dtype. What must not be copied
(the model, a remote value, a module) travels as a reference, resolved by the receiver.
"""

from __future__ import annotations

import dis
import io
import json
import linecache
import marshal
import mmap
import os
import pickle
import select
import socket
import struct
import sys
import tempfile
import time
import types
from array import array
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import _lru_cache_wrapper, cache, lru_cache
from typing import Any, ClassVar, cast

from interp_kernel.errors import ShipError
from interp_kernel.imports import imported_by_code

PROTOCOL = 2
PYTHON = list(sys.version_info[:2])  # the version that bytecode needs
AWAKE_S = 0.0005
AWAY_S = 0.001  # a core that is given back so late has other work
CROWDED_S = 0.3
BLOB_MIN = 1 << 20
PAGE = mmap.PAGESIZE
PIECE = 1 << 18  # bytes that stay in a CPU's cache between two uses
MOST_FILES = 100  # that a worker keeps open for blobs: it may have 1024 descriptors, on macOS 256
STRIPES = 2 if hasattr(os, "memfd_create") else 1
PARALLEL_MIN = 1 << 24  # below it, threads cost more than they save
MAP_FIXED = 0x10  # of Linux

give_way: Callable[[], None] = getattr(os, "sched_yield", lambda: None)  # macOS has none

Head = dict[str, Any]
Buffer = bytes | bytearray | memoryview | mmap.mmap
Reference = tuple[str, Any]  # ("model", None), ("tokenizer", None), ("value", id), ("module", name)


# ------------------------------------------------------------------------------------------------- blobs


class BlobFile:
    """Memory that holds large frames and is passed as descriptors; closed when nobody refers to it any more.

    A frame lies in STRIPES files, a part in each at the same offset: the kernel locks a file while it is written, so
    two files take a frame in half the time of one.
    """

    def __init__(self, fds: Iterable[int]) -> None:
        self.fds: list[int] = []
        self.fds.extend(fds)  # those that are open already, where opening the next one fails

    @classmethod
    def create(cls) -> BlobFile:
        """New, empty files that have no name."""
        if hasattr(os, "memfd_create"):
            return cls(os.memfd_create("interp-blob") for _ in range(STRIPES))
        with tempfile.TemporaryFile() as file:  # not Linux: an unlinked file does the same
            return cls([os.dup(file.fileno())])

    def write(self, data: memoryview, offset: int, *, hashed: bool = False) -> str:
        """Copy a buffer to a place in the files; gives its hash if it is asked for, else ""."""
        stripe = stripe_bytes(data.nbytes)
        return _for_stripes(data, lambda k, part: _write(self.fds[k], part, offset, hashed), stripe)

    def map(self, offset: int, nbytes: int) -> mmap.mmap:
        """Map copy-on-write: the reader may change what it got, and the files stay as they were sent."""
        access = mmap.PROT_READ | mmap.PROT_WRITE
        if STRIPES == 1:
            return mmap.mmap(self.fds[0], nbytes, mmap.MAP_PRIVATE, access, offset=offset)
        whole = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE, access)
        address, stripe = _address(whole), stripe_bytes(nbytes)
        for fd, start in zip(self.fds, range(0, nbytes, stripe), strict=False):  # a short frame needs one file
            _map_at(address + start, min(stripe, nbytes - start), fd, offset)
        return whole

    def __del__(self) -> None:
        for fd in self.fds:
            os.close(fd)


def stripe_bytes(nbytes: int) -> int:
    """Size of the part of a frame that each file of a BlobFile has; the last one's may be smaller."""
    return -(-nbytes // (STRIPES * PAGE)) * PAGE


def _write(fd: int, part: memoryview, offset: int, hashed: bool) -> str:
    hasher = new_hasher() if hashed else None
    for start in range(0, part.nbytes, PIECE):
        piece = part[start : start + PIECE]
        while piece:
            n = os.pwrite(fd, piece, offset)
            if hasher is not None:
                hasher.update(piece[:n])  # while the cache has it
            piece, offset = piece[n:], offset + n
    return "" if hasher is None else str(hasher.hexdigest())


def _for_stripes(data: memoryview, work: Callable[[int, memoryview], str], stripe: int) -> str:
    """Do the work for each part, for those of a large frame at the same time: copying and hashing hold no GIL."""
    parts = [data[start : start + stripe] for start in range(0, data.nbytes, stripe)]
    if data.nbytes < PARALLEL_MIN:
        return "".join(map(work, range(len(parts)), parts))
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(len(parts)) as threads:
        return "".join(threads.map(work, range(len(parts)), parts))


def _address(memory: mmap.mmap) -> int:
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _map_at(address: int, nbytes: int, fd: int, offset: int) -> None:
    """Map a part of a file copy-on-write in place of the memory at an address."""
    import ctypes

    flags = mmap.MAP_PRIVATE | MAP_FIXED
    place = ctypes.c_void_p(address), ctypes.c_size_t(nbytes)
    if _libc_mmap()(*place, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, ctypes.c_long(offset)) != address:
        raise OSError(ctypes.get_errno(), f"mmap of {nbytes} bytes failed: {os.strerror(ctypes.get_errno())}")


@cache
def _libc_mmap() -> Any:
    import ctypes

    function = ctypes.CDLL(None, use_errno=True).mmap
    function.restype = ctypes.c_void_p
    return function


class Packed:
    """A message ready to be sent, more than once if need be: nothing in it refers to live data."""

    def __init__(self, head: Head, frames: Sequence[Buffer] = (), known: Collection[str] | None = None) -> None:
        """Copy large frames into a blob file; with `known`, leave out those whose digest it contains."""
        self.file: BlobFile | None = None
        inline: list[bytes] = []
        blobs: list[tuple[int, int, int | None, str | None]] = []
        end = 0
        for index, frame in enumerate(frames):
            view = memoryview(frame).cast("B")
            if view.nbytes < BLOB_MIN:
                inline.append(bytes(view))
                continue
            if known and (digest := known_digest(view, known)):
                blobs.append((index, view.nbytes, None, digest))
                continue
            self.file = self.file or BlobFile.create()
            written = self.file.write(view, end, hashed=known is not None)
            blobs.append((index, view.nbytes, end, sample_digest(view) + written if known is not None else None))
            end += stripe_bytes(view.nbytes)
        self.head = {**head, "blobs": blobs} if blobs else head
        self.inline = inline

    @property
    def digests(self) -> set[str]:
        """Digests of the blobs that the receiver has once it has this message."""
        return {digest for *_, digest in self.head.get("blobs", ()) if digest}

    def encode(self) -> bytes:
        """The message as it goes through the socket."""
        frames = [encode_head(self.head), *self.inline]
        return struct.pack(f"!I{len(frames)}Q", len(frames), *map(len, frames)) + b"".join(frames)


class _PlainPickler(pickle.Pickler):
    """Refuses what is no plain data, as JSON does: what a call shows must not make its receiver import anything."""

    kinds: ClassVar[dict[type, Any]] = {str: str.__str__, int: int, float: float, list: list, tuple: tuple, dict: dict}

    def reducer_override(self, obj: Any) -> Any:
        """Called for what is none of these itself; their subclasses, as an IntEnum, travel as what they are made of."""
        if isinstance(obj, type) and obj in self.kinds:
            return NotImplemented  # it goes by name
        for kind, plain in self.kinds.items():
            if isinstance(obj, kind):
                return kind, (plain(obj),)
        raise TypeError(f"A {type(obj).__name__} can't be part of a message, which is made of plain data.")


def encode_head(head: Head) -> bytes:
    """Calls and their events are pickled, in a third of the time. The rest is JSON: any version can read a hello."""
    if "seq" not in head and head.get("verb") != "submit":
        return json.dumps(head).encode()
    stream = io.BytesIO()
    _PlainPickler(stream, protocol=5).dump(head)
    return stream.getvalue()


def decode_head(data: bytearray) -> Head:
    """The head that was encoded."""
    head: Head = pickle.loads(data) if data.startswith(pickle.PROTO) else json.loads(data.decode())
    return head


def frames_size(head: Head, inline: Iterable[Buffer]) -> int:
    """Bytes of the frames that travel with a message; the head itself is small."""
    large: int = sum(nbytes for _, nbytes, offset, _ in head.get("blobs", ()) if offset is not None)
    return sum(map(len, inline)) + large


def content_digest(data: memoryview) -> str:
    """The name under which a worker keeps a buffer: a hash of a sample, then 128-bit hashes of its parts."""
    import xxhash

    hashes = _for_stripes(data, lambda _, part: str(xxhash.xxh3_128_hexdigest(part)), stripe_bytes(data.nbytes))
    return sample_digest(data) + hashes


def new_hasher() -> Any:
    """xxh3, 18 GB/s here."""
    import xxhash

    return xxhash.xxh3_128()


def sample_digest(data: memoryview) -> str:
    """How the buffer's content digest begins; enough to see of most buffers that they have not been sent yet."""
    import xxhash

    sample = b"".join(data[i : i + 64] for i in range(0, data.nbytes, data.nbytes // 64))
    return xxhash.xxh3_64_hexdigest(sample, seed=data.nbytes)


def known_digest(data: memoryview, known: Collection[str]) -> str | None:
    """The buffer's digest if it is among `known`; all of it is read only where its sample fits one of them."""
    start = sample_digest(data)
    if not any(digest.startswith(start) for digest in known):
        return None
    digest = content_digest(data)
    return digest if digest in known else None


class BlobStore:
    """The blobs that a worker keeps, least recently used dropped first, so that unchanged inputs travel once."""

    def __init__(self, limit_bytes: int = 1 << 30) -> None:
        self.limit_bytes, self.nbytes = limit_bytes, 0
        self._blobs: dict[str, tuple[BlobFile, int, int]] = {}

    def missing(self, head: Head) -> list[str]:
        """Digests that a message refers to and that are not, or no longer, here."""
        return [d for _, _, offset, d in head.get("blobs", ()) if offset is None and d not in self._blobs]

    def frames(self, head: Head, inline: Iterable[Buffer], file: BlobFile | None) -> list[Buffer]:
        """All frames of a message in order: inline ones, new blobs (which are kept) and known ones."""
        frames: list[Buffer] = list(inline)
        blobs = head.get("blobs", ())
        known = {digest: self._blobs[digest] for _, _, offset, digest in blobs if offset is None}
        for index, nbytes, offset, digest in blobs:
            if offset is None:
                held, offset, nbytes = known[digest]
                self._keep(digest, known[digest])
            else:
                assert file is not None
                held = file
                if digest is not None:
                    self._keep(digest, (held, offset, nbytes))
            frames.insert(index, held.map(offset, nbytes))
        return frames

    def _keep(self, digest: str, blob: tuple[BlobFile, int, int]) -> None:
        if blob[2] > self.limit_bytes:
            return
        if digest not in self._blobs:
            self.nbytes += blob[2]
        self._blobs[digest] = self._blobs.pop(digest, blob)
        while self.nbytes > self.limit_bytes or len({id(file) for file, _, _ in self._blobs.values()}) > MOST_FILES:
            self.nbytes -= self._blobs.pop(next(iter(self._blobs)))[2]


# ------------------------------------------------------------------------------------------------- channel


class Channel:
    """One end of a Unix stream socket that carries messages; one thread sends, one receives."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._buffer = bytearray()
        self._needed = 4  # bytes of the buffer without which it holds no message
        self._fds: deque[int] = deque()
        self._crowded_until = 0.0
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    def fileno(self) -> int:
        """Descriptor of the socket."""
        return self.sock.fileno()

    def send(self, packed: Packed, wake_fd: int | None = None) -> bool:
        """Send the whole message; False if `wake_fd` was readable while the receiver was slow, with a part sent."""
        data, file = memoryview(packed.encode()), packed.file
        while data:
            try:
                data, file = data[self.send_some(data, file, socket.MSG_DONTWAIT) :], None
            except BlockingIOError:
                if not self._sleep(select.POLLOUT, None, wake_fd):
                    return False
        return True

    def send_some(self, data: memoryview, file: BlobFile | None, flags: int = 0) -> int:
        """Send the start of a message, its descriptor attached to the first byte; returns the bytes taken."""
        if file is None:
            return self.sock.send(data, flags)
        return self.sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", file.fds))], flags)

    def send_rest(self, data: memoryview) -> None:
        """Send what is left of a message; blocks."""
        if data:
            self.sock.sendall(data)

    def receive(self) -> tuple[Head, list[bytearray], BlobFile | None]:
        """The next message; blocks. Raises EOFError when the other side is gone."""
        while (message := self.received()) is None:
            self.fill()
        return message

    def arrives(self, within_s: float | None, wake_fd: int | None = None) -> bool:
        """Wait for bytes, or for the other side to leave; False if none come in time, or `wake_fd` is readable first.

        For AWAKE_S it waits awake: to be woken takes up to 60 us, and a small call is answered by then. Where others
        want the core, it goes to sleep at once for the next CROWDED_S.
        """
        started = now = time.perf_counter()
        while not self._poll.poll(0):
            waited = now - started
            if within_s is not None and waited >= within_s:
                return False
            if waited >= AWAKE_S or now < self._crowded_until:
                return self._sleep(select.POLLIN, None if within_s is None else within_s - waited, wake_fd)
            before = now
            give_way()
            now = time.perf_counter()
            if now - before > AWAY_S:
                self._crowded_until = now + CROWDED_S
        return True

    def _sleep(self, until: int, within_s: float | None, wake_fd: int | None) -> bool:
        poll = select.poll()
        poll.register(self.sock, until)
        if wake_fd is not None:
            poll.register(wake_fd, select.POLLIN)
        ready = poll.poll(None if within_s is None else 1000 * within_s)
        return any(fd == self.fileno() for fd, _ in ready)

    def fill(self) -> None:
        """Take what the socket has, at least one byte."""
        data, ancillary, _, _ = self.sock.recvmsg(1 << 15, socket.CMSG_SPACE(16 * 4))
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._fds.extend(array("i", payload[: len(payload) // 4 * 4]))
        if not data:
            raise EOFError("the other side closed the connection")
        self._buffer += data

    def received(self) -> tuple[Head, list[bytearray], BlobFile | None] | None:
        """A message that has arrived whole, or None."""
        buffer = self._buffer
        if len(buffer) < self._needed:
            return None
        n = int.from_bytes(buffer[:4], "big")
        start = 4 + 8 * n
        if len(buffer) < start:
            self._needed = start
            return None
        lengths = struct.unpack_from(f"!{n}Q", buffer, 4)
        if len(buffer) < start + sum(lengths):
            self._needed = start + sum(lengths)
            return None
        self._needed = 4
        frames: list[bytearray] = []  # not bytes: arrays and tensors made of them may be written to
        for length in lengths:
            frames.append(buffer[start : start + length])
            start += length
        del buffer[:start]
        head = decode_head(frames[0])
        has_file = "blobs" in head and any(offset is not None for _, _, offset, _ in head["blobs"])
        return head, frames[1:], self._file() if has_file else None

    def _file(self) -> BlobFile:
        if len(self._fds) < STRIPES:
            raise IndexError(f"{len(self._fds)} descriptors came with a message that needs {STRIPES}")
        return BlobFile([self._fds.popleft() for _ in range(STRIPES)])

    def close(self) -> None:
        """Close both directions; a thread that waits in `receive` gets EOFError."""
        with suppress(OSError):  # the other side was first
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()
        while self._fds:
            os.close(self._fds.popleft())


def peer(sock: socket.socket) -> tuple[int, int]:
    """Process id and user id of the process at the other end of a Unix socket."""
    if hasattr(socket, "SO_PEERCRED"):
        pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
        return pid, uid
    SOL_LOCAL, LOCAL_PEERCRED, LOCAL_PEERPID = 0, 1, 2  # noqa: N806 - macOS' names; struct xucred: version, uid, ...
    _, uid = struct.unpack_from("2I", sock.getsockopt(SOL_LOCAL, LOCAL_PEERCRED, 76))
    return sock.getsockopt(SOL_LOCAL, LOCAL_PEERPID), uid


# ------------------------------------------------------------------------------------------------- values


class TooLargeError(Exception):
    """The pickle passed the size it was allowed."""


class _LimitedBytes(io.BytesIO):
    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def write(self, data: Any) -> int:
        written = super().write(data)
        if self.tell() > self.limit:
            raise TooLargeError
        return written


_resolve: ContextVar[Callable[[Reference], Any]] = ContextVar("resolve")


def load_reference(kind: str, key: Any) -> Any:
    """Called by the unpickler for what travelled as a reference."""
    return _resolve.get()((kind, key))


def _rebuild_tensor(data: Buffer, dtype: str, shape: tuple[int, ...], requires_grad: bool, is_parameter: bool) -> Any:
    import torch

    kind = getattr(torch, dtype)
    flat = torch.frombuffer(data, dtype=torch.uint8).view(kind) if len(data) else torch.empty(0, dtype=kind)
    tensor = flat.reshape(shape)
    return torch.nn.Parameter(tensor, requires_grad) if is_parameter else tensor.requires_grad_(requires_grad)


class Shipment:
    """What `dumps` found out about a value on the way: the frames and what must go along."""

    def __init__(self, limit: int | None = None) -> None:
        """Nothing is in it yet; `limit` is the largest size of its frames in bytes."""
        self.limit, self.nbytes = limit, 0
        self.frames: list[Buffer] = []
        self.modules: set[str] = set()  # modules whose functions or classes went by name
        self.files: set[str] = set()  # files of functions that went by value: cells, for tracebacks
        self.held: Sequence[Any] = ()  # remote values in it
        self.by_value = False  # bytecode is inside, so both sides need the same Python minor version

    def take(self, buffer: pickle.PickleBuffer) -> bool:
        """Add a buffer of the value as a frame; called by the pickler."""
        raw = buffer.raw()
        self.add(raw.nbytes)
        self.frames.append(raw)
        return False

    def add(self, nbytes: int) -> None:
        """Count bytes that are part of it; raises TooLargeError if they pass the limit."""
        self.check(nbytes)
        self.nbytes += nbytes

    def copy(self) -> None:
        """Copy what still lies in the caller's own tensors and arrays, which may be changed before it is sent."""
        self.frames = [bytes(frame) for frame in self.frames]

    def check(self, nbytes: int) -> None:
        """Raise TooLargeError if so many bytes more would pass the limit."""
        if self.limit is not None and self.nbytes + nbytes > self.limit:
            raise TooLargeError


Reducer = Callable[[Any], Reference | None]


@cache
def _pickler_class() -> type[Any]:
    """Made on first use, since it needs cloudpickle, and once, since making a class costs 0.1 ms."""
    import cloudpickle

    class ValuePickler(cloudpickle.Pickler):  # type: ignore[misc]
        def __init__(self, stream: io.BytesIO, shipment: Shipment, reducer: Reducer, lazy: bool) -> None:
            self.shipment, self.reducer, self.lazy = shipment, reducer, lazy
            # A callback of its own would make a cycle, and what it has seen would stay until Python collects garbage.
            super().__init__(stream, protocol=5, buffer_callback=shipment.take)

        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, types.CodeType):
                return reduce_code(obj)
            if isinstance(obj, types.FunctionType):
                if obj.__module__ == cloudpickle.cloudpickle.__name__:
                    return NotImplemented  # one of its own helpers, which go by name with every function
                self.note_function(obj)
                reduced = super().reducer_override(obj)
                if not isinstance(reduced, tuple):
                    return reduced  # it goes by name
                return with_lazy_globals(reduced) if self.lazy else with_given_globals(reduced, obj.__code__)
            if isinstance(obj, _lru_cache_wrapper) and obj.__module__ == "__main__":
                return with_cache, (obj.__wrapped__, obj.cache_parameters())  # by name it would not be found there
            if type(obj) is Stand:
                return load_reference, obj.reference
            if (reference := self.reducer(obj)) is not None:
                if reference[0] == "attribute":
                    self.shipment.modules.add(reference[1][0])
                return load_reference, reference
            if (torch := sys.modules.get("torch")) is not None and isinstance(obj, torch.Tensor):
                return self.reduce_tensor(obj, torch)
            if isinstance(obj, types.ModuleType):
                self.shipment.modules.add(obj.__name__)
                return load_reference, ("module", obj.__name__)
            if isinstance(obj, type):
                if obj.__module__ != "builtins":
                    self.shipment.modules.add(obj.__module__)
                self.shipment.by_value |= obj.__module__ == "__main__"
            refuse_what_stays(obj)
            return super().reducer_override(obj)

        def note_function(self, function: types.FunctionType) -> None:
            if function.__module__ not in (None, "__main__") and "<" not in function.__qualname__:
                self.shipment.modules.add(function.__module__)  # it goes by name
                return
            self.shipment.by_value = True
            self.shipment.modules |= imported_by_code(function.__code__)
            if function.__code__.co_filename in linecache.cache:
                self.shipment.files.add(function.__code__.co_filename)

        def reduce_tensor(self, tensor: Any, torch: Any) -> Any:
            plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
            if not plain or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
                return NotImplemented if tensor.device.type in ("cpu", "meta") else tensor.cpu().__reduce_ex__(5)
            self.shipment.check(tensor.nbytes)  # before a copy from the GPU is made
            data = tensor.detach().cpu().contiguous().resolve_conj().resolve_neg().reshape(-1).view(torch.uint8).numpy()
            requires_grad = tensor.requires_grad and tensor.is_leaf
            return _rebuild_tensor, (
                pickle.PickleBuffer(data),
                str(tensor.dtype).removeprefix("torch."),
                tuple(tensor.shape),
                requires_grad,
                isinstance(tensor, torch.nn.Parameter),
            )

    return ValuePickler


@dataclass(frozen=True)
class Stand:
    """Stands for what its reference names, in the globals of a function that is pickled."""

    reference: Reference


def importable(value: Any) -> tuple[str, str] | None:
    """Module and name of an imported function or class, which go back by name: pickled, they would be imported."""
    if not isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
        return None
    module, name = getattr(value, "__module__", None), value.__qualname__
    if module in (None, "__main__", "builtins") or getattr(sys.modules.get(module), name, None) is not value:
        return None
    return module, name


def with_cache(function: Callable[..., Any], parameters: dict[str, Any]) -> Any:
    """The function with an empty cache of its results."""
    return lru_cache(**parameters)(function)


def reduce_code(code: types.CodeType) -> Any:
    """Bytecode as Python itself stores it, in a tenth of the time that its fields take one by one."""
    if not is_of_source(code):
        return NotImplemented  # marshal refuses such a constant, or makes bytes of it; cloudpickle takes it
    return marshal.loads, (marshal.dumps(code),)


def is_of_source(constant: object) -> bool:
    """Whether a constant of a function can be written in Python; libraries put others there."""
    if isinstance(constant, types.CodeType):
        return all(map(is_of_source, constant.co_consts))
    if type(constant) in (tuple, frozenset):
        return all(map(is_of_source, cast("Iterable[object]", constant)))
    return type(constant) in (types.NoneType, bool, int, float, complex, str, bytes, types.EllipsisType)


def with_lazy_globals(reduced: tuple[Any, ...]) -> tuple[Any, ...]:
    """What cloudpickle made of a function, changed so that to load it imports nothing that its code names."""
    function_globals = reduced[2][1]["__globals__"]
    for name, value in function_globals.items():
        if (place := importable(value)) is not None:
            function_globals[name] = Stand(("attribute", list(place)))
    return reduced


def with_given_globals(reduced: tuple[Any, ...], code: types.CodeType) -> tuple[Any, ...]:
    """The same for the globals that a remote cell is given: a function of the notebook finds them there too."""
    function_globals = reduced[2][1]["__globals__"]
    for name in ("model", "tokenizer"):
        if name not in function_globals and loads_global(code, name):
            function_globals[name] = Stand((name, None))
    return reduced


@lru_cache(maxsize=1024)
def loads_global(code: types.CodeType, name: str) -> bool:
    """Whether code, or code inside it, reads a global of this name."""
    steps = dis.get_instructions(code) if name in code.co_names else ()
    if any(step.opname in ("LOAD_GLOBAL", "LOAD_NAME") and step.argval == name for step in steps):
        return True
    return any(loads_global(inner, name) for inner in code.co_consts if isinstance(inner, types.CodeType))


def refuse_what_stays(obj: Any) -> None:
    """Say in words why a model or a generator does not travel, where pickle would fail or copy gigabytes."""
    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is not None and isinstance(obj, transformers.PreTrainedModel):
        raise ShipError(
            f"A model ({type(obj).__name__}) does not travel: it lives on the worker. "
            "Return the tensors or numbers that you need from it."
        )
    if isinstance(obj, types.GeneratorType | types.AsyncGeneratorType | types.CoroutineType):
        raise ShipError(f"A {type(obj).__name__} can't travel, for it is a paused computation. Return list(...) of it.")


def no_reference(_: Any) -> Reference | None:
    """The reducer of values that hold nothing special."""
    return None


def dumps(value: Any, reducer: Reducer = no_reference, limit: int | None = None, *, lazy: bool = False) -> Shipment:
    """Pickle a value.

    Args:
        value: Anything that cloudpickle takes; tensors on any device.
        reducer: Gives the reference for an object that must not be copied, else None.
        limit: Largest size in bytes, buffers included.
        lazy: The receiver gets what a function's code has imported as references, to be imported at the first use.

    Raises:
        TooLargeError: The pickle is larger than `limit`.
        Exception: Whatever pickling the value raised, as a TypeError or a ShipError.
    """
    shipment = Shipment(limit)
    stream = io.BytesIO() if limit is None else _LimitedBytes(limit)
    _pickler_class()(stream, shipment, reducer, lazy).dump(value)
    shipment.add(stream.tell())
    shipment.frames.insert(0, stream.getvalue())
    return shipment


def loads(frames: Sequence[Buffer], resolve: Callable[[Reference], Any], absent: list[str] | None = None) -> Any:
    """Unpickle frames made by `dumps`; `resolve` gives the object for each reference.

    With `absent`, what can't be imported here becomes a stand-in, so that the rest is not lost with it, and the list
    is told why.
    """
    token = _resolve.set(resolve)
    try:
        return pickle.loads(frames[0], buffers=frames[1:])
    except (ImportError, AttributeError):
        if absent is None:
            raise
        return _TolerantUnpickler(frames, absent).load()
    finally:
        _resolve.reset(token)


class _TolerantUnpickler(pickle.Unpickler):
    def __init__(self, frames: Sequence[Buffer], absent: list[str]) -> None:
        super().__init__(io.BytesIO(frames[0]), buffers=frames[1:])
        self._absent = absent

    def find_class(self, module: str, name: str) -> Any:
        try:
            return super().find_class(module, name)
        except (ImportError, AttributeError) as error:
            self._absent.append(f"{module}.{name} can't be imported here ({error})")
            return type(name, (Absent,), {"__module__": module})


class Absent:
    """Stands for a value whose class can't be imported here; it takes what the pickle has for it, and holds nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Absent:
        """Any arguments will do."""
        return object.__new__(cls)

    def _ignore(self, *_: Any, **__: Any) -> None:
        pass

    __init__ = __setstate__ = __setitem__ = append = extend = add = _ignore

    def __repr__(self) -> str:
        return f"<{type(self).__module__}.{type(self).__name__}, which can't be imported here>"

    def __reduce__(self) -> Any:
        raise ShipError(f"{self!r} holds nothing. Leave the value on the worker: %%remote --keep NAME.")
