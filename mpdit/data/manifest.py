"""Reads and checks the manifest of a packed data set: what its records are, and which files hold them.

A packed data set is a folder of
    manifest.json    everything below, and its own SHA-256; written last, so a folder without it holds no data set
    index.bin        per record an int32 label and the CRC-32 of its bytes (8 bytes, little endian)
    shard-00000.bin  records back to back, fp16 little endian [variants, 2 * channels, height, width] each,
                     posterior means before stds; a few large files, every record at a computable offset
Nothing in it is ever unpickled.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from mpdit.core.errors import DataError
from mpdit.data.normalization import ABSURD, Normalization, apart, overall_std, seen, suits
from mpdit.data.records import INDEX_DTYPE, MOST_LOST, VALUE_DTYPE
from mpdit.model.config import MOST_CLASSES, ModelConfig
from mpdit.model.vae import stated_pixel_range

FORMAT = "mpdit-latents"
VERSION = 2
"""Version 1 had no checksum of the manifest itself; it is still read."""
MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.bin"
PARTS_NAME = ".parts"
JOB_NAME = "job.json"
"""Names of the folder in which an extraction keeps what is not yet put together, and of its note on the job."""
ORIGINAL = ("original",)
ORIGINAL_AND_FLIPPED = ("original", "flipped")


_SCALED_STD = (0.55, 1.45)
"""Bounds the std of latents that were multiplied by a VAE's scaling_factor, which is about 1 / std: 0.73 to 1 for
Stable Diffusion's on photographs."""
_LIKELY_STD = (0.1, 16.0)
"""Bounds the std of a VAE's own latents: 0.65 (SD3) to 8.5 (SDXL's first channel, of playground-v2.5)."""


@dataclass(frozen=True)
class StoredFile:
    """Describes one file of a data set: its plain name, records, size and SHA-256 in hex."""

    file: str
    records: int
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        # Plain names only: a manifest from elsewhere must not make us read outside its folder.
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", self.file):
            raise DataError(f"file name {self.file!r:.80} must be a plain name inside the data set's folder")
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise DataError(f"sha256 {self.sha256!r:.80} of {self.file} must be 64 lower-case hexadecimal digits")


@dataclass(frozen=True, kw_only=True)
class LatentSpec:
    """Describes the records of a data set. Raises DataError, naming field and remedy, when the parts don't fit."""

    channels: int
    """C of the latents; a record holds 2C planes, posterior means before stds."""
    height: int
    width: int
    num_classes: int
    class_names: tuple[str, ...] = ()
    """One per class; the numbers "0", "1", ... when not given."""
    variants: tuple[str, ...] = ORIGINAL
    """Encodings kept of each image: ("original",), or ("original", "flipped") to choose from at random."""
    kind: str = "latents"
    """Short name of the data, by which a decoder may know it: "digits", "imagenet256", ..."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """Where the latents come from: images, crop, encoder and its hash, ... Any JSON."""
    decoder: Mapping[str, Any] = field(default_factory=dict)
    """What turns denormalised latents into images, and their pixel range. Any JSON."""

    def __post_init__(self) -> None:
        for name in ("channels", "height", "width", "num_classes"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise DataError(f"{name} is {value!r:.80}: give a whole number of at least 1")
        if self.num_classes > MOST_CLASSES:
            raise DataError(f"num_classes is {self.num_classes}: give at most {MOST_CLASSES}, or mend the labels")
        for name in ("class_names", "variants"):
            names = getattr(self, name)
            if isinstance(names, str | bytes | Set | Mapping) or not isinstance(names, Iterable):  # in no order of ours
                raise DataError(f"{name} is {names!r:.80}: give a list of names, in the order of their numbers")
            object.__setattr__(self, name, tuple(names))
        if self.variants not in (ORIGINAL, ORIGINAL_AND_FLIPPED):
            raise DataError(f"variants is {self.variants!r:.80}: give {ORIGINAL} or {ORIGINAL_AND_FLIPPED}")
        if not self.class_names:
            object.__setattr__(self, "class_names", tuple(str(label) for label in range(self.num_classes)))
        if len(self.class_names) != self.num_classes:
            raise DataError(f"class_names holds {len(self.class_names)} names for num_classes {self.num_classes}")

    @property
    def record_shape(self) -> tuple[int, int, int, int]:
        """Return the shape (V, 2C, H, W) of a record."""
        return len(self.variants), 2 * self.channels, self.height, self.width

    @property
    def record_bytes(self) -> int:
        """Return the size of a record in a shard."""
        return math.prod(self.record_shape) * VALUE_DTYPE.itemsize


@dataclass(frozen=True, kw_only=True)
class DatasetInfo(LatentSpec):
    """Describes a data set, packed or not: its records, how many, and their statistics."""

    num_samples: int
    posterior_noise: bool
    """False when every posterior std is zero, so that there is no noise to draw."""
    normalization: Normalization
    """The constants training uses."""
    statistics: Normalization
    """The constants measured on these records."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("normalization", "statistics"):
            count = len(getattr(self, name).mean)
            if count != self.channels:
                raise DataError(f"{name} has {count} channels, the latents have {self.channels}")
        if not all(self.normalization.std):
            raise DataError(f"normalization std {self.normalization.std} must be above zero in every channel")

    @property
    def pixel_range(self) -> tuple[float, float] | None:
        """Return the range of pixels that the encoder took black and white as; None where it isn't stated."""
        return stated_pixel_range(self.decoder)

    def describe_source(self) -> str:
        """Return, in one line, where the latents come from, their factor, and the encoder's range of pixels."""
        words = [f"{name} {self.source[name]}" for name in ("format", "images", "vae") if self.source.get(name)]
        scale = self.source.get("scale")
        if type(scale) in (int, float):
            factor = "latents multiplied by no factor" if scale == 1 else f"latents divided by {scale:g}"
            if type(shift := self.source.get("shift")) in (int, float):
                factor += f", plus {shift:g}"
            origin = self.source.get("scale_origin")
            words.append(f"{factor} ({origin})" if origin else factor)
        words.append("pixels in {:g}..{:g}".format(*self.pixel_range) if self.pixel_range else "pixel range not stated")
        if found := self.source.get("range_origin"):
            words[-1] += f" ({found})"
        return ", ".join(words)

    def remarks(self) -> list[str]:
        """Return, a line each, what is measured of the latents and isn't what they are taken for."""
        found = []
        if left_out := self.source.get("left_out"):
            found.append(f"{left_out} beside the latents' files aren't read: check that none of them is missed")
        if not suits(self.normalization, self.statistics):
            found.append(
                f"by the normalisation in use a model sees {seen(self.normalization, self.statistics)}, not 0 "
                "and 1, so it does not suit these latents: give --normalization measured, or check scale and encoder"
            )
        for channel, (mean, std) in enumerate(zip(self.statistics.mean, self.statistics.std, strict=True)):
            # fp16 has 11 bits and exponents from -14; the rounding error is uniform in a step, of std step / sqrt(12).
            step = math.ldexp(1.0, max(math.frexp(mean)[1] - 1, -14) - 10)
            if step > MOST_LOST * math.sqrt(12) * std > 0:
                found.append(
                    f"channel {channel} has mean {mean:.4g} and std {std:.3g}, and fp16 holds such values in steps of "
                    f"{step:.2g}: where they were rounded to it, much of them is lost"
                )
                break
        std, origin = overall_std(self.statistics.std), self.source.get("scale_origin")
        if self.kind == "digits" or "vae_sha256" in self.source:
            return found
        if not _LIKELY_STD[0] < std < _LIKELY_STD[1]:
            found.append(
                f"the latents have std {std:.3g}, as no published VAE's own have: check --data-scale (it is what they "
                "were multiplied by), and that they are latents"
            )
        elif origin == "given":
            return found
        elif self.source.get("scale", 1) != 1:
            if origin:  # packed, it stays in doubt
                found.append(
                    f"{self.describe_source()}: where they are of another VAE than Stable Diffusion's, say by "
                    "--data-scale what they were multiplied by"
                )
        elif _SCALED_STD[0] < std < _SCALED_STD[1]:
            found.append(
                f"the latents are taken as the encoder makes them, and their std is {std:.3g}, as if multiplied "
                "by a VAE's scaling_factor: if they were, say so by --data-scale FACTOR[,SHIFT] (of packed latents to "
                "`mpdit sample`), or images come out at another contrast"
            )
        return found

    def check_normalization(self) -> None:
        """Raise DataError for constants that bring the latents nowhere near zero mean and unit std."""
        if ABSURD < apart(self.normalization, self.statistics) < math.inf:  # a channel may be constant, and meant
            raise DataError(
                f"by the normalisation in use a model would see {seen(self.normalization, self.statistics)}, which is "
                f"more than {ABSURD:g} times or stds off 0 and 1: give --normalization measured, or paper to insist"
            )

    def metadata(self) -> dict[str, Any]:
        """Return, in JSON types, what a weight file must carry about its data to decode samples without it."""
        scaled = self.source.get("scale", 1) != 1
        return {
            "kind": self.kind,
            "class_names": list(self.class_names),
            "normalization": {name: list(getattr(self.normalization, name)) for name in ("mean", "std")},
            "decoder": dict(self.decoder),
            # Another VAE than that of this factor shows that it was found wrongly.
            **(
                {name: self.source[name] for name in ("scale", "scale_origin") if name in self.source} if scaled else {}
            ),
        }

    def check_model(self, config: ModelConfig) -> None:
        """Raise DataError unless a model of this configuration can be trained on these latents."""
        ours, side = f"the data's latents are {self.channels}x{self.height}x{self.width}", config.input_size
        if self.height != self.width:
            raise DataError(
                f"{ours}, and models take square ones: crop images (`mpdit extract --image-size`) or latents"
            )
        if (self.channels, self.height) != (config.channels, side):
            coarsest = config.stages[0].patch
            remedy = "leave channels and input_size out of the overrides, as the data give them"
            if self.height % coarsest:
                remedy = f"override stages with a coarsest patch that divides {self.height}, {coarsest} doesn't"
            raise DataError(f"{ours}, the model takes {config.channels}x{side}x{side}: {remedy}, or choose other data")
        if self.num_classes > config.num_classes:
            raise DataError(
                f"the data has {self.num_classes} classes, the model {config.num_classes}: "
                f"set the model's num_classes to {self.num_classes}"
            )

    def to_json(self) -> str:
        """Return all fields as one JSON object, the same for the same data, whether its scale was given or found."""
        source = {
            name: value for name, value in self.source.items() if not (name.endswith("_origin") or name == "left_out")
        }
        return json.dumps(dataclasses.asdict(self) | {"source": source}, indent=1) + "\n"


@dataclass(frozen=True, kw_only=True)
class Manifest(DatasetInfo):
    """Adds the files of a packed data set to what is known of it: the parsed manifest.json."""

    index: StoredFile
    shards: tuple[StoredFile, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        for stored, record_bytes in (
            (self.index, INDEX_DTYPE.itemsize),
            *((s, self.record_bytes) for s in self.shards),
        ):
            if stored.records < 1 or stored.bytes != stored.records * record_bytes:
                raise DataError(f"{stored.file} can't hold {stored.records} records in {stored.bytes} bytes")
        held = sum(shard.records for shard in self.shards)
        if not self.num_samples == self.index.records == held:
            raise DataError(
                f"num_samples is {self.num_samples}, the index has {self.index.records} records, the shards {held}"
            )

    @property
    def sha256(self) -> str:
        """Return the SHA-256, in hex, of all fields. The file holds it too: a damaged digit may be another digit."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """Return manifest.json, with its own SHA-256."""
        fields = dataclasses.asdict(self) | {"sha256": self.sha256}
        return json.dumps({"format": FORMAT, "version": VERSION} | fields, indent=1) + "\n"

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read and check folder/manifest.json; DataError says what is wrong with it."""
        path = folder / MANIFEST_NAME
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            raise DataError(f"{folder} holds no data set: it has no {MANIFEST_NAME}; check the path") from None
        except OSError as error:
            raise DataError(f"can't read {path}: {error}") from error
        try:
            return _parse(json.loads(text))
        except DataError as error:
            raise DataError(f"{path}: {error}; copy or write the data set again") from None
        except (ValueError, OverflowError, RecursionError) as error:
            raise DataError(f"{path} can't be parsed ({error}): copy or write the data set again") from None


_TYPE_NAMES = {list: "a list", str: "text", int: "a whole number", bool: "true or false", dict: "an object"}


def _parse(document: Any) -> Manifest:
    header = _fields(document, {"format": str, "version": int}, "the manifest")
    if header["format"] != FORMAT or not 1 <= header["version"] <= VERSION:
        raise DataError(
            f"format {header['format']!r:.40} version {header['version']!r:.20} can't be read: "
            f"this mpdit reads {FORMAT!r} up to version {VERSION}; upgrade mpdit"
        )
    manifest: Manifest = _read(document, Manifest, "the manifest")
    if header["version"] > 1 and _fields(document, {"sha256": str}, "the manifest")["sha256"] != manifest.sha256:
        raise DataError("its fields don't match its sha256, so it was altered")
    return manifest


def _read(value: Any, declared: Any, what: str) -> Any:
    """Return a JSON value as a field of the declared type holds it. Raises DataError for a value of another type."""
    if dataclasses.is_dataclass(declared):
        return declared(**_fields(value, get_type_hints(declared), what))  # type: ignore[operator]
    origin = get_origin(declared)
    kind = {tuple: list, collections.abc.Mapping: dict}.get(origin, declared)
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise DataError(f"{what} is {value!r:.80}: expected {_TYPE_NAMES.get(kind, 'a number')}")
    return tuple(_read(item, get_args(declared)[0], f"an item of {what}") for item in value) if kind is list else value


def _fields(value: Any, declared: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Return the declared fields of a JSON object; those we don't know are left to newer versions."""
    if type(value) is not dict:
        raise DataError(f"{what} is {value!r:.80}: expected an object with {', '.join(declared)}")
    if missing := [name for name in declared if name not in value]:
        raise DataError(f"{what} lacks the field {missing[0]!r}")
    return {name: _read(value[name], kind, f"field {name!r} of {what}") for name, kind in declared.items()}
