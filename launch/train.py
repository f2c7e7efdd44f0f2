"""Train under DeepSpeed: `deepspeed launch/train.py --ds_config launch/zero2.json`; --help explains every argument."""

import os
import sys

if __name__ == "__main__":
    # Before torch loads OpenMP: threads that spin while they wait make a shared or full CPU ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from mpdit.training.main import main

    sys.exit(main())
