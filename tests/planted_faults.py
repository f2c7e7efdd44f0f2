"""Plant one-line faults, one after the other, each in a copy of the tree of its own, and see which tests find them.

    python tests/planted_faults.py [--only N ...] [--all-tests] [--jobs N] [--suite DIR]

What the tests are worth, in numbers, before and after tests are merged, moved to `slow` or removed. A fault is found by
day where `make test` would fail, by night where only `make nightly` would. Each names its finder, the test that finds
it soonest; where that one passes, --all-tests runs the whole suite by day. --suite takes tests/ from another checkout.
First the finders run on the unchanged copy, where they must pass. Exit code 0: none is missed, and day misses at most
LEFT_TO_NIGHT.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parents[1]
LEFT_TO_NIGHT = 2
LIMIT = 1200
"""Seconds after which tests count as hung."""
NO_TESTS = (4, 5)
"""pytest's exit codes where it finds no file, or no test in it."""


class Fault(NamedTuple):
    """`old`, found once in `file`, becomes `new`; `finder` and `night`, of a slow test, are pytest's arguments."""

    file: str
    breaks: str
    old: str
    new: str
    finder: str
    night: str = ""


# fmt: off
M, K, T = "mpdit/", "kernels/mpdit_kernels/", "mpdit/training/"
FAULTS = tuple(Fault(*row) for row in (
    # model
    (M + "model/mpdit.py", "the modulation's shift and scale are swapped", "shift1, scale1, gate1, shift2",
     "scale1, shift1, gate1, shift2", "test_model_goldens.py -k guided"),
    (M + "model/layers.py", "positions are transposed", "torch.cat([column, row], dim=2)",
     "torch.cat([row, column], dim=2)", "test_model_goldens.py -k guided"),
    (M + "model/packed.py", "latents of several sizes come back in another order",
     "return [found[i] for i in range(len(found))]", "return list(found.values())",
     "test_model_mixed.py -k 'ablation and apart'"),
    (M + "model/time.py", "a cast to bf16 narrows the table of frequencies", "bits < torch.finfo(exact.dtype).bits",
     "bits > torch.finfo(exact.dtype).bits", "test_model.py -k cast"),
    (M + "model/mpdit.py", "the composed skip loses the embedding's bias",
     "linear(self.embed_bias, self.linear_weight, self.linear_bias)", "self.linear_bias",
     "test_model.py -k 'ablation'"),
    (M + "model/mpdit.py", "activation checkpointing never happens",
     "if not (self.activation_checkpointing and torch.is_grad_enabled()):",
     "if not self.activation_checkpointing or torch.is_grad_enabled():", "test_model.py -k checkpoint"),
    (M + "model/config.py", "the null class is the last class", "        return self.num_classes\n",
     "        return self.num_classes - 1\n", "test_sampling.py -k null_class"),
    (M + "interop/projects.py", "REPA's checkpoints are read with SiT's time", '"sihyun-yu/REPA",\n        "mpdit",',
     '"sihyun-yu/REPA",\n        "sit",', "test_interop_projects.py -k whose"),
    (M + "diffusion/inference.py", "a model prepared for sampling forgets what its file said",
     'getattr(model, "metadata", {})', "{}", "test_inference.py -k prepared"),
    (M + "interop/state_dict.py", "a table without a row for no class loses a class",
     "classes = max(1, rows - 1) if stated is None else stated", "classes = max(1, rows - 1)",
     "test_interop_projects.py -k no_class_is_lost"),
    (M + "model/weights.py", "guidance that was never trained goes unsaid", '.get("class_dropout") == 0:',
     '.get("class_dropout") == 1:', "test_interop_projects.py -k dropped"),
    (T + "init_weights.py", "fine-tuning takes a class for the null class", "parameter[-1].copy_(value[-1])",
     "parameter[-1].copy_(value[0])", "test_training_initial.py -k 'not TestRuns'"),
    # kernels: definitions
    (K + "adaln/reference.py", "the definition of adaLN lacks the 1 of 1 + scale", "normalized, 1 + scale[:, None])",
     "normalized, scale[:, None])", "test_model_goldens.py -k guided"),
    (K + "adamw_ema/optimizer.py", "on a CPU the average forgets instead of keeping", "share = 1 - settings.ema_decay",
     "share = settings.ema_decay", "test_optimizer.py"),
    (K + "fno/reference.py", "the definition's Fourier transform is conjugated",
     "torch.stack([angle.cos(), -angle.sin()], dim=1)", "torch.stack([angle.cos(), angle.sin()], dim=1)",
     "kernels/test_fno.py -k reference"),
    # kernels: Triton
    (K + "adaln/triton_impl.py", "layer norm's gradient keeps its mean",
     "mean_product[:, None] - mean_g[:, None]) * rstd", "mean_product[:, None]) * rstd",
     "kernels/test_adaln.py -k exact"),
    (K + "adaln/triton_impl.py", "only the first program's gate gradient counts",
     "partials[:, :, 0] if parts == 1 else partials.sum(2)", "partials[:, :, 0]", "kernels/test_adaln.py -k exact"),
    (K + "adaln/triton_impl.py", "a packed sequence runs on to the end of all",
     "tl.load(cu_seqlens + b), tl.load(cu_seqlens + b + 1)", "tl.load(cu_seqlens + b), T",
     "kernels/test_adaln_packed.py -k exact"),
    (K + "rows.py", "rows are normalised in bf16", "tiles = tiles + (tile.to(tl.float32),)", "tiles = tiles + (tile,)",
     "kernels/test_adaln.py -k exact"),
    (K + "dispatch.py", "compiled calls are judged by eager times", 'table = table.get("compiled", {})',
     "table = dict(table)", "kernels/test_tune.py -k 'loser'"),
    (K + "rows.py", "eps is added to the deviation, not to the variance", "1 / tl.sqrt_rn(row_mean(squares, D) + eps)",
     "1 / (tl.sqrt_rn(row_mean(squares, D)) + eps)", "kernels/test_adaln.py -k size_of_eps"),
    (K + "upsample/triton_impl.py", "fine tokens are transposed within a coarse one",
     "(y * R + offset // R) * (W * R) + x * R + offset % R", "(y * R + offset % R) * (W * R) + x * R + offset // R",
     "kernels/test_upsample.py -k exact"),
    (K + "fno/triton_impl.py", "mode 16 leaks into the mixing", "mask=mode > 0, other=0)",
     "mask=mode >= 0, other=0)", "kernels/test_fno.py -k exact"),
    (K + "rows.py", "GELU's slope lacks a factor of 3", "0.2140644488", "0.0713548163",
     "kernels/test_gelu_mlp.py -k exact"),
    (K + "short_attn/triton_impl.py", "a key of padding is attended to", "at[None, :] < limit, score",
     "at[None, :] <= limit, score", "kernels/test_short_attn.py -k exact"),
    (K + "short_attn/triton_impl.py", "with query_start the first tokens ask nevertheless",
     "load_rows(q + first * row_stride, rows, limit, row_stride, COLUMNS, D)  # [",
     "load_rows(q + (first - query_start) * row_stride, rows, limit, row_stride, COLUMNS, D)  # [",
     "kernels/test_short_attn.py -k nothing"),
    (K + "short_attn/triton_impl.py", "padded keys have weights in backward",
     "p = tl.where(at[:, None] < limit, p, 0)", "p = tl.where(at[:, None] < limit, p, p)",
     "kernels/test_short_attn.py -k large_scores"),
    (K + "short_attn/triton_impl.py", "all tiles of queries take the first one's sums of result times gradient",
     "delta_i = tl.load(delta + first + rows", "delta_i = tl.load(delta + rows", "kernels/test_short_attn.py -k exact"),
    (K + "adamw_ema/triton_impl.py", "bias is corrected by the next step's power", "step = (done + 1).to(tl.float64)",
     "step = (done + 2).to(tl.float64)", "kernels/test_adamw_ema.py"),
    (K + "adamw_ema/triton_impl.py", "weight decay is not scaled by the weight", "p -= decay * p", "p -= decay",
     "kernels/test_adamw_ema.py"),
    (K + "adamw_ema/triton_impl.py", "a step that is skipped is counted",
     "tl.store(steps, done + (1 - tl.load(skip)), mask=mask)", "tl.store(steps, done + 1, mask=mask)",
     "kernels/test_adamw_ema.py -k skips"),
    # what a run tells, and the planner's guess
    (M + "core/progress.py", "a bar starts a process on Python 3.14", "tqdm.set_lock(threading.RLock())",
     "tqdm.get_lock()", "test_startup.py -k step_of"),
    (T + "metrics.py", "a copied folder goes on in the first one's run of W&B", 'known["out"] != place and',
     "False and", "test_training_wandb.py -k copied"),
    (T + "metrics.py", "a continued run's clock starts anew", "elapsed = self._elapsed + time", "elapsed = time",
     "test_training_metrics.py"),
    (T + "metrics.py", "TensorBoard loses the last step that was kept", "purge = start_step + 1 if",
     "purge = start_step if", "test_training_metrics.py"),
    (T + "metrics.py", "grids and saves count as training", "self._start += time.perf_counter() - self._paused",
     "self._start += 0 * self._paused", "test_training_metrics.py"),
    (M + "planning/plan.py", "A100s are wired as H100s", "capability == (8, 0) else", "capability == (9, 0) else",
     "planning/test_plan.py -k wired"),
    # flow, sampling, random numbers
    (M + "diffusion/flow.py", "the target's sign", "t_b111 * noise, noise - x", "t_b111 * noise, x - noise",
     "test_flow.py"),
    (M + "diffusion/flow.py", "min-SNR is capped at 5", ".clamp(max=3.0)", ".clamp(max=5.0)", "test_flow.py"),
    (M + "diffusion/sampling.py", "Heun's second velocity is of the first time", "velocity(x + dt * v, i + 1))",
     "velocity(x + dt * v, i))", "test_sampling_solvers.py -k order"),
    (M + "diffusion/sampling.py", "guidance doesn't act at the interval's ends",
     "self.interval[0] <= times[index] <= self.interval[1]", "self.interval[0] < times[index] < self.interval[1]",
     "test_sampling.py -k interval"),
    (M + "diffusion/sampling.py", "channels that aren't guided forget the class", "conditional[:, channels:]",
     "unconditional[:, channels:]", "test_sampling.py -k official_sit"),
    (M + "diffusion/sampling.py", "the SDE's last step adds noise", "        if i < steps - 1:",
     "        if i < steps:",
     "test_sampling_solvers.py test_sampling.py"),
    (K + "philox/reference.py", "seeds above 2**32 repeat others", "(seed & _LOW, seed >> 32))", "(seed & _LOW, 0))",
     "test_rng.py"),
    # data
    (M + "data/loaders.py", "every epoch has the first one's order", "torch.tensor([epoch])", "torch.tensor([0])",
     "test_data_order.py"),
    (M + "data/loaders.py", "after a change of batch size samples are left out",
     "return self.start_position + (steps - self.start_step) * self.global_batch", "return steps * self.global_batch",
     "test_data_order.py"),
    (M + "data/loaders.py", "memory is used again while a batch is held",
     "weakref.finalize(lent, self._free.append, memory).atexit = False", "self._free.append(memory)",
     "test_data_loaders.py -k 'contents or order_says'"),
    (M + "data/loaders.py", "memory is free by what one Python counts as references", "        lent = memory.view()\n",
     "        self._kept = [*getattr(self, '_kept', ()), memory]\n        for lent in self._kept:\n"
     "            if __import__('sys').getrefcount(lent) == 3:\n                return torch.from_numpy(lent)\n"
     "        return torch.from_numpy(memory)\n", "test_data_loaders.py -k held"),
    (M + "data/records.py", "a std of -0 counts as negative", "max(initial=0) <= _NEGATIVE_ZERO",
     "max(initial=0) < _NEGATIVE_ZERO", "test_data_writer.py -k minus_zero"),
    (M + "data/normalization.py", "the paper's constants suit other latents too", "LIKE = 1.5\n", "LIKE = 2.5\n",
     "test_data_foreign.py -k suit"),
    (M + "data/records.py", "what fp16 loses of values is let pass", "MOST_LOST = 0.01", "MOST_LOST = 10.0",
     "test_data_writer.py -k blur"),
    (M + "diffusion/images.py", "the shift of latents is not added again", "value / scale.factor + scale.shift",
     "value / scale.factor", "test_sample_set_mistakes.py -k multiplied"),
    (M + "data/writer.py", "the manifest is named before the shards' names are on the disk",
     "        sync_to_disk(self.path)\n        last.publish()", "        last.publish()", "test_disk_order.py"),
    (M + "data/readers/edm2.py", "damage of a zip is not noticed", " or crc32(content) != checksum", "",
     "test_data_foreign.py -k damage"),
    (M + "data/quarantine.py", "what is quarantined is not on the disk", "os.fsync(file.fileno())",
     "os.stat(file.fileno())", "test_disk_order.py"),
    # training: checkpoints, guard, ends
    (M + "core/files.py", "a variable that is not set makes a folder of its name",
     'raise ConfigError(f"{text}: {found[0]} is not set', 'return found[0] or (f"{text}: {found[0]} is not set',
     "test_paths.py -k nothing_tells"),
    (M + "core/files.py", "a file is named before its contents are on the disk",
     "        sync_to_disk(partial)\n        os.replace", "        os.stat(partial)\n        os.replace",
     "test_training_checkpoint.py -k on_the_disk"),
    (T + "checkpoint/format.py", "a damaged shard is not noticed", 'if digest != entry["sha256"]:',
     'if len(digest) != len(entry["sha256"]):', "test_training_checkpoint.py"),
    (T + "checkpoint/save.py", "what is saved may be of the next step",
     "self._memory[key].copy_(values, non_blocking=True)", "values", "test_training_resume.py -k goes_on_while"),
    (T + "checkpoint/format.py", "raw weights are exported for the average", "reader.read(kind, name, 0,",
     'reader.read("weight", name, 0,', "test_training_checkpoint.py"),
    (T + "checkpoint/weights.py", "raw weights are the average", '_KINDS = {"raw": "weight"', '_KINDS = {"raw": "ema"',
     "test_training_weights.py"),
    (T + "setup.py", "a default batch that is rounded up makes another run", "batches = [asked.global_batch, ",
     "batches = [", "test_training_prepare.py -k have_folders_of_their_own"),
    (T + "setup.py", "a run is known by another batch than it trains with", 'identity |= {"precision": precision,',
     'identity |= {"precision": precision} or {', "test_training_prepare.py -k stays_when_ranks_change"),
    (T + "config.py", "data can't lie where names are not UTF-8", "os.fsencode(value)", "value.encode()",
     "test_training_prepare.py -k utf8"),
    (T + "loop.py", "a resumed run sees its last batch again", "samples = plan.samples_after(step)",
     "samples = plan.samples_after(step - 1)", "test_training_runs.py -k bit_for_bit"),
    (T + "metrics.py", "one more step may be skipped than --max-skips says",
     "skipped.in_a_row >= self._run.config.max_skips", "skipped.in_a_row > self._run.config.max_skips",
     "test_training_guard.py -k decided"),
    (T + "safety/guard.py", "a norm that DeepSpeed drops is taken", "(norm < LARGEST_NORM))", "norm.isfinite())",
     "test_training_guard.py -k finite"),
    (T + "safety/stop.py", "a stopped run ends as a finished one", "STOPPED = 75", "STOPPED = 0",
     "test_launch_slurm.py -k defaults"),
    (T + "safety/watchdog.py", "a hung rank ends with another code", "HUNG = 124", "HUNG = 1",
     "test_training_stop.py -k lets_pass"),
    (T + "loop.py", "ranks don't hear of each other's signals",
     "torch.distributed.all_reduce(asked, group=hosts)",
     "torch.distributed.barrier(group=hosts)", "test_training_stop.py -k one_rank"),
    (T + "cli.py", "bad input ends with code 1", "BAD_INPUT, FAILED = 2, 1", "BAD_INPUT, FAILED = 1, 1",
     "test_training_environment.py -k refuses_is_told"),
    # extraction, evaluation
    (M + "jobs/extract/decode.py", "a centre crop is one pixel off", "(height - size) // 2, (width",
     "(height - size + 1) // 2, (width", "test_extraction_crop.py"),
    (M + "jobs/extract/classes.py",
     "classes are numbered as they are found", 'classes = tuple(sorted(names))',
     'classes = tuple(sorted(names, reverse=True))', "test_extraction_sources.py"),
    (M + "jobs/extract/classes.py", "a split is a class", "if splits or all(", "if all(",
     "test_extraction_classes.py -k two_ways"),
    (M + "jobs/extract/archives.py", "a tar without its end is taken for whole", "end - stopped < tarfile.BLOCKSIZE",
     "end - stopped < 0", "test_extraction_archives.py -k cut_short"),
    (M + "jobs/extract/archives.py", "zeros in place of a tar's members are taken for its end",
     "(hole := _find_hole(ends)) or cut", "hole := None", "test_extraction_archives.py -k zeros"),
    (M + "core/zips.py", "members that a zip's table lacks are lost unsaid", "name and min(name) >= ord",
     "not name and min(name) >= ord", "test_extraction_archives.py -k table"),
    (M + "jobs/evaluate/image_sets.py", "any number of broken images is left out of a reference",
     "len(broken) > max_skipped or", "", "test_evaluation_image_sets.py -k broken"),
    (M + "jobs/extract/extract.py", "a damaged part is kept when it is repeated",
     'hashlib.file_digest(file, "sha256").hexdigest() == stored.sha256', "len(stored.sha256) == 64",
     "test_extraction_command.py -k finished_parts"),
    (M + "model/weights.py", "tensors that a VAE's files lack go unnoticed", '"lacks": loaded["missing_keys"]',
     '"lacks": ()', "test_vae.py -k fill"),
    (M + "jobs/extract/decode.py", "values of ten bits in sixteen come out black", "_SHARE = 1 << 14, 0.95",
     "_SHARE = 1 << 8, 0.95", "test_extraction_crop.py -k bits_of_grey"),
    (M + "jobs/extract/decode.py", "one bright row hides that the rest is black", "1 << 14, 0.95", "1 << 14, 1.0",
     "test_extraction_crop.py -k defeats"),
    (M + "jobs/extract/jpeg.py", "half of a picture is grey, unsaid", "longer.tobytes() != image.tobytes()", "False",
     "test_extraction_crop.py -k lack_data"),
    (M + "model/vae.py", "decoded pixels are rounded otherwise than in the papers", "(127.5 * signed + 128).nan",
     "(127.5 * signed + 127.5).nan", "test_vae.py"),
    (M + "jobs/evaluate/statistics.py", "the covariance is biased", "np.cov(values, rowvar=False)",
     "np.cov(values, rowvar=False, bias=True)", "test_evaluation_frechet.py"),
    (M + "jobs/evaluate/adm.py", "sFID is of the pooled features", "sfid=_frechet(found.spatial, target.spatial)",
     "sfid=_frechet(found.pool, target.pool)", "test_evaluation_adm.py -k known_features"),
    (M + "jobs/sample/drawing.py", "every part is drawn from the first one's noise",
     "job.sampler, first=first, progress", "job.sampler, first=0, progress", "test_sample_set.py -k one_call"),
    # planner, report
    (M + "planning/memory.py", "ZeRO-3 shards no weights", "(part if zero == 3 else whole) + WORD",
     "whole + WORD", "planning/test_memory.py -k shards"),
    (M + "planning/account.py", "attention is one product of two", "0, count * 2 * tokens**2 * width",
     "0, count * tokens**2 * width", "planning/test_account.py -k without_fusions"),
    (M + "planning/time.py", "the average costs no memory traffic", "ADAMW_EMA_BYTES = 36",
     "ADAMW_EMA_BYTES = 28", "planning/test_plan.py -k products"),
    (M + "planning/plan.py", "the last epoch is cut short", "math.ceil(self.request.epochs",
     "math.floor(self.request.epochs", "planning/test_plan.py -k epoch"),
    (M + "report/trace.py", "kernels side by side count twice", "max(span.start, reached))", "span.start)",
     "test_report_trace.py"),
    # command lines
    (M + "commands/common.py", "an error names another option than the one given", 'ConfigError(f"{flag(name)} {why}")',
     'ConfigError(f"{flag([*names][0])} {why}")', "test_convert_command.py -k refusals"),
    (T + "setup.py", "an error names a flag that is none", "or --resume auto", "or --restart auto",
     "test_training_prepare.py"),
    (T + "metrics.py", "an error names the wrong flag", "a larger --max-skips, or", "a larger --skip-spikes, or",
     "test_training_guard.py -k end_of_patience"),
    (T + "deepspeed_config.py", "a contradiction names the file's key as a flag",
     "f\"--{name.replace('_', '-')} is {given[name]}\"", "f\"--{key.replace('_', '-')} is {given[name]}\"",
     "test_training_config.py"),
    (T + "arguments.py", "a configuration file goes before the command line", "given = file | given | (",
     "given = given | file | (", "test_training_config_files.py"),
    (T + "setup.py", "a run goes on with another seed unnoticed", '*("bad_records", "gpu_stage"',
     '*("seed", "bad_records", "gpu_stage"', "test_training_prepare.py"),
    ("launch/slurm.sh", "SLURM's warning comes too late to save", "--signal=B:USR1@120", "--signal=B:USR1@60",
     "test_launch_slurm.py -k defaults"),
    ("launch/slurm.sh", "ranks are killed instead of being asked to stop", 'kill -USR1 "$step"', 'kill -TERM "$step"',
     "test_launch_slurm.py -k told_to_end"),
))
# fmt: on


class Found(NamedTuple):
    """When a fault was found, by which test, and the seconds that it took."""

    when: str
    test: str
    seconds: float


def main() -> int:
    """Run the faults that are asked for and print a line for each."""
    parser = argparse.ArgumentParser(description="Plant faults in copies of the tree and see which tests find them.")
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="numbers of faults (default: all)")
    parser.add_argument("--all-tests", action="store_true", help="run the whole suite by day where a finder passes")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="faults at a time (default: 1)")
    parser.add_argument("--suite", type=Path, default=REPOSITORY, metavar="DIR", help="checkout whose tests/ are run")
    args = parser.parse_args()
    chosen = {number: FAULTS[number - 1] for number in args.only or range(1, len(FAULTS) + 1)}
    with tempfile.TemporaryDirectory(prefix="mpdit-faults-") as folder, ThreadPoolExecutor(args.jobs) as pool:
        unchanged = Path(folder, "unchanged").resolve()
        copy_tree(args.suite, unchanged)
        check_copy(unchanged, chosen)
        finders = sorted({fault.finder for fault in chosen.values()})
        absent = set()
        for finder, (code, test) in zip(finders, pool.map(lambda f: run_tests(unchanged, f), finders), strict=True):
            if code in NO_TESTS and args.suite != REPOSITORY:
                absent.add(finder)
            elif code:
                sys.exit(f"error: {finder} ends with {code} without any fault: {test or 'it runs no test'}")

        def find(number: int) -> Found:
            fault = chosen[number]
            runs = [("by day", fault.finder, "not slow")] * (fault.finder not in absent)
            runs += [("by day", ".", "not slow")] * args.all_tests
            runs += [("by night", fault.night, "slow")] * bool(fault.night)
            return look_for(fault, runs, unchanged, unchanged.with_name(str(number)))

        found = pool.map(find, chosen)
        counts = {"by day": 0, "by night": 0, "NOT AT ALL" if args.all_tests else "MISSED BY ITS FINDER": 0}
        print(f"{'':3} {'found':20} {'seconds':>7}  fault | where | by which test")
        for (number, fault), (when, test, seconds) in zip(chosen.items(), found, strict=True):
            when = when or [*counts][-1]
            counts[when.partition(",")[0]] += 1
            print(f"{number:3} {when:20} {seconds:7.0f}  {fault.breaks} | {fault.file} | {test}", flush=True)
    print(f"{len(chosen)} faults:", ", ".join(f"{count} {when}" for when, count in counts.items() if count))
    return int(counts["by day"] + counts["by night"] < len(chosen) or counts["by night"] > LEFT_TO_NIGHT)


def copy_tree(suite: Path, copy: Path) -> None:
    """Copy what git knows or would add of this repository, with tests/ of `suite`."""
    for source, tests in ((REPOSITORY, False), (suite, True)):
        command = ["git", "-C", str(source), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
        for name in names:
            if name.startswith("tests/") == tests and (source / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source / name, copy / name)


def check_copy(copy: Path, chosen: dict[int, Fault]) -> None:
    """Leave unless each fault fits the copy, and the copy is what is imported, not an installed package."""
    for number, fault in chosen.items():
        count = (copy / fault.file).read_text().count(fault.old)
        if count != 1:
            sys.exit(f"error: {fault.file} has {fault.old!r} {count} times: mend fault {number}, {fault.breaks}")
    code = "import mpdit, mpdit_kernels; print(mpdit.__file__, mpdit_kernels.__file__, sep='\\n')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=copy, env=environment(copy), capture_output=True, text=True, check=True)
    if not all(Path(path).is_relative_to(copy) for path in done.stdout.splitlines()):
        sys.exit(f"error: {' and '.join(done.stdout.split())} are imported, not the copy in {copy}")


def look_for(fault: Fault, runs: list[tuple[str, str, str]], unchanged: Path, copy: Path) -> Found:
    """Plant a fault in a copy of the unchanged tree and run tests, (when, finder, marked), until one finds it."""
    began = time.monotonic()
    shutil.copytree(unchanged, copy)  # with the files' times, so that what was compiled stays good
    path = copy / fault.file
    path.write_text(path.read_text().replace(fault.old, fault.new))
    try:
        for when, finder, marked in runs:
            code, test = run_tests(copy, finder, marked)
            if code:
                how = "" if code == 1 else ", hangs" if code is None else ", no import" if code > 1 else ", dies"
                return Found(when + how, test or finder, time.monotonic() - began)
        return Found("", "", time.monotonic() - began)
    finally:
        shutil.rmtree(copy, ignore_errors=True)


def environment(copy: Path) -> dict[str, str]:
    """Have processes import the copy, and leave nothing faulty in the user's cache."""
    own = {"PYTHONPATH": f"{copy}{os.pathsep}{copy / 'kernels'}", "XDG_CACHE_HOME": str(copy / ".cache")}
    return os.environ | own


def run_tests(copy: Path, finder: str, marked: str = "not slow") -> tuple[int | None, str]:
    """Run tests of a copy in a session of their own; pytest's exit code, None where they hang, and which failed."""
    arguments = [f"tests/{word}" if word.endswith(".py") or word == "." else word for word in shlex.split(finder)]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", marked, *arguments]
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        options = {"cwd": copy, "env": environment(copy), "stdout": output, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, start_new_session=True, **options)
        code = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(LIMIT)
        with contextlib.suppress(ProcessLookupError):  # ranks that a fault has left behind, too
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        output.seek(0)
        failed = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(.*?)(?: - |$)", output.read(), re.MULTILINE)
    return code, failed[1] if failed else ""


if __name__ == "__main__":
    sys.exit(main())
