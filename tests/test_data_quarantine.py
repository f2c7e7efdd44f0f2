"""Quarantine: bad records give way to their neighbours, the same for every rank, loader and restart, up to a limit."""

from __future__ import annotations

import errno
import json
import os
import pickle
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import latent_formats
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpdit.core.errors import DataError, RecordError
from mpdit.data import BatchPlan, GlobalOrder, PackedLatents, make_loader, open_latents, quarantine, write_packed
from mpdit.data.loaders import Batch
from mpdit.data.quarantine import QUARANTINE_NAME, Quarantine

SAMPLES, SHARD = 23, 5
Read = tuple[Any, Any]
"""Moments and labels."""


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarantine, "_PAUSE", 0)


@pytest.fixture
def packed(tmp_path: Path) -> PackedLatents:
    means = np.random.default_rng(0).normal(size=(SAMPLES, 2, 4, 4))
    return write_packed(tmp_path / "packed", means, np.arange(SAMPLES) % 7, shard_records=SHARD)


def flip(dataset: PackedLatents, sample: int) -> None:
    """Flip a bit of a record where it lies; flipping it again mends it."""
    path = dataset.path / f"shard-{sample // SHARD:05d}.bin"
    content = bytearray(path.read_bytes())
    content[sample % SHARD * dataset.manifest.record_bytes + 11] ^= 4
    path.write_bytes(content)


def opened(dataset: PackedLatents, limit: int, journal: str = "run", data: str = "data", **options: Any) -> Quarantine:
    """As a rank opens it."""
    folder = dataset.path.parent / journal
    folder.mkdir(exist_ok=True)
    return Quarantine(PackedLatents(dataset.path), limit, folder / QUARANTINE_NAME, data, **options)


def lines(dataset: PackedLatents, journal: str = "run") -> list[dict[str, Any]]:
    path = dataset.path.parent / journal / QUARANTINE_NAME
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def assert_reads(got: Read, dataset: PackedLatents, wanted: Iterable[int]) -> None:
    moments, labels = dataset.read(np.array(list(wanted)))
    assert np.array_equal(got[0], moments)
    assert np.array_equal(got[1], labels)


EVERY = np.arange(SAMPLES)


def test_a_bad_record_is_replaced_by_the_next_with_its_label_and_written_down(
    packed: PackedLatents, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(packed, 7)
    sound = opened(packed, 2)
    assert (len(sound), sound.manifest, sound.path) == (SAMPLES, packed.manifest, packed.path)
    out = np.empty((3, *packed.manifest.record_shape), np.float16)
    got = sound.read(np.array([3, 7, 8]), out)
    assert got[0] is out
    assert_reads(got, packed, [3, 8, 8])
    (line,) = lines(packed)
    reason = line.pop("reason")
    assert "CRC-32" in reason
    assert line == {
        **{"data": "data", "sample": 7, "file": "shard-00001.bin", "replacement": 8},
        "offset": 2 * packed.manifest.record_bytes,
    }
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ")
    assert f"shard-00001.bin: record 2 (sample 7, byte {line['offset']}) {reason}" in warning
    assert "replaced by sample 8" in warning
    assert_reads(sound.read(np.array([7])), packed, [8])
    assert (sound.met, len(lines(packed)), capsys.readouterr().err) == (1, 1, "")


def test_neighbours_that_are_bad_too_are_passed_over_past_the_end(packed: PackedLatents) -> None:
    for sample in (20, 21, 22, 0):
        flip(packed, sample)
    sound = opened(packed, 4)
    assert_reads(sound.read(np.array([21, 5])), packed, [1, 5])
    assert [(line["sample"], line["replacement"]) for line in lines(packed)] == [(21, 1), (22, 1), (0, 1)]
    assert_reads(sound.read(np.array([20, 22])), packed, [1, 1])
    assert sound.met == 4


def test_a_replacement_that_is_lost_later_is_replaced_itself(packed: PackedLatents) -> None:
    flip(packed, 3)
    sound = opened(packed, 2)
    sound.read(EVERY)
    flip(packed, 4)
    assert_reads(sound.read(np.array([3, 4])), packed, [5, 5])


@settings(deadline=None, max_examples=25)
@given(
    st.sets(st.integers(0, SAMPLES - 1), max_size=6), st.lists(st.integers(0, SAMPLES - 1), max_size=8), st.booleans()
)
def test_what_is_read_depends_on_the_damage_alone(
    tmp_path_factory: pytest.TempPathFactory, bad: set[int], wanted: list[int], known: bool
) -> None:
    folder = tmp_path_factory.mktemp("data")
    means = np.random.default_rng(1).normal(size=(SAMPLES, 1, 2, 2))
    whole = write_packed(folder / "packed", means, np.arange(SAMPLES), shard_records=SHARD)
    expected = [next(n % SAMPLES for n in range(i, i + SAMPLES) if n % SAMPLES not in bad) for i in wanted]
    moments, labels = whole.read(np.array(expected, np.int64))
    for sample in bad:
        flip(whole, sample)
    sound = opened(whole, len(bad))
    if known:
        sound.read(EVERY[::-1])
    got = sound.read(np.array(wanted, np.int64))
    assert np.array_equal(got[0], moments)
    assert np.array_equal(got[1], labels)
    assert {line["sample"] for line in lines(whole)} <= bad


def batches(dataset: Any, kind: str, plan: BatchPlan) -> list[Batch]:
    order = GlobalOrder(SAMPLES, 0)
    with make_loader(dataset, order, plan, kind=kind, stop_step=6) as loader:
        return list(loader)


@pytest.mark.parametrize("kind", ["torch", "dali"])
def test_ranks_splits_loaders_and_restarts_change_nothing(packed: PackedLatents, kind: str) -> None:
    for sample in (2, 3, 11):
        flip(packed, sample)
    whole = batches(opened(packed, 3, "one"), "torch", BatchPlan(12))
    assert sorted(line["sample"] for line in lines(packed, "one")) == [2, 3, 11]
    ranks = [opened(packed, 3, "many") for _ in range(3)]
    for start in (0, 2):
        for step in range(start, 6):
            parts = [
                batches(dataset, kind, BatchPlan(12, 3, rank, 2, start, 12 * start))[2 * (step - start) + micro]
                for micro in range(2)
                for rank, dataset in enumerate(ranks)
            ]
            for name in ("moments", "labels", "indices", "positions"):
                assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole[step], name))
        ranks = [opened(packed, 3, "many") for _ in range(3)]  # a restart
    assert sorted(line["sample"] for line in lines(packed, "many")) == [2, 3, 11]
    assert sum(rank.met for rank in ranks) == 0


def test_what_was_replaced_stays_so_when_it_is_mended(packed: PackedLatents) -> None:
    flip(packed, 2)
    opened(packed, 1).read(EVERY)
    flip(packed, 2)
    assert_reads(opened(packed, 1).read(np.array([2])), packed, [3])
    (packed.path.parent / "run" / QUARANTINE_NAME).unlink()
    assert_reads(opened(packed, 1).read(np.array([2])), packed, [2])


def test_more_than_the_limit_over_all_ranks_stops_the_run(packed: PackedLatents) -> None:
    for sample in (2, 9, 16):
        flip(packed, sample)
    ranks = [opened(packed, 2) for _ in range(3)]
    for rank, sample in zip(ranks[:2], (2, 9), strict=True):
        rank.read(np.array([sample]))
    ranks[2].check(sum(rank.met for rank in ranks))
    message = r"shard-00003.bin: .*sample 16.*CRC-32.*bad_records allows 2 records.*larger --bad-records"
    with pytest.raises(DataError, match=message):
        ranks[2].read(np.array([16]))
    errors = set()
    for rank in ranks:
        with pytest.raises(DataError, match=message) as error:
            rank.check(sum(rank.met for rank in ranks))
        errors.add(str(error.value))
    assert len(errors) == 1
    assert [line["replacement"] for line in lines(packed)] == [3, 10, None]

    again = opened(packed, 2)  # the same command: the same end, nothing written twice
    again.check(0)
    with pytest.raises(DataError, match=message):
        again.read(EVERY)
    assert len(lines(packed)) == 3
    more = opened(packed, 3)
    assert_reads(more.read(np.array([16])), packed, [17])
    more.check(more.met)
    with pytest.raises(DataError, match=r"3 records of .* and bad_records allows 2: give --bad-records 3 or more"):
        opened(packed, 2)
    assert_reads(opened(packed, 3, data="other data").read(np.array([3])), packed, [3])


def test_a_shard_of_bad_records_is_not_searched_beyond_the_limit(packed: PackedLatents) -> None:
    for sample in range(5, 15):
        flip(packed, sample)
    sound = opened(packed, 3)
    with pytest.raises(DataError, match=r"bad_records allows 3 records"):
        sound.read(np.array([6]))
    with pytest.raises(DataError, match=r"bad_records allows 3 records"):
        sound.check(sound.met)
    assert [line["replacement"] for line in lines(packed)] == [None]


def test_without_a_limit_the_first_stops_and_says_all_that_is_known(packed: PackedLatents) -> None:
    flip(packed, 7)
    sound = opened(packed, 0)
    place = rf"shard-00001.bin: record 2 \(sample 7, byte {2 * packed.manifest.record_bytes}\) .*CRC-32"
    with pytest.raises(DataError, match=rf"{place}.*--bad-records N, and repeat the command.*newest checkpoint"):
        sound.read(EVERY)
    assert lines(packed) == []
    sound.check(sound.met)


def test_a_data_set_without_a_sound_record_is_an_error(packed: PackedLatents) -> None:
    for sample in range(SAMPLES):
        flip(packed, sample)
    with pytest.raises(DataError, match=r"no record of .* can be read"):
        opened(packed, SAMPLES + 1).read(np.array([0]))


def test_a_moments_failure_is_waited_out_aloud(
    packed: PackedLatents, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    positioned_read, failures = os.preadv, iter([True, False, True])

    def flaky(*arguments: Any) -> int:
        if next(failures, False):
            raise OSError(5, "Input/output error")
        return positioned_read(*arguments)

    monkeypatch.setattr(os, "preadv", flaky)
    for limit in (0, 1):
        assert_reads(opened(packed, limit).read(np.array([3, 4])), packed, [3, 4])
    assert lines(packed) == []
    assert "can't be read ([Errno 5] Input/output error)" in capsys.readouterr().err


def test_many_ranks_and_threads_that_meet_the_same_at_once_report_it_once(packed: PackedLatents) -> None:
    bad = (1, 4, 5, 12, 22)
    for sample in bad:
        flip(packed, sample)
    ranks = [opened(packed, len(bad)) for _ in range(4)]
    barrier = threading.Barrier(8)

    def read(dataset: Quarantine) -> Read:
        barrier.wait()
        return dataset.read(EVERY)

    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(read, [*ranks, *ranks]))
    assert sorted(line["sample"] for line in lines(packed)) == list(bad)
    assert sum(rank.met for rank in ranks) == len(bad)
    for moments, _ in results:
        assert np.array_equal(moments, results[0][0])


@pytest.mark.parametrize(
    "rest", ['{"data": "data", "sam', "[]\nnull\n7\n", '{"data": "data", "sample": 99, "replacement": 3}\n', "\xff\n"]
)
def test_lines_cut_short_or_foreign_are_passed_over(packed: PackedLatents, rest: str) -> None:
    (packed.path.parent / "run").mkdir()
    journal = packed.path.parent / "run" / QUARANTINE_NAME
    journal.write_bytes(rest.encode("latin-1"))
    flip(packed, 2)
    assert_reads(opened(packed, 1).read(np.array([2])), packed, [3])
    written = journal.read_bytes()
    assert written.startswith(rest.encode("latin-1"))
    assert json.loads(written.splitlines()[-1])["sample"] == 2
    assert opened(packed, 1).read(np.array([2]))[1] == [3]
    assert journal.read_bytes() == written


def test_a_journal_that_cannot_be_written_is_a_clear_error(packed: PackedLatents) -> None:
    flip(packed, 2)
    (packed.path.parent / "run").mkdir()
    sound = opened(packed, 1)
    (packed.path.parent / "run").rmdir()
    with pytest.raises(DataError, match=r"quarantine.jsonl can't be written"):
        sound.read(EVERY)


def test_a_full_disk_leaves_no_half_trusted_line(packed: PackedLatents, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(packed, 2)

    def full(descriptor: int) -> None:
        os.ftruncate(descriptor, 10)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"quarantine.jsonl can't be written .*No space"):
        opened(packed, 1).read(EVERY)
    monkeypatch.undo()
    monkeypatch.setattr(quarantine, "_PAUSE", 0)
    sound = opened(packed, 1)
    sound.read(EVERY)
    assert sound.met == 1
    assert opened(packed, 1).read(np.array([2]))[1] == [3]


def test_nothing_is_written_when_asked_not_to(packed: PackedLatents) -> None:
    flip(packed, 2)
    sound = opened(packed, 1, write=False)
    assert_reads(sound.read(np.array([2])), packed, [3])
    assert (sound.met, lines(packed)) == (1, [])


@pytest.mark.parametrize(
    "damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-3])], ids=["gone", "short"]
)
def test_files_of_other_formats_give_way_too(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    latents = latent_formats.draw(24)
    path = latent_formats.write_pairs(tmp_path / "pairs", latents, latent_formats.labels_of(24))
    dataset = open_latents(path)
    damage(path / "imagenet256_features" / "5.npy")
    with pytest.raises(RecordError, match=r"5.npy") as error:
        dataset.read(np.arange(24))
    assert error.value.sample == 5
    sent = pickle.loads(pickle.dumps(error.value))  # as from a worker of DataLoader or of a pool
    assert (type(sent), str(sent), vars(sent)) == (RecordError, str(error.value), vars(error.value))
    sound = Quarantine(dataset, 1, tmp_path / QUARANTINE_NAME, "pairs")
    moments, labels = sound.read(np.array([5, 6]))
    assert np.array_equal(moments[0], moments[1])
    assert labels.tolist() == [0, 0]


def test_a_safetensors_file_cut_short_gives_way_too(tmp_path: Path) -> None:
    path = latent_formats.write_lightningdit(
        tmp_path / "data", latent_formats.draw(10), latent_formats.draw(10, 1), latent_formats.labels_of(10)
    )
    dataset = open_latents(path)
    with open(sorted(path.glob("*.safetensors"))[1], "r+b") as file:
        file.truncate(os.path.getsize(file.name) - 5 * 8 - 4 * 4 * 64)
    dataset.read(np.arange(5))
    with pytest.raises(RecordError, match=r"shard001.safetensors.*truncated") as error:
        dataset.read(np.array([3, 9]))
    assert error.value.sample == 9
    sound = Quarantine(dataset, 9, tmp_path / QUARANTINE_NAME, "data")
    assert np.array_equal(*sound.read(np.array([0, 9]))[0])
    assert np.isfinite(sound.read(np.arange(10))[0]).all()
    assert 1 <= sound.met <= 5
