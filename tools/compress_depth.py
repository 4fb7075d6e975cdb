"""`cherry compress-depth` as a script."""

import sys

from cherry_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main(["compress-depth", *sys.argv[1:]]))
