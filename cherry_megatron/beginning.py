"""What a package brings to begin with: the project's configurations and SLURM launchers, to copy and edit."""

import shutil
from pathlib import Path

from cherry_megatron.files import new_folder, refuse_taken

# In a checkout its folders are links to those of the repository; a wheel has the files themselves.
STARTER = Path(__file__).with_name("starter")
FOLDERS = ("configs", "slurm")


def begin(folder: Path) -> list[Path]:
    """Copy configs/ and slurm/ into a folder, from which every command of the documentation then works.

    Args:
        folder: made if need be; what else lies there stays.

    Returns:
        The folders that were written.

    Raises:
        CherryError: if one of them is there already, before anything is written, or cannot be written.
    """
    targets = [folder / name for name in FOLDERS]
    for target in targets:
        refuse_taken(target)
    for target in targets:
        source = STARTER / target.name
        needed = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
        with new_folder(target, needed) as partial:
            # cluster.env says where somebody's account is; it is no part of the project.
            shutil.copytree(
                source, partial, ignore=shutil.ignore_patterns("cluster.env", "__pycache__"), dirs_exist_ok=True
            )
            partial.rename(target)
    return targets


def hint(missing: Path) -> str:
    """What to add to an error about a file that is not there, where `cherry init` would bring it; else nothing."""
    if missing.is_absolute() or missing.exists() or missing.parts[0] not in FOLDERS:
        return ""
    known = (STARTER / missing).is_file() and not Path(missing.parts[0]).exists()
    return f"; `cherry init` puts the project's {missing.parts[0]}/ into this folder" if known else ""
