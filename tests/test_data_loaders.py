"""Loaders: DALI and torch bitwise equal, independent of world size, resumable at any step, honest about damage."""

import builtins
import gc
import os
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from mpdit.core.errors import ConfigError, DataError
from mpdit.data import BatchPlan, GlobalOrder, loaders, make_loader, write_packed
from mpdit.data.loaders import Batch

KINDS = ("torch", "dali")
SAMPLES = 23  # batches of 12 straddle epochs in every way
FIELDS = ("moments", "labels", "indices", "positions")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    generator = np.random.default_rng(0)
    means, stds = generator.normal(size=(2, SAMPLES, 2, 4, 3, 5))
    return write_packed(
        tmp_path_factory.mktemp("data") / "packed", means, np.arange(SAMPLES) % 7, np.abs(stds), shard_records=5
    )


def batches(dataset, kind="torch", plan=None, start=0, stop=6, seed=0):
    order = GlobalOrder(len(dataset), seed)
    plan = plan or BatchPlan(12, start_step=start, start_position=12 * start)
    with make_loader(dataset, order, plan, kind=kind, stop_step=stop) as loader:
        return list(loader)


def assert_same(got: list[Batch], wanted: list[Batch]) -> None:
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        for name in FIELDS:
            a, b = getattr(one, name), getattr(other, name)
            assert (a.dtype, a.shape) == (b.dtype, b.shape), name
            # Compared as bits, so that -0 is not 0.
            assert torch.equal(a.view(torch.int16), b.view(torch.int16)), name


def join(parts: list[Batch]) -> Batch:
    return Batch(*(torch.cat([getattr(part, name) for part in parts]) for name in FIELDS))


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_what_the_order_says(dataset, kind):
    order = GlobalOrder(SAMPLES, 4)
    for step, batch in enumerate(batches(dataset, kind, seed=4)):
        positions = np.arange(step * 12, step * 12 + 12)
        indices = order.indices(positions)
        moments, labels = dataset.read(indices)
        assert_same([batch], [Batch(*map(torch.from_numpy, (moments, labels, indices, positions)))])
        assert batch.moments.dtype == torch.float16
        assert batch.labels.dtype == batch.indices.dtype == batch.positions.dtype == torch.int64


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_dali_equals_torch_and_ranks_join_to_the_global_batch(dataset, world_size, accumulation):
    whole = batches(dataset)
    ranks = []
    for rank in range(world_size):
        plan = BatchPlan(12, world_size, rank, accumulation)
        ranks.append(batches(dataset, "torch", plan))
        assert_same(batches(dataset, "dali", plan), ranks[-1])
    for step, batch in enumerate(whole):
        micros = range(step * accumulation, (step + 1) * accumulation)
        assert_same([join([ranks[rank][micro] for micro in micros for rank in range(world_size)])], [batch])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", range(6))
def test_resumed_at_any_step_nothing_changes(dataset, kind, start):
    assert_same(batches(dataset, kind, start=start), batches(dataset)[start:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_may_hold_many_epochs(dataset, kind):
    (batch,) = batches(dataset, kind, BatchPlan(5 * SAMPLES), stop=1)
    assert torch.equal(batch.indices.bincount(), torch.full((SAMPLES,), 5))


@pytest.mark.parametrize("kind", KINDS)
def test_no_steps_no_batches(dataset, kind):
    assert batches(dataset, kind, start=3, stop=3) == []


@pytest.mark.parametrize("kind", KINDS)
def test_batches_keep_their_contents_when_later_ones_arrive(dataset, kind):
    order, plan = GlobalOrder(SAMPLES, 0), BatchPlan(12)
    with make_loader(dataset, order, plan, kind=kind, stop_step=40) as loader:
        kept, copies = [], []
        for batch in loader:
            kept.append(batch)
            copies.append(Batch(*(getattr(batch, name).clone() for name in FIELDS)))
    assert_same(kept, copies)
    assert_same(kept, batches(dataset, stop=40))


@pytest.fixture(params=["this Python's", "3.14's"])
def reference_counts(request, monkeypatch):
    """What sys.getrefcount says: from Python 3.14 on, a local variable that is passed to a function counts once."""
    count = sys.getrefcount
    for item in [object()]:
        surplus = count(item) - 2
    if request.param == "3.14's":
        monkeypatch.setattr(sys, "getrefcount", lambda item: count(item) - (surplus + 1))  # the lambda's own is one


HOLDS = {
    "moments": lambda moments: moments,
    "a slice, transposed": lambda moments: moments[1:, :, 3:5].transpose(1, 2),
    "one sample": lambda moments: moments.unbind()[7],
    "another dtype's view": lambda moments: moments.view(torch.int16),
    "a view of NumPy's view": lambda moments: moments.numpy()[2:, 0],
    "a view through DLPack": lambda moments: torch.from_dlpack(moments)[3],
}


@pytest.mark.usefixtures("reference_counts")
@pytest.mark.parametrize("hold", HOLDS)
def test_what_is_held_of_a_batch_keeps_its_values(dataset, hold):
    """A training step holds one batch or two while the loader reads on; others hold a part of some more."""
    order = GlobalOrder(SAMPLES, 0)
    wanted = [HOLDS[hold](batch.moments) for batch in batches(dataset, stop=20)]
    for depth in (1, 2, 10):
        held = deque(maxlen=depth)
        with make_loader(dataset, order, BatchPlan(12), kind="torch", stop_step=20) as loader:
            for step, batch in enumerate(loader):
                held.append((step, HOLDS[hold](batch.moments)))
                del batch
                time.sleep(0.001)  # the threads read on
                assert all(np.array_equal(part, wanted[step]) for step, part in held)


@pytest.mark.parametrize("last_holder", ["this thread", "another thread", "a cycle"])
def test_memory_is_used_again_once_its_last_holder_is_gone(last_holder):
    memory = loaders._Memory((64, 64), pin_memory=False)
    tensors = [memory.take() for _ in range(8)]
    places = {tensor.data_ptr() for tensor in tensors}
    holders = [{"sample": tensor[5]} for tensor in tensors]
    del tensors
    assert memory.take().data_ptr() not in places
    if last_holder == "another thread":
        with ThreadPoolExecutor(1) as pool:
            pool.submit(holders.clear).result()
    elif last_holder == "a cycle":
        for holder in holders:
            holder["itself"] = holder
        del holder
        holders.clear()
        assert memory.take().data_ptr() not in places
        gc.collect()
    holders.clear()
    freed = [torch.empty(64, 64, dtype=torch.float16) for _ in range(8)]  # not what the allocator hands out anew
    assert places.isdisjoint(tensor.data_ptr() for tensor in freed)
    again = [memory.take() for _ in range(8)]
    assert {tensor.data_ptr() for tensor in again} == places


@pytest.mark.parametrize("kind", KINDS)
def test_damage_surfaces_in_place_of_the_batch_it_spoils(tmp_path, kind):
    folder = tmp_path / "packed"
    dataset = write_packed(folder, np.random.default_rng(0).normal(size=(40, 2, 4, 4)), np.arange(40))
    victim = int(GlobalOrder(40, 0).indices(np.array([25]))[0])  # in the batch of step 3
    with open(folder / "shard-00000.bin", "r+b") as shard:
        shard.seek(victim * dataset.manifest.record_bytes)
        shard.write(b"damage")
    with make_loader(dataset, GlobalOrder(40, 0), BatchPlan(8), kind=kind, stop_step=5) as loader:
        for _ in range(3):
            next(loader)
        with pytest.raises(DataError, match=rf"shard-00000.bin: record {victim} \(sample {victim}, .*CRC-32"):
            next(loader)
        with pytest.raises(StopIteration):
            next(loader)


@pytest.mark.parametrize("kind", KINDS)
def test_closing_stops_the_threads_at_once(dataset, kind):
    loader = make_loader(dataset, GlobalOrder(SAMPLES, 0), BatchPlan(12), kind=kind, stop_step=10**9)
    next(loader)
    assert _reading_threads()
    start = time.monotonic()
    loader.close()
    assert time.monotonic() - start < 1
    assert not _reading_threads()
    with pytest.raises(StopIteration):
        next(loader)
    loader.close()


def _reading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("mpdit-read")]


def test_loaders_left_open_do_not_hold_up_the_interpreter(dataset):
    script = f"""
from mpdit.data import *
data = PackedLatents({str(dataset.path)!r})
order = GlobalOrder(len(data), 0)
loaders = [make_loader(data, order, BatchPlan(4), kind=kind, stop_step=10**9) for kind in {KINDS!r}]
print([next(loader).positions.tolist() for loader in loaders], flush=True)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[[0, 1, 2, 3], [0, 1, 2, 3]]\n", "")


def test_without_dali_the_message_says_what_to_do(dataset, monkeypatch):
    real_import = builtins.__import__

    def no_dali(name, *arguments, **keywords):
        if name.startswith("nvidia"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real_import(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", no_dali)
    with pytest.raises(ConfigError, match=r"pip install nvidia-dali.*--loader torch"):
        batches(dataset, "dali")
    assert len(batches(dataset, "torch")) == 6
    assert not _reading_threads()


def test_bad_requests_are_refused(dataset):
    with pytest.raises(ConfigError, match="loader is 'ffcv': choose one of dali, torch"):
        batches(dataset, "ffcv")
    with pytest.raises(ConfigError, match="the order is of 7 samples, the data set has 23"):
        make_loader(dataset, GlobalOrder(7, 0), BatchPlan(1), stop_step=1)
    for kind in KINDS:
        with pytest.raises(ConfigError, match="gpu_stage needs loader dali and a GPU"):
            make_loader(dataset, GlobalOrder(SAMPLES, 0), BatchPlan(1), kind=kind, stop_step=1, gpu_stage=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("gpu_stage", [False, True])
def test_on_a_gpu_nothing_changes(dataset, gpu_stage):
    wanted = batches(dataset)
    for kind in ("dali",) if gpu_stage else KINDS:
        order = GlobalOrder(SAMPLES, 0)
        options = {"kind": kind, "stop_step": 6, "device": "cuda", "gpu_stage": gpu_stage}
        with make_loader(dataset, order, BatchPlan(12), **options) as loader:
            got = list(loader)
        assert all(batch.moments.is_cuda == gpu_stage for batch in got)
        assert_same([Batch(*(getattr(batch, name).cpu() for name in FIELDS)) for batch in got], wanted)


def test_memory_stays_flat(tmp_path):
    dataset = write_packed(tmp_path, np.random.default_rng(0).normal(size=(256, 4, 32, 32)), np.zeros(256, int))
    order, plan = GlobalOrder(256, 0), BatchPlan(64)
    page = os.sysconf("SC_PAGE_SIZE")

    def resident() -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * page

    for kind in KINDS:
        with make_loader(dataset, order, plan, kind=kind, stop_step=400) as loader:
            sizes = [resident() for _ in loader]
        # 64 samples are 1 MB: keeping a tenth of what passed would show as 30 MB.
        assert sizes[-1] - sizes[100] < 16 << 20


@pytest.mark.parametrize(("patience", "expected"), [(60.0, 1), (1e-4, 4)])
def test_more_threads_read_when_records_are_waited_for(dataset, monkeypatch, patience, expected):
    """Cached files are read by one thread, as two would wait for Python's lock; slow ones by several at once."""
    positioned_read, reading, most = os.preadv, 0, 0

    def slow(*arguments):
        nonlocal reading, most
        reading += 1
        most = max(most, reading)
        time.sleep(0.005)
        reading -= 1
        return positioned_read(*arguments)

    monkeypatch.setattr(os, "preadv", slow)
    monkeypatch.setattr(loaders, "_WAITING", patience)
    order = GlobalOrder(len(dataset), 0)
    with make_loader(dataset, order, BatchPlan(12), kind="torch", stop_step=20) as loader:
        got = list(loader)
    assert most == expected
    assert_same(got, batches(dataset, stop=20))


def test_as_many_threads_read_as_the_disk_makes_wait(dataset, monkeypatch):
    monkeypatch.setattr(loaders, "_BATCHES_AHEAD", 3)
    order = GlobalOrder(len(dataset), 0)
    with make_loader(dataset, order, BatchPlan(12), kind="torch", stop_step=0) as loader:
        assert [loader._adapt(waited) for waited in (True, True, True, False, False, False)] == [1, 1, 0, -1, -1, 0]
