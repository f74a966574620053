"""Weights in and out: released layouts to ours on load, ours to the release's on export, every leftover key named.

Three layouts are told apart by the names in the file, never by a path's spelling:
- "release": LLaVA-OneVision's original layout and CCExpert's, which adds `model.vision_resampler.*`;
- "hub": LLaVA-OneVision as transformers keeps it;
- "ours": what `save_pretrained` of our classes writes.
"""

import functools
import json
import logging
import pickle
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.utils import cached_file

from llava.errors import CheckpointError
from llava.model.configuration import SIGLIP_SO400M, ChangeVLMConfig

logger = logging.getLogger(__name__)

Shapes = dict[str, tuple[int, ...]]

# Renaming on load, applied in this order, each at most once a key. Read right to left (and in reverse) on export.
_FUSION = "model.vision_resampler."
_RELEASE_NAMES: tuple[tuple[str, str], ...] = (
    ("model.embed_tokens.", "model.language_model.embed_tokens."),
    ("model.layers.", "model.language_model.layers."),
    ("model.norm.", "model.language_model.norm."),
    ("model.mm_projector.0.", "model.projector.layers.0."),
    ("model.mm_projector.2.", "model.projector.layers.1."),
    ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower.encoder."),
    (_FUSION + "expert_change_feature_extractor_model.linear_mapping.", "model.fusion.difference.gate."),
    (_FUSION + "expert_change_feature_extractor_model.proj.", "model.fusion.difference.proj."),
    (_FUSION + "ChangeAwareTokenReduce.feature_map_level_gate.0.", "model.fusion.level_gate.fc1."),
    (_FUSION + "ChangeAwareTokenReduce.feature_map_level_gate.2.", "model.fusion.level_gate.fc2."),
    (_FUSION + "layers.", "model.fusion.blocks."),
)
_RELEASE_BLOCK_NAMES: tuple[tuple[str, str], ...] = (
    (".change_self_attn.", ".attend_change."),
    (".cross_attn_change_to_imageABC.", ".attend_all."),
    (".cross_attn_imageAB_to_change.", ".attend_back."),
    (".mlp.lin1.", ".mlp.fc1."),
    (".mlp.lin2.", ".mlp.fc2."),
    (".image_a_flag_embed.weight", ".flag_before"),
    (".image_b_flag_embed.weight", ".flag_after"),
    (".change_flag_embed.weight", ".flag_change"),
)
_RELEASE: dict[str, str] = {"^" + re.escape(old): new for old, new in _RELEASE_NAMES} | {
    re.escape(old): new for old, new in _RELEASE_BLOCK_NAMES
}
_HUB: dict[str, str] = {
    r"^language_model\.model\.": "model.language_model.",
    r"^language_model\.lm_head\.": "lm_head.",
    r"^(?:model\.)?multi_modal_projector\.linear_1\.": "model.projector.layers.0.",
    r"^(?:model\.)?multi_modal_projector\.linear_2\.": "model.projector.layers.1.",
    r"^(?:model\.)?vision_tower\.(?:vision_model\.)?": "model.vision_tower.encoder.",
    r"^image_newline": "model.image_newline",
}
LAYOUTS: dict[str, dict[str, str]] = {"release": _RELEASE, "hub": _HUB, "ours": {}}

# In released files, never used by the released forward pass.
_DEAD = re.compile(
    r"^model\.vision_resampler\.(layers\.\d+\.norm4|ChangeAwareTokenReduce\.(change_for_key_proj|cross_attn))\.|^model\.mm_cc_projector\."
)
_OF_FUSION = re.compile(r"^model\.fusion\.")
DISCARDED = "discarded."
"""Before the names of weights that a model with a new fusion does not take."""

# The tower's weights behind the deepest layer asked for, under our names.
_TOWER_TAIL = re.compile(r"^model\.vision_tower\.encoder\.(post_layernorm|head)\.")
_TOWER_LAYER = re.compile(r"^model\.vision_tower\.encoder\.encoder\.layers\.(\d+)\.")

KNOWN_TOWERS: dict[str, dict[str, Any]] = {"siglip-so400m-patch14-384": SIGLIP_SO400M}
"""Sizes of towers that released configs name without giving them."""

RELEASE_ARCHITECTURES = ("LlavaQwenCCForCausalLM", "LlavaQwenForCausalLM")
"""Classes of the published code; they decide where a config's `model_type` does not."""

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")


# --- what is in a file ---------------------------------------------------------------------------------------------


def _header(path: Path) -> Shapes:
    """Names and shapes of a safetensors file, from its header alone."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            raise CheckpointError(f"{path} is no safetensors file, or is cut off in its header")
        try:
            entries = json.loads(file.read(length))
        except ValueError as error:
            raise CheckpointError(
                f"{path} is no safetensors file: its header is damaged ({error})"
            ) from error
    entries.pop("__metadata__", None)
    end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if end != size:
        raise CheckpointError(f"{path} holds {size} bytes, its header promises {end}: the file is incomplete")
    return {name: tuple(entry["shape"]) for name, entry in entries.items()}


def checkpoint_files(source: str | Path, **hub: Any) -> list[Path]:
    """Weight files of a local folder or a hub id (fetched when needed): safetensors before pickles, shards in order.

    Raises:
        CheckpointError: no weights there, or a shard that the index names is missing.
    """
    optional = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_gated_repo": True}
    for single in ("model.safetensors", "pytorch_model.bin"):
        found = cached_file(str(source), single, **optional, **hub)
        if found is not None:
            return [Path(found)]
        index = cached_file(str(source), f"{single}.index.json", **optional, **hub)
        if index is None:
            continue
        shards = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
        files = {shard: cached_file(str(source), shard, **optional, **hub) for shard in shards}
        missing = [shard for shard, file in files.items() if file is None]
        if missing:
            raise CheckpointError(f"{index} names shards that are not there: {', '.join(missing)}")
        return [Path(file) for file in files.values() if file is not None]
    raise CheckpointError(f"no weights in {source}: neither model.safetensors nor an index of shards")


def read_shapes(files: Iterable[Path]) -> Shapes:
    """Names and shapes of all weights in `files`; pickles are opened through `weights_only`.

    Raises:
        CheckpointError: a file is damaged, or a pickle that holds anything but tensors.
    """
    shapes: Shapes = {}
    for file in files:
        if file.suffix == ".safetensors":
            shapes |= _header(file)
        else:
            try:
                weights = torch.load(file, map_location="meta", weights_only=True)
            except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
                raise CheckpointError(
                    f"{file} was refused: it is damaged, or a pickle that holds more than tensors ({error}). "
                    "Ask its author for safetensors"
                ) from error
            shapes |= {name: tuple(tensor.shape) for name, tensor in weights.items()}
    return shapes


def layout_of(names: Iterable[str]) -> str:
    """Which layout the names of a file's weights are in: "release", "hub" or "ours"."""
    names = list(names)
    if any(name.startswith(("model.mm_projector.", "model.vision_tower.vision_tower.")) for name in names):
        return "release"
    if any("multi_modal_projector." in name for name in names):
        return "hub"
    return "ours"


def rename(name: str, layout: str) -> str:
    """A weight's name in a file to its name in `ChangeVLMForConditionalGeneration`."""
    for pattern, target in LAYOUTS[layout].items():
        name = re.sub(pattern, target, name, count=1)
    return name


def is_dead(name: str, layout: str, config: ChangeVLMConfig) -> bool:
    """Whether a weight has no influence on any output: never used by the release, or behind the deepest tower layer."""
    if layout == "ours":
        return False
    ours = rename(name, layout)
    layer = _TOWER_LAYER.match(ours)
    deeper = layer is not None and int(layer.group(1)) >= max(config.vision_layers)
    return bool(deeper or _TOWER_TAIL.match(ours) or (layout == "release" and _DEAD.match(name)))


def check_weights(
    shapes: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]], *, tied: bool, where: str
) -> None:
    """Compare renamed weights with what the model has.

    Args:
        shapes: name to shape, after renaming and without dead weights.
        expected: name to shape of the model.
        tied: whether `lm_head.weight` may be absent, being the embedding.
        where: the folder or id, for the message.

    Raises:
        CheckpointError: every missing, unexpected and mis-shaped weight, by name.
    """
    missing = [n for n in expected if n not in shapes and not (tied and n == "lm_head.weight")]
    unexpected = [n for n in shapes if n not in expected]
    wrong = [
        f"{n} is {list(shapes[n])}, the model has {list(expected[n])}"
        for n in expected
        if n in shapes and tuple(shapes[n]) != tuple(expected[n])
    ]
    faults = [
        f"  {what} ({len(names)}): " + "; ".join(names[:20]) + (" ..." if len(names) > 20 else "")
        for what, names in (("missing", missing), ("unexpected", unexpected), ("other shape", wrong))
        if names
    ]
    if faults:
        raise CheckpointError(f"the weights in {where} do not fit its config.json:\n" + "\n".join(faults))


# --- released configs ----------------------------------------------------------------------------------------------

_TEXT_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act",
    "max_position_embeddings", "max_window_layers", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters",
    "sliding_window", "use_sliding_window", "tie_word_embeddings", "vocab_size",
    "bos_token_id", "eos_token_id", "pad_token_id",
    "attention_dropout", "initializer_range", "use_cache", "torch_dtype", "dtype",
)  # fmt: skip


def _optional_json(source: str | None, filename: str, **hub: Any) -> dict[str, Any] | None:
    """A JSON file beside a config, if there is one."""
    if not source:
        return None
    options = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    found = cached_file(source, filename, **options, **hub)
    return json.loads(Path(found).read_text()) if found is not None else None


def _tower_fields(fields: Mapping[str, Any], source: str | None, hub: Mapping[str, Any]) -> dict[str, Any]:
    """The vision config of a released checkpoint: beside it, by its known name, or in the folder that it names."""
    beside = _optional_json(source, "vision_config.json", **hub)
    if beside is not None:
        return {"model_type": "siglip_vision_model", "vision_use_head": False, **beside}
    tower = str(fields.get("mm_vision_tower", ""))
    known = KNOWN_TOWERS.get(tower.rstrip("/").rsplit("/", 1)[-1])
    if known is not None:
        return dict(known)
    if Path(tower).is_dir() and (Path(tower) / "config.json").is_file():
        own = json.loads((Path(tower) / "config.json").read_text())
        return own.get("vision_config", own)
    raise CheckpointError(
        f"config.json of {source} names the vision tower {tower!r}, whose sizes are not in it. Known: "
        f"{', '.join(KNOWN_TOWERS)}. Put the tower's config beside it as vision_config.json"
    )


def _image_token_id(fields: Mapping[str, Any], source: str | None, hub: Mapping[str, Any]) -> int:
    """Where `<image>` is, or will be added by our processor: behind the tokenizer's last entry."""
    fast = _optional_json(source, "tokenizer.json", **hub)
    if fast is not None:
        vocabulary, added = (
            fast["model"]["vocab"],
            {t["content"]: t["id"] for t in fast.get("added_tokens", [])},
        )
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
    else:
        ids = list((_optional_json(source, "vocab.json", **hub) or {}).values())
        added = _optional_json(source, "added_tokens.json", **hub) or {}
    if ids:
        return int(added.get("<image>", max([*ids, *added.values()]) + 1))
    if fields.get("image_token_index", -1) >= 0:  # LLaVA's own -200 is no id
        return int(fields["image_token_index"])
    vocab = int(fields.get("vocab_size", 151936))
    return 151646 if vocab > 151646 else vocab - 1  # Qwen2's first free id; else the last, a padding row


def _aspect(name: str | None, pinpoints: list[list[int]] | None, *, cut: bool = True) -> dict[str, Any]:
    """How images are brought to size, from LLaVA's name for it ("square", "pad", "anyres_max_9").

    Args:
        cut: whether single images may be cut into views; pairs for a fusion never are.
    """
    tiles = re.fullmatch(r"anyres(?:_max_(\d+))?", name or "square")
    if tiles is None:
        return {"image_aspect": "pad" if name == "pad" else "square"}
    most = int(tiles.group(1) or 10_000)  # plain "anyres" has no bound
    return {"image_aspect": "anyres" if cut else "square", "grid_pinpoints": pinpoints, "max_tiles": most}


def _release_pinpoints(fields: Mapping[str, Any], source: str | None) -> list[list[int]] | None:
    """`image_grid_pinpoints` as [height, width] in pixels; None for every grid up to 6 x 6."""
    given = fields.get("image_grid_pinpoints")
    if given in (None, "(1x1),...,(6x6)"):
        return None
    if not isinstance(given, list):
        raise CheckpointError(
            f"image_grid_pinpoints={given!r} of {source} is neither a list nor '(1x1),...,(6x6)'"
        )
    return [[height, width] for width, height in given]


def config_from_release(fields: Mapping[str, Any], source: str | None = None, **hub: Any) -> ChangeVLMConfig:
    """Our config from a released config.json (`llava_qwen`, `llava_qwen_cc`), and the files beside it.

    Raises:
        CheckpointError: a field has a value that no release has, or the tower is unknown.
    """
    layers = fields.get("mm_vision_select_layer", -2)
    layers = json.loads(layers) if isinstance(layers, str) else layers
    resampler = fields.get("mm_resampler_type")
    fusion = None
    if resampler == "cc_expert":
        args = dict(fields.get("cc_expert_args") or {})
        if args.get("downsample_ratio", 1) != 1:
            raise CheckpointError(
                f"cc_expert_args.downsample_ratio={args['downsample_ratio']} of {source}: only 1 was released"
            )
        fusion = {
            "kind": "difference",
            "depth": args.get("per_expert_depth", 2),
            "mlp_dim": args.get("mlp_dim", 4608),
        }
    elif resampler not in (None, "identity"):
        raise CheckpointError(
            f"mm_resampler_type={resampler!r} of {source} is not known; known: cc_expert, none"
        )
    text = {name: fields[name] for name in _TEXT_FIELDS if fields.get(name) is not None}
    return ChangeVLMConfig(
        vision_config=_tower_fields(fields, source, hub),
        text_config={"model_type": "qwen2", **text},
        vision_layers=layers,
        fusion=fusion,
        projector=fields.get("mm_projector_type", "mlp2x_gelu"),
        image_token_id=_image_token_id(fields, source, hub),
        **_aspect(fields.get("image_aspect_ratio"), _release_pinpoints(fields, source), cut=fusion is None),
        tie_word_embeddings=bool(fields.get("tie_word_embeddings", False)),
        dtype=fields.get("dtype") or fields.get("torch_dtype"),
    )


def config_from_hub(fields: Mapping[str, Any]) -> ChangeVLMConfig:
    """Our config from transformers' LLaVA-OneVision config.json (`llava_onevision`)."""
    if not isinstance(fields.get("vision_feature_layer", -1), int):
        raise CheckpointError("vision_feature_layer is a list; LLaVA-OneVision uses one layer")
    if fields.get("vision_feature_select_strategy", "full") != "full":
        raise CheckpointError("vision_feature_select_strategy must be 'full'")
    text = dict(fields["text_config"])
    tied = bool(fields.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False))
    return ChangeVLMConfig(
        vision_config={"vision_use_head": False, **fields["vision_config"]},
        text_config={**text, "tie_word_embeddings": tied},
        vision_layers=fields.get("vision_feature_layer", -1),
        image_token_id=fields.get("image_token_index", fields.get("image_token_id", 151646)),
        image_newline=True,
        **_aspect(fields.get("vision_aspect_ratio", "anyres_max_9"), fields.get("image_grid_pinpoints")),
        tie_word_embeddings=tied,
        dtype=fields.get("dtype") or fields.get("torch_dtype"),
    )


def read_config(source: str, **hub: Any) -> ChangeVLMConfig:
    """The config of a folder or hub id in any supported layout.

    Raises:
        CheckpointError: another kind of model.
    """
    fields, _ = PreTrainedConfig.get_config_dict(source, **hub)
    kind = fields.get("model_type")
    architectures = fields.get("architectures") or [None]
    if kind == ChangeVLMConfig.model_type:
        return ChangeVLMConfig.from_dict(fields)
    if kind == "llava_onevision":
        return config_from_hub(fields)
    # some released configs carry a model_type of their base ("llava", "qwen2"): the class tells
    if kind in ("llava_qwen", "llava_qwen_cc") or architectures[0] in RELEASE_ARCHITECTURES:
        return config_from_release(fields, source, **hub)
    raise CheckpointError(
        f"model_type={kind!r} in config.json of {source} is not supported; "
        "known: change_vlm, llava_qwen, llava_qwen_cc, llava_onevision"
    )


class ReleaseConfig(PreTrainedConfig):
    """Lets `AutoConfig` read `llava_qwen_cc`: what comes out is our config."""

    model_type = "llava_qwen_cc"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        want_rest = kwargs.pop("return_unused_kwargs", False)
        config = config_from_release(config_dict, kwargs.get("name_or_path"))
        # arguments that are config attributes must not reach the model's constructor
        for name in [name for name in kwargs if hasattr(config, name)]:
            setattr(config, name, kwargs.pop(name))
        return (config, kwargs) if want_rest else config


class ReleaseBaselineConfig(ReleaseConfig):
    """The same for `llava_qwen`: LLaVA-OneVision and the baselines without fusion."""

    model_type = "llava_qwen"


for _released in (ReleaseConfig, ReleaseBaselineConfig):
    AutoConfig.register(_released.model_type, _released, exist_ok=True)

# --- loading and exporting -----------------------------------------------------------------------------------------


@functools.cache
def _say_dropped(where: str, names: tuple[str, ...]) -> None:
    """Once a process and source: which weights of a released file are left out, and why."""
    logger.warning(
        "%s: left out %d weights that no output depends on: %s", where, len(names), ", ".join(names)
    )


def _short(names: Iterable[str]) -> tuple[str, ...]:
    """Weight names without their last part (weight, bias), and one name for a whole layer of the tower."""
    cut = (re.sub(r"(\.encoder\.layers\.\d+)\..*", r"\1", name.rsplit(".", 1)[0]) for name in names)
    return tuple(dict.fromkeys(cut))


@contextmanager
def unsharded() -> Iterator[None]:
    """Inside, transformers builds, loads and generates as on one process, also in a run that it knows to be ZeRO-3.

    There it shards every model that it makes, and each pass of `generate` waits for all processes.
    """
    held = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = held


def inspect(
    source: str, config: ChangeVLMConfig | None = None, *, fresh_fusion: bool = False, **hub: Any
) -> tuple[ChangeVLMConfig, str]:
    """Check a checkpoint without loading it: config against names and shapes of all weights.

    Args:
        fresh_fusion: leave the fusion out of the comparison: the model is to get a new one.

    Returns:
        The config, made to agree with the weights where releases leave that open (vocabulary, newline), and the layout.

    Raises:
        CheckpointError: see `check_weights`.
    """
    from llava.model.change_vlm import ChangeVLMForConditionalGeneration

    shapes = read_shapes(checkpoint_files(source, **hub))
    layout = layout_of(shapes)
    config = read_config(source, **hub) if config is None else config
    renamed = {
        rename(name, layout): shape for name, shape in shapes.items() if not is_dead(name, layout, config)
    }
    if layout != "ours":
        config.text_config.vocab_size = renamed.get(
            "model.language_model.embed_tokens.weight", [config.text_config.vocab_size]
        )[0]
        config.image_newline = "model.image_newline" in renamed
    with unsharded(), torch.device("meta"):
        model = ChangeVLMForConditionalGeneration(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if fresh_fusion:
        renamed, expected = (
            {name: shape for name, shape in shapes.items() if not _OF_FUSION.match(name)}
            for shapes in (renamed, expected)
        )
    check_weights(renamed, expected, tied=config.tie_word_embeddings, where=str(source))
    dropped = [name for name in shapes if is_dead(name, layout, config)]
    if dropped:
        _say_dropped(str(source), _short(dropped))
    return config, layout


def prepare_loading(cls: type, source: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments for transformers' `from_pretrained` so that any supported layout loads, after a check of every key.

    A model already given as `state_dict`, and quantised checkpoints (other names by design), are left to transformers.
    `fresh_fusion=True` among the arguments leaves the checkpoint's fusion aside, if it has one: that of the given
    `config` starts untrained.
    """
    kwargs = dict(kwargs)
    fresh = bool(kwargs.pop("fresh_fusion", False))
    hub = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}
    if kwargs.get("state_dict") is not None or kwargs.get("gguf_file") is not None:
        return kwargs
    adapter = _optional_json(str(source), "adapter_config.json", **hub)
    if adapter is not None:  # transformers loads its base first
        source = adapter["base_model_name_or_path"]
    config = kwargs.get("config")
    config = config if isinstance(config, PreTrainedConfig) else read_config(str(source), **hub)
    if getattr(config, "quantization_config", None) is not None or not isinstance(config, ChangeVLMConfig):
        return kwargs
    checked, layout = inspect(str(source), config, fresh_fusion=fresh, **hub)
    if layout == "ours":
        if fresh:
            kwargs["key_mapping"] = {_OF_FUSION.pattern: DISCARDED} | dict(kwargs.get("key_mapping") or {})
        return kwargs
    if not isinstance(kwargs.get("config"), PreTrainedConfig):
        for name in [
            n
            for n in kwargs
            if n not in HUB_OPTIONS and n not in ("config", "dtype", "torch_dtype") and hasattr(checked, n)
        ]:
            setattr(checked, name, kwargs.pop(name))
    kwargs["config"] = checked
    mapping = dict(LAYOUTS[layout])
    if fresh:
        mapping = {"^" + re.escape(_FUSION): DISCARDED} | mapping
    if cls.__name__ == "ChangeVLMModel":  # the model without its head has no "model." before its names
        mapping[r"^model\."] = ""
    kwargs.setdefault("key_mapping", mapping)
    return kwargs


def to_release(name: str) -> str:
    """A weight's name in our model to its name in the release's layout."""
    for old, new in (*reversed(_RELEASE_BLOCK_NAMES), *reversed(_RELEASE_NAMES)):
        if new.startswith("model."):
            if name.startswith(new):
                return old + name[len(new) :]
        elif name.startswith("model.fusion.blocks."):
            name = name.replace(new, old, 1)
    return name


def release_fields(config: ChangeVLMConfig) -> dict[str, Any]:
    """config.json of the release's layout for `config`.

    Raises:
        CheckpointError: a part that the release's layout has no place for.
    """
    if config.text_config.model_type != "qwen2" or config.vision_config.model_type != "siglip_vision_model":
        raise CheckpointError(
            "the release's layout holds a SigLIP tower and a Qwen2 language model, not "
            f"{config.vision_config.model_type} and {config.text_config.model_type}"
        )
    if config.projector != "mlp2x_gelu" or (
        config.fusion is not None and config.fusion.get("kind") != "difference"
    ):
        raise CheckpointError(
            f"the release's layout has no projector {config.projector!r} with fusion {config.fusion}"
        )
    if config.fusion is not None and config.fusion["head_dim"] != 128:
        raise CheckpointError(
            f"the release's fusion has heads of 128 features, this model {config.fusion['head_dim']}"
        )
    text = config.text_config.to_dict()
    rope = text.pop("rope_parameters", None) or {}
    if (scaled := rope.get("rope_type", "default")) != "default":
        raise CheckpointError(f"the release's layout has no rotary frequencies of type {scaled!r}")
    entries = config.vision_config.num_hidden_layers + 1
    layers = [layer - entries for layer in config.vision_layers]
    fused = config.fusion is not None
    fields = {name: text[name] for name in _TEXT_FIELDS if name in text} | {
        "architectures": ["LlavaQwenCCForCausalLM" if fused else "LlavaQwenForCausalLM"],
        "model_type": "llava_qwen_cc" if fused else "llava_qwen",
        "rope_theta": rope.get("rope_theta", text.get("rope_theta", 1e6)),
        "rope_scaling": None,
        "tie_word_embeddings": config.tie_word_embeddings,
        "image_aspect_ratio": f"anyres_max_{config.max_tiles}"
        if config.image_aspect == "anyres"
        else config.image_aspect,
        "image_grid_pinpoints": config.grid_pinpoints
        and [[width, height] for height, width in config.grid_pinpoints],
        "image_token_index": config.image_token_id,
        "mm_patch_merge_type": "spatial_unpad" if config.image_newline else "flat",
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_projector_type": config.projector,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": str(layers if fused else layers[-1]).replace(" ", ""),
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
        "tokenizer_model_max_length": 32768,
        "use_mm_proj": True,
    }
    if config.fusion is not None:
        fields["mm_resampler_type"] = "cc_expert"
        fields["cc_expert_args"] = {
            "downsample_ratio": 1,
            "embedding_dim": config.vision_config.hidden_size,
            "mlp_dim": config.fusion["mlp_dim"],
            "per_expert_depth": config.fusion["depth"],
        }
    return fields


def export_release(model: Any, folder: str | Path, max_shard_size: int | str = "5GB") -> Path:
    """Write a model in the release's layout: config.json, vision_config.json and safetensors, loadable again by us.

    Args:
        model: a `ChangeVLMForConditionalGeneration`.
        folder: made if need be; must not hold a checkpoint yet.
        max_shard_size: as in transformers' `save_pretrained`.

    Raises:
        CheckpointError: the model has parts the layout has no place for, or the folder is taken.
    """
    from huggingface_hub import save_torch_state_dict

    folder = Path(folder)
    if (folder / "config.json").exists():
        raise CheckpointError(f"{folder} already holds a checkpoint; give another folder")
    fields = release_fields(model.config)
    fields["torch_dtype"] = str(model.dtype).removeprefix("torch.")
    vision = model.config.vision_config
    sizes = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size",
        "num_channels", "hidden_act", "layer_norm_eps",
    )  # fmt: skip
    state = {to_release(name): tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    if dropped := [name for name in state if name.startswith("model.fusion.map_head.")]:
        logger.warning("the release's layout has no place for the change map's head, left out: %s", dropped)
        state = {name: tensor for name, tensor in state.items() if name not in dropped}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(state, folder, max_shard_size=max_shard_size, metadata={"format": "pt"})
    (folder / "vision_config.json").write_text(
        json.dumps({name: getattr(vision, name) for name in sizes}, indent=1)
    )
    model.generation_config.save_pretrained(folder)
    # last, so that a folder with a config.json is a whole one
    (folder / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True))
    return folder
