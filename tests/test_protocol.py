"""Framing, blobs and values, each sent through a real socket where it matters."""

from __future__ import annotations

import enum
import fcntl
import gc
import json
import math
import os
import resource
import socket
import subprocess
import sys
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp_kernel.errors import ShipError
from interp_kernel.protocol import (
    BLOB_MIN,
    BlobStore,
    Channel,
    Head,
    Packed,
    TooLargeError,
    content_digest,
    decode_head,
    dumps,
    encode_head,
    loads,
    peer,
)


@contextmanager
def channels() -> Iterator[tuple[Channel, Channel]]:
    left, right = map(Channel, socket.socketpair())
    try:
        yield left, right
    finally:
        left.close()
        right.close()


@contextmanager
def raised_limit(descriptors: int) -> Iterator[None]:
    """Let this process have so many descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(descriptors, hard)), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def no_references(reference: Any) -> Any:
    raise AssertionError(f"nothing here travels as a reference, but {reference} did")


def travel(value: Any) -> Any:
    """Pickle a value, send it through a socket, and unpickle it."""
    with channels() as (near, far):
        near.send(Packed({}, dumps(value).frames))
        return loads(BlobStore().frames(*far.receive()), no_references)


# ---------------------------------------------------------------------------------------------- framing

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.tuples(st.dictionaries(st.text().filter(lambda key: key != "blobs"), JSON), st.lists(st.binary())), max_size=5
)


@given(messages=MESSAGES, cuts=st.lists(st.integers(1, 40), max_size=30))
@settings(max_examples=60, deadline=None)
def test_messages_arrive_whole_however_the_stream_is_cut(
    messages: list[tuple[dict[str, Any], list[bytes]]], cuts: list[int]
) -> None:
    stream = b"".join(Packed(head, frames).encode() for head, frames in messages)
    pieces = [stream[sum(cuts[:i]) : sum(cuts[: i + 1])] for i in range(len(cuts))] + [stream[sum(cuts) :]]
    arrived = []
    with channels() as (near, far):
        for piece in filter(None, pieces):
            near.sock.sendall(piece)
            far.fill()
            while (message := far.received()) is not None:
                arrived.append(message)
    assert [(head, [bytes(f) for f in frames]) for head, frames, _ in arrived] == messages
    assert all(file is None for *_, file in arrived)


class Name(str):
    __slots__ = ()

    def __str__(self) -> str:
        return "whatever"


class Level(enum.IntEnum):
    HIGH = 3


@pytest.mark.parametrize("head", [{"seq": 1}, {"verb": "submit"}, {"verb": "hello"}], ids=str)
def test_a_head_arrives_as_plain_data(head: Head) -> None:
    more = OrderedDict(none=None, yes=[True])
    sent = {"text": "\ud800 é", Name("red"): Level.HIGH, "n": np.float64(0.5), "more": more}
    arrived = decode_head(bytearray(encode_head({**head, **sent})))
    assert arrived == {**head, "text": "\ud800 é", "red": 3, "n": 0.5, "more": {"none": None, "yes": [True]}}
    types = [type(part) for part in (*arrived, *arrived.values())]
    assert set(types) <= {str, int, float, dict}


@pytest.mark.parametrize(
    "value", [np.int64(3), np.zeros(2), torch.zeros(2), Name, object(), len], ids=lambda value: type(value).__name__
)
def test_a_head_takes_nothing_else(value: Any) -> None:
    with pytest.raises(TypeError, match=f"A {type(value).__name__} can't be part of a message, .* of plain data"):
        encode_head({"seq": 1, "data": {"text/plain": [value]}})


def test_a_hello_can_be_read_by_any_version() -> None:
    for hello in ({"verb": "hello", "client": "c"}, {"event": "reply", "request": None, "value": {"protocol": 9}}):
        assert json.loads(Packed(hello).encode()[4 + 8 :]) == hello


def test_the_end_of_the_stream_is_an_error() -> None:
    with channels() as (near, far):
        near.sock.sendall(Packed({"a": 1}).encode()[:-1])
        near.close()
        with pytest.raises(EOFError):
            far.receive()


def test_messages_with_and_without_large_frames_stay_apart() -> None:
    big = [os.urandom(BLOB_MIN + i) for i in range(3)]
    sent = [[b"a", big[0]], [b"b"], [big[1], b"", big[2], b"c"], []]
    with channels() as (near, far):
        for frames in sent:
            near.send(Packed({"n": len(frames)}, frames))
        for frames in sent:
            head, inline, file = far.receive()
            assert head["n"] == len(frames)
            assert [bytes(frame) for frame in BlobStore().frames(head, inline, file)] == frames


def test_the_peer_is_the_process_at_the_other_end() -> None:
    left, right = socket.socketpair()
    with left, right:
        assert peer(left) == (os.getpid(), os.getuid())


# ---------------------------------------------------------------------------------------------- waiting


@pytest.mark.parametrize("within_s", [0, 0.0001, 0.2])
def test_a_wait_ends_in_time(within_s: float) -> None:
    with channels() as (near, _):
        assert not near.arrives(within_s)


def test_a_wait_ends_with_what_comes_or_with_the_other_side() -> None:
    with channels() as (near, far), ThreadPoolExecutor() as threads:
        waiting = threads.submit(near.arrives, None)
        far.send(Packed({"n": 1}))
        assert waiting.result(10)
        near.receive()
        waiting = threads.submit(near.arrives, None)
        far.close()
        assert waiting.result(10)


def test_a_wait_ends_with_a_stop_also_where_descriptors_are_many() -> None:
    with channels() as (near, _), raised_limit(4096):
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 2000) for fd in os.pipe()]
        os.write(ends[1], b"!")
        assert not near.arrives(None, ends[0])


def test_a_long_wait_costs_no_processor_time() -> None:
    with channels() as (near, _):
        before = time.thread_time()
        near.arrives(1.0)
        assert time.thread_time() - before < 0.3


# ------------------------------------------------------------------------------------------------ blobs


def test_large_frames_do_not_go_through_the_socket() -> None:
    assert len(Packed({}, [bytes(BLOB_MIN)]).encode()) < 200
    assert len(Packed({}, [bytes(BLOB_MIN - 1)]).encode()) > BLOB_MIN - 1


def test_what_a_call_does_to_a_large_input_does_not_reach_the_kept_copy() -> None:
    data = os.urandom(BLOB_MIN)
    store = BlobStore()
    packed = Packed({}, [data], known=())
    first = store.frames(packed.head, [], packed.file)[0]
    memoryview(first)[:4] = b"\0\0\0\0"
    again = Packed({}, [data], known=packed.digests)
    assert again.file is None
    assert bytes(store.frames(again.head, [], None)[0]) == data


def test_what_happens_to_a_value_after_sending_does_not_reach_the_message() -> None:
    data = bytearray(os.urandom(BLOB_MIN))
    before = bytes(data)
    packed = Packed({}, [data, data[:10]])
    data[:] = bytes(len(data))
    assert [bytes(f) for f in BlobStore().frames(packed.head, packed.inline, packed.file)] == [before, before[:10]]


def test_the_least_recently_used_blob_is_evicted_and_named_as_missing() -> None:
    store = BlobStore(limit_bytes=2 * BLOB_MIN)
    a, b, c = (os.urandom(BLOB_MIN) for _ in range(3))
    digests = [content_digest(memoryview(data)) for data in (a, b, c)]

    def send(data: bytes, known: bool) -> list[str]:
        packed = Packed({}, [data], known=digests if known else ())
        if not (missing := store.missing(packed.head)):
            assert bytes(store.frames(packed.head, [], packed.file)[0]) == data
        return missing

    assert [send(data, known=False) for data in (a, b)] == [[], []]
    assert send(a, known=True) == []  # now b is the one used least recently
    assert send(c, known=False) == []
    assert [send(data, known=True) for data in (a, b, c)] == [[], [digests[1]], []]
    assert store.nbytes == 2 * BLOB_MIN


def test_a_blob_larger_than_the_store_is_passed_on_and_not_kept() -> None:
    store = BlobStore(limit_bytes=BLOB_MIN)
    packed = Packed({}, [bytes(BLOB_MIN + 1)], known=())
    assert len(memoryview(store.frames(packed.head, [], packed.file)[0])) == BLOB_MIN + 1
    assert store.missing(Packed({}, [bytes(BLOB_MIN + 1)], known=packed.digests).head) == list(packed.digests)


# ----------------------------------------------------------------------------------------------- values

FLOAT = torch.linspace(-3, 3, 24)
TENSORS = {
    **{str(kind): FLOAT.to(kind) for kind in (torch.float32, torch.float64, torch.float16, torch.bfloat16)},
    **{str(kind): FLOAT.to(kind) for kind in (torch.float8_e4m3fn, torch.float8_e5m2)},
    **{str(kind): torch.arange(24).to(kind) for kind in (torch.uint8, torch.int8, torch.int16, torch.int64)},
    "bool": torch.arange(24) % 3 == 0,
    "complex64": torch.complex(FLOAT, -FLOAT),
    "conjugated": torch.complex(FLOAT, -FLOAT).conj(),
    "negated view": torch.complex(FLOAT, -FLOAT).conj().imag,
    "0-d": torch.tensor(2.5),
    "0-d bf16": torch.tensor(2.5, dtype=torch.bfloat16),
    "empty": torch.empty(0),
    "empty with a shape": torch.empty(3, 0, 2, dtype=torch.int16),
    "transposed": FLOAT.reshape(4, 6).T,
    "strided": FLOAT[::3],
    "expanded": torch.ones(1).expand(5, 4),
    "offset": FLOAT[7:11],
    "not finite": torch.tensor([math.nan, math.inf, -math.inf, -0.0]),
    "large": torch.arange(BLOB_MIN, dtype=torch.int32),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_arrive_as_they_were(name: str) -> None:
    tensor = TENSORS[name]
    back = travel(tensor)
    assert (back.dtype, back.shape, back.requires_grad, back.device.type) == (tensor.dtype, tensor.shape, False, "cpu")
    plain = tensor.resolve_conj().resolve_neg().contiguous()
    assert back.reshape(-1).view(torch.uint8).tolist() == plain.reshape(-1).view(torch.uint8).tolist()
    back.zero_()  # what arrives may be written to


def test_requires_grad_and_parameters_survive_and_a_graph_does_not() -> None:
    leaf = torch.ones(3, requires_grad=True)
    parameter = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    back_leaf, computed, back_parameter = travel([leaf, leaf * 2, parameter])
    assert (back_leaf.requires_grad, back_leaf.is_leaf, type(back_leaf)) == (True, True, torch.Tensor)
    assert (computed.requires_grad, computed.grad_fn, computed.tolist()) == (False, None, [2, 2, 2])
    assert (type(back_parameter), back_parameter.requires_grad) == (torch.nn.Parameter, False)


def test_tensors_that_are_no_plain_memory_survive() -> None:
    sparse = torch.eye(4).to_sparse()
    meta = torch.empty(2, 3, device="meta")
    back_sparse, back_meta = travel([sparse, meta])
    assert back_sparse.is_sparse
    assert torch.equal(back_sparse.to_dense(), torch.eye(4))
    assert (back_meta.device.type, back_meta.shape) == ("meta", meta.shape)


@pytest.mark.parametrize("n", [5, BLOB_MIN])
def test_arrays_arrive_as_they_were_and_can_be_written_to(n: int) -> None:
    arrays: dict[str, Any] = {
        "c": np.arange(n, dtype=np.float32),
        "fortran": np.asfortranarray(np.arange(n * 2).reshape(n, 2)),
        "strided": np.arange(n)[::2],
        "dates": np.arange(n).astype("datetime64[D]"),
        "records": np.zeros(3, dtype=[("a", "i4"), ("b", "U3")]),
        "objects": np.array([{"k": 1}, None], dtype=object),
        "scalar": np.float16(0.5),
    }
    back = travel(arrays)
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array)
    back["c"] += 1
    assert back["c"][0] == 1


def test_nested_values_keep_their_structure_and_identity() -> None:
    tensor = torch.ones(2)
    value: dict[str, Any] = {"a": [tensor, (tensor, {"b": {1, 2}, "c": b"\0\xff", "d": "\ud800"})], "e": None}
    value["self"] = value
    back = travel(value)
    assert back["self"] is back
    assert back["a"][0] is back["a"][1][0]
    assert back["a"][1][1] == {"b": {1, 2}, "c": b"\0\xff", "d": "\ud800"}


def test_modules_go_by_name_and_functions_of_a_notebook_by_value() -> None:
    shipment = dumps([json, {"f": lambda x: x + 1}])
    assert shipment.by_value
    assert "json" in shipment.modules
    back = loads(shipment.frames, lambda reference: {("module", "json"): json}[reference])
    assert (back[0], back[1]["f"](1)) == (json, 2)
    assert not dumps([json.dumps, Path("/"), 3]).by_value


def test_what_the_caller_names_goes_as_a_reference() -> None:
    model = object()
    shipment = dumps({"m": [model]}, lambda value: ("model", None) if value is model else None)
    assert loads(shipment.frames, lambda reference: reference) == {"m": [("model", None)]}


def test_models_and_paused_computations_are_refused_with_the_reason() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    async def coroutine() -> None: ...

    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=4, n_embd=4, n_layer=1, n_head=1))
    with pytest.raises(ShipError, match=r"A model \(GPT2LMHeadModel\) does not travel: it lives on the worker"):
        dumps({"deep": [model]})
    with pytest.raises(ShipError, match=r"A generator can't travel.*Return list"):
        dumps([(i for i in range(3))])
    paused = coroutine()
    with pytest.raises(ShipError, match="A coroutine can't travel"):
        dumps(paused)
    paused.close()


@pytest.mark.parametrize(
    "value", [b"x" * 2000, ["y" * 20] * 3 + [str(i) for i in range(800)], torch.ones(500), np.ones(250)], ids=type
)
def test_the_limit_counts_text_and_buffers(value: object) -> None:
    with pytest.raises(TooLargeError):
        dumps(value, limit=2000)
    assert loads(dumps(value, limit=8000).frames, no_references) is not None


def test_what_was_pickled_is_free_at_once() -> None:
    value = np.ones(1000)
    gone = weakref.ref(value)
    gc.disable()
    try:
        dumps({"value": value, "function": lambda: value})
        del value
        assert gone() is None
    finally:
        gc.enable()


def test_bytecode_with_constants_that_no_source_has_travels() -> None:
    code = (lambda: "here").__code__
    for constant in (Path("there"), np.float64(0.5), (1, (np.int64(2),))):
        odd = code.replace(co_consts=tuple(constant if c == "here" else c for c in code.co_consts))
        outer = (lambda: 0).__code__.replace(co_consts=(None, odd))
        arrived = travel(FunctionType(odd, {"__name__": "__main__"}))()
        assert (arrived, type(arrived)) == (constant, type(constant))
        inner = travel(FunctionType(outer, {"__name__": "__main__"})).__code__.co_consts[1]
        assert list(map(type, inner.co_consts)) == list(map(type, odd.co_consts))


def test_a_cached_function_of_a_notebook_travels_with_an_empty_cache() -> None:
    space: dict[str, Any] = {"__name__": "__main__", "lru_cache": lru_cache}
    exec("@lru_cache(maxsize=3)\ndef double(x): return 2 * x", space)
    assert space["double"](4) == 8
    arrived = travel(space["double"])
    assert arrived.cache_info().currsize == 0
    assert (arrived(4), arrived(4)) == (8, 8)
    assert arrived.cache_info()[:3] == (1, 1, 3)


def test_plain_values_need_no_torch() -> None:
    code = (
        "import sys\nfrom interp_kernel.protocol import dumps, loads\n"
        "assert loads(dumps({'a': [1, lambda: 2]}).frames, None)['a'][1]() == 2\n"
        "print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
