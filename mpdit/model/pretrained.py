"""`from_pretrained`, `save_pretrained` and `push_to_hub` of a model, in the format of weights.py.

As huggingface_hub's PyTorchModelHubMixin has them, but its library is imported only when the hub is asked for.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mpdit.core.errors import CheckpointError, ConfigError, first_line
from mpdit.core.files import as_path
from mpdit.model.config import ModelConfig
from mpdit.model.weights import check_fit, read_weights, save_weights

_DRAWS = (nn.init.normal_, nn.init.uniform_, Tensor.normal_, Tensor.uniform_)


class Pretrained(nn.Module):
    """Brings a model that is built from a ModelConfig to a folder or a hub repository, and back; its base class.

    Attributes:
        config: the ModelConfig it was built from.
        metadata: what was loaded beside the model, and is saved with it: "data" (how samples are decoded), "training".
    """

    config: ModelConfig
    metadata: Mapping[str, Any]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, self.metadata = config, {}

    @classmethod
    def on_meta(cls, config: ModelConfig) -> Self:
        """Build the model on torch's meta device: names and shapes of parameters, no values and no memory."""
        with torch.device("meta"), _Unset():
            return cls(config)

    @classmethod
    def from_tensors(cls, config: ModelConfig, tensors: Mapping[str, Tensor], where: str | Path) -> Self:
        """Build the model of a configuration and a state dict, in evaluation mode on the CPU.

        Raises CheckpointError, naming `where` and the first such tensors, when the two don't fit.
        """
        # On meta first: whatever a configuration says, no more memory is asked for than the tensors take.
        expected = cls.on_meta(config).state_dict()
        check_fit(where, tensors, expected, "give the config.json that the weights were saved with")
        model = cls(config)
        model.load_state_dict(tensors)
        return model.eval()

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Load the model of a folder, as `mpdit.load_weights` takes them, or of a hub repository "owner/name".

        It is in evaluation mode on the CPU; its `metadata` is config.json without the model's part.

        Args:
            path_or_id: a folder that exists is taken, else the hub's repository of that name.
            revision, cache_dir, token, local_files_only: as huggingface_hub.snapshot_download has them, and only read
                where the hub is.

        Raises:
            CheckpointError: nothing there, the hub can't be reached, or files that are damaged or of another format.
            ConfigError: a hub repository is asked for and huggingface_hub is not installed.
        """
        folder, name = as_path(path_or_id), str(path_or_id)
        if is_hub_id(name) and not folder.exists():
            options = {"revision": revision, "cache_dir": cache_dir, "token": token}
            folder = _download(name, local_files_only=local_files_only, **options)
        config, tensors, metadata = read_weights(folder)
        model = cls.from_tensors(config, tensors, folder)
        model.metadata = metadata
        return model

    def save_pretrained(self, folder: str | Path, *, metadata: Mapping[str, Any] | None = None) -> None:
        """Write model.safetensors and config.json into `folder`, as `mpdit.save_weights`.

        metadata is the model's own unless given.
        """
        save_weights(folder, self.state_dict(), self.config, self.metadata if metadata is None else metadata)

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

        Args:
            repo_id: "owner/name".
            metadata: JSON values kept beside the model in config.json; the model's own when not given.
            private, token, revision, commit_message: as huggingface_hub has them.

        Raises:
            CheckpointError: the hub refuses, or can't be reached.
            ConfigError: huggingface_hub is not installed.
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
                raise CheckpointError(f"can't push to {repo_id} on the hub: {first_line(error)}") from error
        return str(commit.commit_url)


class _Unset(TorchFunctionMode):
    """Leaves new tensors as they are.

    To draw values on the meta device, where there are none, torch (2.13) imports its whole compiler: a second and a
    half of CPU time.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _DRAWS:
            return next(iter((*args, *kwargs.values())))  # the tensor
        return (torch.empty if function is torch.randn else function)(*args, **kwargs)


def is_hub_id(name: str) -> bool:
    """Tell "owner/name" from a path, which starts with a dot, a slash or a tilde, or has more or fewer parts."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")


def _download(repo_id: str, **options: Any) -> Path:
    hub = _hub(f"{repo_id} is no folder here, and loading it from the hub")
    logger = logging.getLogger("huggingface_hub")  # which tells of every retry
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return Path(hub.snapshot_download(repo_id, allow_patterns=["config.json", "model.safetensors"], **options))
    except Exception as error:  # as above
        raise CheckpointError(
            f"{repo_id} is no folder here, and the hub can't be reached or holds no such model "
            f"({first_line(error)}): give a folder with model.safetensors and config.json, or the id of a repository "
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
