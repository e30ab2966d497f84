"""RPCs of a client about environments, apps, logs, images, mounts, secrets, volumes and blobs."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import AsyncIterator
from typing import Protocol

from aiohttp import web
from modal_proto import api_pb2

from tests.modal_loopback.containers import drain, schedule, stop_app
from tests.modal_loopback.state import App, Plane, Result, Table, not_found

BUILDER = "2025.06"
OUTLIVES_ITS_CLIENT = (api_pb2.APP_STATE_DEPLOYED, api_pb2.APP_STATE_DETACHED)


class NamedRequest(Protocol):
    """What requests for a named object have in common."""

    deployment_name: str
    environment_name: str
    object_creation_type: api_pb2.ObjectCreationType.ValueType


# ------------------------------------------------------------------------------- client and environment


def get_environment(plane: Plane, req: api_pb2.EnvironmentGetOrCreateRequest) -> api_pb2.EnvironmentGetOrCreateResponse:
    name = req.deployment_name or "main"
    settings = api_pb2.EnvironmentSettings(image_builder_version=BUILDER)
    return api_pb2.EnvironmentGetOrCreateResponse(
        environment_id=plane.named.setdefault(("en", "", name), plane.new_id("en")),
        metadata=api_pb2.EnvironmentMetadata(name=name, settings=settings),
    )


# -------------------------------------------------------------------------------------------------- apps


def new_app(plane: Plane, name: str, environment: str, state: api_pb2.AppState.ValueType) -> App:
    app = App(plane.new_id("ap"), name, environment or "main", state)
    plane.apps[app.id] = app
    return app


def create_app(plane: Plane, req: api_pb2.AppCreateRequest) -> api_pb2.AppCreateResponse:
    app = new_app(plane, req.description, req.environment_name, req.app_state)
    page = f"https://modal.invalid/{app.id}"
    return api_pb2.AppCreateResponse(app_id=app.id, app_page_url=page, app_logs_url=f"{page}/logs")


def find_app(plane: Plane, req: api_pb2.AppGetByDeploymentNameRequest) -> api_pb2.AppGetByDeploymentNameResponse:
    app = plane.deployed.get((req.environment_name or "main", req.name))
    return api_pb2.AppGetByDeploymentNameResponse(app_id=app.id if app else "")


def list_apps(plane: Plane, req: api_pb2.AppListRequest) -> api_pb2.AppListResponse:
    return api_pb2.AppListResponse(
        apps=[
            api_pb2.AppListResponse.AppListItem(
                app_id=app.id,
                name=app.name,
                description=app.name,
                state=api_pb2.APP_STATE_STOPPED if app.is_done else app.state,
                created_at=app.created,
                n_running_tasks=sum(task.function.app is app and task.is_alive for task in plane.tasks.values()),
            )
            for app in plane.apps.values()
        ]
    )


def publish(plane: Plane, req: api_pb2.AppPublishRequest) -> api_pb2.AppPublishResponse:
    """Make an app callable; a new deployment replaces running containers once they are idle."""
    app = plane.apps[req.app_id]
    before = set(app.layout.function_ids.values())
    app.layout = api_pb2.AppLayout(function_ids=dict(req.function_ids), class_ids=dict(req.class_ids))
    app.state = req.app_state or app.state
    if req.app_state == api_pb2.APP_STATE_DEPLOYED:
        app.name = req.name
        plane.deployed[(app.environment, req.name)] = app
    for function in list(plane.functions.values()):
        if (function.base or function).id in before:
            for task in list(function.tasks.values()):
                drain(task, "redeployed")
    for function_id in req.function_ids.values():
        plane.functions[function_id].start_failures = 0
        schedule(plane, plane.functions[function_id])
    return api_pb2.AppPublishResponse(url=f"https://modal.invalid/{app.id}", deployed_at=time.time())


def app_heartbeat(plane: Plane, req: api_pb2.AppHeartbeatRequest) -> None:
    plane.apps[req.app_id].last_heartbeat = time.monotonic()


def disconnect(plane: Plane, req: api_pb2.AppClientDisconnectRequest) -> None:
    if plane.apps[req.app_id].state not in OUTLIVES_ITS_CLIENT:
        stop_app(plane, plane.apps[req.app_id])


def app_stop(plane: Plane, req: api_pb2.AppStopRequest) -> None:
    app = plane.apps[req.app_id]
    plane.deployed.pop((app.environment, app.name), None)
    stop_app(plane, app)


async def stream_logs(plane: Plane, req: api_pb2.AppGetLogsRequest) -> AsyncIterator[api_pb2.TaskLogsBatch]:
    """Log batches as they come, until the app is done or the timeout."""
    app = plane.apps[req.app_id]
    position = int((req.last_entry_id or "0-0").split("-")[0])
    deadline = time.monotonic() + req.timeout
    while True:
        for batch in app.logs[position:]:
            position += 1
            if is_wanted(batch, req.function_call_id, req.task_id):
                yield batch
        if app.is_done and not any(t.function.app is app and t.is_alive for t in plane.tasks.values()):
            yield api_pb2.TaskLogsBatch(app_done=True)
            return
        if not await app.signal.wait(deadline - time.monotonic()):
            return


def fetch_logs(plane: Plane, req: api_pb2.AppFetchLogsRequest) -> api_pb2.AppFetchLogsResponse:
    logs = plane.apps[req.app_id].logs
    kept = [batch for batch in logs if batch.items[0].data and is_wanted(batch, req.function_call_id, "")]
    return api_pb2.AppFetchLogsResponse(batches=kept[-req.limit :] if req.limit else kept)


def is_wanted(batch: api_pb2.TaskLogsBatch, call_id: str, task_id: str) -> bool:
    """Whether a batch is of the call and the container that were asked for."""
    return batch.items[0].function_call_id == (call_id or batch.items[0].function_call_id) and batch.task_id == (
        task_id or batch.task_id
    )


# ---------------------------------------------------------------------------- images, mounts, named things


def image_metadata() -> api_pb2.ImageMetadata:
    version = ".".join(map(str, sys.version_info[:3]))
    return api_pb2.ImageMetadata(image_builder_version=BUILDER, python_version_info=f"Python {version}")


def build_result(plane: Plane) -> api_pb2.GenericResult:
    error = plane.settings.image_error
    status = Result.GENERIC_STATUS_FAILURE if error else Result.GENERIC_STATUS_SUCCESS
    return Result(status=status, exception=error)


def get_image(plane: Plane, req: api_pb2.ImageGetOrCreateRequest) -> api_pb2.ImageGetOrCreateResponse:
    """Any recipe builds at once, and is kept for tests to look at."""
    image_id = "im-" + hashlib.sha256(req.image.SerializeToString(deterministic=True)).hexdigest()[:12]
    plane.images[image_id] = req.image
    return api_pb2.ImageGetOrCreateResponse(image_id=image_id, result=build_result(plane), metadata=image_metadata())


def get_mount(plane: Plane, req: api_pb2.MountGetOrCreateRequest) -> api_pb2.MountGetOrCreateResponse:
    """A mount by name is Modal's own client, which the containers' interpreter has anyway."""
    if req.deployment_name:
        key = ("mo", str(req.namespace), req.deployment_name)
        return api_pb2.MountGetOrCreateResponse(mount_id=plane.named.setdefault(key, plane.new_id("mo")))
    mount_id = plane.new_id("mo")
    plane.mounts[mount_id] = list(req.files)
    return api_pb2.MountGetOrCreateResponse(mount_id=mount_id)


def check_files(
    plane: Plane, req: api_pb2.MountBatchedCheckExistenceRequest
) -> api_pb2.MountBatchedCheckExistenceResponse:
    missing = [digest for digest in req.sha256_hex_hashes if digest not in plane.files]
    return api_pb2.MountBatchedCheckExistenceResponse(missing_sha256_hex_hashes=missing)


def put_file(plane: Plane, req: api_pb2.MountPutFileRequest) -> api_pb2.MountPutFileResponse:
    given = req.WhichOneof("data_oneof")
    if given is not None:
        plane.files[req.sha256_hex] = plane.blobs[req.data_blob_id] if given == "data_blob_id" else req.data
    return api_pb2.MountPutFileResponse(exists=req.sha256_hex in plane.files)


def named_id(plane: Plane, kind: str, req: NamedRequest) -> str:
    """The id of a named object, made if the request says so; a new one for an object without a name."""
    if not req.deployment_name:
        return plane.new_id(kind)
    key = (kind, req.environment_name or "main", req.deployment_name)
    if key not in plane.named and req.object_creation_type == api_pb2.OBJECT_CREATION_TYPE_UNSPECIFIED:
        raise not_found(f"{ {'st': 'Secret', 'vo': 'Volume'}[kind] } {req.deployment_name!r}")
    return plane.named.setdefault(key, plane.new_id(kind))


def get_secret(plane: Plane, req: api_pb2.SecretGetOrCreateRequest) -> api_pb2.SecretGetOrCreateResponse:
    secret_id = named_id(plane, "st", req)
    if req.env_dict or secret_id not in plane.secrets:
        plane.secrets[secret_id] = dict(req.env_dict)
    if missing := [key for key in req.required_keys if key not in plane.secrets[secret_id]]:
        raise not_found(f"Secret {req.deployment_name!r} is missing key(s): {', '.join(missing)}")
    return api_pb2.SecretGetOrCreateResponse(secret_id=secret_id)


def get_volume(plane: Plane, req: api_pb2.VolumeGetOrCreateRequest) -> api_pb2.VolumeGetOrCreateResponse:
    metadata = api_pb2.VolumeMetadata(name=req.deployment_name)
    return api_pb2.VolumeGetOrCreateResponse(volume_id=named_id(plane, "vo", req), metadata=metadata)


def commit_volume(plane: Plane, req: object) -> api_pb2.VolumeCommitResponse:
    return api_pb2.VolumeCommitResponse()


# ------------------------------------------------------------------------------------------------- blobs


def create_clients_blob(plane: Plane, req: api_pb2.BlobCreateRequest) -> api_pb2.BlobCreateResponse:
    plane.bytes_in += req.content_length
    return create_blob(plane, req)


def create_blob(plane: Plane, req: object) -> api_pb2.BlobCreateResponse:
    blob_id = plane.new_id("bl")
    url = f"{plane.blob_url}/{blob_id}"
    urls = api_pb2.UploadUrlList(items=[url])
    return api_pb2.BlobCreateResponse(blob_id=blob_id, upload_url=url, blob_ids=[blob_id], upload_urls=urls)


def get_blob(plane: Plane, req: api_pb2.BlobGetRequest) -> api_pb2.BlobGetResponse:
    if req.blob_id not in plane.blobs:
        raise not_found(req.blob_id)
    return api_pb2.BlobGetResponse(download_url=f"{plane.blob_url}/{req.blob_id}")


def blob_store(plane: Plane) -> web.Application:
    """What stands for the object store: PUT and GET; the client wants the MD5 of what it sent as the ETag."""

    async def put(request: web.Request) -> web.Response:
        data = plane.blobs[request.match_info["blob"]] = await request.read()
        return web.Response(headers={"ETag": f'"{hashlib.md5(data).hexdigest()}"'})

    async def get(request: web.Request) -> web.Response:
        return web.Response(body=plane.blobs[request.match_info["blob"]])

    store = web.Application(client_max_size=4 << 30)
    store.router.add_put("/{blob}", put)
    store.router.add_get("/{blob}", get)
    return store


APPS: Table = {
    "EnvironmentGetOrCreate": get_environment,
    "AppCreate": create_app,
    "AppGetByDeploymentName": find_app,
    "AppList": list_apps,
    "AppPublish": publish,
    "AppHeartbeat": app_heartbeat,
    "AppClientDisconnect": disconnect,
    "AppStop": app_stop,
    "AppGetLogs": stream_logs,
    "AppFetchLogs": fetch_logs,
    "ImageGetOrCreate": get_image,
    "MountGetOrCreate": get_mount,
    "MountBatchedCheckExistence": check_files,
    "MountPutFile": put_file,
    "SecretGetOrCreate": get_secret,
    "VolumeGetOrCreate": get_volume,
    "VolumeCommit": commit_volume,
    "BlobCreate": create_clients_blob,
    "BlobGet": get_blob,
}
