"""What a job was started with, kept in the run's folder: code, configuration, environment, packages."""

import importlib.metadata
import os
import re
from collections.abc import Mapping
from pathlib import Path

from cherry_megatron.files import cannot_write, make_folder, write_atomically
from cherry_megatron.versions import git_difference, git_state

# Variables whose values are nobody's business.
_SECRET = re.compile(
    r"TOKEN|SECRET|PASSW|PASSPHRASE|_PWD|JWT|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE|COOKIE|AUTH", re.IGNORECASE
)
_IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+(?=@)")  # user and password
_NO_SECRET = ("CHERRY_TOKENIZER", "TOKENIZERS_PARALLELISM")


def keep(folder: Path, config: str, environment: Mapping[str, str] = os.environ) -> None:
    """Write code.txt, code.diff (what the commit lacks), config.yaml, environment.txt and packages.txt.

    Args:
        folder: to write them to; made if need be.
        config: the resolved configuration, as YAML.
        environment: values of variables that look like secrets are left out, and passwords in addresses.

    Raises:
        CherryError: if they cannot be written.
    """
    files = {
        "code.txt": "".join(f"{name}: {value}\n" for name, value in git_state().items()) or "no git repository\n",
        "code.diff": git_difference(),
        "config.yaml": config,
        "environment.txt": "".join(f"{name}={_shown(name, environment[name])}\n" for name in sorted(environment)),
        "packages.txt": "".join(sorted({f"{d.name}=={d.version}\n" for d in importlib.metadata.distributions()})),
    }
    make_folder(folder)
    try:
        for name, text in files.items():
            write_atomically(folder / name, text)
    except OSError as error:
        raise cannot_write(folder, error) from None


def _shown(name: str, value: str) -> str:
    if _SECRET.search(name) and name not in _NO_SECRET:
        return "(left out)"
    return _IN_ADDRESS.sub("(left out)", value)
