"""Writing: bad records are refused by name, and a data set is there whole or not at all."""

import os

import numpy as np
import pytest
import torch
from forks import exit_code, in_a_child

from mpdit.core.errors import DataError
from mpdit.data import LatentSpec, Normalization, PackedLatents, PackedWriter, verify, write_packed

SPEC = LatentSpec(channels=1, height=2, width=2, num_classes=3)
LABELS = np.array([0, 1, 2, 0, 1])


def make_moments():
    moments = np.random.default_rng(1).uniform(size=(5, 1, 2, 2, 2))
    return moments.astype(np.float32)


def write(path):
    with PackedWriter(path, SPEC, shard_records=2) as writer:
        writer.add(make_moments()[:3], LABELS[:3])
        writer.add(make_moments()[3:], LABELS[3:])


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ((1, 0, 0, 1, 1), np.nan, "record 6 .*NaN"),
        ((1, 0, 0, 1, 1), -np.inf, "record 6 .*infinite"),
        ((2, 0, 0, 0, 0), 70_000.0, "record 7 .*beyond fp16, of 65504 at most"),
        ((4, 0, 1, 0, 0), -0.5, "record 9 .*negative"),
        ((0, 0, 1, 0, 0), np.nan, "record 5 .*NaN"),
    ],
)
def test_bad_values_are_refused_by_record(tmp_path, place, value, message):
    bad = make_moments()
    bad[place] = value
    with PackedWriter(tmp_path / "data", SPEC) as writer:
        writer.add(make_moments(), LABELS)
        with pytest.raises(DataError, match=message):
            writer.add(bad, LABELS)
        assert writer.num_samples == 5
    assert verify(tmp_path / "data")["num_samples"] == 5  # of the refused batch nothing was written


def test_a_std_of_minus_zero_is_zero(tmp_path):
    moments = make_moments()
    moments[2, 0, 1] = -0.0
    with PackedWriter(tmp_path, SPEC) as writer:
        writer.add(moments, LABELS)
    assert PackedLatents(tmp_path).read(np.arange(5))[0].shape == moments.shape


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 3, 0, 1], "record 2 has label 3, outside 0 .. 2: mend it, or raise num_classes$"),
        ([0, 1, -1, 0, 1], "record 2 has label -1, outside 0 .. 2: mend it$"),
        ([0.0, 1, 2, 0, 1], "give whole numbers"),
        ([[0, 1, 2, 0, 1]], "one per record"),
        ([0, 1, 2, 0], "shape"),
    ],
)
def test_bad_labels_are_refused(tmp_path, labels, message):
    with pytest.raises(DataError, match=message), PackedWriter(tmp_path / "data", SPEC) as writer:
        writer.add(make_moments(), labels)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("shape", [(5, 2, 2, 2), (5, 1, 1, 2, 2), (5, 2, 2, 2, 2), (5, 1, 2, 2, 3)])
def test_other_shapes_are_refused(tmp_path, shape):
    with pytest.raises(DataError, match=r"expected \(5, 1, 2, 2, 2\)"), PackedWriter(tmp_path, SPEC) as writer:
        writer.add(np.zeros(shape), LABELS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channels": 0}, "channels is 0"),
        ({"height": 2.0}, "height is 2.0"),
        ({"class_names": ("a",)}, "1 names for num_classes 3"),
        ({"variants": ("flipped", "original")}, "variants"),
    ],
)
def test_bad_specs_are_refused(fields, message):
    with pytest.raises(DataError, match=message):
        LatentSpec(**({"channels": 1, "height": 2, "width": 2, "num_classes": 3} | fields))


def test_constant_channels_need_a_normalization(tmp_path):
    with pytest.raises(DataError, match="above zero"), PackedWriter(tmp_path, SPEC) as writer:
        writer.add(np.zeros((1, 1, 2, 2, 2)), [0])
    with PackedWriter(tmp_path, SPEC, normalization=Normalization((0,), (1,))) as writer:
        writer.add(np.zeros((1, 1, 2, 2, 2)), [0])
    assert len(PackedLatents(tmp_path)) == 1


def test_nothing_written_is_no_data_set(tmp_path):
    with pytest.raises(DataError, match="no records"), PackedWriter(tmp_path, SPEC):
        pass
    with pytest.raises(DataError, match="shard_records is 0"):
        PackedWriter(tmp_path, SPEC, shard_records=0)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="can't write a data set to"):
        PackedWriter(tmp_path / "file", SPEC)
    for name, target in (("dangling", "gone"), ("loop", "loop")):
        (link := tmp_path / name).symlink_to(tmp_path / target)
        for path in (link, link / "data"):
            with pytest.raises(DataError, match=rf"can't write a data set to {path} \({link} is a link to nothing\)"):
                PackedWriter(path, SPEC)


def test_a_data_set_is_never_overwritten(tmp_path):
    write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(DataError, match="already holds a data set"):
        PackedWriter(tmp_path, SPEC)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_two_writers_do_not_meet_in_one_folder(tmp_path):
    with PackedWriter(tmp_path, SPEC) as writer:
        with pytest.raises(DataError, match="being written by another process"):
            PackedWriter(tmp_path, SPEC)
        writer.add(make_moments(), LABELS)
    assert verify(tmp_path)["num_samples"] == 5


def test_an_exception_removes_what_was_written(tmp_path):
    def interrupted() -> None:
        with PackedWriter(tmp_path, SPEC, shard_records=2) as writer:
            writer.add(make_moments(), LABELS)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    write(tmp_path)


def test_a_writer_killed_anywhere_leaves_no_data_set_and_can_start_again(tmp_path):
    write(tmp_path / "whole")
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    steps = 0
    for steps in range(100):
        folder = tmp_path / str(steps)
        if _killed_in_a_child(folder, steps) == 0:
            break
        if not (folder / "manifest.json").exists():
            with pytest.raises(DataError, match="holds no data set"):
                PackedLatents(folder)
            write(folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    assert steps > 10  # a kill before each fsync and rename


def _killed_in_a_child(folder, steps: int) -> int:
    """Exit status of a child that dies, without unwinding, at the fsync or rename number `steps`."""
    left = [steps]

    def counted(call):
        def wrapper(*arguments):
            if left[0] == 0:
                os._exit(9)
            left[0] -= 1
            return call(*arguments)

        return wrapper

    def work() -> None:
        os.fsync, os.replace = counted(os.fsync), counted(os.replace)
        write(folder)

    return exit_code(in_a_child(work))


VALUES = np.random.default_rng(2).normal(size=(5, 3, 2, 2)).astype(np.float32)
BF16 = torch.from_numpy(VALUES).bfloat16()


@pytest.mark.parametrize(
    ("means", "labels"),
    [
        (VALUES.tolist(), LABELS.tolist()),
        (torch.from_numpy(VALUES).requires_grad_(), torch.from_numpy(LABELS)),
        (torch.from_numpy(VALUES).double(), torch.from_numpy(LABELS).to(torch.uint8)),
        (BF16.requires_grad_(), LABELS),
        ([row.requires_grad_() for row in torch.from_numpy(VALUES)], list(torch.from_numpy(LABELS))),
        ([list(row.double()) for row in torch.from_numpy(VALUES)], tuple(LABELS)),
        (torch._neg_view(torch.from_numpy(-VALUES)), LABELS),
    ],
    ids=["lists", "gradients", "double", "bf16", "list of tensors", "lists of tensors", "view of negatives"],
)
def test_whatever_holds_numbers_is_packed(tmp_path, means, labels):
    stds = torch.full(VALUES.shape, 0.5, dtype=torch.bfloat16)
    moments, found = write_packed(tmp_path / "data", means, labels, stds).read(np.arange(5))
    expected = BF16.detach().float().numpy() if means is BF16 else VALUES
    assert np.array_equal(moments[:, 0, :3], expected.astype(np.float16)) and (moments[:, 0, 3:] == 0.5).all()
    assert np.array_equal(found, LABELS)


@pytest.mark.parametrize(
    ("means", "labels", "message"),
    [
        (VALUES, ["a", "b", "c", "a", "b"], "labels are <U1 .*, and their names as class_names"),
        (VALUES, LABELS == 1, "labels are bool .* give whole numbers"),
        (VALUES, np.eye(5, dtype=int), r"labels \(5, 5\)"),
        (VALUES, LABELS - 1, "has label -1, outside 0 .. 1: mend it$"),
        (VALUES[0], LABELS, r"shapes \[\(3, 2, 2\)\]"),
        (VALUES + 1j, LABELS, "means and stds are complex"),
        ([[[[1.0]]], [[[1.0, 2.0]]]], [0, 1], "means and stds can't be taken as an array"),
        ([[[["x"]]]], [0], "means and stds are <U1"),
        (np.ma.masked_greater(VALUES, 1), LABELS, "means and stds have masked values"),
        (list(np.ma.masked_greater(VALUES, 1)), LABELS, "means and stds have masked values"),
        (torch.from_numpy(VALUES).to("meta"), LABELS, "means and stds can't be taken as an array"),
        (torch.from_numpy(VALUES).to_sparse(), LABELS, "means and stds can't be taken as an array"),
    ],
)
def test_what_holds_no_numbers_is_refused_in_a_line(tmp_path, means, labels, message):
    with pytest.raises(DataError, match=message) as error:
        write_packed(tmp_path / "data", means, labels)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("names", ["ab", b"ab", {"a", "b"}, {"a": 0, "b": 1}, 2])
def test_names_of_classes_are_a_list(tmp_path, names):
    with pytest.raises(DataError, match=r"class_names is .*: give a list of names, in the order of their numbers"):
        write_packed(tmp_path / "data", VALUES, LABELS, class_names=names)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("offset", "std", "lost"),
    [(100.0, 0.1, "1[5-9]"), (-1000.0, 1.0, "1[0-9]"), (2048.0, 0.1, "100"), (1e-7, 1e-8, "[5-9][0-9]")],
)
def test_values_that_fp16_would_blur_are_refused(tmp_path, offset, std, lost):
    values = np.random.default_rng(0).normal(size=(64, 2, 4, 4))
    values[:, 1] = offset + std * values[:, 1]
    constants = Normalization((0.0, offset), (1.0, std))
    labels = np.zeros(64, int)
    with pytest.raises(
        DataError, match=f"channel 1 .* fp16 would lose {lost}\\.[0-9]%, more than 1%: store .latents - OFFSET"
    ):
        write_packed(tmp_path / "data", values, labels, normalization=constants)
    assert not (tmp_path / "data").exists()
    # What is of fp16 already loses nothing by being stored as it is, nor does a constant by being rounded.
    values[:, 1] = offset
    for kept in (values, values.astype(np.float16) + np.float16(0)):
        write_packed(tmp_path / f"of {kept.dtype}", kept, labels, normalization=constants)


def test_a_data_set_of_fp16_too_far_from_zero_says_so(tmp_path):
    values = np.random.default_rng(0).normal(size=(64, 2, 4, 4))
    values[:, 1] = 100 + 0.1 * values[:, 1]
    remarks = write_packed(tmp_path, values.astype(np.float16), np.zeros(64, int)).manifest.remarks()
    assert "channel 1 has mean 100 and std 0.1" in remarks[0] and "in steps of 0.062" in remarks[0]
