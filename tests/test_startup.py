"""Tests what a fresh process imports: no command waits for what it doesn't use."""

import subprocess
import sys
from pathlib import Path

import pytest
from training_runs import REPOSITORY, TINY
from variants import VARIANTS

from mpdit.commands import COMMANDS
from mpdit.data.digits import VERSION, build_digits
from mpdit.model.mpdit import MPDiT

HEAVY = (
    *("torch", "deepspeed", "numpy", "PIL", "matplotlib", "sklearn", "scipy", "tqdm", "pydantic", "nvidia.dali"),
    *("diffusers", "transformers", "tensorboard", "safetensors"),
)
UNUSED = (
    *("torch._dynamo", "torch._inductor", "torch.onnx", "torch.utils.tensorboard", "sympy", "sklearn", "scipy"),
    *("nvidia.dali", "tensorboard", "diffusers", "transformers", "setuptools", "torchvision"),
)


def imported(names: tuple[str, ...], code: str, *arguments: str) -> list[str]:
    """Run code in a fresh process: the names among its modules; code may add to them as `seen`."""
    code = f"import sys; seen = []; {code}; print(sorted({{*seen, *sys.modules}} & set({names!r})))"
    ran = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found: list[str] = eval(ran.stdout.splitlines()[-1])
    return found


def test_help_imports_nothing_heavy() -> None:
    commands = [[], *([name] for name in COMMANDS)]
    code = f"from mpdit.cli import main; print([main([*words, '--help']) for words in {commands}], main(['--version']))"
    assert imported(HEAVY, code) == []


def test_a_step_of_training_and_reading_its_weights_import_only_what_they_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of torch's compiler, no loader that wasn't asked for, matplotlib for the last plot alone."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # what a GPU needs is not in the list
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build_digits(tmp_path / "mpdit" / f"digits-{VERSION}")
    code = (
        "sys.addaudithook(lambda event, args: event == 'import' and args[0] == 'mpdit.training.plots' and seen.extend("
        "'plotted too early' for name in sys.modules if name.startswith('matplotlib')));"
        "from mpdit.training.cli import main; out = sys.argv[-1]; print(main(sys.argv[1:]));"
        "from mpdit import load_weights; load_weights(out)"
    )
    arguments = ["--ds_config", str(REPOSITORY / "launch" / "zero2.json"), *TINY, "--steps", "1", "--loader", "torch"]
    # A lock of several processes, such as tqdm's, is a process of its own from Python 3.14 on.
    unwanted = (*UNUSED, "plotted too early", "matplotlib.pyplot", "multiprocessing.synchronize")
    assert imported(unwanted, code, *arguments, "--out", str(tmp_path / "run")) == []
    assert (tmp_path / "run" / "loss.png").exists()


def test_a_model_without_values_has_the_names_shapes_and_types_of_one_with_them() -> None:
    for name, config in VARIANTS.items():
        model, real = MPDiT.on_meta(config), MPDiT(config)
        found, expected = (
            {name: (value.shape, value.dtype) for name, value in (*m.named_parameters(), *m.named_buffers())}
            for m in (model, real)
        )
        assert found == expected, name
        assert all(value.is_meta for value in (*model.parameters(), *model.buffers()))
