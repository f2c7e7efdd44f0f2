"""`from_pretrained`, `save_pretrained` and `push_to_hub` of a model, in our weights format.

As huggingface_hub's PyTorchModelHubMixin has them, but without its library unless the hub is asked for: a folder is
read and written by mpdit.model.weights alone.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpdit.core.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from mpdit.model.mpdit import MPDiT

_FILES = ["config.json", "model.safetensors"]
_NO_METADATA: Mapping[str, Any] = {}


class Pretrained:
    """A model's ways to a folder or a hub repository and back.

    Attributes:
        metadata: what was loaded beside the model, and is saved with it: "data" (how samples are decoded), "training".
    """

    metadata: Mapping[str, Any] = _NO_METADATA

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> MPDiT:
        """The model of a folder, as `mpdit.load_weights` takes them, or of a hub repository "owner/name".

        It is in evaluation mode on the CPU; its `metadata` is config.json without the model's part. The other arguments
        are those of huggingface_hub.snapshot_download, and only read where the hub is.

        Raises:
            CheckpointError: nothing there, the hub can't be reached, or files that are damaged or of another format.
            ConfigError: a hub repository is asked for and huggingface_hub is not installed.
        """
        from mpdit.model.weights import load_weights

        folder = Path(path_or_id)
        if not folder.exists() and _is_hub_id(str(path_or_id)):
            options = {"revision": revision, "cache_dir": cache_dir, "token": token}
            folder = _download(str(path_or_id), local_files_only=local_files_only, **options)
        model, metadata = load_weights(folder)
        model.metadata = metadata
        return model

    def save_pretrained(self, folder: str | Path, *, metadata: Mapping[str, Any] | None = None) -> None:
        """Write model.safetensors and config.json into `folder`, as `mpdit.save_weights`.

        metadata is the model's own unless given.
        """
        from mpdit.model.weights import save_weights

        model: Any = self
        save_weights(folder, model.state_dict(), model.config, self.metadata if metadata is None else metadata)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        metadata: Mapping[str, Any] | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload MPDiT weights",
    ) -> str:
        """Upload what `save_pretrained` writes to a hub repository "owner/name", made if missing; returns the URL.

        Raises CheckpointError when the hub refuses or can't be reached, ConfigError without huggingface_hub.
        """
        hub = _hub(f"pushing to {repo_id}")
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, metadata=metadata)
            api = hub.HfApi(token=token)
            try:
                api.create_repo(repo_id, private=private, exist_ok=True)
                commit = api.upload_folder(
                    repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message
                )
            except Exception as error:  # the hub's errors are OSError, ValueError and its HTTP client's own
                raise CheckpointError(f"can't push to {repo_id} on the hub: {_first_line(error)}") from error
        return str(commit.commit_url)


def _is_hub_id(name: str) -> bool:
    """owner/name, and no path: those start with a dot, a slash or a tilde, or have more parts."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")


def _download(repo_id: str, **options: Any) -> Path:
    hub = _hub(f"{repo_id} is no folder here, and loading it from the hub")
    logger = logging.getLogger("huggingface_hub")  # which tells of every retry
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return Path(hub.snapshot_download(repo_id, allow_patterns=_FILES, **options))
    except Exception as error:  # as above
        raise CheckpointError(
            f"{repo_id} is no folder here, and the hub can't be reached or holds no such model "
            f"({_first_line(error)}): give a folder with model.safetensors and config.json, or the id of a repository "
            "that has them"
        ) from error
    finally:
        logger.setLevel(level)


def _hub(what: str) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ConfigError(f"{what} needs huggingface_hub ({error}): pip install 'mpdit[vae]'") from error
    return huggingface_hub


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
