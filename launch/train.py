"""Train under DeepSpeed: `deepspeed launch/train.py --ds_config launch/zero2.json`; --help explains every argument."""

import sys

from mpdit.core.cpu import settle_cpu

if __name__ == "__main__":
    settle_cpu()
    from mpdit.training.cli import main

    sys.exit(main())
