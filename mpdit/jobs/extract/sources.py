"""Finding images: folder trees, tar and webdataset shards, zip files, each with EDM's dataset.json where it has one."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from mpdit.core.errors import DataError
from mpdit.core.zips import ZIP_DAMAGE, is_zip, open_zip
from mpdit.jobs.extract.classes import ClassMode, check_mode, classify
from mpdit.jobs.extract.listing import Found, ImageList
from mpdit.jobs.extract.names import IMAGE_SUFFIXES, is_hidden, is_image, is_label
from mpdit.jobs.extract.tars import list_tar

LABELS_NAME = "dataset.json"
"""EDM's file of labels: {"labels": [["00000/img00000000.png", 5], ...]}."""

_ARCHIVES = (".tar", ".zip")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")


def list_images(path: str | Path, classes: ClassMode = "auto") -> ImageList:
    """The images at `path` in order, each with its class, whatever they are kept in.

    - A folder tree: the class is the top folder, as torchvision's ImageFolder has it; links are followed.
    - A .tar, or a folder of them: the class is that of KEY.cls or KEY.json ("label" or "cls") beside KEY.jpg, as
      webdataset has it, else the folder an image lies in, else the tar (also a tar in a tar, as ImageNet comes).
    - A .zip, or a folder of them: the class is the folder an image lies in.
    - A dataset.json at the top of a folder or zip gives every image its label, as EDM has it.

    `classes` insists on "label", "folder" or "archive"; "one" puts all images into one class. Classes by name are
    numbered in sorted order. Labels are read for "auto" and "label" only; of several images of a labelled key KEY.jpg
    is taken, and KEY.seg.png ignored. Hidden files and __MACOSX are left out; files that are no images are counted and
    named in the result. Raises ConfigError for an unknown mode, DataError when there are no images or no classes, only
    some images have one, a label may be of several images, a class folder is empty, or an archive is damaged, or
    compressed as a whole.
    """
    check_mode(classes)
    path = Path(path)
    found = Found(reads_labels=classes in ("auto", "label"))
    with tqdm(desc="listing images", unit="img", disable=None, file=sys.stderr, leave=False) as bar:
        found.progress = bar.update
        if path.is_dir():
            _list_folder(path, found)
        elif path.is_file():
            _list_archives([path], found)
        else:
            raise DataError(f"{path} does not exist: give a folder of images, a tar or a zip")
    if not found.names:
        raise DataError(f"{path} holds no images ({' '.join(IMAGE_SUFFIXES)}): check the path")
    class_names, labels = classify(path, found, classes)
    return ImageList.sort(found, class_names, labels)


def _list_folder(path: Path, found: Found) -> None:
    entries = _entries(str(path))
    folders = [entry.name for entry in entries if entry.is_dir()]
    archives = [e for e in entries if e.name.lower().endswith((*_ARCHIVES, *_COMPRESSED)) and not e.is_dir()]
    if not archives:
        _list_tree(path, entries, found)
        return
    if folders:
        raise DataError(
            f"{path} holds archives ({archives[0].name}, ...) beside folders ({folders[0]}, ...): give one or the other"
        )
    for entry in entries:
        if entry not in archives:
            found.ignored.add(entry.name, "lies beside the archives")
    _list_archives([Path(entry.path) for entry in archives], found)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not is_hidden(entry.name)), key=lambda entry: entry.name)


def _list_tree(path: Path, entries: Sequence[os.DirEntry[str]], found: Found) -> None:
    found.open(str(path), "folder")
    for entry in entries:
        if entry.is_dir():
            before = len(found.names)
            _walk(entry, entry.name, entry.name, found, ())
            if len(found.names) == before:
                found.empty_folders.append(entry.name)
        elif entry.name == LABELS_NAME and found.reads_labels:
            _parse_labels(Path(entry.path).read_bytes(), entry.path, found)
        else:
            _add_file(entry, entry.name, "", found)


def _walk(folder: os.DirEntry[str], name: str, top: str, found: Found, above: tuple[tuple[int, int], ...]) -> None:
    status = folder.stat()
    itself = (status.st_dev, status.st_ino)
    if itself in above:
        found.ignored.add(name, "is a link to a folder above it")
        return
    for entry in _entries(folder.path):
        inside = f"{name}/{entry.name}"
        if entry.is_dir():
            _walk(entry, inside, top, found, (*above, itself))
        else:
            _add_file(entry, inside, top, found)


def _add_file(entry: os.DirEntry[str], name: str, folder: str, found: Found) -> None:
    if not is_image(name):
        found.ignored.add(name, "is no image by its name")
        return
    try:
        status = entry.stat()
    except OSError:  # a link to nowhere is an image that can't be read
        found.add(name, folder)
        return
    if stat.S_ISREG(status.st_mode):
        found.add(name, folder, size=status.st_size)
    else:
        found.ignored.add(name, "is no file")


def _list_archives(paths: Sequence[Path], found: Found) -> None:
    for path in paths:
        prefix = f"{path.name}/" if len(paths) > 1 else ""
        if path.name.lower().endswith(_COMPRESSED):
            raise DataError(
                f"{path} is compressed as a whole, so that no image in it can be read by itself: decompress it first"
            )
        try:
            if path.suffix.lower() == ".zip" or (path.suffix.lower() != ".tar" and is_zip(path)):
                _list_zip(path, prefix, found)
            elif path.suffix.lower() == ".tar":
                list_tar(path, prefix, found)
            else:
                raise DataError(f"{path} is neither a folder nor a .tar nor a .zip: give one of them")
        except OSError as error:
            raise DataError(f"{path} can't be read ({error.strerror or error}): check it, or copy it again") from error
    if found.labels is not None and len(paths) > 1:
        raise DataError(f"{LABELS_NAME} lies in one of {len(paths)} archives: give them one by one")


def _list_zip(path: Path, prefix: str, found: Found) -> None:
    found.open(str(path), "zip", path.stem)
    try:
        with open_zip(path) as archive:
            for member in archive.infolist():
                name = member.filename.removeprefix("./")
                if is_hidden(name):
                    continue
                if member.is_dir():
                    found.note_folder(prefix + name)
                    continue
                if not is_image(name):
                    found.note_folder(prefix + name.rpartition("/")[0])
                if name == LABELS_NAME and found.reads_labels:
                    _parse_labels(archive.read(member), f"{path}/{name}", found)
                elif is_image(name):
                    folder = name.rpartition("/")[0].rpartition("/")[2]
                    offset, size = member.header_offset, member.compress_size
                    found.add(prefix + name, folder, offset=offset, size=size, crc=member.CRC)
                elif not is_label(name):
                    found.ignored.add(prefix + name, "is no image by its name")
    except DataError:
        raise
    except ZIP_DAMAGE as error:
        raise DataError(f"{path} can't be read as a zip ({error}): it is damaged; copy it again") from error


def _parse_labels(text: bytes, where: str, found: Found) -> None:
    """Note the label of each name; null where there are none, as of EDM's unlabelled sets."""
    try:
        pairs = json.loads(text)["labels"]
        found.labels = None if pairs is None else dict(pairs)
        found.unlabelled = pairs is None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(
            f'{where} is no list of labels ({error}): it must hold {{"labels": [["folder/image.png", 5], ...]}}, '
            "unless other classes are chosen than its"
        ) from error
