"""Trains as `mpdit train` does: `python -m mpdit.training`, `deepspeed --module mpdit.training`."""

import sys

from mpdit.training.cli import main

if __name__ == "__main__":
    sys.exit(main())
