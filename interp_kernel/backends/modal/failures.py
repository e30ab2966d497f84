"""What went wrong at Modal, in words, with the command that helps; the only place that knows Modal's exceptions."""

from __future__ import annotations

import builtins

from interp_kernel.backends.modal.wire import LARGEST
from interp_kernel.errors import InterpError

REFUSED = "interp-kernel: the container that was meant has been replaced"  # as gateway.py says it
REPLACED = "its container was replaced: Modal preempted it, it crashed, or it was scaled down"
ENDED = {"InputCancellation", "InternalFailure", "RemoteError"}  # what a call ends with whose container ends under it
PASSING = {"ConnectionError", "InternalError", "ServiceError", "ResourceExhaustedError"}

NEW_TOKEN = "Make a token with `modal token new`, or set MODAL_TOKEN_ID and MODAL_TOKEN_SECRET."
NO_ACCESS = "Look at the workspace and its limits with `modal profile list` and on modal.com/settings."
TRY_AGAIN = "Modal's status is on status.modal.com; run the cell again."
SEE_LOGS = "See what the container wrote: interp-kernel modal logs."
LOWER_SIZE = f"One message holds at most {LARGEST / 1e9:.2f} GB; put large data on a Modal Volume."
REPORT = "This is no fault of yours; report it with this text."
NOT_USED = "interp-kernel does not use this part of Modal. " + REPORT

# Modal's exception classes by name, and what to do. A class that is not here is told by the nearest one above it.
ANSWERS: dict[str, str] = {
    "AlreadyExistsError": REPORT,
    "AsyncUsageWarning": REPORT,
    "AuthError": NEW_TOKEN,
    "ClientClosed": "The connection to Modal was closed; restart the notebook's kernel.",
    "ConflictError": "Another deployment of the app is under way; try again in a minute.",
    "ConnectionError": "Check the network and a proxy; " + TRY_AGAIN,
    "DataLossError": TRY_AGAIN,
    "DeprecationError": "Install a version of modal that fits: pip install 'interp-kernel[modal]'.",
    "DeserializationError": "The image lacks a package that the call needs, or has another version of it. " + SEE_LOGS,
    "Error": REPORT,
    "ExecTimeoutError": NOT_USED,
    "ExecutionError": "Start again. " + SEE_LOGS,
    "FunctionTimeoutError": "Raise `timeout` or `startup_timeout`: a large model may need 20 minutes to load at first.",
    "ImageBuildError": "Read why with `modal image logs` and this image's id. Correct `image=`.",
    "InputCancellation": "It was cancelled at Modal; run the cell again.",
    "InteractiveTimeoutError": NOT_USED,
    "InternalAPIWarning": REPORT,
    "InternalError": TRY_AGAIN,
    "InternalFailure": "The container ended, for want of memory or by a crash. Ask for more `memory=`. " + SEE_LOGS,
    "InvalidError": "Modal refused an option; correct it and start again.",
    "LogsFetchError": TRY_AGAIN,
    "ModuleNotMountable": "A package in the image can't be sent from here; install it in `image=`.",
    "MountUploadTimeoutError": "The upload was too slow; try again on a better connection.",
    "NotFoundError": "It may have been stopped or deleted; start it again with %remote start, or `modal app list`.",
    "OutputExpiredError": "Modal keeps results for a week; run the cell again.",
    "PermissionDeniedError": NO_ACCESS,
    "RemoteError": SEE_LOGS,
    "RequestSizeError": LOWER_SIZE,
    "ResourceExhaustedError": "The workspace's limit is reached. " + NO_ACCESS,
    "SandboxFilesystemDirectoryNotEmptyError": NOT_USED,
    "SandboxFilesystemError": NOT_USED,
    "SandboxFilesystemFileTooLargeError": NOT_USED,
    "SandboxFilesystemIsADirectoryError": NOT_USED,
    "SandboxFilesystemNotADirectoryError": NOT_USED,
    "SandboxFilesystemNotFoundError": NOT_USED,
    "SandboxFilesystemPathAlreadyExistsError": NOT_USED,
    "SandboxFilesystemPermissionError": NOT_USED,
    "SandboxTerminatedError": NOT_USED,
    "SandboxTimeoutError": NOT_USED,
    "SerializationError": REPORT,
    "ServerWarning": TRY_AGAIN,
    "ServiceError": TRY_AGAIN,
    "SnapshotCreationError": "Memory snapshots are experimental at Modal; start without enable_memory_snapshot.",
    "TimeoutError": TRY_AGAIN,
    "UnimplementedError": "Install a version of modal that fits: pip install 'interp-kernel[modal]'.",
    "UserCodeException": SEE_LOGS,
    "VersionError": "Install a version of modal that fits: pip install 'interp-kernel[modal]'.",
    "VolumeUploadTimeoutError": "The upload was too slow; try again on a better connection.",
    "WorkspaceManagementError": NO_ACCESS,
}


def explain(error: BaseException, *, was_up: bool = False) -> str:
    """Why a call to Modal failed and what to do, without a full stop; `was_up`: the container had answered before."""
    if isinstance(error, LookupError) and REFUSED in str(error):
        return REPLACED
    if isinstance(error, InterpError):
        return str(error).removesuffix(".")
    if isinstance(error, builtins.TimeoutError):
        return f"Modal gave no answer. {ANSWERS['ConnectionError']}".removesuffix(".")
    text = " ".join(str(error).split()).rstrip(".")
    if was_up and type(error).__name__ in ENDED:
        return f"{REPLACED} ({text})" if text else REPLACED
    for kind in type(error).__mro__:
        if kind.__module__ == "modal.exception" and kind.__name__ in ANSWERS:
            return f"Modal: {type(error).__name__}: {text}. {ANSWERS[kind.__name__]}".removesuffix(".")
    return f"the container failed: {type(error).__name__}: {text}. {SEE_LOGS}".removesuffix(".")


def is_passing(error: BaseException) -> bool:
    """Whether the same call may succeed when it is made again."""
    if isinstance(error, builtins.TimeoutError | OSError):
        return True
    return type(error).__module__ == "modal.exception" and type(error).__name__ in PASSING
