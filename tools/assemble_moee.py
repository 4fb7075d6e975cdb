"""`cherry assemble-moee` as a script."""

import sys

from cherry_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main(["assemble-moee", *sys.argv[1:]]))
