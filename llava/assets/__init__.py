"""Files that ship inside the package: the small models of the synthetic world, and how they are trained."""

from importlib import resources
from pathlib import Path

from llava.errors import DownloadError

BUILT_IN = {"tiny": "tiny", "tiny-base": "tiny_base"}
"""Names of the models in the package and their folders: the fine-tuned one, and what it started from."""


def built_in_path(name: str) -> Path:
    """Folder of a model in the package.

    Raises:
        DownloadError: this installation came without it.
    """
    folder = Path(str(resources.files("llava.assets"))) / BUILT_IN[name]
    if not (folder / "config.json").is_file():
        raise DownloadError(
            f"the built-in model is not in this installation ({folder} has no config.json); "
            "install the package whole, or name another model: llava download --list shows them"
        )
    return folder


def tiny_train_yaml() -> Path:
    """The settings that fine-tuned the built-in model from its base."""
    return Path(str(resources.files("llava.assets"))) / "tiny.yaml"
