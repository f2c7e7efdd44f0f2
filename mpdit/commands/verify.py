"""`mpdit verify`: is a packed data set whole?"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mpdit.commands.outcome import Outcome

SUMMARY = "check a packed data set from the first byte to the last"
DESCRIPTION = (
    "Read every byte of a packed data set and check manifest, sizes, hashes, checksums, labels, values and statistics. "
    "Exit code 0 and a report when it is sound, 2 and the first thing wrong when not."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", type=Path, help="folder with manifest.json")


def run(args: argparse.Namespace) -> Outcome:
    from tqdm import tqdm

    from mpdit.data.verify import verify

    with tqdm(desc="verifying", unit="rec", disable=None, file=sys.stderr, leave=False) as bar:
        report = verify(args.data, progress=lambda done: bar.update(done - bar.n))
    fewest, most = min(report.class_counts), max(report.class_counts)
    lines = [
        f"sound: {args.data}",
        f"samples: {report.num_samples} in {report.shards} shard(s), {report.bytes / 1e6:.1f} MB",
        f"classes: {len(report.class_counts)}, of {fewest} to {most} samples",
        f"mean of the channels: {_channels(report.statistics.mean)}; in use {_channels(report.normalization.mean)}",
        f"std of the channels: {_channels(report.statistics.std)}; in use {_channels(report.normalization.std)}",
    ]
    return Outcome("\n".join(lines), {"path": str(args.data), **report.to_dict()})


def _channels(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.4g}" for value in values)
