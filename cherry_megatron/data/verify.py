"""Whether the tokens of a data set are those that `cherry data` wrote: by hashes, which reads all of them."""

import json
from collections.abc import Collection
from pathlib import Path

from cherry_megatron.storage.integrity import hash_file

HASHED = (".bin", ".idx")


def hashes(prefix: Path) -> dict[str, str]:
    """SHA-256 of the files of a data set, by their ending, as its report keeps them."""
    return {suffix: hash_file(Path(f"{prefix}{suffix}")) for suffix in HASHED}


def verified(prefixes: Collection[str]) -> str:
    """What is said of data sets of which nothing has `changed`."""
    sizes = [Path(f"{prefix}{suffix}").stat().st_size for prefix in prefixes for suffix in HASHED]
    return f"verified: {len(sizes)} files of data, {sum(sizes):,} bytes, are what was written"


def changed(prefix: str) -> list[str]:
    """What of a data set is not what was written, or why that cannot be told; a sentence each.

    Args:
        prefix: of its files, without their endings.
    """
    report = Path(f"{prefix}.json")
    try:
        recorded = json.loads(report.read_text(encoding="utf-8")).get("sha256")
        found = hashes(Path(prefix))
    except OSError as error:
        return [f"cannot read {error.filename}: {error.strerror}"]
    except (ValueError, AttributeError):
        return [f"{report} is not a report of `cherry data`; restore it or make the data again"]
    if not isinstance(recorded, dict):
        return [f"{report} has no hashes, with which {prefix}.bin could be compared; data made now has them"]
    return [
        f"{prefix}{suffix} is not what was written: {report.name} has another SHA-256 for it; copy it again or "
        "make the data again"
        for suffix in HASHED
        if recorded.get(suffix) != found[suffix]
    ]
