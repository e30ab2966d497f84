"""Memory of the kernel and of the worker, each beside a plain process that does the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.measure import Figure, Samples, Section, median
from benchmarks.notebook import OURS, PLAIN, connected, kernel, model_name, resident_mb
from interp_kernel import demo_model

ROUNDS = 3
FORWARD = "model(**tokenizer('The Eiffel Tower is in', return_tensors='pt')).logits.sum().item()"
SCRIPT = f"""
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = AutoTokenizer.from_pretrained(sys.argv[1]), AutoModelForCausalLM.from_pretrained(sys.argv[1])
{FORWARD}
print("ready", flush=True)
sys.stdin.read()
"""
KERNELS = {"plain ipykernel": (PLAIN, "1"), "interp kernel": (OURS, f"%%remote\n{FORWARD}")}
WORKER, BESIDE = "worker", "script that loads the same model"


def measure() -> Section:
    """Resident memory of each, after one forward pass where there is a model."""
    samples: Samples = {name: [] for name in (*KERNELS, BESIDE, WORKER)}
    for _ in range(ROUNDS):
        with connected() as client:
            for name, (module, cell) in KERNELS.items():
                samples[name].append(kernel_memory(module, cell))
            samples[WORKER].append(resident_mb(client.session.hello["pid"]))
            client.stop()
        samples[BESIDE].append(script_memory())
    extra = median(samples[WORKER]) - median(samples[BESIDE])
    return Section(
        "Memory",
        "Resident memory: of each kernel after its first cell, a remote one in ours; of a worker after that cell and "
        "of a plain script that loads the same model, each after one forward pass.",
        "MB",
        samples,
        [Figure("worker over the script", extra, 150, "MB")],
        ["torch was loaded in neither kernel."],
    )


def kernel_memory(module: str, cell: str) -> float:
    """Resident memory of a kernel after one cell."""
    with kernel(module) as running:
        running.run(cell)
        loaded = running.value("'torch' in __import__('sys').modules")
        if loaded != "False":
            raise RuntimeError(f"torch is loaded in the kernel {module}: {loaded}.")
        return resident_mb(running.process.pid)


def script_memory() -> float:
    """Resident memory of a plain process that holds the model."""
    name = model_name()
    path = str(demo_model.path()) if name == "demo" else str(Path(name))
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", SCRIPT, path], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"The script that loads {path} ended before it was ready.")
        found = resident_mb(process.pid)
        process.stdin.close()
    return found
