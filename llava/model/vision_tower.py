"""Any transformers vision encoder as a source of patch features: the hidden states asked for, nothing deeper."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig

from llava.errors import ConfigError

# What comes after the last layer in the encoders of transformers. None of it is used here.
_TAIL = ("post_layernorm", "layernorm", "norm", "head", "pooler")


def _patchify(pixels: Tensor, config: PreTrainedConfig) -> dict[str, Tensor]:
    """SigLIP2 takes flattened patches [M, N, p p C] with a mask and grid sizes instead of images [M, C, S, S]."""
    p = config.patch_size
    rows, columns = pixels.shape[-2] // p, pixels.shape[-1] // p
    patches = pixels[..., : rows * p, : columns * p].unflatten(-1, (columns, p)).unflatten(-3, (rows, p))
    patches = patches.permute(0, 2, 4, 3, 5, 1).reshape(len(pixels), rows * columns, -1)
    sizes = torch.tensor([[rows, columns]], device=pixels.device).expand(len(pixels), 2)
    mask = torch.ones(patches.shape[:2], dtype=torch.long, device=pixels.device)
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": sizes}


_INPUTS: dict[str, Callable[[Tensor, PreTrainedConfig], dict[str, Tensor]]] = {"siglip2_vision_model": _patchify}


def truncated(config: PreTrainedConfig, layers: Sequence[int]) -> PreTrainedConfig:
    """A copy of a vision config with just enough layers for the hidden states `layers`, and no pooling head."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = max(layers)
    if hasattr(config, "vision_use_head"):
        config.vision_use_head = False
    return config


class VisionTower(nn.Module):
    """Patch features of images at several depths.

    Args:
        config: a vision config of transformers (SigLIP, SigLIP2, CLIP, DINOv3, InstructBLIP's EVA, ...).
        layers: indices into the hidden states, entry 0 being the embedding's output; sorted, positive.

    Raises:
        ConfigError: the encoder has no square grid of patches to give.
    """

    def __init__(self, config: PreTrainedConfig, layers: Sequence[int]) -> None:
        super().__init__()
        if not isinstance(getattr(config, "patch_size", None), int) or not hasattr(config, "image_size"):
            raise ConfigError(f"vision_config of type {config.model_type!r} has no integer patch_size and image_size")
        self.layers = tuple(layers)
        self.num_patches = (config.image_size // config.patch_size) ** 2
        self.encoder = AutoModel.from_config(truncated(config, layers))
        # The tail has weights in some encoders; replaced, they are neither held nor trained, and the last
        # hidden state is that of the layer, not normed. DINOv3 and others keep it one module deeper or not at all.
        for name in _TAIL:
            if isinstance(getattr(self.encoder, name, None), nn.Module):
                setattr(self.encoder, name, nn.Identity())

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """Images [M, C, S, S] to one [M, N, D] per layer, class and register tokens left out."""
        config = self.encoder.config
        inputs = _INPUTS.get(config.model_type, lambda pixels, _: {"pixel_values": pixels})(pixel_values, config)
        states = self.encoder(**inputs, output_hidden_states=True).hidden_states
        return [states[layer][:, -self.num_patches :] for layer in self.layers]
