"""The one exception that means "the input is wrong", not "the program is wrong"."""

from collections.abc import Iterator
from contextlib import contextmanager


class CherryError(Exception):
    """Bad input. The message is one sentence that names the file, key or value and what to do.

    The command line prints it without a traceback and exits with status 2.
    """


@contextmanager
def naming(what: object) -> Iterator[None]:
    """Have refusals begin with what they are of, a file or a key, if they do not do so already."""
    try:
        yield
    except CherryError as error:
        text = str(error)
        raise CherryError(text if text.startswith(str(what)) else f"{what}: {text}") from None
