"""Models that between them reach every branch of the configuration."""

from mpdit.model.config import ModelConfig
from mpdit.model.kinds import TRANSITIONS

_SMALL = ModelConfig(((4, 3), (2, 2)), 64, 2, input_size=8, class_tokens=4, num_classes=3)

VARIANTS = {
    "two stages": _SMALL,
    "three stages": ModelConfig(
        ((4, 2), (2, 1), (1, 2)), 64, 2, input_size=8, channels=8, class_tokens=4, num_classes=3
    ),
    "one stage": _SMALL.replace(stages=((2, 3),)),
    "DiT": _SMALL.replace(
        stages=((2, 3),),
        class_conditioning="added",
        modulation="per_block",
        time_embedding="sinusoidal",
        time_layers=2,
    ),
    "learn_sigma": _SMALL.replace(learn_sigma=True),
    "no skip": _SMALL.replace(skip=False),
    **{kind: _SMALL.replace(transition=kind) for kind in TRANSITIONS if kind != _SMALL.transition},
    "own modulations": _SMALL.replace(modulation="per_block"),
    "added class": _SMALL.replace(class_conditioning="added"),
    "one Linear of time": _SMALL.replace(time_embedding="sinusoidal", time_layers=1),
    "three Linears of time": _SMALL.replace(time_embedding="sinusoidal", time_layers=3),
    "two layers of time": _SMALL.replace(time_layers=2),
    "four layers of time": _SMALL.replace(time_layers=4, time_width=16),
    "no block at the end": _SMALL.replace(stages=((4, 5), (2, 0))),
    "no block at the start": _SMALL.replace(stages=((4, 0), (2, 2))),
    "narrow MLP": _SMALL.replace(mlp_ratio=2.5),
}
