"""`cherry report` as a script."""

import sys

from cherry_megatron.cli import program

if __name__ == "__main__":
    program(["report", *sys.argv[1:]])
