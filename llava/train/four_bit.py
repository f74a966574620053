"""A base held in 4 bits while an adapter is trained (QLoRA, arXiv 2305.14314), and its values without bitsandbytes."""

import importlib.util
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava.errors import CheckpointError, ConfigError, MissingDependencyError
from llava.model.configuration import ChangeVLMConfig
from llava.train.adapters import linear_layers
from llava.train.parts import PARTS

BLOCK = 64
"""Neighbouring weights that share one scale."""

LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The values of NF4, quantiles of a normal distribution (arXiv 2305.14314, appendix E)."""


def options(config: ChangeVLMConfig, parts: Sequence[str], device: str | None = None) -> dict[str, Any]:
    """Arguments for `llava.captioner.load_model`: the layers of `parts` in 4 bits, the rest in float32.

    Args:
        config: of the model to be loaded.
        parts: those with low-rank updates.
        device: where this process computes, "cuda:1".

    Raises:
        MissingDependencyError: no bitsandbytes.
        ConfigError: no CUDA device.
    """
    if not _has_bitsandbytes():
        raise MissingDependencyError("field 'adapter.kind' is 'qlora', which needs: pip install bitsandbytes")
    if not torch.cuda.is_available():
        raise ConfigError("field 'adapter.kind' is 'qlora', which needs a CUDA device; use 'lora'")
    return {
        "quantization_config": quantization(config, parts),
        "device_map": {"": device or "cuda"},
        "dtype": torch.float32,
    }


def _has_bitsandbytes() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


def quantization(config: ChangeVLMConfig, parts: Sequence[str]) -> Any:
    """NF4 for exactly the linear layers that get low-rank updates; they compute in bfloat16.

    Scales are not quantised a second time: it would save a third of a bit a weight, and nothing but bitsandbytes could
    then tell the values.
    """
    from transformers import BitsAndBytesConfig

    from llava.model.change_vlm import ChangeVLMForConditionalGeneration

    with torch.device("meta"):
        model = ChangeVLMForConditionalGeneration(config)
    wanted = set(linear_layers(model, parts))
    others = [prefix.removesuffix(".") for part, prefix in PARTS.items() if part not in parts]
    inside = tuple(PARTS[part] for part in parts)
    rest = [
        name for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(inside) and name not in wanted
    ]  # fmt: skip
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", *others, *rest],
    )


def round_weights(model: nn.Module, names: Collection[str], quantization: dict[str, Any], where: str) -> None:
    """Give the linear layers `names` the values that they had while held in 4 bits.

    Raises:
        CheckpointError: they were held in another form than `quantization` (above).
    """
    known = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False}
    if any(quantization.get(name) != value for name, value in known.items()):
        raise CheckpointError(
            f"{where}/adapted_config.json: field quantization_config is not nf4 with plain scales, so the values "
            "of its base cannot be told; load the adapter with a quantization_config, unmerged"
        )
    for name in names:
        weight = model.get_submodule(name).get_parameter("weight")
        weight.data = round_nf4(weight.data)


def round_nf4(weight: Tensor) -> Tensor:
    """A float32 weight as it is after NF4 and back: each block of `BLOCK` takes multiples of its largest magnitude."""
    flat = weight.flatten()
    blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    values = torch.tensor(LEVELS, device=weight.device)
    between = (values[1:] + values[:-1]) / 2
    nearest = values[torch.bucketize(blocks * (1 / scale.clamp(min=1e-38)), between)]
    return (nearest * scale).flatten()[: len(flat)].view_as(weight)
