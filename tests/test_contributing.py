"""CONTRIBUTING.md's recipes, followed to the letter in a copy of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
RECIPES = (REPOSITORY / "CONTRIBUTING.md").read_text().split("\n## Add ")[1:]


def follow(recipe: str, copy: Path) -> None:
    """Write the files and apply the diffs of a recipe. A diff's place is where its old lines stand."""
    for name, kind, text in re.findall(r"^`(\S+)`:\n\n```(python|diff)\n(.*?)^```", recipe, re.M | re.S):
        path = copy / name
        if kind == "python":
            path.parent.mkdir(exist_ok=True)
            assert not path.exists(), name
            path.write_text(text)
            continue
        for hunk in text.removeprefix("@@\n").split("@@\n"):
            lines = hunk.splitlines()
            old = "".join(f"{line[1:]}\n" for line in lines if line[:1] != "+")
            new = "".join(f"{line[1:]}\n" for line in lines if line[:1] != "-")
            assert path.read_text().count(old) == 1, f"{name} has not once:\n{old}"
            path.write_text(path.read_text().replace(old, new))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for folder in ("mpdit", "kernels", "tests"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_recipes_apply(copy: Path) -> None:
    assert len(RECIPES) == 4
    for recipe in RECIPES:
        follow(recipe, copy)
    for path in copy.rglob("*.py"):
        compile(path.read_text(), path, "exec")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.splitlines()[0])
def test_what_a_recipe_adds_works(recipe: str, copy: Path) -> None:
    follow(recipe, copy)
    (command,) = re.findall(r"^\.venv/bin/python -m pytest ([^#\n]*)", recipe, re.M)
    environment = os.environ | {"PYTHONPATH": f"{copy}:{copy / 'kernels'}"}
    arguments = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-m", "not slow", *command.split()]
    done = subprocess.run(arguments, cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
