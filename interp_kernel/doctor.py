"""`interp-kernel doctor`: checks what is needed, in the order in which it is needed, and says what to do."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interp_kernel.client import InterpClient
from interp_kernel.errors import InterpError, WorkerError

FACT = "The Eiffel Tower is located in the city of"
ANSWER = " Paris"
COMPARED = ("torch", "transformers", "tokenizers")
APP_NAME = "interp-kernel"


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        state: `ok`, `note` for what is optional, or `fail`.
        subject: What was checked.
        text: What was found and, unless it is well, what to do.
    """

    state: str
    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.state:<5} {self.subject:<15} {self.text}"


def examine(show: Callable[[str], Any]) -> bool:
    """Run all checks, showing each as it is done; False if something that is needed does not work."""
    states = []
    for check in (check_kernelspec, check_worker, check_hub_token, check_modal):
        for finding in check():
            show(str(finding))
            states.append(finding.state)
    return "fail" not in states


def check_kernelspec() -> Iterator[Finding]:
    """Whether Jupyter finds the kernel, and whether it runs this Python."""
    from jupyter_client.kernelspec import KernelSpecManager

    folder = KernelSpecManager().find_kernel_specs().get("interp")
    advice = "Install it: interp-kernel kernelspec install --user."
    if folder is None:
        yield Finding("fail", "kernelspec", f"Jupyter here does not know the kernel `interp`. {advice}")
        return
    python = json.loads((Path(folder) / "kernel.json").read_text(encoding="utf-8"))["argv"][0]
    if os.path.isabs(python) and not os.access(python, os.X_OK):
        yield Finding("fail", "kernelspec", f"{folder} runs {python}, which is not there. {advice}")
    elif os.path.isabs(python) and python != sys.executable:
        yield Finding(
            "note", "kernelspec", f"{folder} runs {python}, not this {sys.executable}. If that is wrong: {advice}"
        )
    else:
        yield Finding("ok", "kernelspec", folder)


def check_worker() -> Iterator[Finding]:
    """Whether a worker starts, the demo model answers, and both sides have the same versions."""
    try:
        with InterpClient(model_name="demo") as client:
            info = client.connect(lambda _: None)
            answer = client.run(next_token, FACT)
    except InterpError as error:
        yield Finding("fail", "worker", f"The demo model does not run here: {error}")
        return
    hello = client.session.hello
    yield Finding("ok", "worker", f"pid {hello['pid']}, {', '.join(info['devices'])}")
    if answer == ANSWER:
        yield Finding("ok", "demo model", f"{FACT}{answer}")
    else:
        yield Finding("fail", "demo model", f"It continues {FACT!r} by {answer!r}. Install interp-kernel again.")
    yield compare_versions("worker's", hello, info)


def next_token(model: Any, tokenizer: Any, text: str) -> str:
    """The likeliest next token."""
    inputs = tokenizer(text, return_tensors="pt").to(model.device)
    token: str = tokenizer.decode(model(**inputs).logits[0, -1].argmax())
    return token


def compare_versions(whose: str, hello: dict[str, Any], info: dict[str, Any]) -> Finding:
    """Versions of a worker beside those here, as far as they matter to what travels."""
    from importlib.metadata import PackageNotFoundError, version

    there = {"python": ".".join(map(str, hello["python"])), "interp-kernel": hello["version"]}
    here = {"python": platform.python_version(), "interp-kernel": version("interp-kernel")}
    for name in COMPARED:
        try:
            here[name] = version(name)
            there[name] = info["versions"].get(name)
        except PackageNotFoundError:
            continue  # the notebook's side needs none of these
    differing = [f"{name} {here[name]} here, {there[name]} there" for name in here if here[name] != there[name]]
    if differing:
        return Finding("note", "versions", f"The {whose} differ: {'; '.join(differing)}.")
    return Finding("ok", "versions", f"The {whose} are the same: {', '.join(f'{k} {v}' for k, v in here.items())}.")


def check_hub_token() -> Iterator[Finding]:
    """Whether gated models can be loaded."""
    from huggingface_hub import get_token

    if get_token() is None:
        yield Finding("note", "HF token", "There is none, so gated models can't be loaded. Make one: hf auth login.")
    else:
        yield Finding("ok", "HF token", "It is set, and goes to workers only.")


def check_modal() -> Iterator[Finding]:
    """Whether Modal can be reached with the token, has the hub's secret, and runs the same versions."""
    try:
        import modal
    except ImportError:
        yield Finding(
            "note", "Modal", "Its client is not installed. For mode='modal': pip install 'interp-kernel[modal]'."
        )
        return
    from interp_kernel.backends.modal.app import ModalApp
    from interp_kernel.backends.modal.backend import wait
    from interp_kernel.backends.modal.link import start
    from interp_kernel.backends.modal.options import ModalOptions
    from interp_kernel.spec import WorkerSpec

    app = ModalApp(WorkerSpec(), ModalOptions(app_name=APP_NAME, deploy=True))
    try:
        has_secret, is_deployed = wait(start(app.look("huggingface-secret")))
    except WorkerError as error:
        state = "note" if "no Modal token" in str(error) else "fail"
        yield Finding(state, "Modal token", str(error))
        return
    yield Finding("ok", "Modal token", f"Modal answers; its client is {modal.__version__}.")
    if has_secret:
        yield Finding("ok", "Modal secrets", "huggingface-secret is there; pass it by secrets=['huggingface-secret'].")
    else:
        advice = "For gated models make it: modal secret create huggingface-secret HF_TOKEN=hf_..."
        yield Finding("note", "Modal secrets", f"There is no huggingface-secret. {advice}")
    if is_deployed:
        yield from check_container()
    else:
        yield Finding("note", "Modal app", f"{APP_NAME!r} is not deployed, which only deploy=True needs.")


def check_container() -> Iterator[Finding]:
    """The deployed app's container, if one runs; none is started for the question."""
    client = InterpClient(APP_NAME, mode="modal", deploy=True)
    try:
        link = client.backend.attach("interp-doctor")
    except WorkerError as error:
        yield Finding("fail", "Modal app", str(error))
        return
    if link is None:
        yield Finding("ok", "Modal app", f"{APP_NAME!r} is deployed; no container of the demo model runs now.")
        return
    yield Finding("ok", "Modal app", f"{APP_NAME!r} is deployed; container {link.hello['place']} runs.")
    yield compare_versions("container's", link.hello, link.hello["info"] or {"versions": {}})
    link.close()
