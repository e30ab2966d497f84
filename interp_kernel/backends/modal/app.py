"""The Modal app of one worker: its image, volumes and secrets; run for this process, deployed, or attached to."""

from __future__ import annotations

import asyncio
import json
import urllib.parse
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import modal
from modal.exception import NotFoundError

from interp_kernel.backends.modal.failures import NEW_TOKEN, explain
from interp_kernel.backends.modal.gateway import Gateway, SnapshotGateway
from interp_kernel.backends.modal.image import HF_HOME, HIDDEN_PROMPT, image_for, local_prompt
from interp_kernel.backends.modal.mapper import Mapper
from interp_kernel.backends.modal.options import HF_CACHE, TIMEOUT_S, ModalOptions
from interp_kernel.errors import SpecError, WorkerError
from interp_kernel.spec import WorkerSpec

MODELS = "/models"
AT_ONCE = 100  # calls that one container answers at the same time; most of them wait
REACH_S = 4.0
FOR_ONE_SESSION = ("gpu", "scaledown_window", "region", "cloud", "memory", "cpu")


# ----------------------------------------------------------------------------------------------- options


def settings_for(spec: WorkerSpec) -> str:
    """What the container is told, the same text for equal specs.

    Raises:
        SpecError: The model is a folder of this machine.
    """
    fields = spec.to_json()
    for name in ("model_name", "base_model", "tokenizer_name"):
        value = str(fields.get(name, ""))
        if value.startswith("/") and not value.startswith(f"{MODELS}/") and Path(value).is_dir():
            folder = Path(value).name
            raise SpecError(
                f"{name} is {value!r}, a folder of this machine, which a Modal container does not see. Put it on a "
                f"volume: modal volume create weights; modal volume put weights {value} {folder}. Then start with "
                f"model_volume='weights' and {name}='{MODELS}/{folder}'."
            )
    if local_prompt(spec) is not None:
        fields["hidden_system_prompt"] = f"file:~/{HIDDEN_PROMPT}"
    return json.dumps({"spec": fields}, sort_keys=True)


async def secrets_for(options: ModalOptions) -> list[modal.Secret]:
    """Modal's objects for the secrets; each is looked up now, so that a missing one is named."""
    found = []
    for given in options.secrets:
        secret = modal.Secret.from_name(given) if isinstance(given, str) else given
        if isinstance(given, str):
            try:
                await secret.hydrate.aio()
            except NotFoundError:
                raise WorkerError(
                    f"Modal has no secret {given!r}. Make it: modal secret create {given} NAME=VALUE. "
                    "Those that exist: modal secret list."
                ) from None
        found.append(secret)
    return found


async def volumes_for(options: ModalOptions) -> dict[str, modal.Volume]:
    """Modal's objects for the volumes; the cache of the Hugging Face hub is made if it is missing."""
    named = dict(options.volumes) | ({MODELS: options.model_volume} if options.model_volume else {})
    volumes: dict[str, modal.Volume] = {HF_HOME: modal.Volume.from_name(HF_CACHE, create_if_missing=True)}
    for path, given in named.items():
        volume = modal.Volume.from_name(given) if isinstance(given, str) else given
        if isinstance(given, str):
            try:
                await volume.hydrate.aio()
            except NotFoundError:
                raise WorkerError(
                    f"Modal has no volume {given!r}. Make it: modal volume create {given}. "
                    "Those that exist: modal volume list."
                ) from None
        volumes[path] = volume
    return volumes


def listed(value: Any) -> Any:
    """Alternatives as Modal takes them."""
    return list(value) if isinstance(value, tuple) else value


async def class_options(options: ModalOptions, image: modal.Image) -> dict[str, Any]:
    """What Modal is asked for, by its own names."""
    snapshot: dict[str, Any] = {"enable_memory_snapshot": True} if options.enable_memory_snapshot else {}
    if snapshot and options.gpu:
        snapshot["experimental_options"] = {"enable_gpu_snapshot": True}
    return {
        "image": image,
        "serialized": True,
        "gpu": listed(options.gpu),
        "secrets": await secrets_for(options),
        "volumes": await volumes_for(options),
        "scaledown_window": options.scaledown_window,
        "timeout": TIMEOUT_S[1],  # `hold` lasts as long as a call; the session keeps the limit of each call
        "startup_timeout": options.startup_timeout,
        "region": listed(options.region),
        "cloud": options.cloud,
        "memory": options.memory,
        "cpu": options.cpu,
        **snapshot,
    }


# ------------------------------------------------------------------------------------------------- start


async def check_reachable() -> None:
    """Fail at once, not after Modal's own minute, where there is no token or no network.

    Raises:
        WorkerError: One of them is missing.
    """
    from modal.config import config

    if not (config.get("token_id") and config.get("token_secret")):
        raise WorkerError(f"There is no Modal token on this machine. {NEW_TOKEN}")
    url = urllib.parse.urlsplit(config.get("server_url"))
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(url.hostname, port), REACH_S)
    except (TimeoutError, OSError) as error:
        raise WorkerError(
            f"Modal can't be reached at {url.hostname}:{port} ({type(error).__name__}: {error}). Check the network, "
            "a proxy or a firewall; mode='local' needs none."
        ) from None
    writer.close()


@asynccontextmanager
async def in_words(what: str) -> AsyncIterator[None]:
    """Make sure that Modal can be reached, and say in words what it refuses."""
    await check_reachable()
    try:
        yield
    except (WorkerError, SpecError):
        raise
    except Exception as error:
        raise WorkerError(f"{what} {explain(error)}.") from error


class ModalApp:
    """The app of one spec, started once for all clients of this process."""

    def __init__(self, spec: WorkerSpec, options: ModalOptions) -> None:
        """Nothing is sent yet. Raises SpecError for what no container can be given."""
        if options.deploy and (path := local_prompt(spec)) is not None:
            raise SpecError(
                f"The hidden prompt's file {str(path)!r} is on this machine, and a deployed app is shared by notebooks "
                "that may hide other prompts. Use `secret:NAME` with a Modal secret, or `file:PATH` on a volume."
            )
        self.spec, self.options = spec, options
        self.settings = settings_for(spec)
        self.gateway: Any = None
        self._mapper: Any = None
        self._run: Any = None
        self._starting = asyncio.Lock()

    async def start(self) -> None:
        """Run the app, or find it deployed or deploy it, and get a handle of the container's class.

        Raises:
            WorkerError: Modal refuses, with what to do.
        """
        async with self._starting:
            if self.gateway is None:
                await self._start()

    async def _start(self) -> None:
        async with in_words(f"The Modal app {self.options.app_name!r} could not be started."):
            cls, self._mapper = await (self._deployed() if self.options.deploy else self._ephemeral())
            gateway = cls(settings=self.settings)
            if self.options.min_containers:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # Modal announces another name, which a class does not have yet
                    await gateway.update_autoscaler.aio(min_containers=self.options.min_containers)
        self.gateway = gateway

    def mapper(self, max_containers: int) -> Any:
        """A handle of the class that `map` runs on, in at most so many containers."""
        return self._mapper.with_options(max_containers=max_containers)(settings=self.settings)

    async def look(self, secret: str) -> tuple[bool, bool]:
        """Whether a secret is at Modal, and whether the app is deployed; changes nothing.

        Raises:
            WorkerError: Modal can't be reached or refuses the token.
        """
        found = []
        async with in_words("Modal can't be asked."):
            for each in (modal.Secret.from_name(secret), self._find()[0]):
                try:
                    await each.hydrate.aio()
                    found.append(True)
                except NotFoundError:
                    found.append(False)
        return found[0], found[1]

    async def close(self) -> None:
        """End the app if it is this process's own; its containers end with it."""
        run, self._run, self.gateway = self._run, None, None
        if run is not None:
            await run.__aexit__(None, None, None)

    async def deploy(self) -> None:
        """Deploy the app, in place of an earlier deployment, whose containers end.

        Raises:
            WorkerError: Modal refuses, with what to do.
        """
        async with in_words(f"The Modal app {self.options.app_name!r} could not be deployed."):
            app, *_ = await self._build()
            await app.deploy.aio()

    async def _ephemeral(self) -> tuple[Any, Any]:
        app, *classes = await self._build()
        self._run = app.run()
        await self._run.__aenter__()
        return classes[0], classes[1]

    async def _deployed(self) -> tuple[Any, Any]:
        classes = self._find()
        try:
            await asyncio.gather(*(each.hydrate.aio() for each in classes))
        except NotFoundError:
            await self.deploy()
            classes = self._find()
        chosen = await self._session_options()
        return classes[0].with_options(**chosen), classes[1].with_options(**chosen, timeout=self._group_limit())

    def _find(self) -> list[Any]:
        return [modal.Cls.from_name(self.options.app_name, kind.__name__) for kind in (self._kind(), Mapper)]

    async def _session_options(self) -> dict[str, Any]:
        """What this session asks for in another way than the deployment; equal ones share a container."""
        chosen = {name: listed(value) for name, value in self.options.changed(FOR_ONE_SESSION).items()}
        if isinstance(chosen.get("gpu"), list):
            del chosen["gpu"]  # Modal takes a list only when an app is deployed
        if self.options.secrets:
            chosen["secrets"] = await secrets_for(self.options)
        if self.options.volumes or self.options.model_volume:
            chosen["volumes"] = await volumes_for(self.options)
        return chosen

    def _kind(self) -> type[Gateway]:
        return SnapshotGateway if self.options.enable_memory_snapshot else Gateway

    async def _build(self) -> tuple[modal.App, Any, Any]:
        app = modal.App(self.options.app_name)
        chosen = await class_options(self.options, image_for(self.options.image, self.spec))
        gateway: Any = app.cls(max_containers=1, **chosen)(modal.concurrent(max_inputs=AT_ONCE)(self._kind()))
        for name in ("enable_memory_snapshot", "experimental_options"):
            chosen.pop(name, None)  # containers of a map are not kept
        for_map = {**chosen, "timeout": self._group_limit(), "retries": self.options.retries}
        return app, gateway, app.cls(**for_map)(Mapper)

    def _group_limit(self) -> int:
        """Longest run of a group of a map; a container's first group also waits for the model."""
        return min(self.options.timeout + self.options.startup_timeout, TIMEOUT_S[1])
