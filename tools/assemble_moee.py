"""`cherry assemble-moee` as a script."""

import sys

from cherry_megatron.cli import program

if __name__ == "__main__":
    program(["assemble-moee", *sys.argv[1:]])
