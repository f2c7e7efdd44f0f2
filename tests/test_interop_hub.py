"""A model to a folder or the hub and back, in the manner of PyTorchModelHubMixin."""

import sys

import pytest
import torch

import mpdit
from mpdit.core.errors import CheckpointError, ConfigError

METADATA = {"data": {"kind": "x", "normalization": {"mean": [0.5] * 4, "std": [2.0] * 4}}, "training": {"step": 3}}


@pytest.fixture
def model():
    model = mpdit.create_model("MPDiT-Digits/4-2", width=16, heads=2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_a_model_loaded_samples_identically(model, tmp_path):
    model.save_pretrained(tmp_path / "a", metadata=METADATA)
    loaded = mpdit.MPDiT.from_pretrained(tmp_path / "a")
    assert loaded.metadata == METADATA and not loaded.training
    noise = torch.randn(2, 4, 16, 16)
    first, second = (mpdit.sample(m, noise, [1, 2], steps=3, guidance=2.0) for m in (model, loaded))
    assert torch.equal(first, second)
    loaded.save_pretrained(str(tmp_path / "b"))  # and what was beside it is kept
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert model.metadata == {}


def cached(model, cache, repo="owner/name", revision="main", commit="0" * 40):
    """The model in a hub cache, as huggingface_hub lays one out."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    model.save_pretrained(folder / "snapshots" / commit, metadata=METADATA)
    (folder / "refs").mkdir()
    (folder / "refs" / revision).write_text(commit)


def test_a_repository_is_taken_from_the_hubs_cache(model, tmp_path, monkeypatch):
    cached(model, tmp_path / "cache")
    options = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    loaded = mpdit.MPDiT.from_pretrained("owner/name", **options)
    assert torch.equal(loaded.final.weight, model.final.weight) and loaded.metadata == METADATA
    with pytest.raises(
        CheckpointError, match="owner/other is no folder here, and the hub can't be reached or holds no such model"
    ) as error:
        mpdit.MPDiT.from_pretrained("owner/other", **options)
    assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match="owner/name is no folder"):
        mpdit.MPDiT.from_pretrained("owner/name", revision="v2", **options)
    monkeypatch.chdir(tmp_path)
    other = mpdit.create_model("MPDiT-Digits/4-2", width=16, heads=4)
    other.save_pretrained("owner/name")  # a folder of that name comes first
    assert mpdit.MPDiT.from_pretrained("owner/name", **options).config.heads == 4


@pytest.mark.parametrize("path", ["./owner/name", "owner/name/", "a/b/c", "name", "/nowhere/name", "~/name"])
def test_a_mistaken_path_does_not_go_to_the_hub(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="does not exist: give a run's folder"):
        mpdit.MPDiT.from_pretrained(path)


def test_the_hub_without_its_library(model, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"owner/name .* needs huggingface_hub .* pip install 'mpdit\[vae\]'"):
        mpdit.MPDiT.from_pretrained("owner/name")
    with pytest.raises(ConfigError, match="pushing to owner/name needs huggingface_hub"):
        model.push_to_hub("owner/name")
    model.save_pretrained(tmp_path)
    mpdit.MPDiT.from_pretrained(tmp_path)


def test_push_uploads_what_save_writes(model, monkeypatch, tmp_path):
    """The hub is a stand-in for the network's other end: it keeps what it is handed."""
    import huggingface_hub

    calls = {}

    def upload(self, *, repo_id, folder_path, **options):
        cached(mpdit.MPDiT.from_pretrained(folder_path), tmp_path, repo_id)
        calls["upload"] = options
        return huggingface_hub.CommitInfo(f"https://huggingface.co/{repo_id}/commit/0", "", "", oid="0")

    def create(self, repo_id, **options):
        calls["create"] = options

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    assert model.push_to_hub("owner/name", private=True).endswith("owner/name/commit/0")
    assert calls["create"] == {"private": True, "exist_ok": True}
    loaded = mpdit.MPDiT.from_pretrained("owner/name", cache_dir=tmp_path, local_files_only=True)
    assert torch.equal(loaded.final.weight, model.final.weight)

    def refuse(self, repo_id, **options):
        raise OSError("403 Forbidden\nmore")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(CheckpointError, match=r"can't push to owner/name on the hub: 403 Forbidden$"):
        model.push_to_hub("owner/name")
