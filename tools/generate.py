"""`cherry generate` as a script, for torchrun and srun."""

import sys

from cherry_megatron.cli import program

if __name__ == "__main__":
    program(["generate", *sys.argv[1:]])
