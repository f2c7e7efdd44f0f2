"""GPU code without a GPU: launches, copies and waits of training, sampling, evaluation and extraction, counted."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import standin
import torch
from extraction_data import save_vae, some_files, write_tree
from rank_processes import free_port

from mpdit.data.latents import PackedLatents
from mpdit.model.mpdit import MPDiT
from mpdit.model.presets import preset
from mpdit.planning.memory import MemorySetting, memory
from mpdit.training.checkpoint.format import Checkpoint, committed_folders, read_values

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(standin.unavailable() is not None, reason=f"no stand-in for CUDA: {standin.unavailable()}"),
]

SCRATCH = tempfile.TemporaryDirectory()
STEPS = 6
LAUNCHES = 400
"""More than an eager step of the digits' model has; 372 were counted with torch 2.11, triton 3.6, DeepSpeed 0.19.8."""


@dataclass(frozen=True)
class Walk:
    """What came of a program: of each of its processes that told anything, a trace."""

    traces: list[list[standin.Record]]
    output: str

    def of(self, kind: str, phase: str = "", trace: int = 0) -> list[standin.Record]:
        return [record for record in self.traces[trace] if record.kind == kind and record.phase.startswith(phase)]


def walk(
    *command: str, gpus: int = 1, ranks: int = 1, hold: bool = True, gib: float | None = None, code: int = 0
) -> Walk:
    """Run a command in so many ranks and check what holds for all: none is refused anything, and no copy is raced."""
    folder = Path(tempfile.mkdtemp(dir=SCRATCH.name))
    made = standin.environment(gpus, trace=folder / "%d.trace", hold=hold, gib=gib)
    made["PYTHONPATH"] = os.pathsep.join([made["PYTHONPATH"], str(REPOSITORY), str(REPOSITORY / "kernels")])
    made |= {"TRITON_INTERPRET": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    places = [
        {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)} for r in range(ranks)
    ]
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            env=made | (place if ranks > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for place in places
    ]
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [code] * ranks, "\n".join(outputs)
    # In the order of ranks; of processes that they spawn, in the order of starting.
    traces = [standin.read(path) for path in sorted(folder.iterdir(), key=lambda path: int(path.stem))]
    for trace in traces:
        assert not [record for record in trace if record.kind in ("refused", "race", "error", "unsupported")]
        assert not [record for record in trace if record.kind == "replay" and record.text.startswith("0 kernels")]
    return Walk(traces, "\n".join(outputs))


def command(*arguments: str) -> list[str]:
    return [str(HERE / "walk.py"), "mpdit", *arguments]


@functools.cache
def trained(stage: int, *arguments: str, ranks: int = 1) -> tuple[Path, Walk]:
    """Train the digits' model for a few steps; return its folder and the walk."""
    folder = Path(tempfile.mkdtemp(dir=SCRATCH.name))
    zero = folder / "zero.json"
    zero.write_text(
        json.dumps({"zero_optimization": {"stage": stage, "overlap_comm": True} if stage else {"stage": 0}})
    )
    settings = ["--ds_config", str(zero), "--out", str(folder / "run"), "--loader", "torch", "--steps", str(STEPS)]
    return folder / "run", walk(*command("train", *settings, *arguments), gpus=ranks, ranks=ranks)


def where(records: Sequence[standin.Record]) -> Counter[str]:
    """Return who waits: the innermost function that is not torch's, as file.py:function."""
    # Comprehensions have frames of their own before Python 3.12.
    others = ("/torch/", "/contextlib", "walk.py", "<listcomp>", "<genexpr>", "<dictcomp>")
    frames = [next((f for f in r.stack if not any(text in f for text in others)), "?") for r in records]
    return Counter(
        f"{Path(frame.split(chr(34))[1]).name}:{frame.split()[-1]}" if '"' in frame else frame for frame in frames
    )


VERDICT = {"guard.py:flush": 1}
"""The one wait of ours in a step: for the verdict on the step before, which is there by then."""


WAITS: dict[tuple[int, int], dict[str, int]] = {
    (1, 0): {},
    (2, 0): {},
    (2, 1): {
        "utils.py:mask_nan_or_inf_with_val_inplace": 3,
        "utils.py:is_invalid_grad_norm": 2,
        "stage_1_and_2.py:unscale_and_clip_grads": 2,
    },
    (3, 0): {
        "cuda_accelerator.py:synchronize": 1,
        "stage3.py:independent_gradient_partition_epilogue": 1,
        "stage3.py:get_grad_norm_direct": 2,
        "utils.py:is_invalid_grad_norm": 1,
    },
}
"""DeepSpeed 0.19.8's in an eager step of several ranks, by ZeRO stage and --clip, copies of pageable memory among them:
to read the gradient's norm, and at stage 3 for its reductions. See deepspeed_config.complete."""


class TestTraining:
    @pytest.mark.parametrize("stage", [0, 1, 2])
    def test_a_step_on_one_gpu_is_one_graph(self, stage: int) -> None:
        _, walked = trained(stage)
        for step in range(3, STEPS):
            (replay,) = walked.of("replay", f"step {step}")
            assert int(replay.text.split()[0]) > 200
            assert len(walked.of("launch", f"step {step}")) < 10
            assert where(walked.of("wait", f"step {step}")) == VERDICT
            assert not walked.of("stage", f"step {step}")

    @pytest.mark.parametrize("stage", [0, 2])
    def test_an_eager_step_waits_for_nothing_but_the_last_ones_verdict(self, stage: int) -> None:
        _, walked = trained(stage, "--cuda-graph", "off", "--grad-accum-steps", "2")
        launches = [len(walked.of("launch", f"step {step}")) for step in range(3, STEPS)]
        assert len(set(launches)) == 1 and launches[0] < 2 * LAUNCHES
        for step in range(3, STEPS):
            assert where(walked.of("wait", f"step {step}")) == VERDICT
            assert not walked.of("stage", f"step {step}")
            assert not walked.of("allocate", f"step {step}")

    @pytest.mark.parametrize("stage", [0, 1, 2, 3])
    def test_each_of_two_ranks_stays_on_its_gpu(self, stage: int) -> None:
        _, walked = trained(stage, ranks=2)
        for rank, trace in enumerate(walked.traces):
            assert {record.text for record in trace if record.kind == "context"} == {f"device {rank}"}
            assert {record.device for record in trace if record.kind in ("launch", "collective")} == {rank}
            launches = [len(walked.of("launch", f"step {step}", rank)) for step in range(4, STEPS)]
            assert stage == 3 or len(set(launches)) == 1  # at stage 3 DeepSpeed still learns when to gather what
        collectives = [[r.text for r in walked.of("collective", f"step {STEPS - 1}", rank)] for rank in (0, 1)]
        assert collectives[0] == collectives[1] != []

    @pytest.mark.parametrize(("stage", "clip"), [(1, 0), (2, 0), (2, 1), (3, 0)])
    def test_what_deepspeed_waits_for(self, stage: int, clip: int) -> None:
        _, walked = trained(stage, "--clip", str(clip), "--cuda-graph", "off", ranks=2)
        waits = where([*walked.of("wait", "step 4"), *walked.of("stage", "step 4")])
        assert waits == VERDICT | WAITS[stage, clip]

    def test_a_checkpoint_holds_the_weights_that_were_on_the_gpu(self) -> None:
        run, walked = trained(0, "--checkpoint-every", "3")
        torch.manual_seed(0)
        expected = MPDiT(preset("MPDiT-Digits/4-2")).state_dict()  # no kernel has changed them
        for folder in committed_folders(run):
            values = read_values(Checkpoint.open(folder), "weight")
            assert all(torch.equal(values[name], value) for name, value in expected.items())
        assert len(committed_folders(run)) == 2
        # Most of what is copied is pinned once, in few blocks, and the saver's thread waits on its own GPU.
        assert len(walked.of("pin", "step 3 checkpoint")) <= 35
        assert not walked.of("pin", f"step {STEPS} checkpoint")

    def test_going_on_from_it(self) -> None:
        run, _ = trained(0, "--checkpoint-every", "3")
        settings = ["--ds_config", str(run.parent / "zero.json"), "--out", str(run), "--loader", "torch"]
        walked = walk(*command("train", *settings, "--checkpoint-every", "3", "--steps", "8", "--force"))
        assert len(walked.of("replay", "step 8")) == 1 and not walked.of("replay", "step 6")

    @pytest.mark.parametrize("mode", ["torch", "memory", "nsys"])
    def test_profiling(self, mode: str) -> None:
        run, walked = trained(0, "--profile", mode, "--profile-steps", "3:4")
        waits = [where(walked.of("wait", f"step {step}"))["profiling.py:_synchronize"] for step in range(1, STEPS)]
        assert sum(waits) == (0 if mode == "memory" else 2)  # at the window's ends
        assert len(list((run / "profile").glob("*"))) == (mode != "nsys")

    def test_peak_memory_is_what_was_planned(self) -> None:
        wide = {"width": 768, "heads": 12}
        _, walked = trained(0, "--cuda-graph", "off", *(f"--override={name}={value}" for name, value in wide.items()))
        peak = float(walked.output.partition("standin: peak of device 0: ")[2].split()[0])
        planned = memory(preset("MPDiT-Digits/4-2", **wide), MemorySetting(zero=0, gpus=1, images=64))
        assert 0.85 < peak / planned.allocated < 1.05

    def test_memory_that_runs_out_is_one_line(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            arguments = command(
                "train", "--ds_config", "zero2", "--out", f"{folder}/run", "--steps", "3", "--loader", "torch"
            )
            walked = walk(*arguments, gib=0.03, code=2)
        assert "error: GPU memory ran out on rank 0" in walked.output and "Traceback" not in walked.output


class TestSampling:
    @pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
    def test_graphs_hold_their_kernels_on_any_gpu(self, device: str) -> None:
        weights = str(trained(0)[0])
        with tempfile.TemporaryDirectory() as folder:
            drawing = ["sample", weights, "--out", f"{folder}/set", "--num", "16", "--batch", "8", "--steps", "5"]
            walked = walk(*command(*drawing, "--device", device, "--guidance", "2"), gpus=2)
        (trace,) = walked.traces
        assert {record.text for record in trace if record.kind == "context"} == {device.replace("cuda:", "device ")}
        replays = walked.of("replay")
        assert len(replays) == 2 * 5
        assert len({record.text for record in replays}) == 1 and replays[0].text.endswith(f"device {device[-1]}")

    def test_nothing_waits_within_a_batch(self) -> None:
        weights = str(trained(0)[0])
        with tempfile.TemporaryDirectory() as folder:
            drawing = ["sample", weights, "--out", f"{folder}/set", "--num", "16", "--batch", "8"]
            walks = [walk(*command(*drawing, "--steps", steps, "--out", f"{folder}/{steps}")) for steps in ("5", "20")]
        assert len({len(walked.of("wait")) for walked in walks}) == 1

    def test_two_processes_one_launcher_and_evaluation(self) -> None:
        weights = str(trained(0)[0])
        with tempfile.TemporaryDirectory() as folder:
            drawing = ["sample", weights, "--num", "64", "--batch", "16", "--steps", "3"]
            for walked in (
                walk(*command(*drawing, "--out", f"{folder}/a", "--gpus", "2"), gpus=2),
                walk(*command(*drawing, "--out", f"{folder}/b"), gpus=2, ranks=2),
            ):
                touched = [{record.text for record in trace if record.kind == "context"} for trace in walked.traces]
                assert sorted(map(sorted, filter(None, touched))) == [["device 0"], ["device 1"]]
            walked = walk(*command("evaluate", weights, "--device", "cuda:1", "--steps", "2"), gpus=2)
            assert {record.text for record in walked.of("context")} == {"device 1"}
            assert walked.of("replay")


class TestExtraction:
    """Moments that are read before they have arrived would be NaN, or another batch's."""

    @pytest.fixture(scope="class")
    def source(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("extraction")
        write_tree(folder / "images", some_files())
        save_vae(folder / "vae")
        return folder

    @pytest.mark.parametrize(
        ("arguments", "ranks", "touched"),
        [
            (["--device", "cuda:0"], 1, {"device 0"}),
            (["--device", "cuda:1"], 1, {"device 1"}),
            (["--gpus", "2"], 1, {"device 0", "device 1"}),
            ([], 2, {"device 0", "device 1"}),
        ],
        ids=["gpu 0", "gpu 1", "two processes", "launcher"],
    )
    def test_moments_are_those_that_were_on_the_gpu(
        self, arguments: list[str], ranks: int, touched: set[str], source: Path, tmp_path: Path
    ) -> None:
        settings = ["--vae", str(source / "vae"), "--image-size", "32", "--batch", "2", "--part-images", "4"]
        extract = [str(HERE / "extracting.py"), "extract", str(source / "images"), str(tmp_path / "packed"), *settings]
        walked = walk(*extract, *arguments, gpus=2, ranks=ranks)
        assert {r.text for trace in walked.traces for r in trace if r.kind == "context"} == touched
        packed = PackedLatents(tmp_path / "packed")
        moments, _ = packed.read(np.arange(len(packed)))
        assert np.isfinite(moments).all()
        assert np.allclose(moments[:, :, 4:], 0.1, atol=1e-3)  # no record but whole ones
        assert (moments[:, :, 0] == moments[:, :, 3]).all() and moments[:, :, :3].std() > 0.01


class TestBenchmarks:
    """Their figures are this CPU's, so they go nowhere."""

    @pytest.mark.parametrize("part", ["kernels", "block", "forward", "step", "sampling", "optimizer"])
    def test_a_part_runs(self, part: str, tmp_path: Path) -> None:
        small = ["--models", "MPDiT-B/4-2", "--batches", "8"] if part not in ("kernels", "optimizer") else []
        limits = ["--seconds", "0.1", "--rounds", "1", "--minutes", "0.5", "--results", str(tmp_path), *small]
        file = REPOSITORY / "benchmarks" / f"bench_{part}.py"
        chosen = "ours and not compile" + " and GELU" * (part == "kernels")
        walked = walk(str(HERE / "benching.py"), str(file), "-k", chosen, *limits, hold=False)
        assert " passed" in walked.output and "failed" not in walked.output
        assert walked.of("launch")


class TestTheStandIn:
    """What it is there to find, it finds."""

    def test_a_buffer_that_is_used_in_flight(self, tmp_path: Path) -> None:
        found = _script(
            """
            import standin, torch
            host, device = torch.zeros(1000).pin_memory(), torch.ones(1000).cuda()
            host.copy_(device, non_blocking=True)
            assert host.isnan().all()
            torch.cuda.synchronize()
            assert (host == 1).all() and not standin.counts()["races"]
            device.copy_(host, non_blocking=True)
            host.fill_(2)
            torch.cuda.current_stream().synchronize()
            assert standin.counts()["races"] == 1
            side, done = torch.cuda.Stream(), torch.cuda.Event()
            host.copy_(device, non_blocking=True)
            side.wait_stream(torch.cuda.current_stream())
            done.record(side)
            assert host.isnan().all()
            done.synchronize()  # of another stream, which waits for the copy's
            assert not host.isnan().any()
            """,
            tmp_path,
        )
        assert [record.kind for record in found if record.kind == "race"] == ["race"]

    def test_what_a_capture_forbids_and_a_graph_of_nothing(self, tmp_path: Path) -> None:
        found = _script(
            """
            import standin, torch
            x, graph = torch.ones(4, device="cuda"), torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    (x + 1).sum().item()
            except RuntimeError:
                pass
            assert standin.counts()["refused"]
            y = torch.ones(4, device="cuda:1") + 1
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y + 1
            graph.replay()
            assert standin.counts()["empty_replays"] == 1
            """,
            tmp_path,
        )
        (refused,) = [record for record in found if record.kind == "refused"]
        assert "script.py" in "".join(refused.stack)

    def test_a_launch_off_the_current_gpu(self, tmp_path: Path) -> None:
        found = _script(
            """
            import torch
            event = torch.cuda.Event()
            event.record()  # on GPU 0
            with torch.cuda.device(1):
                try:
                    event.record()
                    raise SystemExit("recorded on another device's stream")
                except RuntimeError as error:
                    assert "another device" in str(error) or "resource handle" in str(error) or "device" in str(error)
            """,
            tmp_path,
        )
        assert found

    def test_two_ranks_sum(self, tmp_path: Path) -> None:
        script = tmp_path / "sum.py"
        script.write_text(
            "import os, torch\n"
            "rank = int(os.environ['RANK'])\n"
            "torch.cuda.set_device(rank)\n"
            "torch.distributed.init_process_group('nccl')\n"
            "x = torch.arange(600_000, dtype=torch.float64).mul(rank + 1).cuda()\n"
            "torch.distributed.all_reduce(x)\n"
            "assert torch.equal(x.cpu(), 3 * torch.arange(600_000, dtype=torch.float64))\n"
            "part, whole = torch.empty(300_000, dtype=torch.float64, device='cuda'), x.cpu().cuda()\n"
            "torch.distributed.reduce_scatter_tensor(part, whole)\n"
            "assert torch.equal(part.cpu(), 2 * x.cpu()[rank * 300_000 : (rank + 1) * 300_000])\n"
            "torch.distributed.all_gather_into_tensor(whole, part)\n"
            "assert torch.equal(whole.cpu(), 2 * x.cpu())\n"
            "torch.distributed.destroy_process_group()\n"
        )
        walk(str(script), gpus=2, ranks=2)


def _script(text: str, folder: Path) -> list[standin.Record]:
    script, trace = folder / "script.py", folder / "trace"
    script.write_text("\n".join(line[12:] for line in text.splitlines()))
    subprocess.run(
        [sys.executable, str(script)], env=standin.environment(2, trace=trace, hold=True), check=True, timeout=300
    )
    return standin.read(trace)
