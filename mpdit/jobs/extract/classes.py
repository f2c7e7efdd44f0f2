"""Decides which class each image is of, by what its source says."""

from __future__ import annotations

import itertools
import re
import unicodedata
from array import array
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from mpdit.core.errors import DataError
from mpdit.core.text import counted

ClassMode = Literal["auto", "label", "folder", "top", "parent", "archive", "one"]

LABELS_NAME = "dataset.json"
"""EDM's file of labels: {"labels": [["00000/img00000000.png", 5], ...]}."""
UNLABELLED, IGNORED = -1, -2
"""In the place of labels: of an image that has none, and of one that is no sample."""

_MOST_CLASSES = 1 << 20
_ONE_CLASS = "all"
_NAMED = 5
_WORD = "(?:train(?:ing|val)?|val(?:id|idation)?|test(?:ing)?|dev|eval(?:uation)?|holdout|(?:un)?labell?ed)"
_SPLIT = re.compile(
    rf"{_WORD}s?([-_. ]?(set|data|images|split))?([-_. ]?\d+|[-_. ][a-z]|(?-i:[A-D]))?"
    r"|(images?|imgs?|jpegimages)([-_. ]?\d+)?",
    re.IGNORECASE,
)
"""Names of folders that are parts of a data set, and of those that hold the images of one; neither is a class."""
_WITH_SPLIT = re.compile(  # in a name of more words, as in cars_train and PublicTest
    rf"(?<![a-z]){_WORD}(?![a-z])|(?-i:(?<=[a-z])(?:Train|Val|Valid|Test)(?:ing|ation)?(?![a-z]))", re.IGNORECASE
)
_PART = re.compile(r"(?<![a-z])(train|val|test)(?:ing|id|idation)?(?![a-z])", re.IGNORECASE)
_WNID = re.compile(r"n\d{8}")  # WordNet's ids, ImageNet's names of classes

Classes = tuple[tuple[str, ...], NDArray[np.int32]]
"""Names of the classes, and a label for each image, int32 [N]; below 0 for one that is no sample."""


Place = tuple[str, ...]
"""Names of the folders that lead to a folder, from the top."""


class FoundImages:
    """Collects images as they are found, with what their source says of their classes."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.folders: list[str] = []
        """The path of the folder each lies in, archives included that its name has; "" for none."""
        self.all_folders: set[str] = set()
        """Paths of folders with and without images."""
        self.inside = ""
        """The folder of an archive that was asked for, with a slash at its end."""
        self.archives: dict[str, str] = {}
        """Archives among those folders: path, with a slash at its end, and name without suffix."""
        self.stem = ""
        """The name without suffix of the archive that all is in."""
        self.labels = array("i")
        """The class by webdataset's files, or UNLABELLED, or IGNORED."""
        self.dataset_labels: dict[str, Any] = {}
        """Labels by image name, from dataset.json."""
        self.unlabelled = False
        """Whether there is a dataset.json that says that there are no labels."""
        self.ignored: list[tuple[str, str]] = []
        """Files that are not among the images, and why."""
        self.hidden: dict[str, None] = {}
        """Hidden files, and those in hidden folders, in order."""
        self.notes: list[str] = []
        """What was assumed."""


def as_label(value: Any) -> int:
    """Return a class's number as a source gives it; ValueError when it is none."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _MOST_CLASSES:
        raise ValueError(f"{value!r:.40} is no whole number from 0 to {_MOST_CLASSES - 1}")
    return value


def classify(path: Path, found: FoundImages, mode: ClassMode) -> Classes:
    """Return the classes by `mode`; "auto" takes labels, else folders, else archives, whichever there are first.

    - "label": the number in KEY.cls or KEY.json beside KEY.jpg, as webdataset has it, or in EDM's dataset.json.
    - "folder": the top folder, as torchvision's ImageFolder has it, below those that all images share. Refused when
      that isn't the only way to read it: it is named as a split is, or holds images in several folders.
    - "top", "parent": the first or the last folder of an image's path, whatever they are named.
    - "archive": the tar or zip it lies in, the innermost. "one": all images are of one class.

    In "auto" archives named as classes are, not numbered through as shards are, count as top folders. Classes by name
    are numbered in text order, as ImageFolder does. Raises DataError, naming image and remedy, when the source doesn't
    have what is needed or can be read in two ways.
    """
    if found.dataset_labels and mode in ("auto", "label"):
        _look_up(path, found)
    has_label = any(label >= 0 for label in found.labels)
    _note_splits(path, found)
    if mode == "one":
        return (_ONE_CLASS,), np.zeros(len(found.names), np.int32)
    if mode == "label" and not has_label:
        raise DataError(f"{path} holds no labels: no KEY.cls or KEY.json beside the images, and no dataset.json")
    if mode == "auto" and has_label and not found.dataset_labels:
        _note_folders(path, found)
    if mode == "label" or (mode == "auto" and has_label):
        return _by_labels(path, found)
    named: Mapping[str, str] = {}
    if mode in ("archive", "top", "parent"):
        named = _read_as(found, mode)
    elif mode == "folder" or not found.unlabelled:
        named = _by_folder(path, found, mode)
    if any(named.values()):
        return _by_name(path, found, {*named.values()} - {""}, [named[folder] for folder in found.folders])
    if mode == "archive":
        raise DataError(f"{path} is no archive, nor a folder of them: choose other classes")
    if mode != "auto":
        raise DataError(f"{path} has no folders that could be classes: all images lie at its top")
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


def _note_folders(path: Path, found: FoundImages) -> None:
    """Note when labels beside the images say otherwise than the folders, which would be the classes without them."""
    named = _read_as(found, "top")
    pairs = {(named[folder], label) for folder, label in zip(found.folders, found.labels, strict=True) if label >= 0}
    tops = {top for top, _ in pairs}
    if len(tops) > 1 and not len(pairs) == len(tops) == len({label for _, label in pairs}):
        found.notes.append(f"the classes of {path} are the labels beside its images, not its folders ({some(tops)})")


def _look_up(path: Path, found: FoundImages) -> None:
    """Give each image the label that dataset.json has for it. An entry without an image is an image that is missing."""
    labels = found.dataset_labels
    missing = labels.keys() - set(found.names)
    if missing:
        raise DataError(
            f"{path}: dataset.json has labels for {counted(len(missing), 'image')} not there ({some(missing)}): "
            "copy what is missing, or take it off the list"
        )
    for index, name in enumerate(found.names):
        if name in labels:
            try:
                found.labels[index] = as_label(labels[name])
            except ValueError as error:
                raise DataError(f"{path}: the label of {name} in dataset.json can't be used: {error}") from error


def _places(found: FoundImages, folders: Iterable[str], archives: bool) -> dict[str, Place]:
    """Return the folders that lead to each of `folders`; archives among them, when asked for, that may be classes."""
    of_classes = _of_classes(found) if archives else {}
    places = {}
    for folder in folders:
        names: list[str] = []
        passed = ""
        for name in f"{folder}/".removeprefix(found.inside).split("/")[:-1]:
            passed += f"{name}/"
            stem = found.archives.get(found.inside + passed)
            if of_classes.get(found.inside + passed) or (stem is None and name not in ("", ".", "..")):
                names.append(stem or name)
        places[folder] = tuple(names)
    return places


def _read_as(found: FoundImages, mode: Literal["archive", "top", "parent"]) -> dict[str, str]:
    """Return the class of each folder that images lie in, read in one way; "" for none."""
    folders = {*found.folders}
    if mode == "archive":
        return {folder: _innermost(found, folder) for folder in folders}
    places = _places(found, folders, archives=False)
    if mode == "parent":
        return {folder: place[-1] if place else "" for folder, place in places.items()}
    # What all share is no class, but each image keeps a folder.
    inside = [place[:-1] for place in places.values() if place]
    shared = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*inside, strict=False))
    depth = sum(1 for _ in shared)
    return {folder: place[depth] if place else "" for folder, place in places.items()}


def _by_folder(path: Path, found: FoundImages, mode: ClassMode) -> dict[str, str]:
    """Return the class of each folder that images lie in: its top folder, if that is the only way to read it."""
    folders = {*found.folders}
    filled = {name.replace("\\", "/").rpartition("/")[0] for name, _ in found.ignored}
    places = _places(found, {*folders, *found.all_folders, *filled}, archives=mode == "auto")
    of_images = _below(places[folder] for folder in folders)
    of_files = _below(places[folder] for folder in (*folders, *filled))
    of_all = _below(places.values())
    # The folders that all images share are no classes. One beside an empty folder may be: that has lost its images.
    top: Place = ()
    while len(of_images[top]) == 1:
        (only,) = of_images[top]
        if not of_images[(*top, only)] or (of_all[top] - of_files[top] and not _SPLIT.fullmatch(only)):
            break
        top = (*top, only)
    classes, depth = of_images[top], len(top)
    named = {folder: places[folder][depth] if len(places[folder]) > depth else "" for folder in folders}
    if not classes:
        return named

    def refuse(why: str) -> NoReturn:
        readings = []
        for other in ("archive", "top", "parent"):
            if other != "archive" or found.archives:
                others = {*_read_as(found, other).values()} - {""}
                readings.append(f"{other} ({counted(len(others), 'class', 'classes')}: {some(others)})")
        raise DataError(f"{path} {why}; say what the classes are: {', '.join(readings)}, or one (all images)")

    splits = {name for name in classes if _SPLIT.fullmatch(name)}
    if splits or all(map(_WITH_SPLIT.search, classes)):
        likely = max(sorted(splits or classes), key=lambda name: "train" in name.lower())
        example = "" if found.archives else f", such as {path}/{'/'.join((*top, likely))}"
        refuse(f"holds {some(splits or classes)}, parts of a data set and no classes: give one of them{example}")
    if empty := of_all[top] - classes:
        raise DataError(
            f"{path} has {counted(len(empty), 'class folder')} without an image ({some(empty)}): a class without "
            "images can't be learnt; fill or remove what is empty"
        )
    outside = [name for name, folder in zip(found.names, found.folders, strict=True) if not named[folder]]
    if outside and (len(classes) == 1 or 2 * len(outside) > len(found.names)):
        refuse(f"has {counted(len(outside), 'image')} ({some(outside, 1)}) beside {counted(len(classes), 'folder')}")
    # Below a class, folders of splits or of images only are no classes of their own.
    leaves = {
        (named[folder], *(name for name in places[folder][depth + 1 :] if not _SPLIT.fullmatch(name)))
        for folder in folders
        if named[folder]
    }
    levels = itertools.zip_longest(*leaves)
    merging = any(1 < len({*level} - {None}) < len(classes) for level in levels)
    archives = classes & {found.archives[inside] for inside, single in _of_classes(found).items() if single}
    inner = mode == "auto" and any(leaf[0] in archives and leaf[1:2] not in ((), leaf[:1]) for leaf in leaves)
    if len(leaves) > len(classes) or merging or inner:
        example = "/".join((*top, *max(leaves, key=lambda leaf: (len(leaf), leaf))))
        refuse(f"has images in folders within folders ({example}), and either may be the classes")
    found.ignored += [(name, "lies outside the class folders") for name in outside]
    if odd := [name for name in classes if _WITH_SPLIT.search(name)]:
        found.notes.append(f"classes of {path} that may be parts of a data set by their names: {some(odd)}")
    if archives and mode == "auto" and not all(map(_WNID.fullmatch, classes)):
        found.notes.append(f"the classes of {path} are its {counted(len(classes), 'archive')} ({some(classes)})")
    elif top:
        found.notes.append(f"the classes of {path} are the {counted(len(classes), 'folder')} in {'/'.join(top)}")
    return named


def _below(places: Iterable[Place]) -> defaultdict[Place, set[str]]:
    """Return by folder the names of the folders in it, of all that lead to `places`."""
    below: defaultdict[Place, set[str]] = defaultdict(set)
    for place in places:
        for depth, name in enumerate(place):
            below[place[:depth]].add(name)
    return below


def _by_name(path: Path, found: FoundImages, names: Iterable[str], values: Sequence[str]) -> Classes:
    """Number classes in the order of their names, and images by the name of each."""
    classes = tuple(sorted(names))
    numbers = {name: number for number, name in enumerate(classes)}
    forms = defaultdict(list)
    for name in classes:
        forms[re.sub(r"\d+", "#", name)].append(name)
    for alike in forms.values():
        by_number = sorted(alike, key=lambda name: [(len(part), part) for part in re.findall(r"0*(\d+)", name)])
        if later := next((name for name, other in zip(alike, by_number, strict=True) if name != other), None):
            found.notes.append(
                f"numbered classes of {path} are in text order, as torchvision's ImageFolder has them: {later} has the "
                f"label {numbers[later]}; for their numbers' order give them leading zeros, or a dataset.json"
            )
            break
    twins = defaultdict(list)
    for name in classes:
        twins[unicodedata.normalize("NFKC", name).casefold().strip()].append(name)
    if same := [ascii(" and ".join(names)) for names in twins.values() if len(names) > 1]:
        found.notes.append(f"classes of {path} that look the same are different ones: {some(same)}")
    return classes, np.array([numbers.get(value, -1) for value in values], np.int32)


def _note_splits(path: Path, found: FoundImages) -> None:
    """Note when images are taken from several splits together, by the names of folders and archives."""
    names = {name for folder in {*found.folders} for name in folder.split("/") if _SPLIT.fullmatch(name)}
    names |= {found.archives[inside] for inside, single in _of_classes(found).items() if not single}
    parts = {part.lower() for name in names for part in _PART.findall(name)}
    if len(parts) > 1:
        found.notes.append(
            f"images of {' and '.join(sorted(parts))} in {path} are taken together: give one to keep them apart"
        )


def _of_classes(found: FoundImages) -> dict[str, bool]:
    """Say of each archive whether it seems to be a class: one of several as deep, not numbered as shards are."""
    depths: dict[str, int] = {}
    stems: defaultdict[int, set[str]] = defaultdict(set)
    for inside, stem in found.archives.items():  # an archive comes after the one that it lies in
        outer = _above(inside)
        while outer and outer not in depths:
            outer = _above(outer)
        depths[inside] = depths.get(outer, 0) + 1
        stems[depths[inside]].add(stem)
    seem = {}
    for depth, names in stems.items():
        forms = {re.sub(r"\d+", "#", name) for name in names}
        seem[depth] = len(names) > 1 and (len(forms) == len(names) or all(map(_WNID.fullmatch, names)))
    return {inside: seem[depth] for inside, depth in depths.items()}


def _innermost(found: FoundImages, folder: str) -> str:
    """Return the name of the archive that a folder lies in; "" for none."""
    inside = f"{folder}/"
    while inside and inside not in found.archives:
        inside = _above(inside)
    return found.archives.get(inside, found.stem)


def _above(folder: str) -> str:
    """Return the path of the folder that a folder or archive lies in, both with a slash at the end; "" at the top."""
    return folder[: folder.rfind("/", 0, -1) + 1]


def some(names: Iterable[Any], most: int = _NAMED) -> str:
    """Return the first of some names, in order."""
    shown = sorted(str(name) for name in names)
    return ", ".join(shown[:most]) + (", ..." if len(shown) > most else "")
