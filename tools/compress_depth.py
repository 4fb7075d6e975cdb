"""`cherry compress-depth` as a script."""

import sys

from cherry_megatron.cli import program

if __name__ == "__main__":
    program(["compress-depth", *sys.argv[1:]])
