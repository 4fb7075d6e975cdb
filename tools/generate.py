"""`cherry generate` as a script, for torchrun and srun."""

import sys

from cherry_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
