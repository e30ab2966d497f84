"""How an agent's client starts our MCP server: its command and the variables that it needs."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

# Programs that start servers pass on little of their environment, or all of it with their own keys; so it is named.
_NAMES = {
    *(
        "HOME",
        "LANG",
        "LD_LIBRARY_PATH",
        "LOGNAME",
        "PATH",
        "REQUESTS_CA_BUNDLE",
        "SHELL",
        "SSL_CERT_FILE",
        "TMPDIR",
        "TZ",
    ),
    *("USER", "VIRTUAL_ENV", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY", "https_proxy", "http_proxy", "no_proxy"),
}
_PREFIXES = (
    *("CUDA_", "HF_", "INTERP_", "IPYTHON", "JUPYTER_", "LC_", "MKL_", "MODAL_", "MPL", "NVIDIA_", "OMP_", "PYTHON"),
    *("PYTORCH_", "TOKENIZERS_", "TORCH", "TRANSFORMERS_", "XDG_"),
)


def server_command(workspace: Path) -> list[str]:
    """The command that serves a workspace over stdio, with this Python."""
    return [sys.executable, "-m", "interp_kernel.cli", "mcp", "--workspace", str(workspace)]


def server_variables(environ: Iterable[str]) -> list[str]:
    """Names of the environment's variables that the server, its kernels and its workers need."""
    return sorted(name for name in environ if name in _NAMES or name.startswith(_PREFIXES))
