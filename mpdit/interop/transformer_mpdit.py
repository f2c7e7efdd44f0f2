"""Makes mpdit's model a component of a diffusers pipeline. Needs mpdit and diffusers: pip install 'mpdit[vae]'.

`mpdit convert --to diffusers` puts a copy of this file beside the weights, as diffusers imports a component of another
library only from the component's own folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from mpdit import ModelConfig, MPDiT
from mpdit.model.weights import check_fit, check_loaded, read_diffusers


class MPDiTTransformer2DModel(ModelMixin, ConfigMixin):
    """Holds an mpdit.MPDiT with what a pipeline must know of its latents.

    Args:
        model: mpdit.ModelConfig as a dict.
        latents_mean: per channel; the model sees (latents - latents_mean) / latents_std, with the latents as the VAE
            makes them, not multiplied by its scaling_factor.
        latents_std: per channel.
        pixel_range: what black and white are to the VAE.
        metadata: what mpdit.load_weights returns beside the model, for `mpdit convert` to give back.
    """

    _no_split_modules = ("Block",)

    @register_to_config
    def __init__(
        self,
        model: dict[str, Any],
        latents_mean: Sequence[float],
        latents_std: Sequence[float],
        pixel_range: Sequence[float] = (-1.0, 1.0),
        metadata: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.mpdit = MPDiT(ModelConfig.from_dict(model))

    @classmethod
    def from_pretrained(cls, path: Any, *, output_loading_info: bool = False, **options: Any) -> Any:
        """Load as ModelMixin does, which leaves what no file holds as it was built; CheckpointError for that here.

        It (diffusers 0.42) believes the index of shards, and not only what they hold.
        """
        model, loaded = super().from_pretrained(path, output_loading_info=True, **options)
        remedy = "export the pipeline again with `mpdit convert --to diffusers`"
        check_loaded(path, loaded, remedy)
        folder = Path(path) / (options.get("subfolder") or "")
        if folder.is_dir():
            tensors, _ = read_diffusers(folder, options.get("variant"))
            check_fit(path, tensors, model.state_dict(), remedy)
        return (model, loaded) if output_loading_info else model

    def forward(self, hidden_states: Tensor, timestep: Tensor | float, class_labels: Tensor) -> Tensor:
        """Predict the velocity, like hidden_states [B, C, S, S], at one time or times [B]: 1 is noise, 0 is data.

        class_labels are int64 [B]; num_classes means no class.
        """
        t = torch.as_tensor(timestep, dtype=torch.float32, device=hidden_states.device).expand(len(hidden_states))
        half = self.dtype in (torch.bfloat16, torch.float16)  # torch_dtype of from_pretrained
        with torch.autocast(hidden_states.device.type, self.dtype if half else None, enabled=half):
            return self.mpdit(hidden_states, t, class_labels)
