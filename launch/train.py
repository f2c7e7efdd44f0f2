"""Train under DeepSpeed: `deepspeed launch/train.py --ds_config launch/zero2.json`; --help explains every argument."""

import os
import sys

if __name__ == "__main__":
    # Before torch loads OpenMP: threads that wait for long without sleeping make a shared CPU ten times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    from mpdit.training.main import main

    sys.exit(main())
