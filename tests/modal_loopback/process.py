"""One container: its files, its environment, modal's own entrypoint in it, and what it prints."""

from __future__ import annotations

import asyncio
import os
import shlex
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import grpclib
import modal
import psutil
from modal_proto import api_pb2

from tests.modal_loopback.rpc import make_server
from tests.modal_loopback.state import App, Plane, Task

PASSED_ON = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM")
CHECKOUT = Path(__file__).resolve().parents[2]


async def run_process(plane: Plane, task: Task, root: Path) -> None:
    """Give a container its files and its socket, start modal's own entrypoint in it, and wait for its end."""
    write_files(plane, task, root)
    task.server = make_server(plane, {**plane.table, **plane.container_table(task)}, "container")
    await task.server.start(path=str(root / "s"))  # short: a Unix socket's path may have 107 characters
    task.process = await asyncio.create_subprocess_exec(
        plane.settings.python,
        *("-m", "modal._container_entrypoint"),
        env=container_environment(plane, task, root),
        cwd=root / "root",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    log(task, "", state=api_pb2.TASK_STATE_ACTIVE)
    assert task.process.stdout is not None
    assert task.process.stderr is not None
    pumps = [
        asyncio.create_task(read_output(task, task.process.stdout, api_pb2.FILE_DESCRIPTOR_STDOUT)),
        asyncio.create_task(read_output(task, task.process.stderr, api_pb2.FILE_DESCRIPTOR_STDERR)),
    ]
    code = await task.process.wait()
    await asyncio.to_thread(kill_processes, task)  # with its first process a container's others end too
    await asyncio.gather(*pumps)
    task.exit_code = code


async def read_output(task: Task, stream: asyncio.StreamReader, fd: api_pb2.FileDescriptor.ValueType) -> None:
    """Keep what the container prints."""
    while chunk := await stream.read(65536):
        text = chunk.decode("utf-8", "replace")
        task.log.append(text)
        log(task, text, fd=fd)


def write_files(plane: Plane, task: Task, root: Path) -> None:
    """Mounts as files below the container's root; a volume as a link to the folder that holds it."""
    definition = task.function.definition
    (root / "root").mkdir(parents=True)
    (root / "tmp").mkdir()
    image = plane.images.get(definition.image_id)
    for mount_id in [*definition.mount_ids, *([image.context_mount_id] if image else [])]:
        for file in plane.mounts.get(mount_id, []):
            target = root / file.filename.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(plane.files[file.sha256_hex])
    for volume in definition.volume_mounts:
        folder = plane.folder / "volumes" / volume.volume_id
        folder.mkdir(parents=True, exist_ok=True)
        link = root / volume.mount_path.lstrip("/")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(folder)


def container_environment(plane: Plane, task: Task, root: Path) -> dict[str, str]:
    """Nothing of the client's own environment but where programs are; what the image and the secrets set."""
    definition = task.function.definition
    (root / "arguments").write_bytes(container_arguments(plane, task).SerializeToString())
    mounted = [volume.mount_path for volume in definition.volume_mounts]
    image = plane.images.get(definition.image_id)
    variables = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    variables |= {name: moved(value, mounted, root) for name, value in image_variables(image)}
    for secret in definition.secret_ids:
        variables |= {name: moved(value, mounted, root) for name, value in plane.secrets[secret].items()}
    return {
        **variables,
        "HOME": str(root / "root"),
        "TMPDIR": str(root / "tmp"),
        "PYTHONPATH": os.pathsep.join(map(str, import_path(plane, root))),
        "PYTHONUNBUFFERED": "1",
        "MODAL_SERVER_URL": f"unix://{root / 's'}",
        "MODAL_TASK_ID": task.id,
        "MODAL_IS_REMOTE": "1",
        "MODAL_CONTAINER_ARGUMENTS_PATH": str(root / "arguments"),
        "MODAL_IMAGE_ID": definition.image_id,
        "MODAL_ENVIRONMENT": task.function.app.environment,
        "MODAL_CLOUD_PROVIDER": "CLOUD_PROVIDER_AWS",
        "MODAL_REGION": "loopback",
        **plane.settings.environment,
    }


def import_path(plane: Plane, root: Path) -> list[str | Path]:
    """Where a container imports from: modal is the client's, whatever version of it or of Python the container has."""
    installed = [Path(module.__file__ or "").parents[1] for module in (modal, grpclib)]
    return [root / "root", *plane.settings.python_path, site_folder(plane), *installed]


def site_folder(plane: Plane) -> Path:
    """What hides this checkout, which is installed in the interpreter, so that containers have what they were sent."""
    folder = plane.folder / "site"
    if not folder.exists():
        folder.mkdir()
        hide = f"import sys\nsys.path[:] = [path for path in sys.path if path != {str(CHECKOUT)!r}]\n"
        (folder / "sitecustomize.py").write_text(hide)
    return folder


def image_variables(image: api_pb2.Image | None) -> Iterator[tuple[str, str]]:
    """The ENV lines of a recipe."""
    for command in image.dockerfile_commands if image else ():
        if command.startswith("ENV "):
            for assignment in shlex.split(command.removeprefix("ENV ")):
                name, _, value = assignment.partition("=")
                yield name, value


def moved(value: str, mounted: list[str], root: Path) -> str:
    """A path on a volume as the one below the container's root, for there is no file system of its own here."""
    return f"{root}{value}" if any(value == path or value.startswith(f"{path}/") for path in mounted) else value


def container_arguments(plane: Plane, task: Task) -> api_pb2.ContainerArguments:
    """What modal's entrypoint reads first."""
    function = task.function
    definition = api_pb2.Function()
    definition.CopyFrom(function.definition)
    definition.is_checkpointing_function = False
    return api_pb2.ContainerArguments(
        task_id=task.id,
        function_id=function.id,
        app_id=function.app.id,
        function_def=definition,
        serialized_params=function.serialized_params,
        environment_name=function.app.environment,
        app_layout=full_layout(plane, function.app),
    )


def full_layout(plane: Plane, app: App) -> api_pb2.AppLayout:
    """An app's functions and classes, and everything that its functions depend on."""
    layout = api_pb2.AppLayout()
    layout.CopyFrom(app.layout)
    functions = [plane.functions[function_id] for function_id in app.layout.function_ids.values()]
    for function in functions:
        layout.objects.append(api_pb2.Object(object_id=function.id, function_handle_metadata=function.metadata))
    for class_id in app.layout.class_ids.values():
        handle = api_pb2.ClassHandleMetadata()
        layout.objects.append(api_pb2.Object(object_id=class_id, class_handle_metadata=handle))
    for object_id in sorted({d.object_id for f in functions for d in f.definition.object_dependencies}):
        volume = api_pb2.VolumeMetadata() if object_id.startswith("vo-") else None
        layout.objects.append(api_pb2.Object(object_id=object_id, volume_metadata=volume))
    return layout


def log(
    task: Task,
    text: str,
    *,
    fd: api_pb2.FileDescriptor.ValueType = api_pb2.FILE_DESCRIPTOR_UNSPECIFIED,
    state: api_pb2.TaskState.ValueType = api_pb2.TASK_STATE_UNSPECIFIED,
) -> None:
    """Add to the app's log; which of several running inputs wrote it is not known."""
    item = next(iter(task.running.values()), None)
    entry = api_pb2.TaskLogs(
        data=text,
        timestamp=time.time(),
        file_descriptor=fd,
        task_state=state,
        function_call_id=item.call.id if item else "",
        input_id=item.id if item else "",
    )
    app = task.function.app
    number = f"{len(app.logs) + 1}-0"
    app.logs.append(
        api_pb2.TaskLogsBatch(task_id=task.id, function_id=task.function.id, items=[entry], entry_id=number)
    )
    app.signal.fire()


def kill_processes(task: Task) -> None:
    """Kill every process of a container, in whatever session it is; its variable tells them."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("MODAL_TASK_ID") == task.id and process.pid != os.getpid():
                process.kill()
