"""Where a model comes from, and checks of its files before it is loaded."""

from __future__ import annotations

from pathlib import Path

from fedmllm.errors import ModelError
from fedmllm.files import is_pointer
from fedmllm.models.settings import ModelConfig

NANO_FOLDER = Path(__file__).parent / "nano" / "folder"
"""Folder of the embedded model, an ordinary Transformers folder."""


def model_source(name: str) -> str:
    """Return the ``from_pretrained`` argument for a model name. ``nano`` stands for the embedded folder."""
    return str(NANO_FOLDER) if name == "nano" else str(Path(name).expanduser()) if name.startswith("~") else name


def check_source(config: ModelConfig) -> str:
    """Return the ``from_pretrained`` argument for the configured model, after checking it.

    A name that looks like a path must be a folder; it is never looked up on the hub.

    Raises:
        ModelError: if the folder does not exist or has no config.json, or if code from the hub is trusted without naming a commit.
    """
    name, source = config.name, model_source(config.name)
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(f"model.name: {name!r} has no config.json; it is not a Transformers folder")
    if not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ModelError(f"model.name: {name!r} is not a folder; give a Transformers folder, a hub id or 'nano'")
    if config.trust_remote_code and config.revision is None and not folder.is_dir():
        raise ModelError(f"model.trust_remote_code runs code that comes with {name!r}; name the commit you trust in model.revision")
    return source


def check_weights(name: str, folder: Path) -> None:
    """Check that a local folder has its weights in safetensors and contains no git-lfs pointers."""
    if pointers := [path.name for path in sorted(folder.iterdir()) if is_pointer(path)] if folder.is_dir() else []:
        raise ModelError(
            f"model.name: {name!r} contains git-lfs pointers instead of {', '.join(pointers)}; download the files, e.g. with 'git lfs pull'"
        )
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        hint = (
            f"only {', '.join(others)}, which can run code when read; convert to safetensors" if others else "download them, or use 'nano'"
        )
        raise ModelError(f"model.name: {name!r} has no weights in *.safetensors ({hint})")
