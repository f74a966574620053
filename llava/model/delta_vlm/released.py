"""The released file (checkpoint_best.pth, LAVIS's names): read it, rename its weights to ours, and ours back.

It holds what was trained and nothing else: the last blocks of the encoder, its final norm, Q-Former, queries, CSRM,
projection, and the optimizer's state. Every name is in `_NAMES` or `_IGNORED`, or an error.
"""

import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava.errors import CheckpointError

# {i} a number; {p} weight or bias; {n} 1 or 2; {x} query, key or value; {y} dense or LayerNorm; {q} with or without
# the suffix of the queries' own feed-forward.
_FIELDS = {
    "i": r"\d+",
    "p": "weight|bias",
    "n": "[12]",
    "x": "query|key|value",
    "y": "dense|LayerNorm",
    "q": "_query|",
}
_BLOCK, _LAYER = "visual_encoder.blocks.{i}.", "Qformer.bert.encoder.layer.{i}."
_OUR_BLOCK, _OUR_LAYER = "model.vision_tower.encoder.layers.{i}.", "model.qformer.encoder.layer.{i}."
_EMBEDDINGS, _OUR_EMBEDDINGS = "Qformer.bert.embeddings.", "model.qformer.embeddings."
_NAMES: tuple[tuple[str, str], ...] = (
    ("query_tokens", "model.query_tokens"),
    ("visual_encoder.cls_token", "model.vision_tower.embeddings.class_embedding"),
    ("visual_encoder.pos_embed", "model.vision_tower.embeddings.position_embedding"),
    ("visual_encoder.patch_embed.proj.{p}", "model.vision_tower.embeddings.patch_embedding.{p}"),
    (_BLOCK + "norm{n}.{p}", _OUR_BLOCK + "layer_norm{n}.{p}"),
    (_BLOCK + "attn.qkv.weight", _OUR_BLOCK + "self_attn.qkv.weight"),
    (_BLOCK + "attn.qkv.bias", _OUR_BLOCK + "self_attn.qkv.bias"),  # joined from two, see `_join_biases`
    (_BLOCK + "attn.proj.{p}", _OUR_BLOCK + "self_attn.projection.{p}"),
    (_BLOCK + "mlp.fc{n}.{p}", _OUR_BLOCK + "mlp.fc{n}.{p}"),
    ("ln_vision.{p}", "model.vision_tower.post_layernorm.{p}"),
    (_EMBEDDINGS + "word_embeddings.weight", _OUR_EMBEDDINGS + "word_embeddings.weight"),
    (_EMBEDDINGS + "position_embeddings.weight", _OUR_EMBEDDINGS + "position_embeddings.weight"),
    (_EMBEDDINGS + "LayerNorm.{p}", _OUR_EMBEDDINGS + "layernorm.{p}"),
    (_LAYER + "attention.self.{x}.{p}", _OUR_LAYER + "attention.attention.{x}.{p}"),
    (_LAYER + "attention.output.{y}.{p}", _OUR_LAYER + "attention.output.{y}.{p}"),
    (_LAYER + "crossattention.self.{x}.{p}", _OUR_LAYER + "crossattention.attention.{x}.{p}"),
    (_LAYER + "crossattention.output.{y}.{p}", _OUR_LAYER + "crossattention.output.{y}.{p}"),
    (_LAYER + "intermediate{q}.dense.{p}", _OUR_LAYER + "intermediate{q}.dense.{p}"),
    (_LAYER + "output{q}.{y}.{p}", _OUR_LAYER + "output{q}.{y}.{p}"),
    ("llm_proj.{p}", "model.projector.{p}"),
    ("context1.weight", "model.fusion.context_diff.weight"),
    ("context2.{p}", "model.fusion.context_feat.{p}"),
    ("gate1.weight", "model.fusion.gate_diff.weight"),
    ("gate2.{p}", "model.fusion.gate_feat.{p}"),
    ("context3.{p}", "model.fusion.out.{p}"),
)
# Heads of a loss that the released forward has switched off, and buffers.
_IGNORED = re.compile(
    r"(vision_proj|text_proj)\.(weight|bias)|temp|Qformer\.bert\.embeddings\.position_ids|llm_model\..*\binv_freq"
)
_HALVES = (".attn.q_bias", ".attn.v_bias")


def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(template)
    for name, values in _FIELDS.items():
        escaped = escaped.replace(rf"\{{{name}\}}", f"(?P<{name}>{values})", 1)
    return re.compile(escaped)


_TO_OURS = [(_pattern(theirs), ours) for theirs, ours in _NAMES]
_TO_THEIRS = [(_pattern(ours), theirs) for theirs, ours in _NAMES]


def _renamed(name: str, rules: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, template in rules:
        match = pattern.fullmatch(name)
        if match:
            return template.format(**match.groupdict())
    return None


@dataclass
class Released:
    """What a released file holds."""

    weights: dict[str, Tensor]
    """By LAVIS's names."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    epoch: int | None = None


def read_release(path: str | Path, *, trust: bool = False) -> Released:
    """Open a released file, with or without its outer `model` and a `module.` before the names.

    Args:
        trust: allow a pickle that holds more than tensors and plain values; whoever made it can run anything here.

    Raises:
        CheckpointError: no such file, a damaged one, one that needs `trust`, or one without weights.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is no file")
    try:
        # mapped, not read: most of the file is the optimizer's
        held = torch.load(path, map_location="cpu", weights_only=not trust, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} was refused: it holds more than tensors and plain values ({_first_line(error)}). If you trust "
            "whoever made it, allow it explicitly (--trust-file)"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read, download it again ({_first_line(error)})") from error
    if not isinstance(held, Mapping):
        raise CheckpointError(f"{path} holds a {type(held).__name__}, not weights by name")
    outer: Mapping[str, Any] = held if isinstance(held.get("model"), Mapping) else {"model": held}
    weights = {
        str(name).removeprefix("module."): value
        for name, value in outer["model"].items()
        if isinstance(value, Tensor)
    }
    if not weights:
        raise CheckpointError(f"{path} holds no weights")
    parts = {
        name: dict(value) for name in ("optimizer", "config") if isinstance(value := outer.get(name), Mapping)
    }
    epoch = outer.get("epoch")
    return Released(weights, epoch=epoch if isinstance(epoch, int) else None, **parts)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def to_ours(weights: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Weights by LAVIS's names to weights by ours, without leftovers of a loss that is not used.

    Raises:
        CheckpointError: names that are in no list, or one of the two biases of an attention without the other.
    """
    kept = {name: value for name, value in weights.items() if not _IGNORED.fullmatch(name)}
    joined = _join_biases(kept, where)
    renamed = {name: _renamed(name, _TO_OURS) for name in joined}
    if unknown := [name for name, ours in renamed.items() if ours is None]:
        raise CheckpointError(f"{where} holds weights that no DeltaVLM has: {_some(unknown)}")
    return {str(renamed[name]): value for name, value in joined.items()}


def _join_biases(weights: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Each q_bias [D] and v_bias [D] to the qkv.bias [3 D] of transformers; keys have none."""
    out: dict[str, Tensor] = {}
    for name, value in weights.items():
        if not name.endswith(_HALVES):
            out[name] = value
            continue
        stem = name[: -len(_HALVES[0])]
        halves = [weights.get(stem + half) for half in _HALVES]
        if halves[0] is None or halves[1] is None:
            raise CheckpointError(f"{where}: {stem} has only one of {' and '.join(_HALVES)}")
        out[f"{stem}.attn.qkv.bias"] = torch.cat([halves[0], torch.zeros_like(halves[0]), halves[1]])
    return out


def from_ours(weights: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The opposite of `to_ours`. A bias of keys has no place there, and no influence: softmax does not see it.

    Raises:
        CheckpointError: weights that the released layout has no place for.
    """
    out: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, value in weights.items():
        theirs = _renamed(name, _TO_THEIRS)
        if theirs is None:
            unknown.append(name)
        elif theirs.endswith(".attn.qkv.bias"):
            stem = theirs.removesuffix(".attn.qkv.bias")
            q_bias, _, v_bias = value.chunk(3)
            out |= {stem + half: bias.clone() for half, bias in zip(_HALVES, (q_bias, v_bias), strict=True)}
        else:
            out[theirs] = value
    if unknown:
        raise CheckpointError(f"the released layout has no place for weights of {where}: {_some(unknown)}")
    return out


def _some(names: Iterable[str], most: int = 20) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
