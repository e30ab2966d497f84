"""A Modal control plane on loopback, for tests.

The real modal client talks to it by gRPC, and each container is a process of modal's own entrypoint: everything but
the cloud is the real thing. Not reproduced: image builds (a recipe is kept, and its containers run in the interpreter
of `Settings.python`), GPUs, memory snapshots, placement, prices, quotas.
"""

from tests.modal_loopback.host import Loopback
from tests.modal_loopback.state import Settings, Task

__all__ = ["Loopback", "Settings", "Task"]
