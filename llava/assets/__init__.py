"""Files that ship inside the package: the small model of the synthetic world."""

from importlib import resources
from pathlib import Path

from llava.errors import DownloadError


def tiny_path() -> Path:
    """Folder of the built-in model.

    Raises:
        DownloadError: this installation came without it.
    """
    folder = Path(str(resources.files("llava.assets"))) / "tiny"
    if not (folder / "config.json").is_file():
        raise DownloadError(
            f"the built-in model is not in this installation ({folder} has no config.json); "
            "install the package whole, or name another model: llava download --list shows them"
        )
    return folder
