"""The order in which files reach the disk and get their names.

A kill can't show it: what was written outlives a process, but not a machine that loses its power.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from disk import watch_disk
from extraction_data import encoded, pixels, save_vae, write_tree

import mpdit
from mpdit.core.dist_env import DistEnv
from mpdit.data import LatentSpec, PackedLatents, PackedWriter, quarantine, write_packed
from mpdit.data.quarantine import QUARANTINE_NAME, Quarantine
from mpdit.jobs.extract.extract import ExtractOptions, extract
from mpdit.model.weights import save_weights
from mpdit.training.checkpoint import format, save
from mpdit.training.checkpoint.format import Checkpoint
from mpdit.training.config import TrainConfig
from mpdit.training.metrics import SkipLog
from mpdit.training.safety.guard import Skipped


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return watch_disk(tmp_path, monkeypatch)


def test_packed_latents_are_there_when_their_manifest_is(seen: list[str], tmp_path: Path) -> None:
    spec = LatentSpec(channels=1, height=2, width=2, num_classes=3)
    with PackedWriter(tmp_path, spec, shard_records=2) as writer:
        writer.add(np.random.default_rng(0).uniform(size=(3, 1, 2, 2, 2)), [0, 1, 2])
    names = ("shard-00000.bin", "shard-00001.bin", "index.bin", "manifest.json")
    before = [f"sync {name}.partial" for name in names[:1] + names[2:0:-1]]
    moved = [f"{name}.partial -> {name}" for name in names]
    assert seen == [*before, *moved[:3], "sync manifest.json.partial", "sync .", moved[3], "sync ."]


def test_a_part_of_an_extraction_is_there_when_its_receipt_is(seen: list[str], tmp_path: Path) -> None:
    images = write_tree(tmp_path / "images", {"a/1.png": encoded(pixels(1)), "a/2.png": encoded(pixels(2))})
    vae = str(save_vae(tmp_path / "vae"))
    seen.clear()
    assert extract(images, tmp_path / "out", vae, ExtractOptions(image_size=32, part_images=1))
    names = ("out/shard-00001.bin", "out/.parts/00001.index")
    files = [*(f"sync {name}.partial" for name in names), *(f"{name}.partial -> {name}" for name in names)]
    receipt = ("out/.parts/.00001.json.partial", "out/.parts/00001.json")
    part = [*files, "sync out", f"sync {receipt[0]}", f"{receipt[0]} -> {receipt[1]}", "sync out/.parts"]
    begin = seen.index(part[0])
    assert seen[begin : begin + len(part)] == part
    manifest = ("out/.manifest.json.partial", "out/manifest.json")
    assert seen[-4:] == ["sync out", f"sync {manifest[0]}", f"{manifest[0]} -> {manifest[1]}", "sync out"]


def test_weights_have_their_names_last(seen: list[str], tmp_path: Path) -> None:
    model = mpdit.create_model("MPDiT-Digits/4-2", width=16, heads=2)
    save_weights(tmp_path, model.state_dict(), model.config, {})
    found = [line for line in dict.fromkeys(seen) if "model.safetensors" in line or "config.json" in line]
    assert found == [
        line
        for name in ("model.safetensors", "config.json")
        for line in (f"sync .{name}.partial", f".{name}.partial -> {name}")
    ]


def test_a_record_is_written_down_before_training_goes_on_without_it(
    seen: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarantine, "_PAUSE", 0)
    packed = write_packed(tmp_path / "data", np.random.default_rng(0).normal(size=(4, 1, 2, 2)), np.arange(4))
    (shard,) = packed.path.glob("shard-*.bin")
    shard.write_bytes(b"\1" + shard.read_bytes()[1:])
    seen.clear()
    Quarantine(PackedLatents(packed.path), 1, tmp_path / QUARANTINE_NAME, "data").read(np.arange(4))
    assert seen == [f"sync {QUARANTINE_NAME}"]


def test_a_checkpoint_is_of_steps_whose_logs_are_on_the_disk(
    seen: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: Any = SimpleNamespace(out=tmp_path, env=DistEnv(), config=TrainConfig())
    partial, folder = format.partial_folder(tmp_path, 1), tmp_path / "checkpoints" / "step-00000001"
    partial.mkdir(parents=True)
    whole = Checkpoint(folder, 1, 64, 1, {}, 1, 2, {}, {"a": [1]}, {})
    whole = replace(whole, files=format.write_shard(partial, 0, {"ema/a/0": torch.ones(1)}))
    seen.clear()

    SkipLog(run, 0, lambda: None).add([Skipped(1, "loss", None, None, (0, 1), [0, 1], [1], in_a_row=1)])
    assert seen == ["sync skipped.jsonl"]

    monkeypatch.setattr(save, "export", lambda *_: seen.append("average"))
    (tmp_path / "metrics.jsonl").touch()
    assert save.finish(run, whole) == ""
    assert seen[1] == "sync metrics.jsonl"
    assert seen[-2:] == ["sync checkpoints/step-00000001", "average"]
