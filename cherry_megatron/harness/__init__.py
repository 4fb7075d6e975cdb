"""Tasks of lm-evaluation-harness: found in a local folder, put to a model, kept, and compared between two models.

The harness (the extra `evaluate`) is imported by tasks.py, model.py and run.py alone.
"""

from importlib.util import find_spec

from cherry_megatron.errors import CherryError


def require_harness() -> None:
    """See that the harness is installed.

    Raises:
        CherryError: how to install it.
    """
    for module, package in (("lm_eval", "lm-eval"), ("accelerate", "accelerate")):
        if find_spec(module) is None:
            raise CherryError(f"--tasks needs {package}; install it with pip install 'cherry-megatron[evaluate]'")
