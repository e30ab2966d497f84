"""The papermill engine `interp`: `papermill --engine interp in.ipynb out.ipynb`.

papermill loads every registered engine at each of its starts, in the midst of its own import. So this module imports
nothing: a slow line here would slow every papermill run on the machine, and an import of papermill would be circular.
"""

from __future__ import annotations

from typing import Any


class InterpEngine:
    """The three class methods that papermill calls on an engine."""

    @classmethod
    def execute_notebook(cls, nb: Any, kernel_name: str, **options: Any) -> Any:
        """Run every cell of `nb` in place and return it; the options are papermill's own and those of `runner.execute`.

        Raises:
            PapermillExecutionError: A cell raised, ran too long, or lost its kernel. The notebook has been saved.
            RunInterruptedError: SIGINT or SIGTERM stopped the run. The notebook has been saved.
        """
        from interp_kernel.notebook import runner

        return runner.execute(nb, kernel_name, **options)

    @classmethod
    def nb_kernel_name(cls, nb: Any, name: str | None = None) -> str:
        """Name of the kernel: `name`, else the one that the notebook names."""
        from papermill.utils import nb_kernel_name

        return str(nb_kernel_name(nb, name))

    @classmethod
    def nb_language(cls, nb: Any, language: str | None = None) -> str:
        """Language of the notebook: `language`, else the one that the notebook names."""
        from papermill.utils import nb_language

        return str(nb_language(nb, language))
