"""Damaged and hostile weights, ours and the official codes' checkpoints: refused, or the same bit for bit."""

from __future__ import annotations

import argparse
import functools
import io
import json
import math
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import fuzz_places
import pytest
import torch
from fuzzing import (
    JSON,
    Edit,
    Files,
    command,
    damaged_json,
    each_damaged_json,
    each_edit,
    edited,
    edits,
    examples,
    folder_of,
    fuzzed,
    judge,
    mostly,
)
from hypothesis import example, given
from hypothesis import strategies as st

import mpdit
from mpdit.core.zips import is_zip
from mpdit.interop.official import read_official
from mpdit.model.mpdit import load_weights

Weights = tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, Any]]


def _loaded(model: mpdit.MPDiT, metadata: dict[str, Any]) -> Weights:
    return model.state_dict(), model.config.to_dict(), metadata


def _same_tensors(ours: Weights, theirs: Weights) -> bool:
    return ours[0].keys() == theirs[0].keys() and all(
        value.dtype == theirs[0][name].dtype and torch.equal(value, theirs[0][name]) for name, value in ours[0].items()
    )


@functools.cache
def _sound() -> Weights:
    with folder_of(fuzz_places.weights()) as folder:
        return _loaded(*load_weights(folder))


def _check_folder(files: Files) -> None:
    with folder_of(files) as folder:
        loaded = judge(lambda: _loaded(*load_weights(folder)), folder)
        if loaded.refusal is not None:
            return
        assert _same_tensors(loaded.value, _sound()), "other weights, and nobody noticed"
        json.dumps(loaded.value[2])
        drawn = command(["sample", ".", "--out", "new", "--num", "1", "--steps", "1", "--json"], folder)
        converted = command(["convert", ".", "../made", "--to", "official"], folder)
        assert (drawn.refusal, converted.refusal) != (None, "")


@fuzzed(nightly=1000)
@given(changes=edits(fuzz_places.weights()))
@examples("changes", each_edit(fuzz_places.weights(), flips=4))
@example(changes=[Edit("copy", "config.json", other="model.safetensors")])
@example(changes=[Edit("copy", "config.json", other="config.json")])
@example(changes=[Edit("flip", "model.safetensors", 20_000)])
def test_damaged_weights_are_refused_or_the_same(changes: list[Edit]) -> None:
    _check_folder(edited(fuzz_places.weights(), changes))


CONFIG = json.loads(fuzz_places.weights()["config.json"] or b"")


@fuzzed(nightly=1000)
@given(text=damaged_json(CONFIG))
@examples("text", each_damaged_json(CONFIG))
@example(text=json.dumps(CONFIG | {"training": [1]}))
@example(text=json.dumps(CONFIG | {"model": CONFIG["model"] | {"stages": [[4, 10**9]]}}))
@example(text=json.dumps(CONFIG | {"model": CONFIG["model"] | {"width": 2**40}}))
@example(text="[" * 3000)
def test_damaged_descriptions_of_weights_are_refused_or_fit(text: str) -> None:
    _check_folder({**fuzz_places.weights(), "config.json": text.encode("utf-8", "surrogatepass")})


# Official checkpoints


@functools.cache
def _sound_official(name: str) -> Weights:
    with folder_of(fuzz_places.official()) as folder:
        return _loaded(*read_official(folder / name, num_heads=2))


@fuzzed(nightly=1500)
@given(changes=edits(fuzz_places.official()), name=st.sampled_from(["whole.pt", "bare.pt"]))
@examples("changes", each_edit(fuzz_places.official(), "whole.pt", flips=8), name="whole.pt")
@examples("changes", each_edit(fuzz_places.official(), "bare.pt", flips=4), name="bare.pt")
@example(changes=[Edit("flip", "whole.pt", 36980, b"\0\0\2")], name="whole.pt")  # of a zip over several disks
@example(changes=[Edit("flip", "bare.pt", 20_000)], name="bare.pt")
def test_damaged_checkpoints_are_refused_or_the_same(changes: list[Edit], name: str) -> None:
    with folder_of(edited(fuzz_places.official(), changes)) as folder:
        # Of a file that is no zip torch reads a length and makes room for it, up to 4 GB.
        greedy = not is_zip(name) if Path(name).is_file() else False
        loaded = judge(lambda: _loaded(*read_official(folder / name, num_heads=2)), folder, greedy=greedy)
        converted = command(["convert", name, "new", "--num-heads", "2"], folder)
        assert (loaded.refusal is None) == (converted.refusal is None), (loaded, converted)
        swapped = any(change.kind == "copy" for change in changes)  # for another whole file
        assert loaded.refusal is not None or swapped or _same_tensors(loaded.value, _sound_official(name))


class _Calls:
    """Pickled as a call of a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.reduced = function, args

    def __reduce__(self) -> tuple[Any, Any]:
        return self.reduced


_HOSTILE = {
    "system": _Calls(os.system, "touch pwned"),
    "eval": _Calls(eval, "open('pwned', 'w')"),
    "exec": _Calls(exec, "import os; os.mkdir('pwned')"),
    "getattr": _Calls(getattr, argparse.Namespace, "__init__"),
    "bytes": _Calls(bytearray, 1 << 40),
    "empty": _Calls(torch.empty, 1 << 40),
    "load": _Calls(torch.load, "whole.pt"),
    "open": _Calls(open, "pwned", "w"),
}


def _reachable(state: dict[str, Any], place: str, value: Any) -> Any:
    """A checkpoint with a value of its own in one place."""
    if place == "root":
        return value
    if place == "args":
        return {"model": state, "ema": state, "args": value}
    if place == "namespace":
        return {"ema": state, "args": argparse.Namespace(model=value, num_heads=2)}
    if place == "entry":
        return {"ema": value}
    if place == "mpdit":
        return {"ema": state, "mpdit": value}
    if place == "name":
        return {**state, value: torch.zeros(1)} if isinstance(value, str | int | float | tuple) else value
    return {**state, place: value}


@fuzzed(nightly=800)
@given(
    value=st.sampled_from([*_HOSTILE]).map(_HOSTILE.__getitem__) | JSON,
    place=st.sampled_from(
        ["root", "args", "namespace", "entry", "mpdit", "name", "x_embedder.proj.weight", "pos_embed"]
    ),
    zipped=st.booleans(),
    protocol=st.integers(2, 5),
)
@examples("value", _HOSTILE.values(), place="args", zipped=True, protocol=2)
@examples("place", ["root", "namespace", "entry", "name", "pos_embed"], value=_HOSTILE["eval"], zipped=True, protocol=2)
@examples("protocol", [2, 3, 4, 5], value=_HOSTILE["exec"], place="root", zipped=False)
@examples(
    "place", ["root", "args", "namespace", "entry", "mpdit", "name", "pos_embed"], value=[], zipped=True, protocol=2
)
@examples("place", ["root", "namespace", "entry", "mpdit", "name"], value={"": {}}, zipped=True, protocol=4)
def test_hostile_pickles_are_refused_and_never_run(value: Any, place: str, zipped: bool, protocol: int) -> None:
    state = mpdit.to_official(fuzz_places.small_model())
    stream = io.BytesIO()
    try:
        torch.save(
            _reachable(dict(state), place, value),
            stream,
            pickle_protocol=protocol,
            _use_new_zipfile_serialization=zipped,
        )
    except (UnicodeEncodeError, OverflowError, TypeError):  # what can't be written needs not be read
        return
    with folder_of({"x.pt": stream.getvalue()}) as folder:
        hostile = isinstance(value, _Calls)
        loaded = judge(lambda: read_official(folder / "x.pt", num_heads=2), folder, greedy=hostile)
        converted = command(["convert", "x.pt", "new", "--num-heads", "2"], folder)
        assert not hostile or (loaded.refusal and converted.refusal)
        assert not (folder / "pwned").exists()


SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 8, 16, 32, 1024, 2**20, 2**40]), max_size=5)
STATE = sorted(mpdit.to_official(fuzz_places.small_model()))


@fuzzed(nightly=1500)
@given(
    changes=st.dictionaries(
        mostly(st.sampled_from(STATE), st.text(max_size=8)),
        st.tuples(
            SHAPES,
            st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64]),
        )
        | st.sampled_from(["remove", "sparse", "quantized", "meta", "view"]),
        min_size=1,
        max_size=3,
    ),
    heads=st.sampled_from([1, 2, 3, 8, 10**9, 2**64]),
)
@examples(
    "changes", [{"x_embedder.proj.weight": how} for how in ("remove", "sparse", "quantized", "meta", "view")], heads=2
)
@examples("changes", [{name: "remove"} for name in STATE[::3]], heads=2)
@examples("changes", [{"0": ([], torch.float32)}, {"pos_embed_downsampled": ([], torch.bool)}], heads=1)
@example(changes={"time_modulation.1.bias": ([0, 16], torch.float16)}, heads=3)
@example(changes={"pos_embed": ([1, 4, 8], torch.complex64)}, heads=2)
@example(changes={"t_embedder.w1.bias": "remove"}, heads=2**64)
@example(changes={"y_embedder.embedding_table.weight": ([2**40, 8], torch.float32)}, heads=2)
@example(changes={"time_modulation.1.weight": ([2**40, 8], torch.float32)}, heads=2)
@example(changes={"pos_embed": ([1, 2**40, 8], torch.float32)}, heads=2)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_odd_tensors_are_refused_or_fit(changes: dict[str, Any], heads: int) -> None:
    """Huge ones have no values behind them, but those of a single element."""
    state = dict(mpdit.to_official(fuzz_places.small_model()))
    for name, change in changes.items():
        value = state.get(name, torch.zeros(2))
        if change == "remove":
            state.pop(name, None)
        elif change == "sparse":
            state[name] = value.to_sparse()
        elif change == "quantized":
            state[name] = torch.quantize_per_tensor(value, 0.1, 0, torch.qint8)
        elif change == "meta":
            state[name] = value.to("meta")
        elif change == "view":
            state[name] = value.flatten()[:1].expand(3, 5)
        else:
            shape, dtype = change
            shape = shape if math.prod(max(size, 1) for size in shape) < 2**58 else [1]
            state[name] = torch.zeros((), dtype=dtype).expand(shape)
    stream = io.BytesIO()
    torch.save(state, stream)
    with folder_of({"x.pt": stream.getvalue()}) as folder:
        loaded = judge(lambda: read_official(folder / "x.pt", num_heads=heads), folder)
        converted = command(["convert", "x.pt", "new", "--num-heads", str(heads)], folder)
        assert (loaded.refusal is None) == (converted.refusal is None), (loaded, converted)


# Of pickle: containers, marks, memos, globals and calls of them, texts and numbers of false lengths.
INSTRUCTIONS = [
    *(b"\x80\x02", b"}", b"]", b"(", b".", b"t", b"s", b"u", b"N", b"b", b"R", b"Q", b"\x81", b"\x85", b"q\0", b"h\0"),
    *(
        b"cos\nsystem\n",
        b"ccollections\nOrderedDict\n",
        b"ctorch\nFloatStorage\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
    ),
    *(b"X\2\0\0\0ls", b"X\xff\xff\xff\x7f", b"J\xff\xff\xff\x7f", b"\x8a\x01\x07", b"\x8a\xff" + b"\xff" * 255),
]


@fuzzed(nightly=800)
@given(
    pickled=st.lists(st.sampled_from(INSTRUCTIONS) | st.binary(min_size=1, max_size=3), max_size=30),
    zipped=st.booleans(),
)
@examples("pickled", [[b"\x80\x02", b"}", instruction, b"."] for instruction in INSTRUCTIONS], zipped=True)
@examples("pickled", [[], [b"\x80\x02", b"cos\nsystem\n", b"X\2\0\0\0ls", b"\x85", b"R", b"."]], zipped=True)
@examples("pickled", [[], [b"\x80\x02", b"}", b"."], [b"cos\nsystem\n", b"(", b"t", b"R", b"."]], zipped=False)
def test_odd_instructions_of_pickle_are_refused(pickled: list[bytes], zipped: bool) -> None:
    content = b"".join(pickled)
    if zipped:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("archive/data.pkl", content)
            archive.writestr("archive/byteorder", "little")
            archive.writestr("archive/version", "3\n")
        content = stream.getvalue()
    with folder_of({"x.pt": content}) as folder:
        judge(lambda: read_official(folder / "x.pt"), folder, greedy=not zipped)
        assert command(["convert", "x.pt", "new"], folder).refusal


@pytest.mark.parametrize("name", ["eval", "exec", "open", "system"])
def test_the_guard_sees_what_a_hostile_pickle_does(name: str) -> None:
    """Unpickled blindly it is stopped, so that the tests above would fail."""
    with folder_of({"x.pickle": pickle.dumps(_HOSTILE[name])}) as folder:
        (folder / "deep" / "in").mkdir(parents=True)
        with pytest.raises(BaseException, match=r"os\.system|open|mkdir"):
            judge(lambda: pickle.loads((folder / "x.pickle").read_bytes()), folder / "deep" / "in")
        assert not (folder / "pwned").exists()
