"""DeltaVLMConfig: InstructBLIP's vision encoder and Q-Former, one fusion of two dates, one language model."""

import copy
from typing import Any

from transformers import AutoConfig, InstructBlipQFormerConfig, InstructBlipVisionConfig, PreTrainedConfig

from llava.errors import ConfigError
from llava.model.configuration import FUSION_DEFAULTS
from llava.model.delta_vlm.prompt import QFORMER_TEXTS, STYLES

VICUNA_7B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
"""lmsys/vicuna-7b-v1.5."""

QFORMER_VOCABULARY = 30523
"""bert-base-uncased's 30,522 words and `[DEC]`, which no text holds but whose row is in every checkpoint."""

_SMALLEST_START = 1e-6

PRESETS: dict[str, dict[str, Any]] = {
    "deltavlm-7b": {
        "text_config": VICUNA_7B | {"vocab_size": 32001},  # and a row for padding
        "fusion": "csrm",
        "prompt_style": "reference",
        "bos_token_id": 2,  # the release calls bos, eos and unk all </s>
        "eos_token_id": 2,
        "pad_token_id": 32000,
    },
}
"""The published model, for `DeltaVLMConfig.preset`."""

TUNABLE = (
    "tune_vision_blocks", "tune_language_model", "prompt_style", "qformer_text", "max_prompt_tokens",
    "max_answer_tokens", "max_qformer_tokens",
)  # fmt: skip
"""Fields that change no weight, so that a trained model may go on with other ones."""

PARTS_PRESETS: dict[str, dict[str, Any]] = {
    "deltavlm-tiny": {
        "tower": {
            "image_size": 56,
            "patch_size": 14,
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "initializer_range": 0.02,
        },
        "qformer": {
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "cross_attention_frequency": 2,
        },
        "llm": {
            "model_type": "llama",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
        },
        # a language model that was never taught cannot speak unless it learns
        "settings": {"num_query_tokens": 8, "tune_vision_blocks": 2, "tune_language_model": True},
    },
}
"""Small models for tests and for the synthetic world, part by part; vocabularies come from what they are trained on."""


def _part(
    value: PreTrainedConfig | dict[str, Any] | None, kind: type[PreTrainedConfig], field: str
) -> PreTrainedConfig:
    """One of InstructBLIP's own sub-configs from an object, a dict or nothing."""
    if value is None or isinstance(value, dict):
        fields = dict(value or {})
        model_type = fields.pop("model_type", kind.model_type)
        if model_type == kind.model_type:
            return kind(**fields)
    elif isinstance(value, kind):
        return value
    else:
        model_type = value.model_type
    raise ConfigError(f"{field} of type {model_type!r}: DeltaVLM is built from {kind.model_type!r}")


def _text(value: PreTrainedConfig | dict[str, Any] | None) -> PreTrainedConfig:
    if isinstance(value, PreTrainedConfig):
        part = getattr(value, "text_config", value)
        return part if isinstance(part, PreTrainedConfig) else value
    fields = dict(VICUNA_7B if value is None else value)
    model_type = fields.pop("model_type", "llama")
    try:
        config: PreTrainedConfig = AutoConfig.for_model(model_type, **fields)
    except ValueError as error:
        raise ConfigError(
            f"text_config.model_type={model_type!r} is not known to transformers: {error}"
        ) from error
    return config


class DeltaVLMConfig(PreTrainedConfig):
    """A vision-language model for a pair of dates, with as many image tokens as it has queries.

    Args:
        vision_config: `InstructBlipVisionConfig` as object or dict; by default EVA-ViT-g/14 with 39 layers. Its own
            `initializer_range` of 1e-10, with which an untrained encoder answers every image alike, becomes 0.02.
        qformer_config: `InstructBlipQFormerConfig`; by default BERT-base with `[DEC]`, reading width from the encoder.
        text_config: any transformers causal language model's config; by default Vicuna-7B v1.5.
        num_query_tokens: queries K, and so tokens that a pair gives to the language model.
        fusion: a kind of `llava.model.fusion.FUSIONS`, or a dict of `kind` and its settings.
        tune_vision_blocks: the last blocks of the encoder that learn, with its final norm; the others are frozen.
        tune_language_model: whether the language model learns too.
        prompt_style: how questions become text, see `llava.model.delta_vlm.prompt.STYLES`.
        qformer_text: what the Q-Former reads: the whole "prompt", or the current "question" alone.
        max_prompt_tokens: longest prompt in training, its first mark included.
        max_answer_tokens: longest answer in training, its end included.
        max_qformer_tokens: longest text of the Q-Former, its two marks included.
        image_token_id: the placeholder's id, K of them before each prompt; by default one past the vocabulary.
        base_models: what a checkpoint that leaves out its frozen weights was made with: `{"vision": a folder or hub id
            of InstructBLIP or a file of EVA, "language": a folder or hub id}`, one or both.
        base_blocks: the first blocks of the encoder, as `base_models["vision"]` has them; by default all that are
            frozen. Fewer are frozen, or more, where a model goes on with another `tune_vision_blocks`.
        bos_token_id, eos_token_id, pad_token_id: by default the language model's own; without a padding token, eos.

    Raises:
        ConfigError: a part that does not fit, an unknown style, no fusion.
    """

    model_type = "delta_vlm"
    sub_configs = {  # noqa: RUF012 (a transformers hook)
        "vision_config": InstructBlipVisionConfig,
        "qformer_config": InstructBlipQFormerConfig,
        "text_config": AutoConfig,
    }

    def __init__(
        self,
        vision_config: PreTrainedConfig | dict[str, Any] | None = None,
        qformer_config: PreTrainedConfig | dict[str, Any] | None = None,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        num_query_tokens: int = 32,
        fusion: dict[str, Any] | str = "csrm",
        tune_vision_blocks: int = 2,
        tune_language_model: bool = False,
        prompt_style: str = "natural",
        qformer_text: str = "prompt",
        max_prompt_tokens: int = 128,
        max_answer_tokens: int = 256,
        max_qformer_tokens: int = 128,
        image_token_id: int | None = None,
        base_models: dict[str, str] | None = None,
        base_blocks: int | None = None,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool | None = None,
        **kwargs: Any,
    ) -> None:
        self.vision_config = _part(vision_config, InstructBlipVisionConfig, "vision_config")
        if self.vision_config.initializer_range < _SMALLEST_START:
            self.vision_config.initializer_range = 0.02
        if qformer_config is None:
            qformer_config = {"vocab_size": QFORMER_VOCABULARY}
        self.qformer_config = _part(qformer_config, InstructBlipQFormerConfig, "qformer_config")
        self.qformer_config.encoder_hidden_size = self.vision_config.hidden_size
        self.text_config = _text(text_config)
        if fusion is None:
            raise ConfigError("DeltaVLM needs a fusion; both dates side by side, as they are, is 'concat'")
        settings = {"kind": fusion} if isinstance(fusion, str) else dict(fusion)
        kind = settings.setdefault("kind", "csrm")
        self.fusion = FUSION_DEFAULTS.get(kind, {}) | settings
        blocks = self.vision_config.num_hidden_layers
        if not 0 <= tune_vision_blocks <= blocks:
            raise ConfigError(
                f"tune_vision_blocks={tune_vision_blocks} does not fit an encoder of {blocks} blocks"
            )
        for name, value, known in (
            ("prompt_style", prompt_style, STYLES),
            ("qformer_text", qformer_text, QFORMER_TEXTS),
        ):
            if value not in known:
                raise ConfigError(f"unknown {name} {value!r}; known: {', '.join(known)}")
        if max_qformer_tokens > self.qformer_config.max_position_embeddings:
            raise ConfigError(
                f"max_qformer_tokens={max_qformer_tokens} is more than the "
                f"{self.qformer_config.max_position_embeddings} positions of the Q-Former"
            )
        if base_blocks is None:
            base_blocks = blocks - tune_vision_blocks
        if not 0 <= base_blocks <= blocks:
            raise ConfigError(f"base_blocks={base_blocks} does not fit an encoder of {blocks} blocks")
        if base_models is not None and (unknown := set(base_models) - {"vision", "language"}):
            raise ConfigError(f"base_models names {sorted(unknown)}; known: vision, language")
        self.num_query_tokens = num_query_tokens
        self.tune_vision_blocks = tune_vision_blocks
        self.tune_language_model = tune_language_model
        self.prompt_style = prompt_style
        self.qformer_text = qformer_text
        self.max_prompt_tokens = max_prompt_tokens
        self.max_answer_tokens = max_answer_tokens
        self.max_qformer_tokens = max_qformer_tokens
        self.image_token_id = self.text_config.vocab_size if image_token_id is None else image_token_id
        self.base_models = base_models
        self.base_blocks = base_blocks
        self.initializer_range = initializer_range
        if tie_word_embeddings is None:
            tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(token, getattr(self.text_config, token, None))
        if kwargs["pad_token_id"] is None:
            eos = kwargs["eos_token_id"]
            kwargs["pad_token_id"] = eos[0] if isinstance(eos, list) else eos
        super().__init__(**kwargs | {"tie_word_embeddings": tie_word_embeddings})

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "DeltaVLMConfig":
        """The config of a published model; `overrides` replace its fields. Unknown names list the known ones."""
        from llava.registry import pick

        return cls(**(copy.deepcopy(pick(PRESETS, name, what="preset")) | overrides))

    @property
    def grid(self) -> int:
        """Patches along one side of an image."""
        return int(self.vision_config.image_size) // int(self.vision_config.patch_size)

    @property
    def image_seq_length(self) -> int:
        """Placeholders of a pair (K); what a ChangeVLM needs for one image."""
        return self.num_query_tokens


AutoConfig.register(DeltaVLMConfig.model_type, DeltaVLMConfig, exist_ok=True)
