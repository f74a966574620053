"""Views of a pair: both dates and the mask alike, drawn anew each epoch, and none where an answer names a place."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llava.data.augment import Augmentation, View
from llava.data.dataset import PairDataset
from llava.data.record import Record, read_records
from llava.data.sampler import Place
from llava.errors import ConfigError
from tests.tiny import random_image, tiny_model

RECORD = Record(uid="x", img1_path="a.png", img2_path="b.png")


def square(at: tuple[int, int], side: int = 24, size: int = 128) -> Image.Image:
    """A white square on black."""
    image = Image.new("L", (size, size))
    image.paste(255, (*at, at[0] + side, at[1] + side))
    return image


def test_what_is_left_out_is_cut_and_the_rest_turns() -> None:
    image = Image.new("RGB", (200, 100), "white")
    kept = View(area=0.64, across=0, down=1, angle=0).of(image)
    assert kept.size == (160, 80) and np.asarray(kept).min() == 255
    corner = Image.new("L", (100, 100))
    corner.putpixel((99, 99), 255)
    assert np.asarray(View(0.25, 1, 1, 0).of(corner))[49, 49] == 255
    assert np.asarray(View(0.25, 0, 0, 0).of(corner)).max() == 0
    turned = View(1, 0, 0, 90).of(square((0, 0)))  # counter-clockwise: from the upper left to the lower left
    assert np.asarray(turned)[-12, 12] == 255 and np.asarray(turned)[12, 12] == 0
    tilted = np.asarray(View(1, 0, 0, 10).of(image.resize((100, 100))))
    assert not tilted[0, 0].any() and tilted[50, 50].all()  # black where nothing was


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(20, 80), st.integers(20, 80))
def test_image_and_mask_are_seen_alike(number: int, x: int, y: int) -> None:
    view = Augmentation().view([RECORD], str(number))
    assert view is not None
    drawn = square((x, y))
    seen = np.asarray(view.of(drawn)) > 127
    mask = np.asarray(view.of(drawn, Image.Resampling.NEAREST)) > 0
    assert seen.shape == mask.shape and (seen != mask).sum() <= 0.15 * mask.sum()
    centre = [int(axis.mean()) for axis in np.nonzero(mask)]
    middle = drawn.width / 2  # neither goes further than the view can take it
    reach = 0.05 * 128 + 2 * np.hypot(x + 12 - middle, y + 12 - middle) * np.sin(np.radians(7.5)) + 2
    assert np.hypot(centre[1] - x - 12, centre[0] - y - 12) <= reach


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=8), st.floats(0, 0.9), st.floats(0, 180))
def test_views_are_drawn_within_bounds_and_by_key_alone(key: str, crop: float, rotate: float) -> None:
    told = Augmentation(crop=crop, rotate=rotate)
    view = told.view([RECORD], key)
    assert view is not None and view == told.view([replace(RECORD, uid="y")], key) != told.view(
        [RECORD], key + "'"
    )
    assert 1 - crop <= view.area <= 1 and abs(view.angle) <= rotate
    assert 0 <= view.across <= 1 and 0 <= view.down <= 1


def test_pairs_with_an_answer_that_names_places_stay_as_they_are() -> None:
    told = Augmentation()
    talk = (("where?", "left"),)
    assert told.view([RECORD, replace(RECORD, task="count"), replace(RECORD, task="binary")], "k") is not None
    for other in (
        *(replace(RECORD, task=task) for task in ("loc", "open", "dialog")),
        replace(RECORD, conversation=talk),
    ):
        assert told.view([other], "k") is None and told.view([RECORD, other], "k") is None
    assert Augmentation(tasks=["loc"]).view([replace(RECORD, task="loc")], "k") is not None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop": 1.0}, "augment.crop"),
        ({"rotate": -1.0}, "augment.rotate"),
        ({"tasks": ["where"]}, r"augment.tasks' has \['where'\]; known: caption"),
    ],
)
def test_faults_are_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Augmentation(**fields)  # type: ignore[arg-type]


def test_samples_are_seen_anew_each_epoch_and_the_same_again(tmp_path: Path) -> None:
    _, processor = tiny_model()
    for name in "abm":
        random_image(ord(name)).save(tmp_path / f"{name}.png")
    fields = {"img1_path": "a.png", "img2_path": "a.png", "mask_path": "m.png"}
    rows = [
        {"uid": "caption", **fields, "change_caption": ["a road"]},
        {"uid": "loc", **fields, "conversation": [["where?", "left"]], "task": "loc"},
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    records = read_records(tmp_path / "data.json")
    plain = PairDataset(records, tmp_path, processor, one_pass=False, mask_grid=4)
    data = PairDataset(
        records, tmp_path, processor, one_pass=False, mask_grid=4, augment=Augmentation(), seed=3
    )
    first, second, again = (data[Place(0, epoch)] for epoch in (0, 1, 0))
    assert torch.equal(first.pixel_values, again.pixel_values)
    assert torch.equal(first.pixel_values[0], first.pixel_values[1])  # both dates alike
    assert not torch.equal(first.pixel_values, second.pixel_values)
    assert not torch.equal(first.pixel_values, plain[0].pixel_values)
    assert first.changed_share is not None and not torch.equal(first.changed_share, plain[0].changed_share)  # type: ignore[arg-type]
    assert torch.equal(data[Place(1, 5)].pixel_values, plain[1].pixel_values)
    with pytest.raises(ConfigError, match="cache_images or augment"):
        PairDataset(records, tmp_path, processor, cache=True, augment=Augmentation())
