"""One training run = one YAML file = one checked dataclass."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from llava.errors import ConfigError

PARTS = {
    "tower": "model.vision_tower.",
    "fusion": "model.fusion.",
    "projector": "model.projector.",
    "llm": "model.language_model.",
}
"""Parts that learn, by the prefix of their weights. The head belongs to `llm`, the newline to `projector`."""


def part_of(name: str) -> str:
    """Which part a weight of `ChangeVLMForConditionalGeneration` belongs to."""
    if name.startswith("lm_head."):
        return "llm"
    if name == "model.image_newline":
        return "projector"
    return next(part for part, prefix in PARTS.items() if name.startswith(prefix))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Fine-tuning on pairs with captions."""

    model: str
    """Where to start: a name, a folder or a hub id, as for `llava caption --model`."""
    data: Path
    """Records: a JSON list or JSON Lines, see `llava.data.record`."""
    root: Path | None = None
    """What the records' paths are relative to; the records' folder by default."""
    output_dir: Path
    """The trained model goes here, with the run's config beside it."""
    fusion: dict[str, Any] | Literal["keep"] | None = "keep"
    """Fusion to train: the model's own ("keep"), none, or settings of a new one."""
    captions: Literal["all", "random"] = "all"
    """All captions of a pair in one pass, or one drawn anew each epoch."""
    labels: Literal["answer", "release"] = "answer"
    mask_weight: float = 0.0
    """Weight of a second loss for records with a `mask_path`, on which patches changed: foretold by a linear head,
    thrown away after training, from the language model's middle layer at the after image's tokens, and, where the
    fusion has a `map_head`, by that from the change stream. 0: captions alone."""
    learn: Sequence[str] = ("tower", "fusion", "projector", "llm")
    """Parts that learn; the others are frozen."""
    learning_rate: float = 1e-5
    part_learning_rate: dict[str, float] = field(default_factory=dict)
    """Other rates for some parts, e.g. {"tower": 2.0e-6}."""
    epochs: float = 1.0
    max_steps: int = -1
    """Stops after so many updates, whatever `epochs` says; -1: no bound."""
    batch_size: int = 8
    """Pairs per device and update."""
    gradient_accumulation_steps: int = 1
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    bf16: bool = False
    gradient_checkpointing: bool = False
    cache_images: bool = False
    """Keep resized images in memory (8 bit): for sets of some thousand small pairs."""
    seed: int = 42
    logging_steps: int = 10
    save_steps: int = 0
    """Updates between checkpoints to resume from; 0: none."""

    def __post_init__(self) -> None:
        unknown = sorted({*self.learn, *self.part_learning_rate} - set(PARTS))
        if unknown:
            raise ConfigError(f"unknown parts {unknown}; known: {', '.join(PARTS)}")
        if not self.learn:
            raise ConfigError("learn is empty: name at least one part")
        for name in ("learning_rate", "batch_size", "gradient_accumulation_steps", "epochs"):
            if not (math.isfinite(value := getattr(self, name)) and value > 0):
                raise ConfigError(f"{name}={value} must be above 0")

    @classmethod
    def from_dict(cls, fields: dict[str, Any], where: str = "config") -> "TrainConfig":
        """Checked fields; paths may be strings, numbers may be written as in YAML ("1e-5").

        Raises:
            ConfigError: unknown or missing fields, a value of the wrong kind; all with the field's name.
        """
        known = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - set(known))
        if unknown:
            raise ConfigError(f"{where}: unknown fields {unknown}; known: {', '.join(known)}")
        missing = [n for n in ("model", "data", "output_dir") if fields.get(n) is None]
        if missing:
            raise ConfigError(f"{where}: missing fields {missing}")
        kinds: dict[str, Callable[[Any], Any]] = {
            "data": Path,
            "root": Path,
            "output_dir": Path,
            "learn": tuple,
        }
        kinds |= {name: f.type for name, f in known.items() if f.type in (int, float)}
        kinds["part_learning_rate"] = lambda rates: {part: float(rate) for part, rate in rates.items()}
        values = dict(fields)
        for name, kind in kinds.items():
            if values.get(name) is not None:
                try:
                    values[name] = kind(values[name])
                except (TypeError, ValueError, AttributeError) as error:
                    raise ConfigError(f"{where}: field {name!r} is {values[name]!r}: {error}") from error
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: Path, overrides: Sequence[str] = ()) -> "TrainConfig":
        """A file's fields with `key=value` overrides (values in YAML) on top."""
        try:
            fields = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
        if not isinstance(fields, dict):
            raise ConfigError(f"{path} must hold fields, not {type(fields).__name__}")
        for override in overrides:
            name, sign, value = override.partition("=")
            if not sign:
                raise ConfigError(f"override {override!r} must read key=value")
            fields[name] = yaml.safe_load(value)
        return cls.from_dict(fields, str(path))

    def to_yaml(self) -> str:
        """As read by `from_yaml`."""
        values = {
            n: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v
            for n, v in vars(self).items()
        }
        return yaml.safe_dump(values, sort_keys=False)
