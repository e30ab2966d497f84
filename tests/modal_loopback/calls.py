"""RPCs about calls: inputs in, outputs out, on the client's side and on the container's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from functools import partial

from modal_proto import api_pb2

from tests.modal_loopback.apps import create_blob
from tests.modal_loopback.containers import cancel_call, drain, expire, finish, requeue, schedule
from tests.modal_loopback.state import Call, Input, Plane, Result, Table, Task, not_found

# ------------------------------------------------------------------------------------------------ client


def add_inputs(
    plane: Plane, call: Call, items: Iterable[api_pb2.FunctionPutInputsItem]
) -> list[api_pb2.FunctionPutInputsResponseItem]:
    """Queue inputs of a call."""
    new = [Input(plane.new_id("in"), item.idx, call, item.input) for item in items]
    for item in new:
        plane.inputs[item.id] = call.inputs[item.id] = item
        call.function.queue.append(item)
    schedule(plane, call.function)
    return [api_pb2.FunctionPutInputsResponseItem(idx=i.index, input_id=i.id, input_jwt=f"{i.id}:0") for i in new]


def call_function(plane: Plane, req: api_pb2.FunctionMapRequest) -> api_pb2.FunctionMapResponse:
    function = plane.functions[req.function_id]
    call = Call(plane.new_id("fc"), function, req.function_call_invocation_type)
    plane.calls[call.id] = call
    return api_pb2.FunctionMapResponse(
        function_call_id=call.id,
        function_call_jwt=call.id,
        retry_policy=function.definition.retry_policy,
        sync_client_retries_enabled=True,
        max_inputs_outstanding=1000,
        pipelined_inputs=add_inputs(plane, call, req.pipelined_inputs),
    )


def put_inputs(plane: Plane, req: api_pb2.FunctionPutInputsRequest) -> api_pb2.FunctionPutInputsResponse:
    return api_pb2.FunctionPutInputsResponse(inputs=add_inputs(plane, plane.calls[req.function_call_id], req.inputs))


async def get_outputs(plane: Plane, req: api_pb2.FunctionGetOutputsRequest) -> api_pb2.FunctionGetOutputsResponse:
    """Wait for outputs: of a range of inputs, or all after the last that the client has."""
    call = find_call(plane, req.function_call_id)
    deadline = time.monotonic() + req.timeout
    while True:
        call.last_poll = time.monotonic()
        found, last = ready_outputs(call, req)
        if found or time.monotonic() >= deadline:
            return api_pb2.FunctionGetOutputsResponse(
                outputs=found,
                idxs=[output.idx for output in found],
                last_entry_id=last,
                num_unfinished_inputs=call.unfinished,
            )
        await call.signal.wait(min(1.0, deadline - time.monotonic()))  # no longer, for `last_poll` to be true


def ready_outputs(
    call: Call, req: api_pb2.FunctionGetOutputsRequest
) -> tuple[list[api_pb2.FunctionGetOutputsItem], str]:
    """The outputs that a request asks for and that are there, and how far they go."""
    if req.HasField("start_idx"):
        return [output for output in call.outputs if req.start_idx <= output.idx <= req.end_idx], req.last_entry_id
    position = int((req.last_entry_id or "0-0").split("-")[0])
    return call.outputs[position:], f"{len(call.outputs)}-0"


def find_call(plane: Plane, call_id: str) -> Call:
    """A call by its id."""
    if call_id not in plane.calls:
        raise not_found(call_id)
    return plane.calls[call_id]


def cancel(plane: Plane, req: api_pb2.FunctionCallCancelRequest) -> None:
    cancel_call(plane, find_call(plane, req.function_call_id), req.terminate_containers)


CALLS: Table = {
    "FunctionMap": call_function,
    "FunctionPutInputs": put_inputs,
    "FunctionGetOutputs": get_outputs,
    "FunctionCallCancel": cancel,
}


# ---------------------------------------------------------------------------------------------- container


def container_table(task: Task) -> Table:
    """The RPCs that only this container may send."""
    rpcs: Table = {
        "ContainerHello": say_hello,
        "ContainerHeartbeat": heartbeat,
        "FunctionGetInputs": take_input,
        "FunctionPutOutputs": put_outputs,
        "TaskResult": task_result,
        "ContainerStop": stop,
        "BlobCreate": lambda _, plane, req: create_blob(plane, req),
    }
    return {name: partial(rpc, task) for name, rpc in rpcs.items()}


def stop(task: Task, plane: Plane, req: api_pb2.ContainerStopRequest) -> api_pb2.ContainerStopResponse:
    """A container asks for no more inputs, as `modal.experimental.stop_fetching_inputs` does."""
    drain(task, "it asked to end")
    return api_pb2.ContainerStopResponse()


def say_hello(task: Task, plane: Plane, req: object) -> None: ...


async def heartbeat(task: Task, plane: Plane, req: object) -> api_pb2.ContainerHeartbeatResponse:
    """Held open, so that a cancellation reaches the container at once."""
    if not task.cancelled:
        await task.signal.wait(14.0)
    ids, task.cancelled = task.cancelled, []
    if not ids:
        return api_pb2.ContainerHeartbeatResponse()
    return api_pb2.ContainerHeartbeatResponse(cancel_input_event=api_pb2.CancelInputEvent(input_ids=ids))


async def take_input(
    task: Task, plane: Plane, req: api_pb2.FunctionGetInputsRequest
) -> api_pb2.FunctionGetInputsResponse:
    """Wait for an input, or for the word to leave."""
    queue = task.function.queue
    task.is_ready, task.idle_since = True, time.monotonic()
    task.asking += 1
    try:
        while task.is_draining or not queue:
            if task.is_draining and not task.running:
                leave = api_pb2.FunctionGetInputsItem(kill_switch=True)
                return api_pb2.FunctionGetInputsResponse(inputs=[leave])
            await task.function.signal.wait(5.0)
    finally:
        task.asking -= 1
    item = queue.popleft()
    deliver(plane, task, item)
    delivered = api_pb2.FunctionGetInputsItem(
        input_id=item.id,
        input=item.payload,
        function_call_id=item.call.id,
        retry_count=item.attempt,
        function_call_invocation_type=item.call.invocation,
    )
    return api_pb2.FunctionGetInputsResponse(inputs=[delivered])


def deliver(plane: Plane, task: Task, item: Input) -> None:
    """Give an input to a container; its time limit begins."""
    item.status = "running"
    item.deliveries += 1
    task.running[item.id] = item
    if limit := task.function.definition.timeout_secs:
        delay = limit * plane.settings.time_scale
        item.timer = asyncio.get_running_loop().call_later(delay, expire, plane, task, item, delay)


def put_outputs(task: Task, plane: Plane, req: api_pb2.FunctionPutOutputsRequest) -> None:
    """Take outputs, but none of an input that was given up meanwhile. A spawned call is retried here, by its policy."""
    for output in req.outputs:
        item = task.running.get(output.input_id)
        if item is None or output.retry_count != item.attempt:
            continue
        if item.call.is_cancelled and output.result.status != Result.GENERIC_STATUS_TERMINATED:
            continue  # only this word acknowledges a cancellation; see modal-client#4125
        del task.running[output.input_id]
        task.idle_since = time.monotonic()
        is_spawned = item.call.invocation == api_pb2.FUNCTION_CALL_INVOCATION_TYPE_ASYNC
        retries = item.call.function.definition.retry_policy.retries if is_spawned else 0
        if output.result.status == Result.GENERIC_STATUS_FAILURE and item.attempt < retries:
            requeue(plane, item)
        else:
            finish(item, output.result, task, output.data_format)
    task.function.signal.fire()


def task_result(task: Task, plane: Plane, req: api_pb2.TaskResultRequest) -> None:
    task.result = req.result
