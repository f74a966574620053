"""The image processor: the reference's numbers, the other aspects by hand, saving, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from llava.errors import ConfigError, ImageError
from llava.model.image_processing import ChangeImageProcessor

GOLDEN = Path(__file__).parents[1] / "golden" / "image"


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("name", ["square", "oblong"])
def test_square_equals_the_published_preprocessing(name):
    # Numbers of the published CCExpert code (commit b265acd) with Pillow 13.0.0.
    expected = load_file(GOLDEN / "preprocess.safetensors")
    values = ChangeImageProcessor().preprocess(GOLDEN / f"{name}.png")["pixel_values"]
    assert values.shape == (1, 3, 384, 384) and values.dtype == torch.float32
    torch.testing.assert_close(values[0, :, ::12, ::12], expected[f"{name}.every_12th"], rtol=0, atol=1e-6)
    torch.testing.assert_close(values[0, :, :24, :24], expected[f"{name}.top_left_24"], rtol=0, atol=1e-6)
    means = values[0].double().mean(dim=(1, 2))
    torch.testing.assert_close(means, expected[f"{name}.channel_mean"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("aspect", ["square", "pad"])
@pytest.mark.parametrize("size", [(30, 20), (20, 31), (24, 24)])
def test_values_equal_a_plain_computation(aspect, size):
    mean, std = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
    processor = ChangeImageProcessor(size=48, mean=mean, std=std, aspect=aspect, resample="bilinear")
    image = picture(*size)
    levels = np.asarray(image)
    if aspect == "pad":
        longest = max(size)
        levels = np.tile(np.array([int(m * 255) for m in mean], np.uint8), (longest, longest, 1))
        top, left = (longest - size[1]) // 2, (longest - size[0]) // 2
        levels[top : top + size[1], left : left + size[0]] = np.asarray(image)
    resized = np.asarray(Image.fromarray(levels).resize((48, 48), Image.Resampling.BILINEAR)) / 255.0
    expected = ((resized - mean) / std).transpose(2, 0, 1)
    values = processor.preprocess(image)["pixel_values"][0]
    np.testing.assert_allclose(values.numpy(), expected, atol=1e-6)


def test_order_and_kinds_of_input_are_kept():
    processor = ChangeImageProcessor(size=16)
    a, b, c = (picture(20, 20, seed) for seed in range(3))
    alone = torch.cat([processor.preprocess(image)["pixel_values"] for image in (a, b, c)])
    stacked = np.stack([np.asarray(image) for image in (a, b, c)])
    for images in (
        [a, b, c],
        [[a, b], [c]],
        stacked,
        torch.from_numpy(stacked).permute(0, 3, 1, 2),
        [a, stacked[1], c],
    ):
        assert torch.equal(processor(images, return_tensors="pt")["pixel_values"], alone)
    assert isinstance(processor(a, return_tensors="np")["pixel_values"], np.ndarray)


def test_saved_and_loaded_alike(tmp_path):
    processor = ChangeImageProcessor(
        size=28, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], resample="lanczos", aspect="anyres",
        grid_pinpoints=[[28, 56], [56, 28]], max_tiles=4,
    )  # fmt: skip
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text()) == processor.to_dict()
    again = ChangeImageProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == processor.to_dict()
    assert torch.equal(again.tiles(picture(60, 20)), processor.tiles(picture(60, 20)))
    changed, rest = ChangeImageProcessor.from_dict(
        processor.to_dict(), size=14, other=1, return_unused_kwargs=True
    )
    assert changed.size == 14 and rest == {"other": 1}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"size": 0}, "size=0"),
        ({"std": [0.5, 0, 0.5]}, "std above 0"),
        ({"resample": "cubic"}, "known: nearest"),
        ({"aspect": "wide"}, "known: square, pad, anyres"),
        ({"grid_pinpoints": [[384, 500]]}, "multiples of size=384"),
        ({"grid_pinpoints": []}, "grid_pinpoints is empty"),
        ({"max_tiles": 0}, "max_tiles=0"),
        ({"image_mean": [0.5] * 3}, "unknown fields.*image_mean"),
    ],
)
def test_fields_that_cannot_work_are_named(fields, said):
    with pytest.raises(ConfigError, match=said):
        ChangeImageProcessor(**fields)


def test_calls_that_cannot_work():
    processor = ChangeImageProcessor(size=16)
    with pytest.raises(ConfigError, match="no images"):
        processor.preprocess([])
    with pytest.raises(ConfigError, match="do_resize"):
        processor.preprocess(picture(9, 9), do_resize=False)
    with pytest.raises(ImageError, match="nowhere"):
        processor.preprocess("nowhere.png")
    with pytest.raises(ImageError, match="allow_url"):
        processor.fetch_images(["https://example.org/a.png"])


def test_fetched_images_are_pictures(tmp_path):
    picture(8, 6).save(tmp_path / "a.png")
    fetched = ChangeImageProcessor().fetch_images([[tmp_path / "a.png", picture(8, 6)]])
    assert fetched[0][0].tobytes() == fetched[0][1].tobytes()
