"""Reads what a file says of its model: the arguments of the script that made it, or a nested configuration.

Only what is said of the model and its training counts; what else a configuration describes, as an encoder or a teacher,
has the same names. What is predicted on which path is read by many names and words (`objective_of`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_HOLDS = (
    "args?|kwargs|config(uration)?|cfg|hyper_?param(eter)?s|h?params?|parameters|options?|opts|settings|flags|"
    "meta(data)?"
)
_MODEL = (
    "model|net(work)?|transformer|denoiser|backbone|dit|sit|generator|diffusion|flow|transport|interpolant|"
    "sde|process|precond\\w*|prediction|time|data(set|module)?|train(ing|er)?|conditioning|experiment|run|common|general|main|loss|objective|init"
)
_SECTION = re.compile(rf"(({_MODEL})(_({_HOLDS}|model|module|net(work)?))*|({_HOLDS})(_({_HOLDS}))*)", re.IGNORECASE)
"""Sections of a configuration that speak of the model and its training."""
_ENTRY = re.compile(rf".*?({_HOLDS})", re.IGNORECASE)
_VAE = re.compile(r"(vae|auto_?encoder|first_stage|tokenizer).*", re.IGNORECASE)


def _by_word(words: Mapping[str, str]) -> dict[str, str]:
    return {word: what for what, some in words.items() for word in some.split()}


_WORDS = _by_word(
    {
        "velocity": "v velocity vel flow flowmatching rectifiedflow vectorfield drift u",
        "noise": "noise eps epsilon n",
        "data": "x x0 x1 xstart startx xzero sample data image clean",
        "score": "score",
    }
)
"""Maps to what a model predicts the words it is called by, without signs between letters."""
_STRAIGHT = _by_word(
    {"straight": "linear straight ot condot optimaltransport icfm rectified rectifiedflow rf flow fm flowmatching lerp"}
)
_CURVED = _by_word(
    {
        "curved": "vp gvp ve vpsde vesde subvp cosine trig trigflow ddpm iddpm ddim edm gaussian",
        "of two times": "shortcut consistency",
    }
)
_ANYWHERE = (_CURVED.keys() - {"cosine", "gaussian"}) | {"eps", "epsilon", "x0", "xstart", "vprediction", "predv"}
"""Words that are about the objective whatever the argument is called."""
_PREDICTS = re.compile(
    r"(model_|train(ing)?_|net_|diffusion_|loss_)?(pred(ict(s|ion)?)?|objective|target|parameteri[sz]ation|"
    r"parametri[sz]ation|mean_type)(_type|_target|_mode|_mean_type|_objective)?"
)
_PATH = re.compile(
    r"(path|interpolant|interpolation|transport|process|diffusion|flow|sde|probability_path)(_type|_name|_kind|_path)?|"
    r"(noise|beta|diffusion|train)_?(schedule|scheduler)(_type|_name)?"
)
_FLAG = re.compile(r"(?:use_)?(?:predicts?|pred|learn)_?(\w+)|(?:use_)?(\w+?)_?(?:pred|prediction|param)")
_BETAS = re.compile(r"diffusion_steps|timestep_respacing|beta_(start|end|min|max)")
"""Matches arguments that only diffusion over steps of noise has."""
_OTHER_USE = re.compile(
    r"(.*_)?(sampl\w*|\w*solver|eval\w*|\w*name|\w*dir|folder|\w*file|tag|lr|optim\w*|logg\w*|ckpt|checkpoint\w*|\w*seed)(_.*)?"
)
_KINDS = ("type", "name", "kind", "_target_", "_class_name", "class_path")
"""Names by which a section says what it is of."""
_CLASS = re.compile(r"\.|[A-Z]\w*[a-z]\w*[A-Z]")
_KNOWN_WORDS = _WORDS.keys() | _STRAIGHT.keys() | _CURVED.keys()
_TIME = r"(t|t0|t1|\w*times?|\w*timesteps?|timescale)"
_UNCLEAR = re.compile(
    rf"(.*_)?({_TIME}|direction|revers\w*|swap\w*|convention|sigmas?|nois\w+|objective|regress\w*|xstart|diffusion|"
    r"backwards?|precond\w*|\w*snr|sign|negat\w*|dt|c_(skip|in|out)|"
    r"distill\w*|mg)(_.*)?|[Pp]_(mean|std)"
)
"""Names about what is predicted, at which times, or what a model was distilled to."""
_UNCLEAR_WORD = re.compile(r"(.*_)?(score|pred|predicts?|prediction|target|x0|betas?)(_.*)?")
"""The same where they have words or a switch, and no number, as a value."""
_SCALED = re.compile(
    r"(.*_)?(x|z|inputs?|out(puts?)?|data|prior|latents?)_(\w*scale|std|mult\w*|factor)|(re)?scale_(x|inputs?|data|latents?)"
)
_GUIDED = re.compile(r"(.*_)?(guidance|guided?|cfg)(_.*)?|w_(emb|cond)\w*")
_GUIDES = re.compile(
    r"((use|using|do|with|enable|train|eval|p|prob|\w*drop\w*|cf|(classifier|class)_free|null)_)*(cfg|guidance)(_(scales?|"
    r"interval|start|end|low|high|min|max|weight|strength|rescale|channels|probs?|p|rate|ratio|\w*drop\w*|uncond\w*|w|t|"
    r"schedule))*|use_cfg_embedding"
)
"""Matches how samples are guided and classes dropped, on which nothing else in a model depends."""
_CLOCK = re.compile(
    r"(.*_)?(timeout|datetime|walltime|runtime)(_.*)?|(max|start|end|total|train(ing)?|wall|run|save)_time|"
    r"time_(limit|budget|out|stamp|zone)|T_(max|mult|0|i|warmup)|pred(ict)?_sigma|target_modules|(min_)?snr_(gamma|weight\w*)|"
    rf"{_TIME}_((emb\w*_)?(dim|size|width|channels|hidden\w*)|dist\w*|weight\w*|shift)"
)
"""Matches names of words of `_UNCLEAR` that say nothing of what is predicted, or what shapes show."""
CONSTANTS = re.compile(r"(vae[._])?latents?[._](mean|std|bias|scale|shift)s?")
"""Matches arguments that give constants of latents by channel, or as projects of their own understand them."""
_PLAIN_LOSS = re.compile(
    r"mse|l[12]|smooth|(pseudo)?huber|charbonnier|mean|squared|error|ma?e|rmse|lpips|cosine|uniform|log(it|norm(al)?)|"
    r"normal|adaptive|weighted|min|snr|flow|matching|velocity|v|loss|default"
)
_LEARNING_RATE = re.compile(
    r"(?!.*(flow|euler|solver|unipc|heun)).*(cos(ine)?|linear|constant|step|lr|warmup|plateau|poly|cycle|exp|wsd|sqrt)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Arguments:
    """Holds what a file says of its model."""

    values: dict[str, Any]
    """By name; of a VAE by "vae." and the name."""
    disputed: dict[str, str]
    """Holds by name what is said twice and differently: both."""
    elsewhere: tuple[str, ...]
    """Names where other parts are described, which were not read."""


def read_arguments(checkpoint: Mapping[Any, Any]) -> Arguments:
    """Read the arguments in a checkpoint's entries, and beside them."""
    seen: dict[str, dict[str, Any]] = {}
    elsewhere: list[str] = []
    for place, name, value in _walk(checkpoint):
        where = ".".join((*place, name))
        if name == "target" and isinstance(value, str) and _CLASS.search(value) and _word(value) not in _KNOWN_WORDS:
            name = "_target_"  # of what is to be built
        if name in _KINDS and place and (says_objective(place[-1]) or place[-1] == "scheduler"):
            place, name = place[:-1], place[-1]
        if any(_VAE.fullmatch(part) for part in place):
            name = f"vae.{name}"
        elif not all(_SECTION.fullmatch(part) for part in place):
            stated = says_objective(name) and _reads(name, value)
            if not stated or not stated[2] or any(_OTHER_USE.fullmatch(part) for part in place):
                elsewhere.append(where)
                continue
        seen.setdefault(name, {})[where] = value
    disputed = {
        name: " and ".join(f"{value!r:.40} ({where})" for where, value in said.items())
        for name, said in seen.items()
        if any(value != next(iter(said.values())) for value in said.values())
    }
    values = {name: next(iter(said.values())) for name, said in seen.items() if name not in disputed}
    return Arguments(values, disputed, tuple(elsewhere))


def says_objective(name: str) -> bool:
    """Tell names of arguments that say what is predicted, or on which path."""
    return bool(_PREDICTS.fullmatch(name) or _PATH.fullmatch(name))


def may_be_objective(name: str, value: Any) -> bool:
    """Tell arguments that may bear on what is predicted, at which times, scaled or guided how, and aren't read."""
    if _reads(name, value) or name == "_target_" or _CLOCK.fullmatch(name) or _OTHER_USE.fullmatch(name):
        return False
    lower, text, neutral = name.lower(), isinstance(value, str), type(value) in (int, float) and value == 1
    words = re.findall(r"[a-z]+\d*", re.sub(r"([a-z])([A-Z])", r"\1 \2", value).lower()) if text else []
    if text and re.search(r"[/\\]|\.(ya?ml|json|py|pt|npz)$", value):
        return False
    if re.fullmatch(r"(train_|diffusion_)?loss(_(type|fn|func|function|kind))?", lower):
        return not all(map(_PLAIN_LOSS.fullmatch, words))
    if re.fullmatch(r"(train_)?scheduler(_type)?", lower):
        return not (text and _LEARNING_RATE.match(value))
    if text and ((words in (["noise"], ["score"])) or ("loss" in lower and {*words} & {"noise", "eps", "score", "x0"})):
        return True
    if not text and (_GUIDED.fullmatch(lower) or re.fullmatch(r"(.*_)?path", lower)):
        return not _GUIDES.fullmatch(lower)
    about = (
        _UNCLEAR.fullmatch(lower)
        or says_objective(name)
        or (type(value) in (str, bool) and _UNCLEAR_WORD.fullmatch(lower))
    )
    return (
        not neutral
        if _SCALED.fullmatch(lower) or (about and re.search("scale|mult|factor|std", lower))
        else bool(about)
    )


def objective_of(values: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str], bool]:
    """Return what the arguments say is predicted, on which paths, each with what said it, and whether in known words.

    A straight path is "". Two of either contradict one another.
    """
    found: dict[str, dict[str, str]] = {"predicts": {}, "path": {}}
    known = True
    for name, value in values.items():
        if stated := _reads(name, value):
            kind, what, sure = stated
            found[kind].setdefault(what, f"its {name} {value!r:.40}")
            known = known and sure
    return found["predicts"], found["path"], known


def _reads(name: str, value: Any) -> tuple[str, str, bool] | None:
    """Return ("predicts" or "path", what, whether the word is known) of an argument that says it; else None."""
    if value is True and (short := _word(name).removeprefix("use").removeprefix("is")) in _CURVED.keys() - {"cosine"}:
        return "path", short, True
    if value is True and _word(name).removeprefix("use") in ("flowmatching", "rectifiedflow", "rf", "reflow"):
        return "path", "", True
    if value is True and (flag := _FLAG.fullmatch(name)):
        word = _word(flag[1] or flag[2])
        # diffusers' v_prediction is Salimans and Ho's v, on another path than the straight one.
        what = name if word == "v" else _WORDS.get(word)
        return ("predicts", what, word != "v") if what else None
    if value and isinstance(value, int | float) and _BETAS.fullmatch(name):
        return "path", "diffusion", False
    if value is False and _word(name).removeprefix("use") in ("flowmatching", "rectifiedflow"):
        return "path", "diffusion", True
    if not isinstance(value, str):
        return None
    word = _word(value)
    if _PREDICTS.fullmatch(name) or _PATH.fullmatch(name) or "scheduler" in name:
        # Names of classes: DDPMScheduler, GaussianDiffusion, VPPath.
        parts = re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+", value.rpartition(".")[2])
        kinds = _CURVED.keys() - ({"cosine"} if "scheduler" in name else set())
        word = next((part.lower() for part in parts if len(parts) > 1 and part.lower() in kinds), word)
    short = re.sub(r"^pred(ict)?|pred(iction)?$", "", word)
    what = _WORDS.get(word) or (_WORDS.get(short) if short != "v" else None)
    if _PREDICTS.fullmatch(name):
        if what:
            return "predicts", what, True
        if word in _CURVED or word in _STRAIGHT:
            return "path", "" if word in _STRAIGHT else value, True
        return None if re.search(r"[/.]|^$", value) else ("predicts", value, False)
    if _PATH.fullmatch(name):
        schedule = "schedule" in name  # of noise: its "linear" are DDPM's betas
        if word in _STRAIGHT and not (schedule and word == "linear"):
            return "path", "", True
        if word in _CURVED or schedule:
            return "path", value, word in _CURVED or schedule
        return None if name == "path" or re.search(r"[/.]|^$", value) else ("path", value, False)
    if (word in _ANYWHERE or (what and short != word)) and not _OTHER_USE.fullmatch(name):
        return ("path", value, True) if word in _CURVED else ("predicts", what or value, bool(what))
    return None


def _word(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower().rpartition(".")[2])


def _walk(held: Any, place: tuple[str, ...] = (), depth: int = 5) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    """Yield place, name and value of what is said in nested configurations; tensors' dicts are passed over."""
    held = vars(held) if isinstance(held, argparse.Namespace) else held
    for key, value in held.items() if isinstance(held, Mapping) else ():
        *more, name = re.split(r"[./]", str(key).replace("-", "_"))
        if isinstance(value, Mapping | argparse.Namespace):
            if depth and (place or _ENTRY.fullmatch(name)):
                yield from _walk(value, (*place, *more, name), depth - 1)
        elif isinstance(value, str) and value.startswith("{") and _ENTRY.fullmatch(name) and depth:
            with contextlib.suppress(ValueError, RecursionError):
                yield from _walk({name: json.loads(value)}, (*place, *more), depth - 1)
        elif isinstance(value, str) and value.isdecimal():
            yield (*place, *more), name, int(value)
        elif isinstance(value, str) and re.fullmatch(r"\d*\.\d+", value):
            yield (*place, *more), name, float(value)
        elif isinstance(value, list | tuple | Tensor) and CONSTANTS.fullmatch(name):
            yield (*place, *more), name, value.tolist() if isinstance(value, Tensor) else list(value)
        elif isinstance(value, str | int | float) or (_ENTRY.fullmatch(name) and isinstance(value, list) and not place):
            yield (*place, *more), name, value
