"""RPCs as plain functions in tables, and a gRPC server made of such a table.

A function takes (plane, request) and returns the answer, or None for an empty one; an async generator makes a
stream. What is in no table answers UNIMPLEMENTED and is counted, so that a test fails by its name.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

from google.protobuf.empty_pb2 import Empty
from grpclib import GRPCError, Status
from grpclib.config import Configuration
from grpclib.const import Handler
from grpclib.protocol import H2Protocol
from grpclib.server import Server
from modal_proto import api_grpc

from tests.modal_loopback.state import Fault, Plane, Table

Handle = Callable[[Any], Awaitable[None]]
WINDOW_BYTES = 1 << 26  # grpclib's own 64 KB would make every large message wait for acknowledgements


class Servicer:
    """What grpclib serves: a table of RPCs."""

    def __init__(self, handles: Mapping[str, Handle]) -> None:
        self._mapping = api_grpc.ModalClientBase.__mapping__(SimpleNamespace(**handles))  # type: ignore[arg-type]

    def __mapping__(self) -> Mapping[str, Handler]:
        """Every RPC of Modal's service by its path."""
        return self._mapping


class ClosingServer(Server):
    """A server that ends its connections too when it is closed; grpclib leaves them to the other side."""

    def __init__(self, servicer: Servicer, config: Configuration) -> None:
        super().__init__([servicer], config=config)
        self._protocols: list[H2Protocol] = []

    def _protocol_factory(self) -> H2Protocol:
        self._protocols.append(super()._protocol_factory())
        return self._protocols[-1]

    def close(self) -> None:
        """Stop listening, cancel requests, end connections."""
        super().close()
        for protocol in self._protocols:
            protocol.processor.close()


def make_server(plane: Plane, table: Table, side: str) -> Server:
    """A server of all RPCs that Modal's service has, for clients or for one container; those in no table refuse."""
    names = api_grpc.ModalClientBase.__abstractmethods__  # not all that we have written is in every modal
    handles = {name: partial(answer, plane, name, table.get(name), side) for name in names}
    windows = Configuration(http2_connection_window_size=WINDOW_BYTES, http2_stream_window_size=WINDOW_BYTES)
    return ClosingServer(Servicer(handles), windows)


async def answer(plane: Plane, name: str, rpc: Callable[..., Any] | None, side: str, stream: Any) -> None:
    """Serve one request: count it, check who sends it, and let it be late or fail if a test wants that."""
    request = await stream.recv_message()
    plane.rpc_count[f"{side}:{name}"] += 1
    if rpc is None:
        plane.unimplemented[f"{side}:{name}"] += 1
        raise GRPCError(Status.UNIMPLEMENTED, f"{name} is not written in tests/modal_loopback")
    fault = None
    if side == "client":
        plane.bytes_in += request.ByteSize()
        check_token(plane, stream.metadata)
        await asyncio.sleep(plane.settings.rpc_latency_s)
        fault = take_fault(plane, name)
    if inspect.isasyncgenfunction(rpc):
        async for item in rpc(plane, request):
            await stream.send_message(item)
        return
    reply = await carry_out(plane, rpc, request)
    if fault is not None:
        raise fault.error()
    await stream.send_message(Empty() if reply is None else reply)


async def carry_out(plane: Plane, rpc: Callable[..., Any], request: Any) -> Any:
    """The answer to a request; a mistake of the plane's own fails the test."""
    try:
        reply = rpc(plane, request)
        return await reply if inspect.isawaitable(reply) else reply
    except GRPCError:
        raise
    except Exception as error:
        plane.failures.append(error)
        raise


def check_token(plane: Plane, metadata: Any) -> None:
    """Refuse a client that has another token."""
    if (metadata.get("x-modal-token-id"), metadata.get("x-modal-token-secret")) != plane.settings.token:
        raise GRPCError(Status.UNAUTHENTICATED, "Token validation failed")


def take_fault(plane: Plane, name: str) -> Fault | None:
    """The fault of this request, if there is one; one from before it is carried out is raised here."""
    if not plane.faults[name]:
        return None
    fault = plane.faults[name].popleft()
    if not fault.is_after:
        raise fault.error()
    return fault
