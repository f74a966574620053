"""Image features into the places their placeholders hold. No weights in here."""

import torch
from torch import Tensor

from llava.errors import DataError


def placeholder_mask(input_ids: Tensor, image_token_id: int) -> Tensor:
    """[B, T] ids to a [B, T] bool mask of the image placeholders."""
    return input_ids == image_token_id


def splice(embeds: Tensor, mask: Tensor, features: Tensor, *, check: bool = True) -> Tensor:
    """Put image features where the placeholders are.

    Args:
        embeds: [B, T, H] embeddings; what stands at placeholders is replaced.
        mask: [B, T] bool, the placeholders.
        features: [n, H], all images of the batch, sample after sample.
        check: compare the counts (a synchronisation on GPUs); off inside compiled graphs.

    Raises:
        DataError: the batch has another number of placeholders than `features` has rows.
    """
    if check and not torch.compiler.is_compiling():
        held = int(mask.sum())
        if held != len(features):
            raise DataError(
                f"the text holds {held} image placeholders, the images give {len(features)} features; "
                "text and images must come from the same ChangeVLMProcessor call"
            )
    # on the embedding's card, which need not be the ids' where a model is spread over several
    return embeds.masked_scatter(mask[..., None].to(embeds.device), features.to(embeds))
