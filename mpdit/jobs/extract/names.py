"""What the name of a file says it is."""

from __future__ import annotations

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
"""Of files that count as images, in small letters: torchvision's list, and ADM's gif."""

LABEL_SUFFIXES = (".cls", ".json")
"""Of webdataset's files that may hold the label of the image of the same key."""


def is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def is_label(name: str) -> bool:
    return name.lower().endswith(LABEL_SUFFIXES)


def is_hidden(name: str) -> bool:
    """Whether any part of the path is hidden, or made by macOS beside the real ones."""
    parts = name.split("/")
    return "__MACOSX" in parts or any(part.startswith(".") and part not in (".", "..") for part in parts)
