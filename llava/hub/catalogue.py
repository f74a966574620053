"""Models by name: what is known, and where it lies on this machine."""

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llava.errors import DownloadError
from llava.hub.inspection import weight_files


@dataclass(frozen=True)
class Scores:
    """Published results on the LEVIR-CC test split, in percent; `sm` is the mean of the four."""

    bleu4: float
    meteor: float
    rouge_l: float
    cider_d: float
    sm: float
    source: str


@dataclass(frozen=True)
class Release:
    """One published set of weights."""

    name: str
    kind: Literal["base", "checkpoint", "tower"]
    """base: a general vision-language model to train from; checkpoint: knows change; tower: image encoder."""
    repo: str | None
    """Hub id, or None where only a person with a browser can fetch the files."""
    licence: str
    size_gb: float
    """Size of the weights in 10^9 bytes, rounded (CCExpert's: computed from its layers); only a guide."""
    note: str
    scores: Scores | None = None


_PAPER = "arXiv 2411.11360"
_BY_HAND = "on a net disk, linked from the project page Meize0729/CCExpert"

RELEASES: dict[str, Release] = {
    release.name: release
    for release in (
        Release("llava-onevision-0.5b", "base", "lmms-lab/llava-onevision-qwen2-0.5b-ov", "Apache-2.0", 1.8,
                "what CCExpert-0.5b starts from"),
        Release("llava-onevision-7b", "base", "lmms-lab/llava-onevision-qwen2-7b-ov", "Apache-2.0", 16.1,
                "what CCExpert-7b starts from"),
        Release("llava-onevision-0.5b-hf", "base",
                "llava-hf/llava-onevision-qwen2-0.5b-ov-hf", "Apache-2.0", 1.8,
                "the same weights in the transformers layout"),
        Release("llava-onevision-7b-hf", "base",
                "llava-hf/llava-onevision-qwen2-7b-ov-hf", "Apache-2.0", 16.1,
                "the same weights in the transformers layout"),
        Release("siglip-so400m-384", "tower", "google/siglip-so400m-patch14-384", "Apache-2.0", 3.5,
                "image encoder of all of the above, alone"),
        Release("ccexpert-0.5b", "checkpoint", None, "Apache-2.0", 1.9, _BY_HAND,
                Scores(65.42, 41.33, 75.93, 141.19, 80.99, _PAPER)),
        Release("ccexpert-7b", "checkpoint", None, "Apache-2.0", 16.2, _BY_HAND,
                Scores(65.49, 41.82, 76.55, 143.32, 81.80, _PAPER)),
    )
}  # fmt: skip


def home() -> Path:
    """Folder of this package's own files: $LLAVA_HOME, else $XDG_CACHE_HOME/llava, else ~/.cache/llava."""
    if chosen := os.environ.get("LLAVA_HOME"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "llava"


def imported(cache: str | Path | None = None) -> dict[str, Path]:
    """Models taken in by `import_checkpoint`, by name."""
    models = Path(cache or home()) / "models"
    if not models.is_dir():
        return {}
    folders = sorted(path.parent for path in models.glob("*/config.json"))
    return {folder.name: folder for folder in folders if folder.suffix != ".part"}


def downloaded(repo: str) -> Path | None:
    """Folder of a repository in the hub's cache, or None unless its config and all its weights are there."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo, "config.json")
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    names, _ = weight_files(folder)
    return folder if names and all((folder / name).is_file() for name in names) else None


def local_folder(release: Release) -> Path | None:
    """Where this machine holds a release, imported or downloaded; None if it does not."""
    if found := imported().get(release.name):
        return found
    return downloaded(release.repo) if release.repo else None


def resolve(name_or_path: str | Path) -> str:
    """What to hand to `from_pretrained`: a local folder, or a hub id.

    A folder stands for itself; a short name of the catalogue, or of an imported model, for its folder, or for
    its hub id while it is not downloaded yet; `owner/name` is a hub id as it is.

    Raises:
        DownloadError: a path that does not exist, an unknown name, or a release that must be fetched by hand.
    """
    text = str(name_or_path)
    path = Path(text).expanduser()
    name = text.lower()
    if path.is_dir() and ((path / "config.json").is_file() or name not in RELEASES):
        return str(path)
    if path.is_file():
        raise DownloadError(f"{path} is a file; a model is the folder that holds config.json and the weights")
    if found := imported().get(text) or imported().get(name):
        return str(found)
    if release := RELEASES.get(name):
        if release.repo is None:
            raise DownloadError(by_hand(release))
        return str(downloaded(release.repo) or release.repo)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text):
        return text
    if re.search(r"[/\\~]", text):
        raise DownloadError(f"no folder {path}; give a model folder, a hub id (owner/name) or a known name")
    known = sorted({*RELEASES, *imported()})
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise DownloadError(
        f"unknown model {text!r}; {hint}known: {', '.join(known)}; or give a folder, or a hub id (owner/name)"
    )


def by_hand(release: Release) -> str:
    return (
        f"{release.name} cannot be fetched by name: its authors published it {release.note}. "
        f"Download the folder there in a browser, then run: llava import FOLDER --name {release.name}"
    )
