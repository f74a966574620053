"""Whether a folder holds a whole checkpoint, told from its headers alone."""

import contextlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.errors import CheckpointError

MODEL_TYPES = ("change_vlm", "delta_vlm", "llava_qwen_cc", "llava_qwen", "llava_onevision")
"""`model_type` values of the layouts that load (both of ours, CCExpert's, LLaVA-NeXT's, transformers')."""

READERS = ("qformer_tokenizer",)
"""Folders inside a model's own, with what a second tokenizer needs."""

ARCHITECTURES = ("LlavaQwenCCForCausalLM", "LlavaQwenForCausalLM")
"""LLaVA-NeXT configs with a general `model_type` ("llava", "qwen2") are known by this instead."""

UNFINISHED = {".part", ".crdownload", ".download", ".downloading", ".aria2", ".incomplete", ".tmp"}
"""What browsers, net-disk clients and download tools append to the name of a file they have not finished."""


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
    names, pickled = weight_files(folder)
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


def _model_type(path: Path, faults: list[str]) -> str:
    config = _read_json(path, faults)
    model_type = str(config.get("model_type"))
    architectures = config.get("architectures") or [""]
    if config and model_type not in MODEL_TYPES and architectures[0] not in ARCHITECTURES:
        faults.append(f"config.json: model_type {model_type!r} is none of {', '.join(MODEL_TYPES)}")
    return model_type


def weight_files(folder: Path) -> tuple[list[str], bool]:
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
