"""Reads what a file says of its model: the arguments of the script that made it, or a nested configuration.

Only what is said of the model and its training counts; what else a configuration describes, as an encoder or a teacher,
has the same names. What is predicted on which path is read by many names and words (`objective_of`).
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_HOLDS = (
    "args?|kwargs|config(uration)?|cfg|hyper_?param(eter)?s|h?params?|parameters|options?|opts|settings|flags|"
    "meta(data)?"
)
_MODEL = (
    "model|net(work)?|transformer|denoiser|backbone|dit|sit|generator|diffusion|flow|transport|interpolant|"
    "data(set|module)?|train(ing|er)?|conditioning|experiment|run|common|general|main|loss|objective|init"
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
"""What a model predicts by the words it is called by, without signs between letters."""
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
_OTHER_USE = re.compile(r".*(sampl|solver|eval|name|dir|folder|file|tag|lr|optim|log|ckpt|checkpoint).*")


@dataclass(frozen=True)
class Arguments:
    """Holds what a file says of its model."""

    values: dict[str, Any]
    """By name; of a VAE by "vae." and the name."""
    disputed: dict[str, str]
    """What is said twice and differently, by name: both."""
    elsewhere: tuple[str, ...]
    """Where other parts are described, which were not read."""


def read_arguments(checkpoint: Mapping[Any, Any]) -> Arguments:
    """Read the arguments in a checkpoint's entries, and beside them."""
    seen: dict[str, dict[str, Any]] = {}
    elsewhere: list[str] = []
    for place, name, value in _walk(checkpoint):
        where = ".".join((*place, name))
        if name in ("type", "name", "kind") and place and says_objective(place[-1]):
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
    if word in _ANYWHERE and not _OTHER_USE.fullmatch(name):
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
        elif isinstance(value, str) and value.isdecimal():
            yield (*place, *more), name, int(value)
        elif isinstance(value, str) and re.fullmatch(r"\d*\.\d+", value):
            yield (*place, *more), name, float(value)
        elif isinstance(value, str | int | float) or (_ENTRY.fullmatch(name) and isinstance(value, list) and not place):
            yield (*place, *more), name, value
