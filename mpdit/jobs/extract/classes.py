"""Which class each image is of, by what its source says."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from mpdit.core.errors import ConfigError, DataError
from mpdit.core.files import counted
from mpdit.jobs.extract.listing import UNLABELLED, Found

ClassMode = Literal["auto", "label", "folder", "archive", "one"]

_MOST_CLASSES = 1 << 20
_ONE_CLASS = "all"
_NAMED = 5

Classes = tuple[tuple[str, ...], NDArray[np.int32]]
"""Names of the classes, and a label for each image, int32 [N]; -1 for one that lies outside them."""


def check_mode(mode: str) -> None:
    if mode not in get_args(ClassMode):
        raise ConfigError(f"classes is {mode!r}: choose one of {', '.join(get_args(ClassMode))}")


def as_label(value: Any) -> int:
    """A class's number as a source gives it; ValueError when it is none."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _MOST_CLASSES:
        raise ValueError(f"{value!r:.40} is no whole number from 0 to {_MOST_CLASSES - 1}")
    return value


def classify(path: Path, found: Found, mode: ClassMode) -> Classes:
    """The classes by `mode`; "auto" takes labels, else folders, else archives, whichever there are first.

    Raises DataError, naming image and remedy, when the source doesn't have what is needed.
    """
    if found.labels is not None and mode in ("auto", "label"):
        _look_up(path, found, found.labels)
    has_label = any(label >= 0 for label in found.label)
    match mode:
        case "one":
            return (_ONE_CLASS,), np.zeros(len(found.names), np.int32)
        case "label" if not has_label:
            raise DataError(f"{path} holds no labels: no KEY.cls or KEY.json beside the images, and no dataset.json")
        case "folder" if not any(found.folders):
            raise DataError(f"{path} has no folders that could be classes: all images lie at its top")
        case "archive" if not any(found.archives):
            raise DataError(f"{path} is no archive, nor a folder of them: choose other classes")
    if mode == "label" or (mode == "auto" and has_label):
        return _by_labels(path, found)
    guess = mode == "auto" and not found.unlabelled
    if mode == "folder" or (guess and any(found.folders)):
        return _by_folder(path, found)
    if mode == "archive" or (guess and _one_class_each(found)):
        names = tuple(sorted({found.archives[index] for index in found.container}))
        return names, _number(names, [found.archives[index] for index in found.container])
    raise DataError(
        f"{path} has no classes: its {len(found.names)} images have neither labels nor folders of their own; give each "
        "class a folder, or say what the classes are: archive (each tar or zip is one), folder, or one (all images)"
    )


def _by_labels(path: Path, found: Found) -> Classes:
    for name, label in zip(found.names, found.label, strict=True):
        if label == UNLABELLED:
            raise DataError(f"{path}: image {name} has no label, and others have: add it, or choose other classes")
    labels = np.array(found.label, np.int32)
    return tuple(str(label) for label in range(int(labels.max()) + 1)), labels


def _look_up(path: Path, found: Found, labels: Mapping[str, Any]) -> None:
    """Give each image the label that dataset.json has for it. An entry without an image is an image that is missing."""
    missing = labels.keys() - set(found.names)
    if missing:
        raise DataError(
            f"{path}: dataset.json has labels for {counted(len(missing), 'image')} not there ({_some(missing)}): "
            "copy what is missing, or take it off the list"
        )
    for index, name in enumerate(found.names):
        if name in labels:
            try:
                found.label[index] = as_label(labels[name])
            except ValueError as error:
                raise DataError(f"{path}: the label of {name} in dataset.json can't be used: {error}") from error


def _by_folder(path: Path, found: Found) -> Classes:
    if empty := [*found.empty_folders, *_empty_in_archives(found)]:
        raise DataError(
            f"{path} has {counted(len(empty), 'class folder')} without an image ({_some(empty)}): a class without "
            "images can't be learnt; fill or remove what is empty"
        )
    names = tuple(sorted(set(found.folders) - {""}))
    for name, folder in zip(found.names, found.folders, strict=True):
        if not folder:
            found.ignored.add(name, "lies outside the class folders")
    return names, _number(names, found.folders)


def _empty_in_archives(found: Found) -> set[str]:
    """Folders beside those that are classes, of which no archive has an image."""
    with_images = {name.rpartition("/")[0] for name, folder in zip(found.names, found.folders, strict=True) if folder}
    beside = {folder.rpartition("/")[0] for folder in with_images}
    above = {folder[:end] for folder in with_images for end, letter in enumerate(folder) if letter == "/"}
    empty = found.archived_folders - with_images - above - {"", "."}
    names = {parent_and_name[2] for folder in empty if (parent_and_name := folder.rpartition("/"))[0] in beside}
    return names - set(found.folders)


def _number(names: Sequence[str], values: Sequence[str]) -> NDArray[np.int32]:
    numbers = {name: number for number, name in enumerate(names)}
    return np.array([numbers.get(value, -1) for value in values], np.int32)


def _one_class_each(found: Found) -> bool:
    """Whether each archive seems to be a class: there are several, not numbered through as shards are."""
    names = {found.archives[index] for index in found.container}
    parts = [re.fullmatch(r"(.*?)(\d+)", name) for name in names]
    counted = sorted(int(part[2]) for part in parts if part)
    numbered = len(counted) == len(names) and len({part[1] for part in parts if part}) == 1
    consecutive = numbered and counted == list(range(counted[0], counted[0] + len(counted)))
    return len(names) > 1 and "" not in names and not consecutive


def _some(names: Iterable[Any]) -> str:
    shown = sorted(str(name) for name in names)
    return ", ".join(shown[:_NAMED]) + (", ..." if len(shown) > _NAMED else "")
