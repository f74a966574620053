"""Any-resolution views against LLaVA-OneVision as in transformers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from llava.errors import ConfigError
from llava.model.anyres import (
    anyres_tile_count,
    anyres_token_count,
    arrange_anyres,
    default_pinpoints,
    select_resolution,
)
from llava.model.image_processing import ChangeImageProcessor

SIZES = [
    *[
        (384, 384),
        (256, 256),
        (768, 384),
        (384, 768),
        (1, 1),
        (100, 1000),
        (1000, 100),
        (27, 3000),
        (2304, 2304),
    ],
    *[(int(h), int(w)) for h, w in np.random.default_rng(0).integers(20, 4000, (400, 2))],
]


def reference(tile: int, side: int, max_tiles: int) -> SimpleNamespace:
    """Enough of a LLaVA-OneVision processor and model to call their arithmetic."""
    pinpoints = [list(point) for point in default_pinpoints(tile)]
    aspect = f"anyres_max_{max_tiles}"
    processor = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
    processor.image_processor = SimpleNamespace(image_grid_pinpoints=pinpoints)
    processor.num_image_tokens, processor.vision_aspect_ratio = side**2, aspect
    vision = SimpleNamespace(image_size=tile, patch_size=tile // side)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=pinpoints))
    return SimpleNamespace(processor=processor, model=model, aspect=aspect, pinpoints=pinpoints)


def test_the_grid_is_llava_onevisions():
    assert default_pinpoints(384) == [
        tuple(point) for point in LlavaOnevisionImageProcessorPil.image_grid_pinpoints
    ]
    for size in SIZES:
        assert select_resolution(size, default_pinpoints(384)) == select_best_resolution(
            size, default_pinpoints(384)
        )


@pytest.mark.parametrize("max_tiles", [9, 2])
def test_token_counts_equal_transformers(max_tiles):
    other = reference(384, 27, max_tiles)
    for size in SIZES:
        counted = anyres_token_count(size, 384, 729, max_tiles)
        assert counted == other.processor._get_number_of_features(*size, 384, 384), size


@pytest.mark.parametrize("max_tiles", [9, 2])
def test_features_are_arranged_as_in_transformers(max_tiles):
    other, newline = reference(20, 5, max_tiles), torch.randn(6)
    for height, width in SIZES[:120]:
        size = (max(1, height // 19), max(1, width // 19))  # as many tiles as at 384 px, in little memory
        views = torch.randn(anyres_tile_count(size, 20), 25, 6)
        ours = arrange_anyres(views, size, newline, image_size=20, max_tiles=max_tiles)
        [theirs], _ = LlavaOnevisionModel.pack_image_features(
            other.model, [views], torch.tensor([size]), newline, vision_aspect_ratio=other.aspect
        )
        assert len(ours) == anyres_token_count(size, 20, 25, max_tiles)
        assert torch.equal(ours, theirs), size


@pytest.mark.parametrize("size", [(24, 24), (30, 100), (101, 33), (57, 71), (300, 40), (9, 7)])
def test_tiles_equal_transformers(size):
    pixels = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    theirs = LlavaOnevisionImageProcessorPil(
        size={"height": 24, "width": 24},
        image_grid_pinpoints=[list(point) for point in default_pinpoints(24)],
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
    )(Image.fromarray(pixels), return_tensors="pt")
    processor = ChangeImageProcessor(size=24, mean=[0.0] * 3, std=[1.0] * 3, aspect="anyres")
    ours = processor.tiles(Image.fromarray(pixels))
    assert len(ours) == anyres_tile_count(size, 24)
    torch.testing.assert_close(ours, theirs["pixel_values"][0].float(), rtol=0, atol=1.001 / 255)
    assert processor.token_count(size, 16) == anyres_token_count(size, 24, 16)


def test_only_anyres_depends_on_the_image():
    assert ChangeImageProcessor(aspect="square").token_count((1000, 300), 729) == 729


def test_an_extreme_strip_still_has_its_whole_view():
    assert select_resolution((1, 100_000), default_pinpoints(384)) == (384, 384)
    tokens = anyres_token_count((1, 100_000), 384, 729)
    assert len(arrange_anyres(torch.zeros(2, 729, 1), (1, 100_000), torch.ones(1), image_size=384)) == tokens


def test_gradients_reach_every_view_and_the_newline():
    views, newline = torch.randn(7, 16, 3, requires_grad=True), torch.randn(3, requires_grad=True)
    arrange_anyres(views, (40, 60), newline, image_size=20).sum().backward()
    assert (views.grad.abs().sum(dim=(1, 2)) > 0).all() and (newline.grad > 0).all()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"3 views.*1 \+ 1 x 1"):
        arrange_anyres(torch.zeros(3, 16, 2), (20, 20), torch.zeros(2), image_size=20)
    with pytest.raises(ConfigError, match="no square"):
        anyres_token_count((20, 20), 20, 257)
    with pytest.raises(ConfigError, match="grid_pinpoints"):
        select_resolution((20, 20), [])
