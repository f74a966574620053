"""Models by name: what is known, where it lies, how it is fetched, how a download by hand is taken in."""

import contextlib
import difflib
import errno
import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, Literal

from llava.errors import CheckpointError, DownloadError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.jinja")
"""What `download` fetches; never pickled weights (*.bin, *.pt, *.pth), which can run code when read."""

MODEL_TYPES = ("change_vlm", "llava_qwen_cc", "llava_qwen", "llava_onevision")
"""`model_type` values of the layouts that load (ours, CCExpert's, LLaVA-NeXT's, transformers')."""

ARCHITECTURES = ("LlavaQwenCCForCausalLM", "LlavaQwenForCausalLM")
"""LLaVA-NeXT configs with a general `model_type` ("llava", "qwen2") are known by this instead."""

UNFINISHED = {".part", ".crdownload", ".download", ".downloading", ".aria2", ".incomplete", ".tmp"}
"""What browsers, net-disk clients and download tools append to the name of a file they have not finished."""

RETRY_WAITS = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Seconds to wait after one, two, ... attempts in a row that brought no byte; then the download stops."""

PASSING = (408, 429, 500, 502, 503, 504)
"""HTTP answers that may be different a little later."""

CHUNK = 1 << 20


# --- the catalogue --------------------------------------------------------------------------------


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


# --- where things lie -----------------------------------------------------------------------------


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
    names, _ = _weight_files(folder)
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
            raise DownloadError(_by_hand(release))
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


def _by_hand(release: Release) -> str:
    return (
        f"{release.name} cannot be fetched by name: its authors published it {release.note}. "
        f"Download the folder there in a browser, then run: llava import FOLDER --name {release.name}"
    )


# --- downloading ----------------------------------------------------------------------------------


def download(
    name: str,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    endpoint: str | None = None,
) -> Path:
    """Fetch a model into the hub's cache, check every file by the hub's checksums, and return its folder.

    Only `PATTERNS` are fetched. What a broken connection or an interrupted run leaves is kept, and the next
    run goes on from there (the hub's own client starts such a file anew). Files already in the cache are
    checked again. HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE keep their meaning; offline, a complete
    cached copy is returned unchecked.

    Args:
        name: a name of the catalogue or a hub id.
        revision: branch, tag or commit; the hub's default branch if None.
        cache_dir: the hub cache to fill, instead of the one HF_HOME names.
        endpoint: address of the hub, instead of HF_ENDPOINT.

    Raises:
        DownloadError: unknown name, by hand only, no network, not found, gated, disk full, wrong checksum.
    """
    from huggingface_hub import HfApi, constants

    release = RELEASES.get(name.lower())
    if release is not None and release.repo is None:
        raise DownloadError(_by_hand(release))
    repo = release.repo if release and release.repo else resolve(name)
    if Path(repo).is_dir():
        return Path(repo)
    cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
    api = HfApi(endpoint=endpoint)

    with _said_plainly(repo, revision, api.endpoint, cache):
        if constants.HF_HUB_OFFLINE:
            return Path(
                api.snapshot_download(
                    repo,
                    revision=revision,
                    cache_dir=cache,
                    local_files_only=True,
                    allow_patterns=list(PATTERNS),
                )
            )
        info = api.model_info(repo, revision=revision, files_metadata=True)
        files = [f for f in info.siblings or () if any(fnmatch(f.rfilename, p) for p in PATTERNS)]
        if not any(f.rfilename.endswith(".safetensors") for f in files):
            raise DownloadError(
                f"{repo} holds no safetensors; pickled weights can run code and are not fetched"
            )
        blobs = cache / f"models--{repo.replace('/', '--')}" / "blobs"  # layout documented by huggingface_hub
        large = [f for f in files if f.lfs is not None]
        _check_space(large, blobs)
        fresh = _fetch_all(repo, str(info.sha), large, blobs, api.endpoint)
        folder = Path(
            api.snapshot_download(repo, revision=revision, cache_dir=cache, allow_patterns=list(PATTERNS))
        )
        if folder.name != info.sha:
            raise DownloadError(f"{repo} was changed on the hub during the download; run the command again")
    _verify(folder, [f for f in files if f.rfilename not in fresh])
    return folder


def _check_space(files: Sequence["RepoSibling"], blobs: Path) -> None:
    """Refuse before the first byte when the missing part of `files` cannot fit on the cache's disk."""
    missing = 0
    for file in files:
        assert file.lfs is not None
        if not (blobs / file.lfs.sha256).exists():
            part = blobs / f"{file.lfs.sha256}.part"
            missing += file.lfs.size - (part.stat().st_size if part.exists() else 0)
    _need_space(missing, blobs)


def _need_space(size: int, folder: Path) -> None:
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if size > free:
        raise DownloadError(
            f"disk full: {size / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free at {there}; "
            "make room, or choose another disk with HF_HOME (downloads) or LLAVA_HOME (imports)"
        )


def _fetch_all(
    repo: str, commit: str, files: Sequence["RepoSibling"], blobs: Path, endpoint: str
) -> set[str]:
    """Bring the large files that are missing into the cache, four at a time; returns the names fetched."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import WeakFileLock, tqdm

    wanted = {f.lfs.sha256: f for f in files if f.lfs is not None and not (blobs / f.lfs.sha256).exists()}
    if not wanted:
        return set()
    locks = blobs.parent.parent / ".locks" / blobs.parent.name  # where the hub's own client locks a file, too
    for folder in (blobs, locks):
        folder.mkdir(parents=True, exist_ok=True)
    stop = Event()

    def fetch(file: "RepoSibling") -> None:
        assert file.lfs is not None
        blob = blobs / file.lfs.sha256
        url = hf_hub_url(repo, file.rfilename, revision=commit, endpoint=endpoint)
        with WeakFileLock(locks / f"{blob.name}.lock"):
            if not blob.exists():  # else another process brought it while this one waited
                _fetch(url, blob, file.lfs.size, file.rfilename, bar, stop)

    total = sum(f.lfs.size for f in wanted.values() if f.lfs is not None)
    with tqdm(total=total, unit="B", unit_scale=True, desc=repo) as bar, ThreadPoolExecutor(4) as pool:
        try:
            list(pool.map(fetch, wanted.values()))
        finally:
            stop.set()  # after an error, or Ctrl-C, the other transfers end at their next block
    return {f.rfilename for f in files if f.lfs is not None and f.lfs.sha256 in wanted}


def _fetch(url: str, blob: Path, size: int, name: str, bar: Any, stop: Event) -> None:
    """Fetch one file to `blob` by way of `blob.part`, going on where an earlier attempt stopped."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    part = blob.with_name(f"{blob.name}.part")
    part.touch()
    bar.update(part.stat().st_size)
    fruitless = 0
    while (have := part.stat().st_size) < size and not stop.is_set():
        try:
            _receive(url, part, have, bar, stop)
        except HTTPError as error:
            if isinstance(error, HfHubHTTPError) and error.response.status_code not in PASSING:
                raise
            fruitless = 0 if part.stat().st_size > have else fruitless + 1
            if fruitless > len(RETRY_WAITS):
                raise
            stop.wait(RETRY_WAITS[max(fruitless, 1) - 1])
    if stop.is_set():
        return
    if (found := _sha256(part)) != blob.name:
        part.unlink()
        raise DownloadError(_wrong_checksum(name, found, blob.name))
    part.replace(blob)


def _receive(url: str, part: Path, have: int, bar: Any, stop: Event) -> None:
    """One request: append to `part` what comes after its first `have` bytes."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    # identity: a compressed transfer could not be resumed at a byte of the file
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with get_session().stream("GET", url, headers=headers, timeout=30, follow_redirects=True) as response:
        hf_raise_for_status(response)
        if have and response.status_code != 206:  # the server knows no ranges: the file comes from its start
            bar.update(-have)
            have = 0
        with part.open("r+b") as out:
            out.truncate(have)
            out.seek(have)
            for chunk in response.iter_bytes():  # as received: a break loses nothing
                out.write(chunk)
                bar.update(len(chunk))
                if stop.is_set():
                    return


def _verify(folder: Path, files: Sequence["RepoSibling"]) -> None:
    """Compare files with the hub's checksums; a wrong one is removed from the cache and named."""
    for file in files:
        path = folder / file.rfilename
        if file.lfs is not None:
            expected, found = file.lfs.sha256, _sha256(path)
        else:
            expected, found = file.blob_id or "", _git_sha1(path)
        if found != expected:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            raise DownloadError(_wrong_checksum(file.rfilename, found, expected))


def _wrong_checksum(name: str, found: str, expected: str) -> str:
    return (
        f"{name} arrived damaged (checksum {found[:12]}, the hub says {expected[:12]}); "
        "it was removed: run the command again"
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _git_sha1(path: Path) -> str:
    """Name git gives to a file's content: how the hub identifies files outside its large-file storage."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@contextlib.contextmanager
def _said_plainly(repo: str, revision: str | None, endpoint: str, cache: Path) -> Iterator[None]:
    """Turn what the hub's client raises into one line that says what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    kept = "what has arrived is kept: the same command goes on from there"
    try:
        yield
    except DownloadError:
        raise
    except HFValidationError as error:
        raise DownloadError(f"{repo!r} is not a hub id: {error}") from error
    except GatedRepoError as error:
        raise DownloadError(
            f"{repo} is gated: accept its terms in a browser at {endpoint}/{repo}, "
            "then set HF_TOKEN or run `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise DownloadError(f"{repo} has no revision {revision!r}; without --revision it is main") from error
    except RepositoryNotFoundError as error:
        raise DownloadError(
            f"no repository {repo} at {endpoint}; check the spelling; "
            "a private one needs HF_TOKEN or `hf auth login`"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise DownloadError(f"{endpoint} answered {status} for {repo}; try later; {kept}") from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, HTTPError) as error:
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            raise DownloadError(
                f"HF_HUB_OFFLINE is set and {repo} is not complete in {cache}; unset it, or copy the cache "
                "of a machine that has it"
            ) from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DownloadError(
            f"no connection to {endpoint} ({reason}); check the network, the proxy and HF_ENDPOINT; {kept}"
        ) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DownloadError(f"disk full at {cache}; make room or set HF_HOME; {kept}") from error
        reason = " ".join(str(error).split())
        raise DownloadError(f"{repo} could not be fetched: {reason}; {kept}") from error


# --- taking in what a person downloaded -----------------------------------------------------------


@dataclass(frozen=True)
class Inspection:
    """What a complete checkpoint folder holds."""

    model_type: str
    weights: tuple[str, ...]
    """File names of the weights, in order."""
    pickled: bool
    """Weights are *.bin: to be read by `torch.load(weights_only=True)` alone."""
    keys: frozenset[str]
    """Names of the tensors, for a check against the model; empty for pickled weights, not opened here."""


def inspect_checkpoint(folder: str | Path) -> Inspection:
    """Check that a folder holds a whole checkpoint, reading headers only.

    Raises:
        CheckpointError: lists every fault: missing, cut-off or foreign files, by name.
    """
    folder = Path(folder).expanduser()
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; unpack an archive, and give the folder with config.json")
    if not folder.is_dir():
        raise CheckpointError(f"no folder {folder}")
    if not (folder / "config.json").is_file():
        inner = sorted(path.parent for path in folder.glob("*/config.json"))
        hint = f"; did you mean {' or '.join(map(str, inner[:3]))}?" if inner else ""
        if (folder / "adapter_config.json").is_file():
            hint = "; it holds an adapter, which is used with the model it was trained on, not imported"
        raise CheckpointError(f"{folder} has no config.json{hint}")

    faults: list[str] = []
    model_type = _model_type(folder / "config.json", faults)
    names, pickled = _weight_files(folder)
    keys: set[str] = set()
    if not names:
        faults.append("no weights: neither model.safetensors nor a readable model.safetensors.index.json")
    for name in names:
        path = folder / name
        if Path(name).name != name:
            faults.append(f"the index names {name!r}, which is not a plain file name")
        elif not path.is_file():
            faults.append(f"{name} is missing")
        elif pickled:
            if not zipfile.is_zipfile(path):
                faults.append(f"{name} is cut off, or no file that torch.save wrote")
        else:
            keys |= _tensor_names(path, faults)
    if not faults and not pickled:
        _check_index(folder, keys, faults)
    faults += _tokenizer_faults(folder)
    faults += [
        f"{p.name} is an unfinished download" for p in sorted(folder.iterdir()) if p.suffix in UNFINISHED
    ]
    if faults:
        raise CheckpointError(f"{folder} is not a complete checkpoint:\n  " + "\n  ".join(faults))
    return Inspection(model_type, tuple(names), pickled, frozenset(keys))


def import_checkpoint(
    folder: str | Path,
    name: str | None = None,
    *,
    cache: str | Path | None = None,
    link: bool = False,
    replace: bool = False,
) -> Path:
    """Check a downloaded folder and put it where `resolve(name)` finds it; returns the new folder.

    Args:
        folder: what the person downloaded; it is left as it is.
        name: what to call it; the folder's own name, in lower case with "-" for "_", if None.
        cache: instead of `home()`.
        link: symbolic links to the files instead of copies (the folder must then stay where it is).
        replace: take the place of an earlier import of that name.

    Raises:
        CheckpointError: the folder is not whole, or the name is taken or unusable.
        DownloadError: not enough room on the disk.
    """
    folder = Path(folder).expanduser().resolve()
    found = inspect_checkpoint(folder)
    name = name or folder.name.lower().replace("_", "-")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or name.endswith(".part"):
        raise CheckpointError(f"{name!r} cannot name a model; give a --name of letters, digits, '-' and '.'")
    models = Path(cache or home()).expanduser() / "models"
    target, part, old = models / name, models / f"{name}.part", models / f"{name}.old.part"
    if target.exists() and not replace:
        raise CheckpointError(f"{name} is already imported at {target}; give another --name, or --replace")
    if folder == target.resolve():
        raise CheckpointError(f"{folder} is the imported {name} itself")

    files = [folder / weight for weight in found.weights]
    files += [p for p in sorted(folder.iterdir()) if p.is_file() and _is_companion(p.name)]
    models.mkdir(parents=True, exist_ok=True)
    for left_over in (part, old):
        shutil.rmtree(left_over, ignore_errors=True)
    part.mkdir()
    try:
        for path in files:
            _place(path, part / path.name, link=link)
        if target.exists():
            target.replace(old)
        part.replace(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return target


def _model_type(path: Path, faults: list[str]) -> str:
    config = _read_json(path, faults)
    model_type = str(config.get("model_type"))
    architectures = config.get("architectures") or [""]
    if config and model_type not in MODEL_TYPES and architectures[0] not in ARCHITECTURES:
        faults.append(f"config.json: model_type {model_type!r} is none of {', '.join(MODEL_TYPES)}")
    return model_type


def _weight_files(folder: Path) -> tuple[list[str], bool]:
    """Names of the weight files a folder should hold (by its index, if any), and whether they are pickled."""
    for single, pickled in (("model.safetensors", False), ("pytorch_model.bin", True)):
        index = folder / f"{single}.index.json"
        if index.is_file():
            shards = _read_json(index, []).get("weight_map")
            return (sorted(set(map(str, shards.values()))) if isinstance(shards, Mapping) else []), pickled
        if (folder / single).is_file():
            return [single], pickled
        # shards without their index: name the index as what is missing
        stem, suffix = single.split(".")
        if any(folder.glob(f"{stem}-*-of-*.{suffix}")):
            return [index.name], pickled
    return [], False


def _tensor_names(path: Path, faults: list[str]) -> set[str]:
    """Names of the tensors in a safetensors file, whose header and length are checked."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        faults.append(f"{path.name}: {_why_unreadable(path)} ({error})")
        return set()


def _why_unreadable(path: Path) -> str:
    """Say in a person's words why safetensors refuses a file."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(64)
        if head.startswith(b"version https://git-lfs"):
            return "a git-lfs pointer, not the weights; run `git lfs pull`"
        if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
            return "a web page, not the weights"
        length = int.from_bytes(head[:8], "little")
        if 2 <= length <= size - 8:
            stream.seek(8)
            with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
                header = json.loads(stream.read(length))
                ends = [t["data_offsets"][1] for key, t in header.items() if key != "__metadata__"]
                promised = 8 + length + max(ends)
                if size != promised:
                    return f"holds {size:,} bytes of the {promised:,} its header promises; download it again"
    return f"is no safetensors file or was cut off at {size:,} bytes; download it again"


def _check_index(folder: Path, keys: set[str], faults: list[str]) -> None:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        absent = sorted(set(_read_json(index, faults).get("weight_map", {})) - keys)
        if absent:
            faults.append(f"{len(absent)} tensors of {index.name} are in no shard, first {absent[0]}")


def _tokenizer_faults(folder: Path) -> list[str]:
    def there(name: str) -> bool:
        return (folder / name).is_file()

    faults = [] if there("tokenizer_config.json") else ["tokenizer_config.json is missing"]
    if not there("tokenizer.json") and not (there("vocab.json") and there("merges.txt")):
        faults.append("no tokenizer: tokenizer.json, or vocab.json with merges.txt, is missing")
    return faults


def _is_companion(name: str) -> bool:
    """Small files that go along: configs, tokenizer, template, card, licence; no optimizer, no pickle."""
    suffixes = {".json", ".txt", ".jinja", ".md", ".model"}
    return Path(name).suffix in suffixes or name.upper().startswith("LICEN")


def _place(source: Path, target: Path, *, link: bool) -> None:
    """Put `source` at `target`: a link if asked, else a copy that shares the disk's blocks where it can."""
    source = source.resolve()
    if link:
        target.symlink_to(source)
        return
    if _clone(source, target):
        return
    if source.suffix in {".safetensors", ".bin"}:
        # Weights are written aside and renamed by every tool that saves them, so a shared inode stays safe.
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    _need_space(source.stat().st_size, target.parent)
    shutil.copy2(source, target)


def _clone(source: Path, target: Path) -> bool:
    """A copy-on-write copy (Btrfs, XFS, APFS-like file systems on Linux); False where there is none."""
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    ficlone = 0x40049409  # linux/fs.h: share the blocks of another file
    with source.open("rb") as old, target.open("xb") as new:
        try:
            fcntl.ioctl(new.fileno(), ficlone, old.fileno())
            return True
        except OSError:
            pass
    target.unlink()
    return False


def _read_json(path: Path, faults: list[str]) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        faults.append(f"{path.name} cannot be read as JSON: {error}")
        return {}
    if not isinstance(value, dict):
        faults.append(f"{path.name} does not hold a JSON object")
        return {}
    return value
