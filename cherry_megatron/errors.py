"""The one exception that means "the input is wrong", not "the program is wrong"."""


class CherryError(Exception):
    """Bad input. The message is one sentence that names the file, key or value and what to do.

    The command line prints it without a traceback and exits with status 2.
    """
