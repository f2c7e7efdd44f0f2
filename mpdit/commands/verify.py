"""`mpdit verify`: checks that a data set is whole, and shows what training takes it for."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpdit.commands.common import Outcome, add_data, channels_lines, open_data
from mpdit.core.parser import to_path

SUMMARY = "check a data set from the first byte to the last"
DESCRIPTION = (
    "Read every byte of a data set and check it: manifest, sizes, hashes and checksums of packed latents; whole files "
    "of other projects' formats, which have no checksums; shapes, values, labels and statistics of both. Counts the "
    "classes, and puts the measured statistics beside the normalisation in use. "
    "Exit code 0 and a report when it is sound, 2 and the first thing wrong when not."
)

_MOST_LISTED = 20
_IMBALANCED = 2  # times as many samples in the largest class as in the smallest; ImageNet has 1.8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data",
        metavar="DATA",
        type=to_path,
        help="packed latents (a folder with manifest.json), or MPDiT's, fast-DiT's, EDM2's, REPA's or LightningDiT's",
    )
    add_data(parser)


def run(args: argparse.Namespace) -> Outcome:
    from mpdit.core.progress import bar
    from mpdit.data.verify import verify

    dataset = open_data(args, args.data)
    with bar("verifying", len(dataset), "rec") as shown:
        report = verify(dataset, shown.update)
    return Outcome("\n".join(_lines(args.data, report)), {"path": str(args.data), **report})


def _lines(data: Path, report: dict[str, Any]) -> Iterator[str]:
    from mpdit.data.normalization import Normalization

    where = f"{report['shards']} shard(s)" if report["checksums"] else f"the files of {report['format']}"
    yield f"sound: {data}"
    yield f"samples: {report['num_samples']} in {where}, {report['bytes'] / 1e6:.1f} MB"
    yield f"source: {report['origin']}"
    counts, empty = report["class_counts"], report["empty_classes"]
    yield f"classes: {len(counts)}, of {min(counts)} to {max(counts)} samples, in the median {report['median_count']:g}"
    if empty:
        more = ", ..." if len(empty) > _MOST_LISTED else ""
        yield f"empty classes: {len(empty)} ({', '.join(map(str, empty[:_MOST_LISTED]))}{more})"
    ratio = max(counts) / min(count for count in counts if count)
    if ratio > _IMBALANCED:
        yield f"imbalanced: {ratio:.1f} times as many samples in the largest class as in the smallest"
    yield from channels_lines(Normalization(**report["statistics"]), Normalization(**report["normalization"]))
    yield from (f"note: {remark}" for remark in report["remarks"])
    if not report["checksums"]:
        yield "checksums: the format has none; `mpdit convert` packs the data with them"
