"""Runs the `mpdit` command: `python -m mpdit`, `deepspeed --module mpdit train`, `torchrun -m mpdit train`."""

import sys

from mpdit.cli import main

if __name__ == "__main__":
    sys.exit(main())
