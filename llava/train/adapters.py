"""Adapters: low-rank updates of named parts, with whole parts beside them, in a folder that names its base.

Such a folder holds `adapter_config.json` and `adapter_model.safetensors` in peft's form (the parts trained in full are
in the same file), `adapted_config.json`, which is the config of the model that was trained, and the processor's files.
Loading one gives a plain model: base and adapter merged.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from llava.errors import CheckpointError, ConfigError, DownloadError, MissingDependencyError
from llava.model.precision import cast_weights
from llava.train.parts import PARTS

if TYPE_CHECKING:
    from peft import LoraConfig

    from llava.model.change_vlm import ChangeVLMForConditionalGeneration
    from llava.model.configuration import ChangeVLMConfig
    from llava.train.adapted import AdaptedModel

LOW_RANK = ("llm", "tower")
"""Parts that can get low-rank updates."""
WHOLE = ("fusion", "projector")
"""Parts that can be trained in full beside them."""

CONFIG_FILE = "adapted_config.json"
"""Not config.json, by which transformers would take the folder for a whole model's."""

_BASE = "base_model_name_or_path"
_BOTH = ("cache_dir", "force_download", "local_files_only", "token", "proxies")
_ONE = ("revision", "subfolder")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What an adapter changes, and how.

    Raises:
        ConfigError: a value that cannot be; the field is named.
    """

    kind: Literal["lora", "dora", "qlora"]
    """Low-rank updates (arXiv 2106.09685), the same with learned magnitudes (arXiv 2402.09353), or the first on a base
    held in 4 bits (arXiv 2305.14314; on CUDA devices, with bitsandbytes)."""
    rank: int = 128
    alpha: float = 256.0
    """Updates are scaled by alpha / rank."""
    dropout: float = 0.05
    """Share of an update's inputs that is left out while training."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (arXiv 2312.03732)."""
    parts: Sequence[str] = ("llm",)
    """Where updates go: llm, tower. All linear maps of their layers get one; the head and the embeddings do not."""
    full: Sequence[str] = ("fusion", "projector")
    """Trained in full and kept with the adapter; one that the model does not have is passed over. `image_newline`,
    which pairs never use, stays as it is."""

    def __post_init__(self) -> None:
        for name, known in (("parts", LOW_RANK), ("full", WHOLE)):
            values = tuple(getattr(self, name))
            object.__setattr__(self, name, values)
            if unknown := sorted(set(values) - set(known)):
                raise ConfigError(f"field 'adapter.{name}' has {unknown}; known: {', '.join(known)}")
        if not self.parts:
            raise ConfigError(f"field 'adapter.parts' is empty: name {' or '.join(LOW_RANK)}")
        if self.kind not in ("lora", "dora", "qlora"):
            raise ConfigError(f"field 'adapter.kind' is {self.kind!r}; known: lora, dora, qlora")
        if self.rank < 1:
            raise ConfigError(f"field 'adapter.rank' is {self.rank}, expected 1 or more")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(f"field 'adapter.alpha' is {self.alpha}, expected a number above 0")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"field 'adapter.dropout' is {self.dropout}, expected 0 or more, below 1")


def add_adapter(
    model: "ChangeVLMForConditionalGeneration", config: AdapterConfig, seed: int, base: str | None = None
) -> "AdaptedModel":
    """Freeze `model` and put an adapter on it, in place; what learns afterwards is the adapter and `config.full`.

    Before the first update the outputs are those of `model`. Weights of the adapter are float32, whole parts keep
    their precision: load the model in float32.

    Args:
        model: for "qlora", loaded with `llava.train.four_bit.options`. On the meta device: a plan.
        seed: of the adapter's first weights; torch's global generator is left as it was.
        base: what `model` was loaded by (a name, folder or hub id), for whoever loads the adapter; the model's own
            `name_or_path` by default.

    Raises:
        MissingDependencyError: no peft.
        ConfigError: a part to adapt without linear layers, a "qlora" of a model that is not held in 4 bits, or a model
            that lies nowhere.
    """
    peft = _peft()
    from llava.train.adapted import AdaptedModel

    plan = model.device.type == "meta"
    in_four_bits = bool(getattr(model, "is_loaded_in_4bit", False))
    if not plan and (config.kind == "qlora") != in_four_bits:
        raise ConfigError(
            f"field 'adapter.kind' is {config.kind!r}, but the model is {'' if in_four_bits else 'not '}"
            "held in 4 bits; see llava.train.four_bit.options"
        )
    base = base or str(model.name_or_path)
    if not plan and not base:
        raise ConfigError(
            "an adapter needs a base that can be loaded again: save the model and start from there"
        )
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        use_dora=config.kind == "dora",
        target_modules=_targets(model, config.parts),
        modules_to_save=[f"model.{part}" for part in config.full if getattr(model.model, part) is not None],
        base_model_name_or_path=_lasting_name(base) if base else None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AdaptedModel(model, settings)


def linear_layers(model: nn.Module, parts: Sequence[str]) -> list[str]:
    """Names of the linear maps of attention and MLPs in some parts, whatever the backbone calls them: those inside its
    lists of layers.

    Raises:
        ConfigError: a part has none.
    """
    modules = dict(model.named_modules())
    found = []
    for part in parts:
        lists = tuple(
            f"{name}." for name, module in modules.items()
            if name.startswith(PARTS[part]) and isinstance(module, nn.ModuleList)
        )  # fmt: skip
        inside = [name for name, m in modules.items() if isinstance(m, nn.Linear) and name.startswith(lists)]
        if not inside:
            raise ConfigError(f"field 'adapter.parts' names {part!r}, which has no linear layers here")
        found += inside
    return found


def _targets(model: nn.Module, parts: Sequence[str]) -> str | list[str]:
    """`linear_layers` for peft: one pattern for all layers where it fits nothing else, or the names."""
    names = linear_layers(model, parts)
    patterns = sorted({re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(name)) for name in names})
    pattern = "|".join(patterns)
    fitting = {name for name, _ in model.named_modules() if re.fullmatch(pattern, name)}
    return pattern if fitting == set(names) else names


def _lasting_name(base: str) -> str:
    """A folder by its full path, so that the adapter finds it from anywhere; other names as they are."""
    from llava.captioner import resolve_model

    folder = Path(base).expanduser()
    is_folder = folder.is_dir() and resolve_model(base) == str(folder)
    return str(folder.resolve()) if is_folder else base


# --- loading ----------------------------------------------------------------------------------------


def find_adapter(source: str, **hub: Any) -> Path | None:
    """`adapter_config.json` of a folder or hub id, where it is an adapter's."""
    found = find_adapter_config_file(source, **hub)
    return None if found is None else Path(found)


def read_config(source: str, **hub: Any) -> "ChangeVLMConfig":
    """The config of a folder or hub id: of an adapter, that of the model which loading it gives.

    Raises:
        LlavaError: as for loading.
    """
    from llava.model import checkpoint

    if find_adapter(source, **hub) is None:
        return checkpoint.read_config(source, **hub)
    own, _ = _own_config(source, hub)
    if own is not None:
        return own
    settings = _read_settings(source, hub)
    place, base_hub = _base_place(source, None, settings, hub)
    with _base_named(source, settings):
        return read_config(place, **base_hub)


def load_adapted(
    source: str,
    *,
    base: str | None = None,
    dtype: str | torch.dtype | None = None,
    config: "ChangeVLMConfig | None" = None,
    fresh_fusion: bool = False,
    **options: Any,
) -> "ChangeVLMForConditionalGeneration":
    """A plain model from an adapter's folder or hub id: its base with the adapter merged into it, in float32.

    A base that was held in 4 bits while training is rounded to the same 4-bit values first. With a
    `quantization_config` among the options nothing is merged, which would round once more: the adapter stays on the
    quantised layers.

    Args:
        base: another place of the base than the adapter names.
        dtype: what the merged weights are cast to; "auto" and None: the base's own.
        config: only one that agrees with the adapter's.
        options: for the base, as for `llava.captioner.load_model`.

    Raises:
        CheckpointError: an adapter that cannot be read, or does not fit its base.
        DownloadError: the base is not where the adapter says.
        ConfigError: a fusion or layers other than the adapter's.
        MissingDependencyError: no peft.
    """
    from llava.captioner import load_model

    hub = {name: options.pop(name) for name in (*_BOTH, *_ONE) if options.get(name) is not None}
    settings = _read_settings(source, hub)
    place, base_hub = _base_place(source, base, settings, hub)
    with _base_named(source, settings):
        base_config = read_config(place, **base_hub)
    wanted, quantization = _own_config(source, hub)
    wanted = wanted or base_config
    if fresh_fusion or (config is not None and _differs(config, wanted)):
        raise ConfigError(
            f"{source} is an adapter: its fusion and vision_layers cannot be changed while it is loaded; "
            f"merge it first (llava merge {source} MERGED) and use MERGED"
        )
    fresh = wanted.fusion != base_config.fusion
    if fresh and wanted.fusion is not None and "model.fusion" not in (settings.modules_to_save or ()):
        raise CheckpointError(
            f"{source} was trained with a fusion that is neither in it nor in its base {place}"
        )
    four_bit = options.get("quantization_config") is not None
    with _base_named(source, settings):
        model = load_model(
            place,
            dtype=dtype if four_bit else torch.float32,
            config=wanted,
            **({"fresh_fusion": True} if fresh else {}),
            **base_hub,
            **options,
        )
    if quantization is not None and not four_bit:
        from llava.train.four_bit import round_weights

        round_weights(model, _targeted(model, settings), quantization, source)
    adapted = _applied(model, source, settings, hub, place)
    if four_bit:
        return adapted.get_base_model()
    merged: ChangeVLMForConditionalGeneration = adapted.merge_and_unload()
    _cast(merged, _precision(dtype, base_config))
    return merged.requires_grad_(True)  # as any model that was loaded


def _read_settings(source: str, hub: dict[str, Any]) -> "LoraConfig":
    """The adapter's own settings, checked."""
    peft = _peft()
    path = find_adapter(source, **hub)
    if path is None:
        raise CheckpointError(f"{source} is no adapter: it has no adapter_config.json")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        kind = fields["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no adapter's config: {error!r}") from error
    if kind != "LORA":
        raise CheckpointError(f"{path}: field peft_type is {kind!r}; known: LORA, with use_dora or without")
    return peft.LoraConfig.from_pretrained(str(path.parent))


def _base_place(
    source: str, base: str | None, settings: "LoraConfig", hub: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Folder or hub id of the base, and the hub's options for it."""
    from llava.captioner import resolve_model

    name = base or settings.base_model_name_or_path
    if not name:
        raise CheckpointError(f"{source}/adapter_config.json: field {_BASE} is empty; {_remedy(source)}")
    if base is not None:
        place = resolve_model(base)
    else:
        with _base_named(source, settings):
            place = resolve_model(name)
    if Path(source).is_dir() and Path(place).is_dir() and Path(source).samefile(place):
        raise CheckpointError(
            f"{source}/adapter_config.json: field {_BASE} names the adapter itself; {_remedy(source)}"
        )
    options = {name: value for name, value in hub.items() if name in _BOTH}
    if settings.revision and not Path(place).is_dir():
        options["revision"] = settings.revision
    return place, options


class _base_named:  # noqa: N801 (used like a function)
    """What goes wrong inside with finding the base is said with the field that names it, and the way out."""

    def __init__(self, source: str, settings: "LoraConfig") -> None:
        self.source, self.settings = source, settings

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):  # a DownloadError too
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DownloadError(
                f"{self.source}/adapter_config.json: field {_BASE} is {self.settings.base_model_name_or_path!r}, "
                f"which cannot be loaded ({reason}); {_remedy(self.source)}"
            ) from error


def _remedy(source: str) -> str:
    return f"put the base's folder, name or hub id there, or give it: llava merge {source} OUT --base MODEL"


def _own_config(source: str, hub: dict[str, Any]) -> "tuple[ChangeVLMConfig | None, dict[str, Any] | None]":
    """The config beside an adapter, if there is one, and how its base was quantised while training."""
    from llava.model.configuration import ChangeVLMConfig

    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    path = cached_file(source, CONFIG_FILE, **quiet, **hub)
    if path is None:
        return None, None
    try:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
        quantization = fields.pop("quantization_config", None)
        return ChangeVLMConfig.from_dict(fields), quantization
    except (ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is no model's config: {error}") from error


def _differs(config: "ChangeVLMConfig", other: "ChangeVLMConfig") -> bool:
    return (config.fusion, list(config.vision_layers)) != (other.fusion, list(other.vision_layers))


def _targeted(model: nn.Module, settings: "LoraConfig") -> list[str]:
    from peft.tuners.tuners_utils import check_target_module_exists

    return [name for name, _ in model.named_modules() if check_target_module_exists(settings, name)]


def _applied(
    model: "ChangeVLMForConditionalGeneration",
    source: str,
    settings: "LoraConfig",
    hub: dict[str, Any],
    base: str,
) -> "AdaptedModel":
    """`model` with the adapter on it, every weight of it compared by name and shape."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    from llava.model.checkpoint import check_weights
    from llava.train.adapted import AdaptedModel

    quiet = {"_raise_exceptions_for_missing_entries": False}
    path = cached_file(source, "adapter_model.safetensors", **quiet, **hub)
    if path is None:
        raise CheckpointError(f"{source} holds no adapter_model.safetensors; other forms are not read")
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or cut off: {error}") from error
    try:
        adapted = AdaptedModel(model, settings)
    except ValueError as error:
        raise CheckpointError(f"{source} does not fit its base {base}: {error}") from error
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    check_weights(
        {name: tuple(value.shape) for name, value in weights.items()},
        {name: tuple(value.shape) for name, value in expected.items()},
        tied=False,
        where=f"{source}, for the base {base}",
    )
    set_peft_model_state_dict(adapted, weights)
    return adapted


def _precision(dtype: str | torch.dtype | None, config: "ChangeVLMConfig") -> torch.dtype:
    if dtype in (None, "auto"):
        dtype = config.dtype or torch.float32
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"dtype={dtype!r} is no precision of weights; give float32, bfloat16 or float16")
    return found


def _cast(model: "ChangeVLMForConditionalGeneration", dtype: torch.dtype) -> None:
    """Weights to `dtype`, and only them: position codes stay in float32, as in a model loaded in that precision."""
    cast_weights(model, dtype)
    for config in (model.config, model.config.vision_config, model.config.text_config):
        config.dtype = dtype


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise MissingDependencyError('adapters need peft: pip install "llava[train]"') from error
    return peft
