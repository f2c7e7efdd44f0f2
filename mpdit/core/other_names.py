"""Tells by one table what other projects' names of settings mean here, for messages about names that nothing has."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

_EVERY = r"_?(every\w*|freq\w*|interval|steps?|iters?|epochs?|period)$"
_COUNT = r"^((num|n|nb|max|min|total|global|train(ing)?|update|optimi[sz](er|ation))_?)*"
_CONCEPTS = r"""
resum => resume =>
(act|grad)\w*_(checkp|ckpt)|recompute|remat|^checkpointing$ => activation_checkpointing => activation_checkpointing
keep|total_limit|max_(to_keep|checkpoints|ckpts)|save_top_k|save_last => keep =>
^(sav\w*|(\w+_)?(ckpt|checkpoint)\w*?)EVERY => checkpoint_every =>
^(log|print|report|disp)\w*?EVERY => log_every =>
^(num_)?(sampl(e|ing)|inference|diffusion)_?(time)?steps?$|^nfe$ => sample_steps => steps
^(sampl|eval|val|vis|image|preview)\w*?EVERY => sample_every =>
^(out|sav|sampl|results?|work|log|exp|run|ckpt|checkpoint)\w*?_?(dir|folder|root)$|^(exp\w*|run)(_name)?$ => out => out
^(out(put)?|save|sample)(_path|_file)?$ => out => out
pretrain|fine_?tune|ckpt|checkpoint|^init|^load|^(model_)?weights(_path)?$ => init_from =>
warm_?up => warmup =>
(noise|beta)s?_sched =>  =>
sched|lr_(decay|policy|min)|min_lr|anneal => lr_schedule => method
learning_?rate|(^|_)b?lr$|^lr => lr =>
accum|micro_?steps|update_freq => grad_accum_steps => grad_accum_steps
^(ref|real|gt|stats)(_|$)|ref_batch =>  => reference
^(eval\w*|val\w*|test|sample|infer\w*)_batch => training draws in batches of its own: leave it out => batch
micro_?batch|batch\w*_per_|(^|_)per_(gpu|device|rank)(_|$) => give --global-batch, ranks x micro steps x it => batch
batch|^bsz?$ => global_batch => global_batch batch
clip|(grad|max)_norm => clip =>
(^|_)ema => ema_decay => weights
uncond|(cfg|label|class|cond\w*|caption|text)_?(prob|drop\w*) => class_dropout =>
drop =>  =>
(guid\w*|cfg)_(interval|low|high|start|end) =>  => interval
(cfg|config)_?(file|path) =>  =>
cfg|guid => sample_guidance => guidance
^(adam\w*_|optim\w*_)?(wd|(weight_|l2_)?decay)$|^l2 => weight_decay =>
beta|momentum => betas =>
(^|_)eps(ilon)?$ => AdamW's epsilon is fixed: leave it out =>
tf32 => tf32 => precision
precision|(^|_)(amp|half|autocast|[bf]+p?(16|32))(_|$)|b?float(16|32)|dtype|opt_level => precision => precision dtype
^opt(im\w*)?(_(type|name))?$ => optimizer =>
COUNTepochs?$ => steps => epochs
COUNT(steps?|iters?|iterations?)$|^(total_)?(kimg|nimg|duration)$ => steps => steps epochs
scal(e|ing)_factor|latents?_scale|data_std => data_scale => data_scale
^(num|n|nb|max|total)_\w*(images?|samples?|imgs)$|_size_?total =>  => num dataset_size
(im\w*g\w*|input|crop|latent)_?(size|res)|resol => it is the data's: leave it out => image_size input_size
^(data(set)?|train\w*data|features?|latents?|train)(_(dir|path|root|name|folder|file))?$|^(root|imagenet)\w*$ => data =>
^(model|arch|net|backbone)(_?(name|type|size|arch|id))?$ => model =>
^(hidden|embed\w*|n)_?(size|dim|embd)$|^(d_model|model_dim|dim)$|width => override width => override width
depth|(num|n)_(layers?|blocks)|patch|^layers$ => override stages => override stages
heads?$ => override heads => num_heads override heads
(in|latent|num)_(chan\w*|dim)|^channels$ => override channels => override channels
^(num|nb|n)_?(class\w*|labels)$|label_dim => override num_classes => num_classes override num_classes
vae|autoencoder|first_stage => latents are made by `mpdit extract`: leave it out => vae
seed => seed => seed
wandb|report_to|tracker|logger => wandb =>
deepspeed|zero(_?stage)?$ => ds_config => zero
prediction|parameteri[sz]ation|objective => the velocity is what is learnt: leave it out =>
p_mean => logit_mean =>
p_std => logit_std =>
snr|loss_?(type|weight\w*)|weighting => loss_weight =>
t(ime)?(step)?_?(sampl\w*|dist\w*)|density => time_sampler =>
workers|num_(proc|threads) => data are read by threads as needed: leave it out => workers
solver|sampler|ode|method =>  => method
^(gpus?(_?ids?)?|devices?(_?ids?)?|cuda)$ => CUDA_VISIBLE_DEVICES chooses the GPUs: leave it out => gpus device
^(num|n|nb)?_?(gpus?|devices|processes|proc\w*)$|world_size =>  => gpus
device|^cuda =>  => device
label|class =>  => classes
"""
"""Maps a pattern of names to training's name for it, then to other commands'; the first line that matches counts.

"override X" is a field of the model, other text with spaces what to say instead of a name.
"""
_COUNTED = ("steps", "global_batch", "warmup", "class_dropout")
"""Settings of training that others count otherwise, whose help is told too."""


def hint(name: str, ours: Mapping[str, str], training: bool, option: str = "--") -> str:
    """Say what was meant by a name that none of `ours`, with underscores and by their help, has; "" if unknown.

    `option` is "--" for arguments, "" for keys of a file.
    """
    name = name.lower().strip("-").replace("-", "_").removeprefix("no_")
    meant = next(iter(difflib.get_close_matches(name, ours, n=1, cutoff=0.83)), "")
    for line in () if meant else _CONCEPTS.strip().splitlines():
        pattern, theirs, others = map(str.strip, line.split("=>"))
        if re.search(pattern.replace("EVERY", _EVERY).replace("COUNT", _COUNT), name):
            found = [theirs] if training else re.findall(r"override \w+|\w+", others)
            meant = next((one for one in found if training or one.split()[0] in ours), "")
            break
    if meant.startswith("override "):
        return model_hint(meant.split()[1], option)
    if not meant or " " in meant:
        return meant
    given = f"--{meant if meant == 'ds_config' else meant.replace('_', '-')}" if option else repr(meant)
    return f"did you mean {given}{f', {ours[meant]}' if training and meant in _COUNTED else ''}?"


def model_hint(field: str, option: str) -> str:
    """Say how a field of the model is given, as an argument or in a file."""
    return f"it is the model's: {f'{option}override {field}=...' if option else f'override: {{{field}: ...}}'}"
