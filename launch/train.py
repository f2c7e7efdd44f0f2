"""Train as `mpdit train` does: `deepspeed launch/train.py ARGUMENTS`; --help explains every argument.

`main` is `run = setup.prepare(arguments)`, then `loop.train(run)`, and turns what goes wrong into exit codes.
"""

import sys

from mpdit.training.cli import main

if __name__ == "__main__":
    sys.exit(main())
