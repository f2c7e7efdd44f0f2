"""The planner: arithmetic by hand, figures that must agree with the accounting, and its command."""

import contextlib
import dataclasses
import json
from pathlib import Path

import pytest
from mpdit_kernels.hardware import GPUS, find_gpu

import mpdit
from mpdit.cli import main
from mpdit.core.errors import ConfigError
from mpdit.model.kinds import TIME_EMBEDDINGS, TRANSITIONS
from mpdit.planning import account, time
from mpdit.planning.plan import Request, plan, usual_network
from mpdit.planning.time import HOST_BLOCK, Efficiency, Fabric, communication, efficiency, step_time, volume

XL, DIT = mpdit.PRESETS["MPDiT-XL/4-2"], mpdit.PRESETS["DiT-XL/2"]
IDEAL = Efficiency(1, 1, 1, 1, 1, 0, "nowhere")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("A100-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA L4", None),
        ("RTX 4090", "rtx4090"),
        ("A100-80", "a100-80gb"),
        ("h2000", None),
        ("a100-40gbx", None),
        ("a100", None),
    ],
)
def test_gpus_are_found_by_key_and_by_the_drivers_name(name, key):
    found = find_gpu(name)
    assert (found.key if found else None) == key


def test_volumes_are_those_of_the_zero_paper_but_for_all_reduced_gradients():
    once = 4 * 1000 * 7 / 8
    assert volume(0, 8, 1000, 1) == (2 * once, 0)
    assert volume(1, 8, 1000, 4) == (2 * once, once)
    assert volume(2, 8, 1000, 4) == (8 * once, once)
    assert volume(3, 8, 1000, 4) == (4 * once, 8 * once)
    assert volume(2, 1, 1000, 4) == (0, 0)


def test_nodes_are_wired_as_their_gpus_usually_are() -> None:
    assert usual_network(GPUS["a100-40gb"]) == 25e9, "HDR, 200 Gb/s"
    assert usual_network(GPUS["h200"]) == usual_network(GPUS["h100"]) == 50e9, "NDR, 400 Gb/s"


def test_each_transition_moves_what_its_own_layers_do() -> None:
    """Count by hand, in bytes of an image: 16 coarse and 64 fine tokens 8 wide, 4 class tokens, bf16, fp32 stream."""
    small = mpdit.ModelConfig(((2, 0), (1, 0)), 8, 2, input_size=8, class_tokens=4, num_classes=3)
    moved = {kind: time._transition_bytes(small.replace(transition=kind), 1, 2) for kind in TRANSITIONS}
    stream, refined = 68 * 8 * 4 * 4, 68 * 8 * 8 * 2
    shuffled, added = 16 * 4 * 4 * 8 * 2, 68 * 8 * 2 * 2
    assert moved == {
        "linear_linear": stream + refined,
        "linear": stream + added + shuffled,
        "conv_transpose": stream + added + shuffled + 16 * 4 * 8 * 2,
        "linear_mlp": stream + refined + shuffled + 68 * 6 * 32 * 2,
        "linear_conv": stream + refined + shuffled + 68 * 8 * 8 * 2,
    }


@pytest.mark.parametrize("command", ["account", "plan", "train"])
def test_help_of_overrides_names_every_kind(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        main([command, "--help"])
    told = " ".join(capsys.readouterr().out.split())
    for name, kind in (TRANSITIONS | TIME_EMBEDDINGS).items():  # type: ignore[operator]
        assert f"{name} ({kind.help})" in told


def test_a_collective_takes_bytes_over_the_slowest_link():
    fabric = Fabric(gpus_per_node=8, link=300e9, network=25e9, share=0.5)
    assert fabric.seconds(3e9, 8, 0) == pytest.approx(3e9 / 150e9)
    assert fabric.seconds(3e9, 16, 0) == pytest.approx(3e9 / 100e9)  # eight adapters of 25 GB/s, half of it
    assert fabric.seconds(3e9, 1, 5) == 0
    assert fabric.seconds(3e9, 64, 2) > fabric.seconds(3e9, 64, 0)


def test_gradients_hide_behind_backward_and_weights_do_not():
    fabric = Fabric(8, 100e9, 25e9, 1.0)
    found = communication(2, 8, 10**9, 1, backward=10.0, forward=5.0, fabric=fabric)
    assert found.exposed == pytest.approx(4e9 * 7 / 8 / 100e9, rel=0.02)
    assert communication(2, 8, 10**9, 1, 0.0, 0.0, fabric).exposed == pytest.approx(3 * found.exposed, rel=0.02)
    assert communication(3, 8, 10**9, 1, 10.0, 5.0, fabric).exposed == 0
    assert communication(0, 8, 10**9, 1, 10.0, 5.0, fabric).exposed > found.exposed, "reduced once backward is over"


def test_a_step_takes_what_its_launches_take_unless_it_is_one_graph():
    gpu, blocks = GPUS["h200"], sum(stage.blocks for stage in XL.stages)
    graph = step_time(XL, gpu, IDEAL, 1)
    launched = step_time(XL, gpu, IDEAL, 1, micro_steps=3, graphed=False)
    assert graph.waiting == 0
    assert launched.total == pytest.approx(3 * HOST_BLOCK * blocks)
    assert step_time(XL, gpu, IDEAL, 1024, graphed=False).waiting == 0
    request = Request(gpu, gpus=1, global_batch=1, zero=0)
    assert plan(XL, request).time.waiting == 0 < plan(XL, dataclasses.replace(request, zero=3)).time.waiting


def test_deepspeed_copies_gradients_where_it_reduces_them():
    gpu = GPUS["h200"]
    for gpus, zero, copies in ((1, 0, 0), (8, 0, 1), (8, 1, 1), (8, 2, 4), (8, 3, 4)):
        found = plan(XL, Request(gpu, gpus, 1024, zero, grad_accum_steps=4))
        assert found.time.copies == pytest.approx(copies * 29 * 480_839_216 / (gpu.bandwidth * found.share.bandwidth))


def test_products_take_exact_flops_over_the_peak():
    gpu = GPUS["h200"]
    found = step_time(XL, gpu, IDEAL, 128)
    linear = sum(part.executed_macs(128) for part in account(XL, 128).parts if part.linear)
    assert found.products == pytest.approx(6 * 128 * linear / gpu.flops)
    words = 1 + 2 * 4  # the gradient read, weight, both moments and average read and written
    assert found.optimizer == pytest.approx(4 * words * 480_839_216 / gpu.bandwidth)
    assert found.casts == pytest.approx((4 + 2) * 480_839_216 / gpu.bandwidth)
    again = step_time(XL, gpu, IDEAL, 128, activation_checkpointing=True)
    assert again.products == pytest.approx(4 / 3 * found.products)
    assert found.rest == 0
    twice = step_time(XL, gpu, dataclasses.replace(IDEAL, step=2.0), 128)
    assert twice.total == pytest.approx(2 * found.total)


def test_the_ratio_to_dit_is_near_that_of_the_flops():
    share = efficiency(GPUS["h200"])
    ours, theirs = (step_time(config, GPUS["h200"], share, 128).total for config in (XL, DIT))
    assert theirs / ours == pytest.approx(account(DIT).macs / account(XL).macs, rel=0.1)


@pytest.mark.parametrize("key", GPUS)
@pytest.mark.parametrize("name", mpdit.PRESETS)
def test_no_plan_beats_the_peak(name, key):
    found = plan(mpdit.PRESETS[name], Request(GPUS[key], gpus=8, global_batch=1024))
    assert 0 < found.mfu < found.share.matmul
    assert found.micro_batch * found.grad_accum_steps * 8 == 1024
    assert found.hours == pytest.approx(found.steps * found.step_seconds / 3600)
    for rows in found.scaling.values():
        assert all(0 < row["efficiency"] <= 1.0001 for row in rows)
    assert [row["gpus"] for row in found.scaling["images_per_gpu"]] == [8 << i for i in range(10)]


def test_a_run_ends_with_the_epoch_and_not_before() -> None:
    steps = [plan(XL, Request(GPUS["h100"], epochs=3, images=images)).steps for images in (1024, 1025)]
    assert steps == [3, 4]


def test_scaling_reaches_4096_from_any_number_of_gpus():
    found = plan(XL, Request(GPUS["h100"], gpus=3, global_batch=384))
    assert [row["gpus"] for row in found.scaling["images_per_gpu"]] == [3, *(8 << i for i in range(10))]


def test_a_run_of_which_not_one_image_fits_is_refused_with_what_would_help():
    small = dataclasses.replace(GPUS["h100"], memory=4 * 2**30)
    with pytest.raises(ConfigError, match=r"a --zero stage above 0, or a GPU with more memory"):
        plan(XL, Request(small, gpus=8, zero=0))
    with pytest.raises(ConfigError, match=r"give a GPU with more memory, or a smaller model or input"):
        plan(XL.replace(input_size=2048), Request(GPUS["h100"], zero=3))


def test_each_part_is_shown_at_its_most():
    found = plan(XL, Request(GPUS["a100-40gb"]))
    assert found.memory.gradients == 0 and found.memory_parts["gradients"] > 0
    assert all(found.memory_parts[name] >= value for name, value in vars(found.memory).items())


def test_it_splits_a_step_until_it_fits():
    found = plan(DIT.replace(input_size=64), Request(GPUS["a100-40gb"], gpus=8, global_batch=1024))
    assert found.grad_accum_steps > 1 and found.fits
    assert found.micro_batch <= found.largest[0] < found.largest[1]
    asked = plan(DIT.replace(input_size=64), Request(GPUS["a100-40gb"], gpus=8, global_batch=1024, grad_accum_steps=1))
    assert not asked.fits


def test_a_step_is_not_cut_small_for_the_sake_of_room_it_may_not_need():
    gpu = GPUS["rtx4090"]
    found = plan(DIT, Request(gpu, gpus=1, global_batch=256, zero=3))
    assert found.micro_batch == 8 and found.fits, "with room one image, and half as fast"
    beside = plan(DIT, Request(gpu, gpus=1, global_batch=256, zero=3, grad_accum_steps=256))
    assert found.step_seconds < 0.7 * beside.step_seconds
    roomy = plan(DIT, Request(GPUS["h100"], gpus=1, global_batch=4096, zero=2))
    assert 1.15 * roomy.memory.total <= GPUS["h100"].memory, "where it costs little, room is left"


def test_a_measured_gpu_is_planned_by_its_measurement(monkeypatch):
    known = dataclasses.asdict(dataclasses.replace(IDEAL, matmul=0.5, measured=True, source="a test"))
    monkeypatch.setattr(time, "measured", lambda: {"h100": known})
    assert plan(XL, Request(GPUS["h100"])).share.measured
    assert plan(XL, Request(GPUS["h100"])).time.products > plan(XL, Request(GPUS["h200"])).time.products


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"gpus": 7}, "multiple of 7"),
        ({"grad_accum_steps": 3}, "in 3 micro steps"),
        ({"gpus": 2048}, "multiple of 2048"),
        ({"epochs": 0}, "epochs is 0"),
    ],
)
def test_an_impossible_plan_is_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        Request(GPUS["h100"], **fields)


def test_the_command_prints_json_and_text(capsys):
    arguments = ["plan", "MPDiT-XL/4-2", "--gpu", "a100-40gb", "--gpus", "8", "--global-batch", "1024", "--zero", "2"]
    assert main([*arguments, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["fits"] is True and figures["micro_batch"] == 128
    assert figures["memory"]["optimizer"] == round(8 * 480_839_216 / 8)
    assert set(figures["communication_bytes_by_zero_stage"]) == {"0", "1", "2", "3"}
    assert main([*arguments, "--epochs", "1"]) == 0
    text = capsys.readouterr().out
    assert "does it fit?         yes" in text and "4096" in text and "not measured" in text


def test_the_docs_predictions_are_the_planners():
    ours, theirs = (plan(config, Request(GPUS["h200"], 1, 128, 0)) for config in (XL, DIT))
    paper = plan(XL, Request(GPUS["a100-40gb"]))
    text = Path(__file__).parents[2].joinpath("docs", "performance.md").read_text(encoding="utf-8")
    assert f"| {ours.mfu:.0%} (" in text
    assert f"| {theirs.step_seconds / ours.step_seconds:.2f}x (2.10 by FLOPs)" in text
    assert f"| {ours.memory.allocated / 1e9:.1f} GB allocated |" in text
    assert f"products {1e3 * ours.time.products:.1f}, norms" in text
    assert f"sums {paper.memory.total / 2**30:.2f} GiB" in text


def test_an_unlisted_gpu_goes_by_its_figures(capsys):
    figures = ["--gpu-memory", "48", "--gpu-tflops", "181", "--gpu-bandwidth", "864", "--gpu-link", "32"]
    assert main(["plan", "MPDiT-B/4-2", "--gpu", "l40s", *figures]) == 0
    assert "8 x l40s" in capsys.readouterr().out
    assert main(["plan", "MPDiT-B/4-2", "--gpu", "h100", "--gpu-memory", "20"]) == 0
    assert "of 20.00 GiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "l40s"], "--gpu-memory, --gpu-tflops"),
        (["--gpu", "h100", "--gpus", "7"], "multiple of 7"),
        (["--gpu", "h100", "--zero", "5"], "--zero"),
        (["--gpu", "h100", "--gpu-memory", "0"], "argument --gpu-memory: '0' is not"),
        (["--gpu", "h100", "--gpu-memory", "1e300"], "argument --gpu-memory: '1e300' is not"),
        (["--gpu", "h100", "--gpu-memory", "1"], "this run can't be"),
        (["--gpu", "h100", "--epochs", "1e308"], "epochs is 1e+308"),
        (["--gpu", "h100", "--network", "0"], "argument --network: '0' is not"),
        (["--gpu", "h100", "--epochs", "-1"], "--epochs"),
        ([], "--gpu"),
    ],
)
def test_bad_input_is_one_line(arguments, words, capsys):
    assert main(["plan", "MPDiT-B/4-2", *arguments]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1
