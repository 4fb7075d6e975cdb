"""`cherry plan` as a script."""

import sys

from cherry_megatron.cli import program

if __name__ == "__main__":
    program(["plan", *sys.argv[1:]])
