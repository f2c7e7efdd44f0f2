"""What an installation brings: exactly two import names, none of which shadows another library's."""

import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from itertools import chain
from pathlib import Path

import pytest

import mpdit

ROOT = Path(__file__).parents[1]


def run_python(code: str, cwd: Path) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, check=True, capture_output=True, text=True).stdout


def test_installed_top_level_names_are_exactly_two():
    names = (metadata.distribution("mpdit").read_text("top_level.txt") or "").split()
    assert sorted(names) == ["mpdit", "mpdit_kernels"]


def test_kernels_is_left_to_hugging_face(tmp_path):
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = (
        "import importlib.util as u; print([u.find_spec(n) is not None for n in ('kernels', 'launch', 'benchmarks')])"
    )
    assert run_python(code, tmp_path).strip() == "[False, False, False]"


def test_the_repository_root_is_not_on_the_path(tmp_path):
    paths = json.loads(run_python("import json, sys; print(json.dumps(sys.path))", tmp_path))
    assert str(ROOT) not in paths


def test_no_script_in_launch_shadows_an_import():
    scripts = {path.stem for path in (ROOT / "launch").glob("*.py")}
    assert scripts <= {"train"}


def test_pypi_apex_is_no_dependency():
    """PyPI's apex is another project; NVIDIA's is built from source. It is in no extra either."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    wanted = [*project["build-system"]["requires"], *project["project"]["dependencies"], *chain(*extras.values())]
    assert {"flash", "xformers"} <= set(extras)
    for requirement in [*wanted, *(metadata.requires("mpdit") or [])]:
        name = re.match(r"[\w.-]+", requirement)
        assert name and name[0].lower() != "apex"


@pytest.mark.parametrize(
    ("package", "one"),
    [("kernels/mpdit_kernels", "tuned/attention_cpu.json"), ("mpdit", "training/zero3.json")],
)
def test_json_files_of_a_package_are_shipped(package, one):
    project, folder = tomllib.loads((ROOT / "pyproject.toml").read_text()), ROOT / package
    shipped = {path for p in project["tool"]["setuptools"]["package-data"][folder.name] for path in folder.glob(p)}
    assert folder / one in shipped
    assert set(folder.rglob("*.json")) == shipped


def test_public_names_load_lazily(tmp_path):
    assert run_python("import sys, mpdit; print('torch' in sys.modules)", tmp_path).strip() == "False"
    assert [name for name in mpdit.__all__ if not hasattr(mpdit, name)] == []


def test_unknown_public_name():
    with pytest.raises(AttributeError, match="nothing_here"):
        mpdit.nothing_here  # noqa: B018


def test_the_oldest_versions_are_the_lower_bounds_of_pyproject(tmp_path: Path) -> None:
    """make test-oldest's Python and constraints, without what it installs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = dict(re.match(r"([\w-]+)>=([\d.]+)", line).groups() for line in project["dependencies"])
    target = f"{tmp_path}/.installed"
    plan = subprocess.run(
        ["make", "-n", "--no-print-directory", f"OLDEST_VENV={tmp_path}", target],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert plan[0].split()[0] == f"python{project['requires-python'].removeprefix('>=')}"
    for line in plan:
        if line.startswith(("sed ", "grep ")):
            subprocess.run(line, shell=True, cwd=ROOT, check=True)
    lines = (tmp_path / "constraints.txt").read_text().splitlines()
    for name in ("torch", "triton", "numpy"):
        assert [line for line in lines if line.startswith(f"{name}==")] == [f"{name}=={bounds[name]}"]
    assert "scipy==" in "\n".join(lines)
