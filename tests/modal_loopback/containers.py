"""How many containers there are, and the ways in which one ends."""

from __future__ import annotations

import asyncio
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

from modal_proto import api_pb2

from tests.modal_loopback.process import kill_processes, log, run_process
from tests.modal_loopback.state import App, Call, Function, Input, Plane, Result, Task

PICKLE = api_pb2.DATA_FORMAT_PICKLE

# --------------------------------------------------------------------------------------------- autoscaler


def schedule(plane: Plane, function: Function) -> None:
    """Start the containers that queued inputs and `min_containers` ask for, and wake those that wait."""
    least, most, _ = limits(plane, function)
    live = [task for task in function.tasks.values() if not task.is_draining]
    each = max(1, function.definition.max_concurrent_inputs)
    room = sum(each - len(task.running) for task in live)
    wanted = len(live) + max(0, -(-(len(function.queue) - room) // each))
    if function.app.layout.function_ids and not function.start_failures:  # it is published
        wanted = max(wanted, least)
    if not function.app.is_done and not plane.is_closing:
        for _ in range(min(most, wanted) - len(live)):
            task = Task(plane.new_id("ta"), function)
            function.tasks[task.id] = plane.tasks[task.id] = task
            plane.start_job(run_container(plane, task))
    function.signal.fire()


def limits(plane: Plane, function: Function) -> tuple[int, int, float]:
    """Least and most containers, and the seconds that an idle one stays."""
    definition, settings = function.definition, function.definition.autoscaler_settings
    least = settings.min_containers or definition.warm_pool_size
    most = settings.max_containers or definition.concurrency_limit or plane.settings.max_containers
    window = settings.scaledown_window or definition.task_idle_timeout_secs or 60
    return least, most, window * plane.settings.time_scale


async def watch_idle(plane: Plane) -> None:
    """End idle containers, calls that nobody waits for, and apps whose client is gone."""
    while True:
        await asyncio.sleep(0.05)
        now = time.monotonic()
        for function in list(plane.functions.values()):
            scale_down(plane, function, now)
        for call in list(plane.calls.values()):
            if is_abandoned(plane, call, now):
                cancel_call(plane, call, terminate=False)
        for app in list(plane.apps.values()):
            silent = now - app.last_heartbeat > plane.settings.silence_s
            if silent and app.state == api_pb2.APP_STATE_EPHEMERAL and not app.is_done:
                stop_app(plane, app)


def scale_down(plane: Plane, function: Function, now: float) -> None:
    """Let containers go that have been idle for the window."""
    least, _, window = limits(plane, function)
    live = [task for task in function.tasks.values() if not task.is_draining]
    idle = [task for task in live if task.asking and not task.running and now - task.idle_since > window]
    if not function.queue:
        for task in idle[: max(0, len(live) - least)]:
            drain(task, "idle for the scaledown window")


def is_abandoned(plane: Plane, call: Call, now: float) -> bool:
    """Whether the client of a `.remote()` no longer asks for its output."""
    limit = plane.settings.abandon_s
    is_spawned = call.invocation == api_pb2.FUNCTION_CALL_INVOCATION_TYPE_ASYNC
    if limit is None or is_spawned or call.is_cancelled or not call.unfinished:
        return False
    return now - call.last_poll > limit


# ------------------------------------------------------------------------------------------ one container


async def run_container(plane: Plane, task: Task) -> None:
    """One container from its start to its end."""
    root, definition = plane.folder / task.id, task.function.definition
    await plane.may_start.wait()
    limit_s = (definition.startup_timeout_secs or definition.timeout_secs or 300) * plane.settings.time_scale
    late = asyncio.get_running_loop().call_later(limit_s, start_took_too_long, task, limit_s)
    try:
        if not task.is_draining:
            await run_process(plane, task, root)
    finally:
        late.cancel()
        end_container(plane, task, root)


# --------------------------------------------------------------------------------------------------- ends


def end_container(plane: Plane, task: Task, root: Path) -> None:
    """Clean up after a container; its inputs go to another one, or fail."""
    function = task.function
    function.tasks.pop(task.id, None)
    if task.server is not None:
        task.server.close()
    task.exit_code = -1 if task.exit_code is None else task.exit_code
    note_failed_start(task)
    lost, task.running = list(task.running.values()), {}
    for item in reversed(lost):
        deliver_again(plane, task, item)
    if task.result is not None and task.result.status != Result.GENERIC_STATUS_SUCCESS:
        function.start_failures += 1
        while function.queue:  # the next container would fail in the same way
            finish(function.queue.popleft(), task.result, task)
    log(task, "", state=api_pb2.TASK_STATE_COMPLETED)
    shutil.rmtree(root, ignore_errors=True)
    schedule(plane, function)


def note_failed_start(task: Task) -> None:
    """A container that ended before it asked for an input has failed to start, whatever it said."""
    if task.is_ready or task.is_draining or task.result is not None:
        return
    what = f"Container {task.id} exited with code {task.exit_code} during start-up\n{''.join(task.log)[-2000:]}"
    task.result = Result(status=Result.GENERIC_STATUS_INIT_FAILURE, exitcode=task.exit_code or 0, exception=what)


def deliver_again(plane: Plane, task: Task, item: Input) -> None:
    """What becomes of an input whose container is gone."""
    if item.call.is_cancelled:
        finish(item, Result(status=Result.GENERIC_STATUS_TERMINATED), task)
    elif item.deliveries <= plane.settings.redeliveries:
        item.status = "queued"
        item.call.function.queue.appendleft(item)
    else:
        what = task.end_reason or f"Container {task.id} exited with code {task.exit_code} while running this input"
        code = task.exit_code or 0
        finish(item, Result(status=Result.GENERIC_STATUS_INTERNAL_FAILURE, exception=what, exitcode=code), task)


def finish(
    item: Input, result: api_pb2.GenericResult, task: Task | None, data_format: api_pb2.DataFormat.ValueType = PICKLE
) -> None:
    """Give an input its output."""
    if item.timer is not None:
        item.timer.cancel()
    item.status = "done"
    output = api_pb2.FunctionGetOutputsItem(
        result=result,
        idx=item.index,
        input_id=item.id,
        data_format=data_format,
        task_id=task.id if task else "",
        retry_count=item.attempt,
        output_created_at=time.time(),
    )
    item.call.outputs.append(output)
    item.call.signal.fire()


def requeue(plane: Plane, item: Input) -> None:
    """Run an input once more under the same id."""
    item.attempt += 1
    item.status = "queued"
    item.call.function.queue.append(item)
    schedule(plane, item.call.function)


def expire(plane: Plane, task: Task, item: Input, limit_s: float) -> None:
    """An input has passed its time limit: it fails, and its container with it."""
    if task.running.get(item.id) is item:
        del task.running[item.id]
        text = f"Task's current input {item.id} hit its timeout of {limit_s:g}s"
        finish(item, Result(status=Result.GENERIC_STATUS_TIMEOUT, exception=text), task)
        kill(task, "timeout")


def start_took_too_long(task: Task, limit_s: float) -> None:
    """A container that has not come up in time is killed, and its inputs fail."""
    if not task.is_ready:
        text = f"Runner failed to start within {limit_s:g}s"
        task.result = Result(status=Result.GENERIC_STATUS_TIMEOUT, exception=text)
        kill(task, "start-up timeout")


def drain(task: Task, reason: str) -> None:
    """Let a container go: it gets no more inputs, and the word to leave once it has none."""
    task.is_draining = True
    task.end_reason = task.end_reason or reason
    task.function.signal.fire()


def kill(task: Task, reason: str) -> None:
    """End a container and all its processes at once."""
    drain(task, reason)
    if task.is_alive:
        kill_processes(task)


async def preempt(task: Task, grace_s: float) -> None:
    """As documented for Modal's preemptions: SIGINT, then SIGKILL after a time of grace."""
    drain(task, "preempted")
    assert task.process is not None
    task.process.send_signal(signal.SIGINT)
    with suppress(TimeoutError):
        await asyncio.wait_for(task.process.wait(), grace_s)
    kill(task, "preempted")


def stop_app(plane: Plane, app: App) -> None:
    """End an app: its containers, and the calls that wait for them."""
    app.is_done = True
    for function in [function for function in plane.functions.values() if function.app is app]:
        for item in [*function.queue, *(i for task in function.tasks.values() for i in task.running.values())]:
            item.call.is_cancelled = True
        while function.queue:
            finish(function.queue.popleft(), Result(status=Result.GENERIC_STATUS_TERMINATED), None)
        for task in list(function.tasks.values()):
            kill(task, "app stopped")
    app.signal.fire()


def cancel_call(plane: Plane, call: Call, terminate: bool) -> None:
    """Cancel what of a call has not ended."""
    call.is_cancelled = True
    for item in call.inputs.values():
        if item.status == "queued":
            call.function.queue.remove(item)
            finish(item, Result(status=Result.GENERIC_STATUS_TERMINATED, exception="Input was cancelled"), None)
    for task in list(plane.tasks.values()):
        for item in [item for item in task.running.values() if item.call is call]:
            if terminate:
                kill(task, "its call was cancelled")
            else:
                plane.start_job(cancel_running(plane, task, item))


async def cancel_running(plane: Plane, task: Task, item: Input) -> None:
    """Tell a container to cancel an input; one that does not is killed."""
    task.cancelled.append(item.id)
    task.signal.fire()
    deadline = time.monotonic() + plane.settings.cancel_grace_s
    while item.id in task.running:
        if not await item.call.signal.wait(deadline - time.monotonic()):
            kill(task, f"input {item.id} did not end {plane.settings.cancel_grace_s:g} s after it was cancelled")
            return
