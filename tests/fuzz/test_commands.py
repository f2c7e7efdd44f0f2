"""Command lines of `mpdit`, right and wrong: each is refused in one line, with nothing written, or works."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

import fuzz_places
from fuzzing import ARGUMENT, command, contents, examples, folder_of, fuzzed, mostly
from hypothesis import example, given
from hypothesis import strategies as st

import mpdit.report.plots  # noqa: F401 (matplotlib writes into the user's caches as it is imported)
from mpdit import cli

os.environ["HF_HUB_OFFLINE"] = "1"  # a name may be taken for a hub's, and no case is to leave this machine

PLACES = st.sampled_from(
    [
        *("packed", "pairs", "edm2", "zip/latents.zip", "lightning/x", "run", "run/ema", "run/ema/model.safetensors"),
        *(
            "official/whole.pt",
            "official/bare.pt",
            "samples",
            "samples/samples.npz",
            "reference/reference.npz",
            "images",
        ),
        *(
            "results.json",
            "trace.json",
            "PAGE.md",
            "empty",
            "file",
            "full",
            "nowhere",
            "file/x",
            "new/deep",
            "new.pt",
        ),
        *("new.npz", ".", "..", "/", "/dev/null", "/proc/self/mem", "packed/manifest.json", ""),
    ]
)
FEW = st.sampled_from(["1", "2", "3"])
"""Of what takes time: images, steps, processes."""
NUMBERS = st.sampled_from(
    [
        "0",
        "1",
        "2",
        "8",
        "1.5",
        "-1",
        "1e-30",
        "1e30",
        "1e400",
        "1000000",
        "4611686018427387904",
        "1" * 30,
        "nan",
        "inf",
    ]
)
_TIMELY = {"num", "steps", "batch", "workers", "part_images", "decode_batch"}
MODELS = st.sampled_from(["MPDiT-XL/4-2", "MPDiT-Digits/4-2", "DiT-B/2", "mpdit", ""])
OVERRIDES = st.builds(
    "{}={}".format,
    st.sampled_from(
        ["width", "stages", "heads", "class_tokens", "mlp_ratio", "skip", "transition", "input_size", "x", ""]
    ),
    st.sampled_from(
        ["64", "0", "-4", "true", "null", '"a"', "[[4,1],[2,1]]", "[[4]]", "[]", "{}", "NaN", "1e400", "[[2,1e9]]"]
    )
    | NUMBERS
    | ARGUMENT,
)


def _values(action: argparse.Action) -> st.SearchStrategy[str]:
    """What may stand for an argument: mostly of its kind."""
    if action.dest == "override":
        return OVERRIDES
    if action.dest == "model":
        return mostly(MODELS, ARGUMENT)
    if action.choices:
        return mostly(st.sampled_from([*map(str, action.choices)]), ARGUMENT)
    if action.dest in _TIMELY:
        return mostly(FEW, st.sampled_from(["0", "-1", "1.5", "", "x", "1e3", "1" * 5000]))
    if action.type is not None and action.type.__name__ in ("parse", "number"):
        return mostly(NUMBERS, ARGUMENT)
    return mostly(PLACES, ARGUMENT)


_SOUND = [
    *(["verify", data] for data in ("packed", "pairs", "edm2", "zip/latents.zip", "lightning/x")),
    *(["convert", data, "new"] for data in ("packed", "pairs", "edm2", "lightning/x", "official/whole.pt")),
    ["convert", "official/bare.pt", "new/deep", "--num-heads", "2"],
    *(["convert", "run", "new", "--to", to] for to in ("official", "weights")),
    ["convert", "run", "new.pt", "--to", "official"],
    ["account", "MPDiT-Digits/4-2"],
    ["plan", "MPDiT-XL/4-2", "--gpu", "h100"],
    [
        "plan",
        "DiT-B/2",
        "--gpu",
        "mine",
        "--gpu-memory",
        "8",
        "--gpu-tflops",
        "8",
        "--gpu-bandwidth",
        "8",
        "--gpu-link",
        "8",
    ],
    *(
        ["sample", place, "--out", "new", "--num", "2", "--steps", "2"]
        for place in ("run", "run/ema/model.safetensors")
    ),
    ["extract", "images", "new", "--vae", "nowhere"],
    ["evaluate", "samples", "--reference", "reference/reference.npz"],
    ["evaluate", "images", "--reference", "samples"],
    ["evaluate", "run"],
    ["evaluate", "samples", "--write-reference", "new.npz"],
    ["report", "results.json"],
    ["report", "results.json", "--out", "new"],
    ["report", "--compare", "results.json", "results.json", "--fail-on-regression"],
    ["report", "--trace", "trace.json"],
    ["report", "results.json", "--update", "PAGE.md"],
]


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A command line that means something, with a few more options and a few things wrong."""
    line = [*draw(st.sampled_from(_SOUND))]
    parser = cli.build_parser()._subparsers._group_actions[0].choices[line[0]]  # type: ignore[union-attr,index]
    # More than one process takes half a minute to start.
    options = [a for a in parser._actions if a.option_strings and a.dest not in ("help", "gpus")]
    for action in draw(st.lists(st.sampled_from(options), max_size=2)):
        line.append(draw(st.sampled_from(action.option_strings)))
        count = action.nargs if isinstance(action.nargs, int) else 1 if action.nargs in (None, "?") else 2
        values = [draw(_values(action)) for _ in range(count)]
        if count == 1 and draw(st.booleans()):
            line[-1] += f"={values[0]}"
        else:
            line += values
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 1, 2]))):
        at = draw(st.integers(1, len(line)))
        change = draw(st.sampled_from(["place", "place", "argument", "number", "insert", "remove", "again"]))
        new = draw({"place": PLACES, "number": NUMBERS}.get(change, ARGUMENT))
        line[at : at + (change != "insert")] = {"remove": [], "again": line[at : at + 1] * 2}.get(change, [new])
    return _offline(line)


def _offline(line: list[str]) -> list[str]:
    """Name a file of Inception's weights: without one they would be downloaded."""
    return [*line, "--inception", "file"] if line[0] == "evaluate" else line


WRONG = (
    "verify pairs --normalization auto --num-classes 8",
    "verify nowhere --json",
    "convert packed new --num-classes=8 --convention=sit",
    "convert run full --to official",
    "convert official/bare.pt new --num-heads 0",
    "convert run new --to diffusers --vae nowhere",
    "account MPDiT-Digits/4-2 --override width=0 --json",
    "account mpdit",
    "account MPDiT-Digits/4-2 --override stages=[[4,1],[2,1]] --json",
    "plan packed/manifest.json --gpu h100 --epochs 111111111111111111111111111111",
    "plan MPDiT-XL/4-2 --gpu h100 --json",
    "sample inf --out new --num 2 --steps 2",
    "sample run --out full --num 1 --steps 1",
    "sample run --out new --num 2 --steps 1 --guidance nan",
    "sample run --out new --num 2 --steps 1 --format png --json",
    "sample run --out new --num 2 --steps 1 --classes 7",
    "extract nowhere new --vae nowhere",
    "report results.json --update --update PAGE.md",
    "report results.json --out new --json --json",
    "report PAGE.md",
    "report --trace results.json",
    "report --compare results.json nowhere",
    "nothing",
    "sample --help",
)


@fuzzed(nightly=1500)
@given(line=command_lines())
@examples("line", map(_offline, _SOUND))
@examples("line", map(str.split, WRONG))
@example(line=["verify", "edm2", "--data-scale", ""])
@example(line=["verify", "pairs", "--num-classes", "", "--num-classes", ""])
@example(line=["plan", "MPDiT-XL/4-2", "--gpu", "1e-30", "--gpu-memory=1000000", "--gpu-memory", "\udcff"])
@example(line=["convert", "\U000514f1\U0006887e", "new"])
@example(line=["convert", "packed", "\udcff"])
@example(line=["convert", "~/packed", "$HOME/new"])
@example(line=["verify", "$NOWHERE/packed"])
@example(line=["sample", "run", "--out", "samples", "--num", "2", "--steps", "2"])
@example(line=["report", "results.json", "--update", "zip/latents.zip"])
@example(line=["sample", "run", "--out", "new", "--steps", "4611686018427387904"])
@example(line=["verify", "pairs", "--num-classes", "4611686018427387904"])
@example(line=["sample", "run", "--out=--"])
@example(line=["verify", "\x1b[31m" + 5000 * "x"])
def test_every_command_line_is_refused_or_works(line: list[str]) -> None:
    with folder_of(fuzz_places.everything()) as folder:
        before = contents(folder)
        verdict = command(line, folder)
        if line[0] in ("verify", "account", "plan"):
            assert contents(folder) == before  # these only look
        elif verdict.refusal is None:
            after = contents(folder)
            assert all(after[name] == before[name] for name in before if name != "PAGE.md")  # nothing is overwritten
        if verdict.refusal is None and "--json" in line and "--help" not in line:
            json.loads(verdict.value, parse_constant=_no_constant)


def _no_constant(name: str) -> Any:
    raise AssertionError(f"{name} is no JSON")
