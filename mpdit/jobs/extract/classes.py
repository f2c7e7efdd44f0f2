"""Decides which class each image is of, by what its source says."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mpdit.core.errors import DataError
from mpdit.core.text import counted

ClassMode = Literal["auto", "label", "folder", "archive", "one"]

LABELS_NAME = "dataset.json"
"""EDM's file of labels: {"labels": [["00000/img00000000.png", 5], ...]}."""
UNLABELLED, IGNORED = -1, -2
"""In the place of labels: of an image that has none, and of one that is no sample."""

_MOST_CLASSES = 1 << 20
_ONE_CLASS = "all"
_NAMED = 5

Classes = tuple[tuple[str, ...], NDArray[np.int32]]
"""Names of the classes, and a label for each image, int32 [N]; below 0 for one that is no sample."""


class FoundImages:
    """Collects images as they are found, with what their source says of their classes."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.folders: list[str] = []
        """The folder that may be its class; "" for none."""
        self.archives: list[str] = []
        """The archive it lies in, without suffix; "" for none."""
        self.labels = array("i")
        """By webdataset's files, or UNLABELLED, or IGNORED."""
        self.dataset_labels: Mapping[str, Any] | None = None
        """By image name, from a dataset.json."""
        self.unlabelled = False
        """Whether there is a dataset.json that says that there are no labels."""
        self.class_folders: set[str] = set()
        """The top folders of a tree."""
        self.ignored: list[tuple[str, str]] = []
        """Files that are not among the images, and why."""


def as_label(value: Any) -> int:
    """Return a class's number as a source gives it; ValueError when it is none."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _MOST_CLASSES:
        raise ValueError(f"{value!r:.40} is no whole number from 0 to {_MOST_CLASSES - 1}")
    return value


def classify(path: Path, found: FoundImages, mode: ClassMode) -> Classes:
    """Return the classes by `mode`; "auto" takes labels, else folders, else archives, whichever there are first.

    Raises DataError, naming image and remedy, when the source doesn't have what is needed.
    """
    if found.dataset_labels is not None and mode in ("auto", "label"):
        _look_up(path, found, found.dataset_labels)
    has_label = any(label >= 0 for label in found.labels)
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
    archives = set(found.archives)
    if mode == "archive" or (guess and _one_class_each(archives)):
        return _by_name(archives, found.archives)
    raise DataError(
        f"{path} has no classes: its {len(found.names)} images have neither labels nor folders of their own; give each "
        "class a folder, or say what the classes are: archive (each tar or zip is one), folder, or one (all images)"
    )


def _by_labels(path: Path, found: FoundImages) -> Classes:
    for name, label in zip(found.names, found.labels, strict=True):
        if label == UNLABELLED:
            raise DataError(f"{path}: image {name} has no label, and others have: add it, or choose other classes")
    labels = np.array(found.labels, np.int32)
    return tuple(str(label) for label in range(int(labels.max()) + 1)), labels


def _look_up(path: Path, found: FoundImages, labels: Mapping[str, Any]) -> None:
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
                found.labels[index] = as_label(labels[name])
            except ValueError as error:
                raise DataError(f"{path}: the label of {name} in dataset.json can't be used: {error}") from error


def _by_folder(path: Path, found: FoundImages) -> Classes:
    if empty := found.class_folders - set(found.folders):
        raise DataError(
            f"{path} has {counted(len(empty), 'class folder')} without an image ({_some(empty)}): a class without "
            "images can't be learnt; fill or remove what is empty"
        )
    outside = [name for name, folder in zip(found.names, found.folders, strict=True) if not folder]
    found.ignored += [(name, "lies outside the class folders") for name in outside]
    return _by_name(set(found.folders) - {""}, found.folders)


def _by_name(names: Iterable[str], values: Sequence[str]) -> Classes:
    """Number classes in the order of their names, and images by the name of each."""
    classes = tuple(sorted(names))
    numbers = {name: number for number, name in enumerate(classes)}
    return classes, np.array([numbers.get(value, -1) for value in values], np.int32)


def _one_class_each(archives: set[str]) -> bool:
    """Return whether each archive seems to be a class: there are several, not numbered through as shards are."""
    parts = [re.fullmatch(r"(.*?)(\d+)", name) for name in archives]
    numbers = sorted(int(part[2]) for part in parts if part)
    numbered = len(numbers) == len(archives) and len({part[1] for part in parts if part}) == 1
    consecutive = numbered and numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    return len(archives) > 1 and "" not in archives and not consecutive


def _some(names: Iterable[Any]) -> str:
    shown = sorted(str(name) for name in names)
    return ", ".join(shown[:_NAMED]) + (", ..." if len(shown) > _NAMED else "")
