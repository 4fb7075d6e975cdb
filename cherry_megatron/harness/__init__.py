"""Tasks of lm-evaluation-harness: found in a local folder, put to a model, kept, and compared between two models.

Nothing outside this package imports the harness, which is the extra `evaluate`; nor does compare.py.
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
