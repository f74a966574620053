"""ChangeVLMConfig: one vision encoder, one fusion, one projector, one language model."""

import copy
import math
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from llava.errors import ConfigError

SIGLIP_SO400M: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}
"""google/siglip-so400m-patch14-384, the tower of every released checkpoint."""

_QWEN2_COMMON: dict[str, Any] = {
    "model_type": "qwen2",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "pad_token_id": 151643,
}
QWEN2_05B: dict[str, Any] = _QWEN2_COMMON | {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
QWEN2_7B: dict[str, Any] = _QWEN2_COMMON | {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
DIFFERENCE_FUSION: dict[str, Any] = {"kind": "difference", "depth": 2, "head_dim": 128, "mlp_dim": 4608}
"""CCExpert's fusion with the release's defaults (arXiv 2411.11360)."""

_CCEXPERT = {"vision_layers": [17, 20, 23, 26], "fusion": DIFFERENCE_FUSION}
_ONEVISION = {"vision_layers": [26], "fusion": None, "image_newline": True, "image_aspect": "anyres"}

PRESETS: dict[str, dict[str, Any]] = {
    "ccexpert-0.5b": {"text_config": QWEN2_05B, **_CCEXPERT},
    "ccexpert-7b": {"text_config": QWEN2_7B, **_CCEXPERT},
    "llava-onevision-0.5b": {"text_config": QWEN2_05B, **_ONEVISION},
    "llava-onevision-7b": {"text_config": QWEN2_7B, **_ONEVISION},
}
"""The published models, by name, for `ChangeVLMConfig.preset`."""


FUSION_DEFAULTS: dict[str, dict[str, Any]] = {
    "difference": DIFFERENCE_FUSION,
    "csrm": {"kind": "csrm", "dropout": 0.5, "init": "identity"},
    "csrm_paper": {"kind": "csrm_paper"},
    "concat": {"kind": "concat", "temporal_embedding": False},
}
_DEFAULTS = {"vision_config": SIGLIP_SO400M, "text_config": QWEN2_05B}


def _as_config(value: PreTrainedConfig | dict[str, Any] | None, *, field: str) -> PreTrainedConfig:
    """A sub-config object from a dict with `model_type`, an object, or nothing (SigLIP so400m, Qwen2-0.5B)."""
    if not isinstance(value, PreTrainedConfig):
        fields = dict(_DEFAULTS[field] if value is None else value)
        model_type = fields.pop("model_type", _DEFAULTS[field]["model_type"])
        try:
            value = AutoConfig.for_model(model_type, **fields)
        except ValueError as error:
            raise ConfigError(
                f"{field}.model_type={model_type!r} is not known to transformers: {error}"
            ) from error
    part = getattr(value, field, None)  # of a model with both, such as SigLIP or CLIP
    return part if isinstance(part, PreTrainedConfig) else value


def _check_patches(config: PreTrainedConfig) -> None:
    """Make sure that a vision config says what a square grid of patches needs."""
    patch, patches = getattr(config, "patch_size", None), getattr(config, "num_patches", None)
    if getattr(config, "image_size", None) is None and isinstance(patch, int) and isinstance(patches, int):
        config.image_size = math.isqrt(patches) * patch  # SigLIP2 states the number of patches instead
    for name in ("image_size", "patch_size", "num_hidden_layers", "hidden_size"):
        if not isinstance(getattr(config, name, None), int):
            raise ConfigError(
                f"vision_config of type {config.model_type!r} has {name}={getattr(config, name, None)!r}; needed is an "
                "encoder of square patches with integer image_size, patch_size, num_hidden_layers and hidden_size"
            )


class ChangeVLMConfig(PreTrainedConfig):
    """A vision-language model for one image, a pair of dates, or several images.

    Args:
        vision_config: any transformers vision encoder's config (SigLIP, SigLIP2, CLIP, DINOv3, ...), as object or dict.
        text_config: any transformers causal language model's config, as object or dict.
        vision_layers: hidden states handed on, shallow to deep. Entry 0 is the patch embedding's output, entry i the
            output of layer i. Negative numbers count from the end and are stored as positive ones. The fusion adds
            to the last one listed; without fusion that one alone is used.
        fusion: None (the baseline), or a `kind` of `llava.model.fusion.FUSIONS` with its settings:
            `{"kind": "difference", "depth", "head_dim", "mlp_dim", "map_head"}`, `{"kind": "csrm", "dropout", "init"}`,
            `{"kind": "csrm_paper"}`, `{"kind": "concat", "temporal_embedding"}`; these three read the last level only.
        projector: "mlp2x_gelu" (any depth: "mlp3x_gelu", ...) or "linear".
        image_token_id: the placeholder's id; each image takes `image_seq_length` of them.
        image_newline: whether the model has LLaVA-OneVision's row separator, needed for `anyres` single images.
        image_aspect: how its processor brings images to the tower's size: "square", "pad" or "anyres".
        grid_pinpoints: resolutions [height, width] that "anyres" chooses from; None: all grids of 1 x 1 to 6 x 6.
        max_tiles: bound of `anyres_max_N`, in tiles.
        tie_word_embeddings: defaults to the text config's.

    Raises:
        ConfigError: a layer out of range, no layer, an unknown model type, an encoder without a grid of patches.
    """

    model_type = "change_vlm"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012 (a transformers hook)

    def __init__(
        self,
        vision_config: PreTrainedConfig | dict[str, Any] | None = None,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        vision_layers: list[int] | int = -2,
        fusion: dict[str, Any] | None = None,
        projector: str = "mlp2x_gelu",
        image_token_id: int = 151646,
        image_newline: bool = False,
        image_aspect: str = "square",
        grid_pinpoints: list[list[int]] | None = None,
        max_tiles: int = 9,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool | None = None,
        **kwargs: Any,
    ) -> None:
        self.vision_config = _as_config(vision_config, field="vision_config")
        self.text_config = _as_config(text_config, field="text_config")
        _check_patches(self.vision_config)
        entries = self.vision_config.num_hidden_layers + 1
        layers = [vision_layers] if isinstance(vision_layers, int) else list(vision_layers)
        if not layers or any(not -entries <= layer < entries for layer in layers):
            raise ConfigError(
                f"vision_layers={layers} does not fit a tower of {entries - 1} layers "
                f"({entries} hidden states, counting the embedding as 0)"
            )
        self.vision_layers = [layer % entries for layer in layers]
        if fusion is not None:
            kind = fusion.get("kind", "difference")
            fusion = {"kind": kind, **FUSION_DEFAULTS.get(kind, {}), **fusion}
        self.fusion = fusion
        self.projector = projector
        self.image_token_id = image_token_id
        self.image_newline = image_newline
        self.image_aspect = image_aspect
        self.grid_pinpoints = grid_pinpoints
        self.max_tiles = max_tiles
        self.initializer_range = initializer_range
        if tie_word_embeddings is None:
            tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(token, getattr(self.text_config, token, None))
        super().__init__(**kwargs | {"tie_word_embeddings": tie_word_embeddings})

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "ChangeVLMConfig":
        """The config of a published model; `overrides` replace its fields. Unknown names list the known ones."""
        from llava.registry import pick

        fields = copy.deepcopy(pick(PRESETS, name, what="preset"))
        return cls(**({"vision_config": dict(SIGLIP_SO400M), **fields} | overrides))

    @property
    def grid(self) -> int:
        """Patches along one side of an image."""
        return int(self.vision_config.image_size) // int(self.vision_config.patch_size)

    @property
    def image_seq_length(self) -> int:
        """Tokens one image gives to the language model (N), without `anyres`."""
        return self.grid**2


AutoConfig.register(ChangeVLMConfig.model_type, ChangeVLMConfig, exist_ok=True)
