"""A rank of a small training run under DeepSpeed, whose rank 0 prints its peak memory: for test_memory.py."""

import json
import sys
from pathlib import Path

import deepspeed
import torch
from mpdit_kernels import AdamWEMA, use_attention
from peaks import peak_bytes
from training_runs import ds_config

import mpdit
from mpdit.model.config import ModelConfig

CONFIG = ModelConfig(((4, 3), (2, 2)), 256, 4, input_size=16, class_tokens=4, num_classes=10)
IMAGES, BUCKET = 4, 500_000


def main(zero: int) -> None:
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    ranks = torch.distributed.get_world_size()
    stage = json.loads(Path(ds_config(zero)).read_text())["zero_optimization"] if zero else {"stage": 0}
    stage |= {name: BUCKET for name in stage if name.endswith("bucket_size")}
    if zero == 3:  # at this width most weights would persist, at the presets' next to none
        stage["stage3_param_persistence_threshold"] = 1000
    if zero:  # as deepspeed_config.complete sets them
        stage["memory_efficient_linear" if zero == 3 else "compute_grad_norm"] = False
    settings = {
        "train_batch_size": ranks * IMAGES,
        "train_micro_batch_size_per_gpu": IMAGES,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": stage,
        "timers": {"throughput": {"enabled": False}},
        "log_level": "error",
    }

    def work() -> None:
        model = mpdit.MPDiT(CONFIG)
        engine, *_ = deepspeed.initialize(model=model, optimizer=AdamWEMA(model.parameters()), config=settings)
        for _ in range(3):
            with use_attention("sdpa_flash"):
                velocity = engine(torch.randn(IMAGES, 4, 16, 16), torch.rand(IMAGES), torch.zeros(IMAGES).long())
                engine.backward(velocity.square().mean())
            engine.step()

    parameters = sum(parameter.numel() for parameter in mpdit.MPDiT(CONFIG).parameters())
    peak = peak_bytes(work, "cpu")
    if torch.distributed.get_rank() == 0:
        print(json.dumps({"bytes_per_parameter": peak / parameters}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
