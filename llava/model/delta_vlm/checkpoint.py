"""DeltaVLM's weights in and out: what is saved, what a folder may leave out, and where that comes from on loading.

Most of a DeltaVLM is frozen: the language model and all but the last blocks of the encoder. A config that names its
`base_models` lets a checkpoint hold the rest alone.
"""

import copy
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from llava.errors import CheckpointError, DownloadError
from llava.model.checkpoint import (
    HUB_OPTIONS,
    Shapes,
    check_weights,
    checkpoint_files,
    read_shapes,
    unsharded,
)
from llava.model.delta_vlm import released
from llava.model.delta_vlm.configuration import DeltaVLMConfig

BASES = ("vision", "language")
"""Base models, keys of a config's `base_models`."""

_FUSION = "model.fusion."
_BLOCK = re.compile(r"vision_tower\.encoder\.layers\.(\d+)\.")
# A vision encoder's names in InstructBLIP's and BLIP-2's folders, and in ours.
_VISION = re.compile(r"^(?:model\.)?(?:vision_model|vision_tower)\.")


def base_of(name: str, config: DeltaVLMConfig) -> str | None:
    """Which base model a frozen weight belongs to, "vision" or "language"; None for one that learns.

    Args:
        name: in `DeltaVLMForConditionalGeneration` or in `DeltaVLMModel`.
    """
    base = _place(name, _frozen(config))
    return None if base == "language" and config.tune_language_model else base


def held_by(name: str, config: DeltaVLMConfig) -> str | None:
    """Which base model has a weight as a checkpoint with this config has it, which may leave it out; None for one that
    has learned, even where it is frozen now."""
    return _place(name, config.base_blocks)


def _frozen(config: DeltaVLMConfig) -> int:
    return int(config.vision_config.num_hidden_layers - config.tune_vision_blocks)


def _place(name: str, blocks: int) -> str | None:
    """The base model of a weight, if of the encoder the first `blocks` are a base."""
    plain = name.removeprefix("model.")
    if plain.startswith(("language_model.", "lm_head.")):
        return "language"
    if plain.startswith("vision_tower.embeddings."):
        return "vision" if blocks else None
    block = _BLOCK.match(plain)
    return "vision" if block is not None and int(block.group(1)) < blocks else None


def lasting(name: str) -> str:
    """A folder, file or hub id as a config may keep it: found from whatever folder it is looked for."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def expected_shapes(config: DeltaVLMConfig) -> Shapes:
    """Names and shapes of a whole model, without making one."""
    from llava.model.delta_vlm.modeling import DeltaVLMForConditionalGeneration

    with unsharded(), torch.device("meta"):
        model = DeltaVLMForConditionalGeneration(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


# --- saving ------------------------------------------------------------------------------------------------------


@contextmanager
def saving(
    model: PreTrainedModel, state_dict: dict[str, Tensor] | None, whole: bool | None
) -> Iterator[dict[str, Tensor] | None]:
    """Inside, the config says what the checkpoint leaves out; gives the weights to write, None for all.

    A base model whose weights learn, whatever the config says of them, is no base any more, and is written; so is all
    where nothing learns, since then there is no telling what has: peft freezes a model before it adds to its weights.
    """
    config = cast(DeltaVLMConfig, model.config)
    held = config.base_models, config.base_blocks
    bases = dict(config.base_models or {})
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if whole or (whole is None and not learning):
        bases = {}
    config.base_blocks = min(
        config.base_blocks, _frozen(config)
    )  # of those that were a base, some may learn now
    for name in learning:
        bases.pop(held_by(name, config) or "", None)
    if whole is False and not bases:
        raise CheckpointError(
            "this model's config names no base_models whose weights could be left out; save it whole"
        )
    if bases:
        weights = model.state_dict() if state_dict is None else state_dict
        state_dict = {name: value for name, value in weights.items() if held_by(name, config) not in bases}
    config.base_models = bases or None
    try:
        yield state_dict
    finally:
        config.base_models, config.base_blocks = held


# --- loading -----------------------------------------------------------------------------------------------------


def prepare_loading(cls: type, source: str, kwargs: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Source and arguments for transformers' `from_pretrained`, after a check of every key.

    Where the checkpoint leaves out its base models, all weights are given as `state_dict`, and no source; likewise with
    `fresh_fusion=True`, which leaves the checkpoint's fusion aside: that of the given `config` starts untrained. Models
    already given so, and quantised checkpoints, are left to transformers.

    Raises:
        CheckpointError: every missing, unexpected and mis-shaped weight, by name.
        DownloadError: a base model that cannot be reached.
    """
    kwargs = dict(kwargs)
    fresh = bool(kwargs.pop("fresh_fusion", False))
    if kwargs.get("state_dict") is not None or kwargs.get("gguf_file") is not None:
        return source, kwargs
    hub = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}
    config = kwargs.get("config")
    if not isinstance(config, PreTrainedConfig):
        fields = inspect.signature(DeltaVLMConfig.__init__).parameters
        changed = {name: kwargs.pop(name) for name in list(kwargs) if name in fields and name != "config"}
        config = DeltaVLMConfig.from_pretrained(source if config is None else config, **hub, **changed)
        kwargs["config"] = config
    if getattr(config, "quantization_config", None) is not None or not isinstance(config, DeltaVLMConfig):
        return source, kwargs
    files = checkpoint_files(source, **hub)
    left_out = check_checkpoint(source, read_shapes(files), config, fresh_fusion=fresh)
    if not left_out and not fresh:
        return source, kwargs
    state = {
        name: value
        for file in files
        for name, value in _read(file).items()
        if not (fresh and name.startswith(_FUSION))
    }
    for base in left_out:
        state |= base_weights(base, config)
    check_checkpoint(
        source, {name: tuple(value.shape) for name, value in state.items()}, config, fresh_fusion=fresh
    )
    if cls.__name__ == "DeltaVLMModel":  # the model without its head has no "model." before its names
        state = {name.removeprefix("model."): v for name, v in state.items() if name.startswith("model.")}
    kwargs["state_dict"] = state
    return None, kwargs


def check_checkpoint(
    source: str, shapes: Shapes, config: DeltaVLMConfig, *, fresh_fusion: bool = False
) -> tuple[str, ...]:
    """Compare a checkpoint's weights with its config's; returns which base models it leaves out, each altogether.

    Raises:
        CheckpointError: see `llava.model.checkpoint.check_weights`.
    """
    expected = expected_shapes(config)
    if fresh_fusion:
        shapes, expected = (
            {name: shape for name, shape in held.items() if not name.startswith(_FUSION)}
            for held in (shapes, expected)
        )
    present = {held_by(name, config) for name in shapes}
    left_out = tuple(base for base in BASES if base in (config.base_models or {}) and base not in present)
    wanted = {name: shape for name, shape in expected.items() if held_by(name, config) not in left_out}
    check_weights(shapes, wanted, tied=config.tie_word_embeddings, where=source)
    return left_out


def is_delta_vlm(source: str, **hub: Any) -> bool:
    """Whether a folder or hub id holds a DeltaVLM, by its config.json; not so where there is none."""
    found = cached_file(
        source,
        "config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub,
    )
    return found is not None and json.loads(Path(found).read_text()).get("model_type") == "delta_vlm"


def inspect_folder(source: str, **hub: Any) -> tuple[DeltaVLMConfig, tuple[str, ...]]:
    """Check a checkpoint without loading it; returns its config and the base models it leaves out.

    Raises:
        CheckpointError: see `check_checkpoint`.
    """
    config = DeltaVLMConfig.from_pretrained(source, **hub)
    return config, check_checkpoint(source, read_shapes(checkpoint_files(source, **hub)), config)


def take_generation_config(model: PreTrainedModel, source: str, kwargs: Mapping[str, Any]) -> None:
    """Give a model put together from several places the generation_config.json of `source`, if it has one."""
    hub = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}
    model.name_or_path = model.config.name_or_path = source
    found = cached_file(source, "generation_config.json", _raise_exceptions_for_missing_entries=False, **hub)
    if found is not None and model.can_generate():
        model.generation_config = GenerationConfig.from_dict(json.loads(Path(found).read_text()))


# --- base models -------------------------------------------------------------------------------------------------


def base_weights(base: str, config: DeltaVLMConfig) -> dict[str, Tensor]:
    """The frozen weights of a base model, by our names.

    Args:
        base: "vision" or "language", a key of `config.base_models`.

    Raises:
        CheckpointError: weights that find no place.
        DownloadError: it cannot be reached.
    """
    assert config.base_models is not None
    source = config.base_models[base]
    return language_weights(source, config) if base == "language" else vision_weights(source, config)


def language_weights(source: str, config: DeltaVLMConfig) -> dict[str, Tensor]:
    """A causal language model's weights in the precision that they are stored in, read by its own class.

    Rows of words that it does not have, such as a padding token's, are the mean of those it has: never the likeliest
    word.
    """
    try:
        with unsharded():  # also in a run that transformers knows to be ZeRO-3
            whole: Any = AutoModelForCausalLM.from_pretrained(source, dtype="auto", trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise DownloadError(f"the language model {source} cannot be loaded: {_first_line(error)}") from error
    head = whole.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise CheckpointError(f"{source}: its head has a bias, for which DeltaVLM has no place")
    embedding = whole.get_input_embeddings().weight.data_ptr()
    rows = config.text_config.vocab_size
    weights = {
        f"model.language_model.{name}": _with_rows(value, rows) if value.data_ptr() == embedding else value
        for name, value in whole.base_model.state_dict().items()
    }
    return weights | {"lm_head.weight": _with_rows(head.weight.detach(), rows)}


def _with_rows(weight: Tensor, rows: int) -> Tensor:
    """[n, D] to [rows, D], with the mean of the n for rows that are new."""
    more = rows - len(weight)
    if more <= 0:
        return weight
    mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
    return torch.cat([weight, mean.expand(more, -1)])


def vision_weights(source: str, config: DeltaVLMConfig) -> dict[str, Tensor]:
    """The frozen part of the vision encoder: from a folder or hub id of InstructBLIP, BLIP-2 or ours, or from a file of
    LAVIS's (eva_vit_g.pth).

    Raises:
        CheckpointError: weights that are not there.
    """
    wanted = {name for name in expected_shapes(config) if held_by(name, config) == "vision"}

    def ours(name: str) -> str:
        return _VISION.sub("model.vision_tower.", name)

    if Path(source).is_file():
        held = released.read_release(source).weights
        inner = {name.removeprefix("visual_encoder."): value for name, value in held.items()}
        found = released.to_ours(
            {f"visual_encoder.{name}": value for name, value in inner.items() if _is_encoder(name)}, source
        )
    else:
        found = {
            ours(name): value
            for file in _files_with(source, lambda name: ours(name) in wanted)
            for name, value in _read(file, lambda name: ours(name) in wanted).items()
        }
    if missing := sorted(wanted - set(found)):
        raise CheckpointError(f"{source} lacks weights of the vision encoder: {', '.join(missing[:20])}")
    return {name: value for name, value in found.items() if name in wanted}


def instructblip_weights(source: str, config: DeltaVLMConfig, part: str) -> dict[str, Tensor]:
    """What a new model takes over from a folder or hub id of InstructBLIP or BLIP-2, or ours; by our names.

    Args:
        part: "tower", the whole vision encoder; or "qformer", with the queries and the projection where these fit. A
            file is EVA's encoder, without the final norm.

    Raises:
        CheckpointError: weights that are not there, or of another shape.
    """
    expected = expected_shapes(config)
    if part == "tower" and Path(source).is_file():
        whole = copy.deepcopy(config)
        whole.base_blocks = config.vision_config.num_hidden_layers
        return vision_weights(source, whole)
    prefixes = ("model.vision_tower.",) if part == "tower" else _QFORMER.values()
    wanted = {name for name in expected if name.startswith(tuple(prefixes))}

    def ours(name: str) -> str:
        plain = name.removeprefix("model.")
        return next(
            (new + plain.removeprefix(old) for old, new in _QFORMER.items() if plain.startswith(old)),
            _VISION.sub("model.vision_tower.", name),
        )

    found = {
        ours(name): value
        for file in _files_with(source, lambda name: ours(name) in wanted)
        for name, value in _read(file, lambda name: ours(name) in wanted).items()
    }
    needed = {name for name in wanted if not name.startswith(("model.projector.", "model.query_tokens"))}
    found = {n: v for n, v in found.items() if n in needed or tuple(v.shape) == expected[n]}
    wrong = [name for name in needed if name not in found or tuple(found[name].shape) != expected[name]]
    if wrong:
        raise CheckpointError(
            f"{source}: weights of the {part} that are missing, or of another shape than its config says: "
            f"{', '.join(sorted(wrong)[:20])}"
        )
    return found


_QFORMER = {
    "qformer.": "model.qformer.",
    "query_tokens": "model.query_tokens",
    "language_projection.": "model.projector.",
    "projector.": "model.projector.",
}
"""Names of InstructBLIP's, and ours."""


def _is_encoder(name: str) -> bool:
    """Of EVA's own file, what LAVIS uses: not its classifier and the norm before it."""
    return name.startswith(("blocks.", "patch_embed.")) or name in ("cls_token", "pos_embed")


def _files_with(source: str, wanted: Callable[[str], bool]) -> list[Path]:
    """Weight files that hold what is wanted; shards of a hub id without any of it are not fetched."""
    index = cached_file(source, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    if index is None:
        return checkpoint_files(source)
    shards: dict[str, str] = json.loads(Path(index).read_text())["weight_map"]
    found = [cached_file(source, shard) for shard in sorted({s for n, s in shards.items() if wanted(n)})]
    return [Path(file) for file in found if file is not None]


def _read(file: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """Weights of a safetensors file, or of a pickle that holds nothing else."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as held:
            return {name: held.get_tensor(name) for name in held.keys() if wanted(name)}  # noqa: SIM118
    weights = torch.load(file, map_location="cpu", weights_only=True)
    return {name: value for name, value in weights.items() if wanted(name)}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
