"""Says what a model from elsewhere is: whose, by which convention, and which of its tensors are the model's.

`PROJECTS` is what is known of other projects' checkpoints, `find_model` finds the model in a file, `identify` says
whose it is and what showed it. What the models have in common, names and shapes, is in official.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from mpdit.core.errors import CheckpointError
from mpdit.interop.arguments import CONSTANTS, may_be_objective, objective_of, read_arguments, says_objective
from mpdit.model.config import Convention


@dataclass(frozen=True)
class Project:
    """Says what the checkpoints of a project mean, and what in a file shows that it is theirs."""

    name: str
    repository: str
    convention: Convention
    """"mpdit": t = 1 is noise and v = noise - data; "sit": t = 1 is data and v = data - noise."""
    latents: Literal["paper", "scaled", "batch norm", "own"]
    """Normalised by the paper's constants, times 0.18215, by a BatchNorm in the file, or as its configuration says."""
    predicts: str = "velocity"
    """What its models predict where the arguments don't say it."""
    vae: str | None = "ema"
    """Which of stabilityai/sd-vae-ft-*, where the arguments name none; None for a VAE of its own."""
    tensors: str = "(?!)"
    """Pattern of the beginning of tensors that only its models have, before `extra` is left out."""
    arguments: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Arguments of its train.py; with values where other projects use the name too."""
    model: str = "(?!)"
    """Pattern of the beginning of its models' names."""
    extra: str = "(?!)"
    """Pattern of the beginning of tensors that training needs and sampling does not."""
    others: frozenset[str] = frozenset()
    """Arguments that sampling needn't know, beside those of `_KNOWN` and `_TRAINING`."""


PROJECTS = (
    Project(
        "MPDiT",
        "quandao10/MPDiT",
        "mpdit",
        "paper",
        tensors=r"time_modulation\.",
        model="MPDiT",
        others=frozenset(
            {"p_mean", "p_std", "reweight", "time_emb", "time_sampler", "num_condition_tokens", "skip_connection"}
        ),
    ),
    Project(
        "REPA-E",
        "End2End-Diffusion/REPA-E",
        "mpdit",
        "batch norm",
        vae=None,
        tensors=r"bn\.running_",
        arguments={"vae_align_proj_coeff": (), "bn_momentum": ()},
        extra=r"projectors\.|bn\.",
        others=frozenset({"vae_learnable", "loss_cfg_path"}),
    ),
    Project(
        "REPA",
        "sihyun-yu/REPA",
        "mpdit",
        "scaled",
        vae="mse",
        tensors=r"projectors\.|decoder_blocks\.",
        arguments={
            "enc_type": (),
            "proj_coeff": (),
            "encoder_depth": (),
            "path_type": ("linear", "cosine"),
            "prediction": ("v",),
        },
        extra=r"projectors\.",
        others=frozenset({"fused_attn", "legacy", "weighting"}),
    ),
    Project(
        "LightningDiT",
        "hustvl/LightningDiT",
        "sit",
        "own",
        vae=None,
        model="LightningDiT",
        others=frozenset({"use_lognorm", "use_cosine_loss", "downsample_ratio", "in_chans"}),
    ),
    Project(
        "SiT",
        "willisma/SiT",
        "sit",
        "scaled",
        arguments={"path_type": ("Linear", "GVP", "VP"), "prediction": ("velocity", "noise", "score")},
        model="SiT",
        others=frozenset({"sample_eps", "train_eps"}),
    ),
    Project(
        "diffusers' DiT",
        "huggingface/diffusers",
        "mpdit",
        "scaled",
        predicts="noise",
        tensors=r"transformer_blocks\.",
        others=frozenset(
            {"attention_bias", "attention_type", "norm_elementwise_affine", "norm_eps"}
            | {"norm_num_groups", "out_channels", "num_layers", "upcast_attention"}
        ),
    ),
    Project("DiT", "facebookresearch/DiT", "mpdit", "scaled", predicts="noise", model="DiT"),
)
"""The first that a file shows is taken; one that shows none, a bare state dict of DiT's or SiT's, is the last's."""

_STEPS = ("train_steps", "steps", "global_step", "step")
HEADS = ("num_heads", "num_attention_heads", "n_heads", "heads", "n_head", "num_head")
CLASSES = ("num_classes", "num_embeds_ada_norm", "n_classes", "nb_classes", "num_class", "label_dim")
_KNOWN = frozenset(
    {*HEADS, *CLASSES, "head_dim", "attention_head_dim", "model", "model_type", "_target_", "latent_norm"}
    | {"latent_multiplier", "vae", "norm_type", "activation_fn", "sample_size"}
    | {"image_size", "resolution", "latent_size", "input_size", "patch_size", "patch_sizes", "in_channels", "channels"}
    | {"hidden_size", "depth", "depth_list", "mlp_ratio", "learn_sigma", "vae_rate", "z_dims", "projector_dim"}
)
"""Arguments that are read, or that shapes show."""
_TRAINING = re.compile(
    r"(.*_)?(lr|learning|batch|seed|epochs?|iters?|steps?|every|interval|num_workers|workers|\w*dir|paths?|folder|root|"
    r"files?|log\w*|wandb|\w*name|tag|eval\w*|fid|samples?|sampling|sampler|cfg|guidance|ema|optim\w*|adam\w*|betas?|"
    r"decay|warmup|grad\w*|clip\w*|precision|fp16|bf16|amp|tf32|device|gpus?|rank|world|dist|nodes?|compile|resume|"
    r"ckpt|checkpoint\w*|save|debug|version|weight|weights|report|project|entity|cache|pin|shuffle|flip|crop|loss|"
    r"p|prob|(?<!token_)drop|dropout|eps|epsilon|time|port|url|max|min|total|amount)(_.*)?"
)
"""Names of what is about training or sampling alone."""
_SWITCH = re.compile(
    r"(^|.*_)(rope|rotary|qk_?norm|norm(alized?)?_?qk|swi_?glu|ge_?glu|rms_?norm|registers?|wo_shift|window_size|"
    r"causal|cosine_att\w*|soft_?cap|logit_?(scale|cap)|self_?cond\w*|parallel_(blocks?|att\w*)|sandwich|post_norm|"
    r"alibi|moe|experts|linear_att\w*|gated_att\w*|kv_heads|value_residual|mean_?flow|layer_?scale|"
    r"(reversed?|flip|invert)_?(t|time))(_.*|$)",
    re.IGNORECASE,
)
"""Parts of a model that change what it computes, and that need not show in its tensors."""
_EXPECTED: tuple[tuple[str, tuple[Any, ...]], ...] = (
    (r"(norm|ln|layer_?norm)_(eps|epsilon)", (1e-6,)),
    (r"(\w+_)?max_period", (10000,)),
    (r"(gelu_)?approx(imat(e|ion))?(_gelu)?|gelu_approx\w*", ("tanh", True)),
)
"""Names of arguments of which only these values are read: no tensor shows them."""
SCALING = re.compile(r"(vae[._])?(scaling|scale|shift)_factor|(vae|latents?)[._](scaling|scale|shift)(_factor)?")
"""Matches arguments that latents are multiplied by, or that are subtracted from them before."""
_SCALE = re.compile(r"(t|time|timesteps?)_(scale|factor|multiplier)")
_LISTED = 6
_OFF = ("", "none", "false", "no", "off")
_WRAPPERS = re.compile(r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_ANCHOR = re.compile(r"(|.*\.)(x_embedder|pos_embed)\.proj\.weight")
_COUNTERS = re.compile(
    r"(?!.*blocks)(.*\.)?(num_batches_tracked|n_averaged|initted|decay|num_updates|(global_)?steps?|epoch)"
)
"""Matches single numbers that wrappers and averages keep beside a model's tensors."""
_OPTIMIZER = re.compile(
    r"(opt|optim|optimi[sz]er|lr|sched|scaler|scheduler|grad|rng|amp|callbacks|loops)\w*", re.IGNORECASE
)
_AVERAGE = re.compile(r"(^|[._])(ema|avg|averaged?|swa|polyak|shadow)", re.IGNORECASE)
_NO_AVERAGE = re.compile(r"(no|non|not|without)[._]?(ema|avg|averaged?|swa)", re.IGNORECASE)
_ELSEWHERE = "only DiT, SiT, REPA, MPDiT and models of their shape are read"
_OTHERS = (
    (
        r".*(lora|\.base_layer\.|modules_to_save\.)",
        "a LoRA",
        "merge it into its model where it was trained, and give that",
    ),
    (r"(mpdit\.)?stages\.\d+\.", "mpdit's own weights", "put the config.json that was written with it beside it"),
    (r"(.*\.)?(encoder|decoder)\.(conv_in|conv_out|mid|mid_block|down|up)\b", "a VAE", "give its folder as --vae"),
    (r"(.*\.)?(Mixed_5b|Conv2d_1a_3x3)\.", "an Inception network", "evaluate takes it, as --inception"),
    (r"(.*\.)?(in_blocks\.0|decoder_pred)\.", "a U-ViT", _ELSEWHERE),
    (r"(.*\.)?s_embedder\.", "a DDT (decoupled encoder and decoder)", _ELSEWHERE),
    (r"(.*\.)?(input_blocks\.0|down_blocks\.0|map_noise|emb_fourier)", "a U-Net", _ELSEWHERE),
    (r"(.*\.)?(joint_blocks|double_blocks|single_transformer_blocks|context_embedder)\.", "an MMDiT", _ELSEWHERE),
    (r"(.*\.)?(caption_projection|t_block|adaln_single|y_embedder\.y_proj)\b", "a PixArt", _ELSEWHERE),
    (r"(.*\.)?(mask_token|side_blocks|en_inblocks)", "a masked transformer (MDT, MaskDiT)", _ELSEWHERE),
    (r"(.*\.)?r_embedder\.", "a model of two times (MeanFlow), which predicts an average velocity", _ELSEWHERE),
    (r"(.*\.)?(cls_token|text_model|visual)\b", "an encoder of images or text", _ELSEWHERE),
    (r"(.*\.)?blocks\.\d+\.mlp\.(w12|w1|w3)\.", "a transformer with SwiGLU (LightningDiT's default)", _ELSEWHERE),
    (r"(.*\.)?blocks\.\d+\.attn\.(q_norm|k_norm)", "a transformer with normalised queries and keys", _ELSEWHERE),
    (r"(.*\.)?blocks\.\d+\.norm\d\.weight", "a transformer with learned norms (RMSNorm)", _ELSEWHERE),
    (r"(.*\.)?(feat_rope|rope)\b", "a transformer with rotary positions", _ELSEWHERE),
    (r"param_groups|exp_avg|optimizer", "an optimiser's state", "give the file with the model"),
    (r"latents(_flip)?$", "latents", "give the folder it lies in"),
)
"""Patterns of the beginning of tensors' names, of what is not read: what it is, and what to do."""


@dataclass(frozen=True)
class FoundModel:
    """Holds the tensors of one model in a checkpoint, by their official names, and what lies beside it."""

    tensors: dict[str, Any]
    weights: str | None
    """"ema" or "model", where the checkpoint has both or says which; None for a state dict alone."""
    arguments: dict[str, Any]
    disputed: dict[str, str]
    """Arguments that are given twice and differently, and therefore not taken."""
    elsewhere: tuple[str, ...]
    """Arguments of other parts, which are not read."""
    step: int | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Identity:
    """Says whose a model is, and what follows."""

    project: Project
    known_by: str | None
    """What in the file showed it; None where nothing did."""
    objective: str | None
    """What it predicts, if not the velocity of a straight path."""
    stated: bool
    """Whether the objective is the file's own statement."""
    against: str | None = None
    """Says what in it contradicts itself, if anything does."""

    def describe(self, convention: Convention | None, objective: str | None) -> str:
        """Say in a line what was concluded from what; convention is the one given, objective the one chosen."""
        means = {"mpdit": ("t = 1 is noise", "v = noise - data"), "sit": ("t = 1 is data", "v = data - noise")}
        of = self.project
        if not self.known_by and not convention:
            return (
                "nothing in it says whose it is: taken to be DiT's, whose weights predict noise and can be fine-tuned, "
                "not sampled; if it was trained to predict a velocity, give --convention sit (t = 1 is data, as in "
                "SiT) or mpdit"
            )
        taken = f"taken to be {of.name}'s ({of.repository}) by {self.known_by}: " if self.known_by else ""
        what = f"it predicts {objective}, so that it can be fine-tuned, not sampled" if objective else ""
        said = f"--convention {convention} was given" if convention and convention != of.convention else ""
        if said and self.known_by and (of.predicts == "velocity" or self.stated):
            said = f"but {said}, against its project's {of.convention}"
        time, velocity = means[convention or of.convention]
        return taken + "; ".join(filter(None, (what, said, time if objective else f"{time} and {velocity}")))


def find_model(checkpoint: Any, which: str, path: object) -> FoundModel:
    """Find the model in what a checkpoint holds, however it is nested and whatever its names begin with.

    Its names begin with what stands before "x_embedder.proj.weight", as "net." in the entry "state_dict"; what begins
    otherwise is not the model's. Raises CheckpointError, naming `path`, for what holds none, or several of which none
    is `which` ("ema" or "model").
    """
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f"{path} holds a {type(checkpoint).__name__}, expected a dict of names to tensors")
    held = list(_leaves(checkpoint))
    found = [(entry, match[1]) for entry, name, _ in held if (match := _ANCHOR.fullmatch(name))]
    if not found:
        _refuse_others((name for _, name, _ in held), path)
        some = ", ".join([name for _, name, value in held if isinstance(value, Tensor)][:3])
        raise CheckpointError(
            f"{path} lacks x_embedder.proj.weight: is this an official MPDiT, DiT or SiT state dict? It "
            + (f"holds {some}" if some else "holds no tensors")
        )
    entry, prefix, weights = _choose(found, which, path)
    others = tuple(p for e, p in found if e == entry and p != prefix and p.startswith(prefix))
    tensors: dict[str, Tensor] = {}
    beside = set()
    for place, name, value in held:
        if not isinstance(value, Tensor) or (not value.ndim and _COUNTERS.fullmatch(name)):
            continue
        if place != entry:
            if not any(place == e and name.startswith(p) for e, p in found):
                beside.add(place.partition(".")[0] or name.partition(".")[0])
        elif not name.startswith(prefix):
            beside.add(name.partition(".")[0])
        elif not name.startswith(others):
            short = name.removeprefix(prefix)
            if short in tensors:
                raise CheckpointError(f"{path} holds {short} twice: save the state dict of one model alone")
            tensors[short] = value
    _refuse_others(tensors, path)
    notes = []
    beside = {name for name in beside if not _OPTIMIZER.fullmatch(name)}
    if beside:
        under = prefix or entry or "no prefix"
        notes.append(f"of its tensors those under {under} are read; left out: {', '.join(sorted(beside))}")
    if weights is None and entry:
        notes.append(f"its weights are those of {entry}, which it doesn't call an average")
    counts = [n.item() if isinstance(n, Tensor) and not n.ndim else n for n in map(checkpoint.get, _STEPS)]
    step = next((count for count in counts if isinstance(count, int)), None)
    said = read_arguments(checkpoint)
    return FoundModel(tensors, weights, said.values, said.disputed, said.elsewhere, step, tuple(notes))


def identify(model: FoundModel) -> Identity:
    """Say whose a model is, by the first row of `PROJECTS` that its tensors, its arguments or its name fit."""
    given, name = model.arguments, model_name(model.arguments)
    shown = []
    for project in PROJECTS:
        tensor = next((n for n in model.tensors if re.match(project.tensors, n)), None)
        own = [n for n, values in project.arguments.items() if n in given and (not values or given[n] in values)]
        if tensor:
            shown.append((project, f"its tensor {tensor}"))
        shown += [(project, f"its {n} {given[n]!r:.40}") for n in own]
        if not tensor and not own and re.match(project.model, name):
            shown.append((project, f"its name {name}"))
    project, known_by = shown[0] if shown else (PROJECTS[-1], None)
    predicts, path, known = objective_of(given)
    what, way = next(iter(predicts), project.predicts), next(iter(path), "")
    if what == "velocity":
        objective = f"a velocity on the {way} path" if way else None
    else:
        objective = f"{what} on the {way} path" if way else what
    against = next(_contradictions(model, shown, predicts, path), None)
    return Identity(project, known_by, objective, bool(predicts or path) and known and not against, against)


def _contradictions(
    model: FoundModel, shown: list[tuple[Project, str]], predicts: dict[str, str], path: dict[str, str]
) -> Iterator[str]:
    """Yield what in a file speaks against what else it says of t and of what is predicted."""
    for name in filter(says_objective, model.disputed):
        yield f"its {name} is {model.disputed[name]}"
    for said in (predicts, path):
        if len(said) > 1:
            yield " against ".join(said.values())
    for other, what in shown[1:]:
        # Models called SiT or DiT are in many projects: their names count only where nothing else does.
        common = what.startswith("its name") and other.model in ("SiT", "DiT")
        if other.convention != shown[0][0].convention and not common:
            yield f"{shown[0][1]} is {shown[0][0].name}'s, {what} is {other.name}'s"
    project = shown[0][0] if shown else PROJECTS[-1]
    if project.predicts != "velocity" and "velocity" in predicts:
        yield f"{predicts['velocity']} is not what {project.name} predicts"


def check_arguments(model: FoundModel, project: Project, velocity: bool) -> list[str]:
    """Refuse a model whose arguments switch on what isn't read here; return notes on those that weren't read.

    A switch need not show in tensors, as rotary positions don't. `velocity` says that the file alone is to show that
    the model predicts one: what may speak against it is then refused. Raises CheckpointError.
    """
    unread = [where for where in model.elsewhere if where.rpartition(".")[2] in _KNOWN - {"vae", "model"}]
    for name, value in model.arguments.items():
        own = name in project.others or value in project.arguments.get(name, ()) or not project.arguments.get(name, "?")
        expected = next((values for names, values in _EXPECTED if re.fullmatch(names, name)), None)
        if expected and value not in expected and not own:
            raise CheckpointError(
                f"its {name} is {value!r:.40}: only models of {expected[0]!r} are read, as DiT, SiT and REPA have it"
            )
        if not value or str(value).lower() in _OFF or re.match("vae|auto_?encoder|first_stage", name):
            continue
        theirs = any(name in other.arguments or name in other.others for other in PROJECTS)
        if _switches(name, True if theirs else value):
            raise CheckpointError(
                f"its {name} is {value!r:.40}: no model with that is read, whatever its tensors; {_ELSEWHERE}"
            )
        doubtful = not (
            own or expected or name in _KNOWN or SCALING.fullmatch(name) or CONSTANTS.fullmatch(name)
        ) and may_be_objective(name, value)
        if doubtful and velocity:
            raise CheckpointError(
                f"its {name} is {value!r:.40}, which may say that it predicts no velocity of a straight path, or at "
                "other times: if it does predict one, give --convention sit if t = 1 is data, mpdit if it is noise"
            )
        objective = says_objective(name) or any(objective_of({name: value})[:2])
        if doubtful or not (
            theirs
            or objective
            or expected
            or name in _KNOWN
            or _TRAINING.fullmatch(name)
            or SCALING.fullmatch(name)
            or CONSTANTS.fullmatch(name)
        ):
            unread.append(name)
    both = [name for name in model.disputed if name in _KNOWN or "drop" in name or "uncond" in name]
    notes = [f"its {name} is {model.disputed[name]}: neither is taken" for name in both]
    if unread:
        more = f" and {len(unread) - _LISTED} more" if len(unread) > _LISTED else ""
        notes.append(f"of its arguments these were not read, and may matter: {', '.join(unread[:_LISTED])}{more}")
    return notes


def _switches(name: str, value: Any) -> bool:
    """Tell whether an argument changes what a model computes: by its name, or by the kind of part it names."""
    if _SCALE.fullmatch(name):
        return isinstance(value, bool) or value != 1
    if _SWITCH.fullmatch(name):
        return True
    if not isinstance(value, str) or _TRAINING.fullmatch(name):
        return False
    other_position = name.startswith("pos") and "sin" not in value.lower()
    return bool(other_position or _SWITCH.fullmatch(re.sub(r"\W", "_", value)))


def model_name(arguments: Mapping[str, Any]) -> str:
    """Return the name a model has in a project's own table, such as "SiT-XL/2"; "" without one."""
    return next((v for n in ("model", "model_type") if isinstance(v := arguments.get(n), str)), "")


def _leaves(held: Mapping[Any, Any], entry: str = "", depth: int = 3) -> Iterator[tuple[str, str, Any]]:
    """Yield the entry, name and value of all that is in nested dicts, names without what wrappers put before them."""
    for key, value in held.items():
        if isinstance(value, Mapping) and depth:
            yield from _leaves(value, f"{entry}.{key}" if entry else str(key), depth - 1)
        else:
            yield entry, _WRAPPERS.sub("", str(key)), value


def _choose(found: list[tuple[str, str]], which: str, path: object) -> tuple[str, str, str | None]:
    """Return entry and prefix of the model asked for, and what its file calls it: "ema", "model" or None."""
    named = [(e, p, _label(f"{e}.{p}")) for e, p in found]
    if [label for _, _, label in named].count("ema") > 1 and any(_label(p) == "ema" for _, p in found):
        named = [(e, p, _label(p)) for e, p in found]  # ema_pytorch's "ema" holds online_model and ema_model
    asked = [model for model in named if model[2] == which]
    if len(asked) == 1:
        entry, prefix, label = asked[0]
        return entry, prefix, label if entry == label or label == "ema" or len(named) > 1 else None
    if len(named) == 1 and named[0][2] == "model" and named[0][0] != "model":
        return named[0][0], named[0][1], None
    held = ", ".join(f"{e}.{p}".strip(".") or "a state dict" for e, p, _ in named)
    if asked:
        raise CheckpointError(f"{path} holds several models ({held}): save the state dict of one alone")
    raise CheckpointError(f"{path} has no entry {which!r}: it holds {held}; ask for that, or give another file")


def _label(place: str) -> str:
    return "ema" if _AVERAGE.search(_NO_AVERAGE.sub("", place)) else "model"


def _refuse_others(names: Iterable[str], path: object) -> None:
    names = list(names)
    for pattern, what, remedy in _OTHERS:
        if name := next((name for name in names if re.match(pattern, name)), None):
            raise CheckpointError(f"{path} holds {what} ({name}), no model that is read here: {remedy}")
