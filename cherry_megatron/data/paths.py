"""The data sets that a configuration names."""

from pathlib import Path

from cherry_megatron.config import Config
from cherry_megatron.errors import CherryError

DATA_FLAGS = ("data-path", "train-data-path", "valid-data-path", "test-data-path")


def data_prefixes(config: Config) -> list[tuple[str, str]]:
    """Every data set's path prefix with the flag that names it; weights may stand between the prefixes."""
    named: list[tuple[str, list[str]]] = [(flag, config.value(flag) or []) for flag in DATA_FLAGS]
    listing = config.value("data-args-path")
    if listing is not None:
        try:
            named.append(("data-args-path", Path(listing).read_text().split()))
        except OSError as error:
            raise CherryError(f"megatron.data-args-path {listing}: {error.strerror}") from None
    return [(flag, str(text)) for flag, texts in named for text in texts if not _is_number(str(text))]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
