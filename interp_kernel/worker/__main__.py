"""`python -m interp_kernel.worker FOLDER READY_FD`: a supervisor that stays small, and the worker that it forks.

The supervisor only waits: when the worker ends, by itself, by a signal or for lack of memory, it writes why to
`exit-PID.json`, so that any client can tell. FOLDER is the worker's rendezvous folder and holds `spec.json`;
READY_FD is written to when the socket listens.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

OOM_COUNTER = Path("/sys/fs/cgroup/memory.events")


def main() -> None:
    """Fork the worker and wait for its end."""
    if os.fork():
        os._exit(0)  # whoever started the worker is not its parent, and so need not wait for its end
    folder = Path(sys.argv[1])
    kills_before = oom_kills()
    pid = os.fork()
    if pid == 0:
        work(folder, int(sys.argv[2]))
        return
    os.close(int(sys.argv[2]))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _, status = os.waitpid(pid, 0)
    ended = {"reason": reason(folder, status, oom_kills() > kills_before), "time": time.time()}
    partial = folder / "exit.partial"
    partial.write_text(json.dumps(ended))
    partial.rename(folder / f"exit-{pid}.json")


def work(folder: Path, ready_fd: int) -> None:
    """Be the worker: bind the socket first, so that clients see the model load, then load and serve."""
    import faulthandler

    from interp_kernel.spec import WorkerSpec
    from interp_kernel.worker.server import listen, serve_forever
    from interp_kernel.worker.service import Service, tick_forever

    faulthandler.enable(file=os.dup(2))
    signal.signal(signal.SIGTERM, lambda *_: service.stop("it was stopped"))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.register_at_fork(after_in_child=forget_signals)
    settings = json.loads((folder / "spec.json").read_text())
    (folder / f"exit-{os.getpid()}.json").unlink(missing_ok=True)  # of an earlier process that had the same id
    spec = WorkerSpec.from_json(settings["spec"])
    service = Service(spec, folder, settings["scaledown_window"], settings["min_containers"])
    serve_forever(service, listen(Path(settings["socket"])))
    os.write(ready_fd, b"1")
    os.close(ready_fd)
    tick_forever(service)
    service.run()


def forget_signals() -> None:
    """What a call forks dies of a signal as any process does: `multiprocessing` ends its children by SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def reason(folder: Path, status: int, killed_for_memory: bool) -> str:
    """Why the worker ended, in words."""
    note = folder / "reason"
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        if name == "SIGKILL":
            by = "the machine ran out of memory" if killed_for_memory else "out of memory, or kill -9"
            return f"killed by SIGKILL ({by})"
        return f"killed by {name}" + (" (a crash in native code; see the log)" if name != "SIGTERM" else "")
    if note.exists():
        return note.read_text()
    return f"it exited with status {os.WEXITSTATUS(status)} by its own code (os._exit, or a fatal error; see the log)"


def oom_kills() -> int:
    """How often the kernel has killed a process of this container for want of memory."""
    try:
        lines = dict(line.split() for line in OOM_COUNTER.read_text().splitlines())
    except OSError:
        return 0
    return int(lines.get("oom_kill", 0))


if __name__ == "__main__":
    main()
