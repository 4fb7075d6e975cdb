"""`cherry convert-hf` as a script."""

import sys

from cherry_megatron.cli import program

if __name__ == "__main__":
    program(["convert-hf", *sys.argv[1:]])
