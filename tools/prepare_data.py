"""`cherry data` as a script."""

import sys

from cherry_megatron.cli import program

if __name__ == "__main__":
    program(["data", *sys.argv[1:]])
