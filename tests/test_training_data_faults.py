"""Data faults: whatever happens to the files is named or made good, before a run, during it and when it is resumed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import latent_formats
import numpy as np
import pytest
from training_runs import TINY, ds_config, new_folder, start, trained

from mpdit.core.dist_env import DistEnv
from mpdit.core.errors import CheckpointError, ConfigError, DataError, UserError
from mpdit.data import BatchPlan, GlobalOrder, PackedLatents, make_loader, write_packed
from mpdit.data.digits import build_digits
from mpdit.data.loaders import Batch
from mpdit.training.checkpoint.resume import check_same
from mpdit.training.run import Run
from mpdit.training.setup import prepare

KINDS = ("torch", "dali")
SAMPLES, SHARD = 24, 6
MODEL = ("--model", "MPDiT-Digits/4-2")


@pytest.fixture
def packed(tmp_path: Path) -> PackedLatents:
    means = np.random.default_rng(0).normal(size=(SAMPLES, 4, 8, 8))
    return write_packed(tmp_path / "packed", means, np.arange(SAMPLES) % 3, num_classes=3, shard_records=SHARD)


def prepared(data: Path | str, out: Path, *arguments: str) -> Run:
    given = ["--data", str(data), *MODEL, "--override", "input_size=8", "--global-batch", "8", "--out", str(out)]
    return prepare(["--ds_config", ds_config(2), *given, *arguments], DistEnv())


def flip(path: Path, byte: int) -> None:
    with path.open("r+b") as file:
        file.seek(byte)
        value = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([value ^ 1]))


def replace(path: Path) -> None:
    """In place, by other records of the same size."""
    path.write_bytes(path.read_bytes()[::-1])


def swap(one: Path, other: Path) -> None:
    between = one.with_name("between")
    one.rename(between)
    other.rename(one)
    between.rename(other)


def _batches(dataset: Any, kind: str, order: GlobalOrder, stop: int) -> list[Batch]:
    with make_loader(dataset, order, BatchPlan(8), kind=kind, stop_step=stop) as loader:
        return list(loader)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: flip(folder / "shard-00002.bin", 1000), r"CRC-32 \w+, not \w+: it was altered"),
        (lambda folder: swap(folder / "shard-00001.bin", folder / "shard-00002.bin"), "CRC-32"),
        (lambda folder: replace(folder / "shard-00002.bin"), "CRC-32"),
    ],
    ids=["bit flipped", "shards swapped", "shard replaced"],
)
def test_contents_that_changed_are_named_by_shard_record_sample_and_byte(
    packed: PackedLatents, tmp_path: Path, kind: str, damage: Callable[[Path], None], message: str
) -> None:
    damage(packed.path)
    run = prepared(packed.path, tmp_path / "out")
    where = r"shard-0000[12]\.bin: record (\d) \(sample (\d+), byte (\d+)\) .*"
    with pytest.raises(DataError, match=where + message) as error:
        _batches(run.dataset, kind, GlobalOrder(SAMPLES, 0), 3)
    sample = int(str(error.value).partition("(sample ")[2].partition(",")[0])
    nbytes = packed.manifest.record_bytes
    assert f"record {sample % SHARD} (sample {sample}, byte {sample % SHARD * nbytes})" in str(error.value)
    assert f"shard-{sample // SHARD:05d}.bin" in str(error.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "shard-00001.bin").unlink(), r"can't open .*shard-00001.bin"),
        (lambda folder: os.truncate(folder / "shard-00001.bin", 100), r"shard-00001.bin has 100 bytes, the manifest"),
        (lambda folder: (folder / "index.bin").unlink(), r"can't open .*index.bin"),
        (lambda folder: os.truncate(folder / "index.bin", 8), r"index.bin has 8 bytes, the manifest says"),
        (lambda folder: flip(folder / "index.bin", 9), r"index.bin does not match its hash in the manifest"),
        (lambda folder: (folder / "manifest.json").unlink(), r"holds no data set"),
        (lambda folder: os.truncate(folder / "manifest.json", 300), r"manifest.json can't be parsed"),
    ],
)
def test_files_that_are_damaged_are_refused_and_never_quarantined(
    packed: PackedLatents, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(packed.path)
    with pytest.raises(DataError, match=message):
        prepared(packed.path, tmp_path / "out", "--bad-records", "24")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", ["truncated", "altered", "renamed over", "removed"])
def test_a_shard_that_changes_during_the_run_never_gives_other_data(
    packed: PackedLatents, tmp_path: Path, kind: str, damage: str
) -> None:
    order, stop = GlobalOrder(SAMPLES, 0), 30
    sound = _batches(packed, "torch", order, stop)
    run = prepared(packed.path, tmp_path / "out")
    shard = packed.path / "shard-00001.bin"
    with make_loader(run.dataset, order, BatchPlan(8), kind=kind, stop_step=stop) as loader:
        got = [next(loader)]
        match damage:
            case "truncated":
                os.truncate(shard, 0)
            case "altered":
                replace(shard)
            case "renamed over":
                shutil.copy(packed.path / "shard-00002.bin", tmp_path / "other")
                (tmp_path / "other").replace(shard)
            case _:
                shard.unlink()
        if damage in ("truncated", "altered"):
            with pytest.raises(DataError, match=r"shard-00001.bin: record \d \(sample \d+, byte \d+\)"):
                got.extend(loader)
            assert len(got) < 1 + 4 + 4 + 3, "an epoch after those that were read ahead"
        else:
            got.extend(loader)  # the file that was opened is read on
            assert len(got) == stop
    for ours, theirs in zip(got, sound, strict=False):
        assert ours.moments.equal(theirs.moments)
        assert ours.labels.equal(theirs.labels)


class TestResuming:
    @pytest.fixture
    def begun(self, packed: PackedLatents, tmp_path: Path) -> Run:
        """A run that has begun."""
        run = prepared(packed.path, tmp_path / "out")
        run.out.mkdir()
        (run.out / "config.json").write_text(json.dumps(run.describe()))
        return run

    @pytest.mark.parametrize(
        ("arguments", "difference"),
        [
            (["--seed", "1"], "seed 0 there, 1 here"),
            (["--global-batch", "4"], "global_batch 8 there, 4 here"),
            (["--loader", "torch"], "loader dali there, torch here"),
            (["--lr", "1e-3", "--seed", "3"], "seed 0 there, 3 here, lr 0.0002 there, 0.001 here"),
        ],
    )
    def test_other_settings_are_refused_with_the_difference_unless_forced(
        self, begun: Run, arguments: list[str], difference: str
    ) -> None:
        data, before = begun.dataset.path, (begun.out / "config.json").read_bytes()
        with pytest.raises(ConfigError, match=rf"{difference}\).*--force"):
            prepared(data, begun.out, *arguments)
        assert (begun.out / "config.json").read_bytes() == before
        forced = prepared(data, begun.out, *arguments, "--force")
        assert check_same(begun.identity, forced.identity, "it is of", True, CheckpointError) == difference
        with pytest.raises(CheckpointError, match=rf"^it is of another run \({difference}\).*--force"):
            check_same(begun.identity, forced.identity, "it is of", False, CheckpointError)

    @pytest.mark.parametrize(
        ("arguments", "difference"),
        [
            (["--override", "width=64"], "model.width 96 there, 64 here"),
            (["--override", "num_classes=5"], "model.num_classes 3 there, 5 here"),
            (["--optimizer", "deepspeed"], "optimizer adamw_ema there, deepspeed here"),
        ],
    )
    def test_what_the_weights_would_not_fit_stays_refused(
        self, begun: Run, arguments: list[str], difference: str
    ) -> None:
        with pytest.raises(ConfigError, match=rf"{difference}\) and --force can't change that, as"):
            prepared(begun.dataset.path, begun.out, *arguments, "--force", "--seed", "4")

    def test_data_is_known_by_its_contents(self, begun: Run, packed: PackedLatents, tmp_path: Path) -> None:
        shutil.copytree(packed.path, tmp_path / "moved")
        prepared(tmp_path / "moved", begun.out)

        # The same records under each other's labels: every statistic is equal.
        moments, labels = packed.read(np.arange(SAMPLES))
        other = write_packed(tmp_path / "other", moments[:, 0, :4], labels[::-1], num_classes=3, shard_records=SHARD)
        assert other.manifest.statistics == packed.manifest.statistics
        with pytest.raises(ConfigError, match=r"data latents \w+ there, latents \w+ here"):
            prepared(other.path, begun.out)
        prepared(other.path, begun.out, "--force")

    def test_other_projects_data_is_known_by_samples_and_labels(self, tmp_path: Path) -> None:
        latents, labels = latent_formats.draw(SAMPLES), latent_formats.labels_of(SAMPLES)
        paths = [
            latent_formats.write_pairs(tmp_path / name, latents, those)
            for name, those in (("a", labels), ("b", labels), ("c", labels[::-1]))
        ]
        identities = [prepared(path, tmp_path / "out").identity["data"] for path in paths]
        assert identities[0] == identities[1] != identities[2]
        given = prepared(paths[0], tmp_path / "out", "--override", "num_classes=3")
        assert given.identity["data"] == identities[0]

    def test_an_older_record_of_a_run_says_less(self, begun: Run) -> None:
        path = begun.out / "config.json"
        described = json.loads(path.read_text())
        for name in ("loader", "optimizer"):
            del described["identity"][name]
        path.write_text(json.dumps(described))
        prepared(begun.dataset.path, begun.out, "--loader", "torch")
        for text in ("[]", '{"identity": [1]}', '{"identity": null}', "{"):
            path.write_text(text)
            with pytest.raises(ConfigError, match=r"holds files but no run .*give another --out"):
                prepared(begun.dataset.path, begun.out, "--force")

    def test_the_number_of_bad_records_may_change(self, begun: Run) -> None:
        assert prepared(begun.dataset.path, begun.out, "--bad-records", "3").identity == begun.identity
        with pytest.raises(UserError, match="bad_records is -1"):
            prepared(begun.dataset.path, begun.out, "--bad-records", "-1")


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[int]]:
    """Digits of which records are bad that both ranks meet, before and after the checkpoint of step 10."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    dataset = build_digits(folder)
    order = GlobalOrder(len(dataset), 0)
    first, last = (int(order.indices(BatchPlan(32, 2, rank).positions(step))[5]) for rank, step in ((0, 3), (1, 16)))
    bad = {first, last, (last + 1) % len(dataset)}
    for sample in bad:
        flip(folder / dataset.manifest.shards[0].file, sample * dataset.manifest.record_bytes + 100)
    return folder, bad


def arguments_of(folder: Path) -> tuple[str, ...]:
    return ("--data", str(folder), *MODEL, "--loader", "torch", "--precision", "fp32")


def quarantined(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]


def test_a_run_with_quarantine_resumes_bit_for_bit(damaged: tuple[Path, set[int]]) -> None:
    folder, bad = damaged
    arguments = (*arguments_of(folder), "--bad-records", "3")
    whole = trained(*arguments, ranks=2)
    entries = quarantined(whole.out)
    assert {entry["sample"] for entry in entries} == bad
    assert len(entries) == len(bad)
    warnings = [line for line in whole.stderr.splitlines() if "replaced by sample" in line]
    assert len(warnings) == len(bad)

    # As if it had been killed after step 10, before it met all of them.
    out = new_folder("run")
    shutil.copytree(whole.out, out)
    shutil.rmtree(out / "checkpoints" / "step-00000020")
    (out / "quarantine.jsonl").write_text(json.dumps(entries[0]) + "\n" + json.dumps(entries[1])[:20])
    resumed = start(out, *arguments, ranks=2)
    assert resumed.code == 0, resumed.stderr
    assert resumed.losses() == whole.losses()
    assert resumed.ema() == whole.ema()


def test_more_bad_records_than_allowed_over_both_ranks_stop_the_run(damaged: tuple[Path, set[int]]) -> None:
    folder, bad = damaged
    run = start(new_folder("run"), *arguments_of(folder), "--bad-records", "1", ranks=2)
    assert run.code == 2, run.stderr
    assert run.errors
    assert all("bad_records allows 1 record" in line for line in run.errors)
    entries = quarantined(run.out)
    assert len(entries) == 2
    assert {entry["sample"] for entry in entries} < bad
    assert [entry["replacement"] is None for entry in entries] == [False, True]
    assert f"sample {entries[1]['sample']}" in run.errors[0]


@pytest.mark.slow
def test_a_forced_run_goes_on_from_the_checkpoints_step_and_position(damaged: tuple[Path, set[int]]) -> None:
    folder, _ = damaged
    whole = trained(*arguments_of(folder), "--bad-records", "3", ranks=2)
    out = new_folder("run")
    shutil.copytree(whole.out, out)
    changed = ["--global-batch", "64", "--seed", "7", "--loader", "dali", "--steps", "22", "--bad-records", "3"]
    run = start(out, *arguments_of(folder), *changed, "--force")
    assert run.code == 0, run.stderr
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("forced:")]
    for words in ("seed 0 there, 7 here", "global_batch 32 there, 64 here", "loader torch there, dali here"):
        assert words in line
    described = json.loads((out / "config.json").read_text())
    assert described["identity"]["seed"] == 7
    assert [entry["step"] for entry in run.metrics()] == list(range(1, 23))
    assert run.losses()[:20] == whole.losses()
    assert [entry["samples"] for entry in run.metrics()[18:]] == [19 * 32, 20 * 32, 20 * 32 + 64, 20 * 32 + 128]
    again = prepare(["--ds_config", ds_config(2), *TINY, *arguments_of(folder), *changed, "--out", str(out)], DistEnv())
    assert again.config.seed == 7, "it is this run now, without force"
