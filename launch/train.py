"""Train as `mpdit train` does: `deepspeed launch/train.py ARGUMENTS`; --help explains every argument."""

import sys

from mpdit.training.cli import main

if __name__ == "__main__":
    sys.exit(main())
