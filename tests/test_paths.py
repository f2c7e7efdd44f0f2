"""Paths as users give them, and text files as their editors leave them."""

from __future__ import annotations

import getpass
import io
import json
import os
import pwd
import tarfile
from pathlib import Path

import fuzz_places
import latent_formats
import pytest

import mpdit
from mpdit import cli
from mpdit.core.errors import ConfigError, DataError
from mpdit.core.file_kind import explain_kind
from mpdit.core.files import expand_path, read_text, settle_folders
from mpdit.data import open_latents, write_packed
from mpdit.jobs.extract.contents import BESIDE
from mpdit.jobs.extract.sources import list_images
from mpdit.model.config import ModelConfig
from mpdit.training.arguments import parse_arguments
from mpdit.training.deepspeed_config import read_ds_config

ZERO2 = Path(__file__).parents[1] / "launch" / "zero2.json"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("BLANK", "")
    monkeypatch.delenv("NOWHERE", raising=False)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("~", "HOME"),
        ("~/runs/a", "HOME/runs/a"),
        ("~root/x", f"{pwd.getpwnam('root').pw_dir}/x"),
        ("$SCRATCH/runs", "/scratch/me/runs"),
        ("/data/${SCRATCH}x", "/data//scratch/mex"),
        ("$HOME/a", "HOME/a"),
        ("runs/~/a", "runs/~/a"),
        ("owner/name", "owner/name"),
        ("owner/name~", "owner/name~"),
        ("cost$/5$", "cost$/5$"),
        ("a b/c//d/", "a b/c//d/"),
        ("", ""),
    ],
)
def test_home_and_variables_stand_for_what_they_do_in_a_shell(given: str, meant: str, tmp_path: Path) -> None:
    assert expand_path(given) == meant.replace("HOME", str(tmp_path / "home"))


@pytest.mark.parametrize("name", ["~", "$SCRATCH", "a$NOWHERE"])
def test_what_is_there_under_such_a_name_is_meant_by_it(name: str) -> None:
    Path(name).mkdir()
    assert expand_path(name) == name
    os.symlink("gone", f"{name}/link")
    assert expand_path(f"{name}/link") == f"{name}/link"


def test_a_name_that_holds_no_variable_goes_on_where_a_folder_has_it() -> None:
    Path("a$NOWHERE").mkdir()
    assert expand_path("a$NOWHERE/new") == "a$NOWHERE/new"
    assert expand_path("$SCRATCH/new") == "/scratch/me/new"


@pytest.mark.parametrize(
    "given", ["$NOWHERE/x", "${NOWHERE}", "runs/$NOWHERE", "$BLANK/x", "${NOWHERE:-x}/y", "~nobody-here/x"]
)
def test_what_nothing_tells_is_refused_and_makes_no_folder(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="write the path out"):
        expand_path(given)
    for line in (
        ["sample", "run", f"--out={given}"],
        ["extract", given, "out", "--vae", "x/y"],
        ["extract", "images", "out", "--vae", given],
        ["convert", given, "out"],
        ["evaluate", "x", "--inception", given],
        ["verify", given],
        ["report", given],
    ):
        assert cli.main(line) == 2
        assert "write the path out" in capsys.readouterr().err
    assert not list(Path().iterdir())


def test_every_argument_that_is_a_path_is_read_as_one() -> None:
    parser = cli.build_parser()._subparsers._group_actions[0]  # type: ignore[union-attr]
    metavars = ("DIR", "FILE", "OUT", "SOURCE", "IMAGES", "DATA", "PAGE", "RESULTS", "REF", "PATH", "WEIGHTS")
    for command in parser.choices.values():  # type: ignore[union-attr]
        for action in command._actions:
            shown = " ".join(action.metavar) if isinstance(action.metavar, tuple) else action.metavar or ""
            if any(word in shown for word in metavars):
                assert action.type.__name__ in ("to_path", "path_text"), action.dest  # type: ignore[union-attr]


def test_paths_of_every_file_of_settings_are_expanded(tmp_path: Path) -> None:
    ds = json.loads(ZERO2.read_text()) | {"csv_monitor": {"enabled": False, "output_path": "~/csv", "job_name": "~"}}
    Path("ds.json").write_text(json.dumps(ds))
    Path("run.yaml").write_text(f"ds_config: {tmp_path}/ds.json\nout: ~/run\ndata: $SCRATCH/data\nmodel: MPDiT-B/4-2\n")
    given = parse_arguments(["--config", "run.yaml", "--init-from=${SCRATCH}/x.pt", "--resume=~/other"])
    home = str(tmp_path / "home")
    assert given["out"] == f"{home}/run" and given["resume"] == f"{home}/other"
    assert given["data"] == "/scratch/me/data" and given["init_from"] == "/scratch/me/x.pt"
    assert read_ds_config("ds.json")["csv_monitor"] == {"enabled": False, "output_path": f"{home}/csv", "job_name": "~"}
    Path("run.yaml").write_text("out: $NOWHERE/run\n")
    with pytest.raises(ConfigError, match=r"config run.yaml: .*--out: \$NOWHERE/run: \$NOWHERE is not set"):
        parse_arguments(["--config", "run.yaml", "--ds_config", "ds.json"])


def test_python_takes_text_as_the_command_line_does_and_a_path_as_it_is(tmp_path: Path) -> None:
    config = ModelConfig(width=8, heads=2, stages=((4, 1), (2, 1)), input_size=8, num_classes=3, class_tokens=1)
    model = mpdit.MPDiT(config)
    mpdit.save_weights("~/weights", model.state_dict(), config, {})
    assert (tmp_path / "home/weights/model.safetensors").is_file() and not Path("~").exists()
    assert mpdit.load_weights("$HOME/weights")[0].config == config
    mpdit.save_weights(Path("~"), model.state_dict(), config, {})
    assert (tmp_path / "~/model.safetensors").is_file()


def _unknown(user: int) -> None:
    raise KeyError(f"getpwuid(): uid not found: {user}")


@pytest.mark.parametrize("home", [None, "", "relative"])
def test_a_user_whom_nobody_knows_gets_a_home_of_its_own(
    home: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pwd.getpwuid", _unknown)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    settle_folders()
    made = tmp_path / f"mpdit-{os.getuid()}"
    assert (os.environ["HOME"], getpass.getuser()) == (str(made), str(os.getuid()))
    assert made.stat().st_mode & 0o777 == 0o700
    assert expand_path("~/.cache") == f"{made}/.cache"
    monkeypatch.delenv("HOME")
    settle_folders()
    assert os.environ["HOME"] == str(made)
    made.rename(tmp_path / "other")
    made.symlink_to(tmp_path / "other")
    monkeypatch.delenv("HOME")
    with pytest.raises(ConfigError, match=r"HOME is not set, and .* is another user's"):
        settle_folders()


def test_a_current_folder_that_is_gone_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    Path("gone").mkdir()
    os.chdir("gone")
    Path.cwd().rmdir()
    assert cli.main(["verify", "x"]) == 2
    assert capsys.readouterr().err == "error: the current folder was removed: change to one that is there\n"


def test_a_home_that_is_known_stays(tmp_path: Path) -> None:
    before = dict(os.environ)
    settle_folders()
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("given", "kept"),
    [("~/c", "HOME/c"), ("/var/c", "/var/c"), ("cache", None), ("", None), ("$SCRATCH", "/scratch/me")],
)
def test_caches_are_where_an_absolute_path_says(
    given: str, kept: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    settle_folders()
    assert os.environ.get("XDG_CACHE_HOME") == (kept and kept.replace("HOME", str(tmp_path / "home")))


MARKED = {
    "plain": str.encode,
    "a mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "a mark and Windows' lines": lambda text: b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode(),
    "PowerShell's": lambda text: b"\xff\xfe" + text.encode("utf-16-le"),
    "the other order": lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
}


@pytest.mark.parametrize("encode", MARKED.values(), ids=MARKED.keys())
def test_files_of_settings_are_read_whatever_editor_wrote_them(encode, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    Path("ds.json").write_bytes(encode(ZERO2.read_text()))
    Path("run.yaml").write_bytes(encode("steps: 3  \nout: café\noverride:\n  width: 32\n"))
    given = parse_arguments(["--config", "run.yaml", "--ds_config", "ds.json"])
    assert (given["steps"], given["out"], given["override"]) == (3, "café", ["width=32"])
    assert read_ds_config("ds.json") == read_ds_config(ZERO2)


@pytest.mark.parametrize("encode", MARKED.values(), ids=MARKED.keys())
def test_descriptions_and_labels_are_read_whatever_editor_wrote_them(encode, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    config = ModelConfig(width=8, heads=2, stages=((4, 1), (2, 1)), input_size=8, num_classes=3, class_tokens=1)
    mpdit.save_weights("weights", mpdit.MPDiT(config).state_dict(), config, {})
    latent_formats.write_edm2(tmp_path / "edm2", fuzz_places.moments(), latent_formats.labels_of(fuzz_places.COUNT))
    write_packed("packed", latent_formats.draw(4), [0, 1, 2, 2])
    for file in (Path("weights/config.json"), Path("edm2/dataset.json"), Path("packed/manifest.json")):
        file.write_bytes(encode(file.read_text()))
    assert mpdit.load_weights("weights")[0].config == config
    assert open_latents("edm2").manifest.num_samples == fuzz_places.COUNT
    assert open_latents("packed").manifest.num_classes == 3
    with tarfile.open("images.tar", "w") as archive:
        for name, content in (
            ("a.cls", encode("5\n")),
            ("a.png", b""),
            ("b.json", encode('{"label": 7}')),
            ("b.png", b""),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    assert list_images("images.tar").labels.tolist() == [5, 7]


def test_what_is_no_text_is_told_in_one_line() -> None:
    Path("latin").write_bytes(b"out: caf\xe9\n")
    os.mkfifo("pipe")
    with pytest.raises(ConfigError, match="config latin can't be read: 'utf-8' codec"):
        parse_arguments(["--config", "latin"])
    for path, reason in (("/dev/zero", "is no regular file"), (".", "Is a directory"), ("gone", "No such file")):
        with pytest.raises(ConfigError, match=f"config {path} can't be read: .*{reason}"):
            parse_arguments(["--config", path])


def test_a_pipe_is_read_but_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpdit.core.files._PIPE_SECONDS", 0.01)
    os.mkfifo("pipe")
    with pytest.raises(OSError, match="a pipe into which nothing is written"):
        read_text("pipe")
    reader, writer = os.pipe()
    os.write(writer, b"steps: 3")
    os.close(writer)
    assert read_text(f"/dev/fd/{reader}") == "steps: 3"
    os.close(reader)


def test_a_pipe_beside_archives_or_given_as_one_is_not_waited_for() -> None:
    with tarfile.open("images.tar", "w") as archive:
        member = tarfile.TarInfo("a.png")
        archive.addfile(member)
    os.mkfifo("pipe")
    assert list_images(".", None).ignored == [("pipe", BESIDE)]
    assert explain_kind("pipe") is None
    os.mkfifo("pipe.tar")
    with pytest.raises(DataError, match=r"pipe\.tar can't be read \(is no regular file\)"):
        list_images(".")
