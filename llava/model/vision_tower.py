"""Any transformers vision encoder as a source of patch features: the hidden states asked for, nothing deeper."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from llava.errors import DataError

# What comes after the last layer in the encoders of transformers. None of it is used here.
_TAIL = ("post_layernorm", "layernorm", "norm", "head", "pooler")
# EVA encoders, which AutoModel knows only as parts of larger models.
_ENCODERS = {
    "instructblip_vision_model": "InstructBlipVisionModel",
    "blip_2_vision_model": "Blip2VisionModel",
}


def _patchify(pixels: Tensor, config: PreTrainedConfig) -> dict[str, Tensor]:
    """SigLIP2 takes flattened patches [M, N, p p C] with a mask and grid sizes instead of images [M, C, S, S]."""
    p = config.patch_size
    rows, columns = pixels.shape[-2] // p, pixels.shape[-1] // p
    patches = pixels[..., : rows * p, : columns * p].unflatten(-1, (columns, p)).unflatten(-3, (rows, p))
    patches = patches.permute(0, 2, 4, 3, 5, 1).reshape(len(pixels), rows * columns, -1)
    sizes = torch.tensor([[rows, columns]], device=pixels.device).expand(len(pixels), 2)
    mask = torch.ones(patches.shape[:2], dtype=torch.long, device=pixels.device)
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": sizes}


_INPUTS: dict[str, Callable[[Tensor, PreTrainedConfig], dict[str, Tensor]]] = {
    "siglip2_vision_model": _patchify
}


@contextmanager
def _truncated(config: PreTrainedConfig, layers: int) -> Iterator[None]:
    """Inside, `config` asks for `layers` layers and no pooling head.

    Not a copy: transformers tells by identity which part of a model a sub-config belongs to.
    """
    fields = {"num_hidden_layers": layers} | (
        {"vision_use_head": False} if hasattr(config, "vision_use_head") else {}
    )
    held = {name: getattr(config, name) for name in fields}
    try:
        for name, value in fields.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in held.items():
            setattr(config, name, value)


def _build(config: PreTrainedConfig) -> PreTrainedModel:
    """The encoder of a vision config, without the weights that no hidden state depends on."""
    name = _ENCODERS.get(config.model_type)
    build = getattr(transformers, name)._from_config if name else AutoModel.from_config
    encoder: PreTrainedModel = build(config)
    # Replaced, the tail is neither held nor trained, and the last hidden state is that of the layer, not normed.
    for name in _TAIL:
        if isinstance(getattr(encoder, name, None), nn.Module):
            setattr(encoder, name, nn.Identity())
    embeddings = getattr(encoder, "embeddings", None)
    mask_token = getattr(embeddings, "mask_token", None)
    if embeddings is not None and isinstance(mask_token, nn.Parameter):
        # DINO's, for masked pretraining only; its own initialisation still writes to it
        del embeddings.mask_token
        embeddings.register_buffer("mask_token", mask_token.detach(), persistent=False)
    return encoder


class VisionTower(nn.Module):
    """Patch features of images at several depths.

    Args:
        config: a vision config of transformers (SigLIP, SigLIP2, CLIP, DINOv3, InstructBLIP's EVA, ...).
        layers: indices into the hidden states, entry 0 being the embedding's output; positive.
    """

    def __init__(self, config: PreTrainedConfig, layers: Sequence[int]) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.image_size = int(config.image_size)
        self.num_patches = (config.image_size // config.patch_size) ** 2
        with _truncated(config, max(layers)):
            self.encoder = _build(config)
        # transformers gathers these from a model's direct children only
        self._no_split_modules = self.encoder._no_split_modules
        self._keep_in_fp32_modules = self.encoder._keep_in_fp32_modules

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """Images [M, C, S, S] to one [M, N, D] per layer, class and register tokens left out.

        Raises:
            DataError: images of another size than S.
        """
        if pixel_values.shape[-2:] != (self.image_size, self.image_size):
            raise DataError(
                f"images of {tuple(pixel_values.shape[-2:])} pixels for a tower of {self.image_size} x "
                f"{self.image_size}; use this model's own processor"
            )
        config = self.encoder.config
        inputs = _INPUTS.get(config.model_type, lambda pixels, _: {"pixel_values": pixels})(
            pixel_values, config
        )
        # Gradient checkpointing marks the embedding's output as needing a gradient, which a frozen tower would pass on.
        learns = pixel_values.requires_grad or any(parameter.requires_grad for parameter in self.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            states = self.encoder(**inputs, output_hidden_states=True).hidden_states
        return [states[layer][:, -self.num_patches :] for layer in self.layers]
