"""`python train.py ...` is `miles train ...`: recipes of slime and Miles begin this way."""

import sys

from miles.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
