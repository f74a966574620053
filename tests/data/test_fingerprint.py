"""Fingerprints: copies are found again, other places are not, and the search misses nothing that is near."""

import io
import random

import numpy as np
import pytest
from PIL import Image

from llava.data.fingerprint import NEAR, Looks, look_of, pixel_hash
from llava.synth import World


@pytest.fixture(scope="module")
def places() -> list[Image.Image]:
    return [Image.fromarray(World(3, "train", 128).pair(k).before) for k in range(24)]


def _jpeg(picture: Image.Image) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=60)
    return Image.open(file).convert("RGB")


def test_pixels_are_those_of_size_and_colours(places: list[Image.Image]):
    picture = places[0]
    assert pixel_hash(picture) == pixel_hash(picture.copy())
    changed = picture.copy()
    changed.putpixel((5, 5), (1, 2, 3))
    assert len({pixel_hash(p) for p in (picture, changed, *places[1:])}) == len(places) + 1
    flat = np.zeros((2, 8, 3), np.uint8)
    assert pixel_hash(Image.fromarray(flat)) != pixel_hash(Image.fromarray(flat.reshape(4, 4, 3)))


def test_copies_look_alike_and_other_places_do_not(places: list[Image.Image]):
    looks = [look_of(picture) for picture in places]
    for picture, look in zip(places, looks, strict=True):
        assert look is not None
        for copy in (_jpeg(picture), picture.resize((64, 64)), picture.resize((200, 200))):
            assert (look ^ (look_of(copy) or 0)).bit_count() <= NEAR
    table = Looks({str(k): look for k, look in enumerate(looks) if look is not None})
    assert [list(table.near_to(look)) for look in looks if look] == [[(0, str(k))] for k in range(len(looks))]


def test_a_flat_picture_has_no_look():
    assert look_of(Image.new("RGB", (64, 64), "green")) is None


@pytest.mark.parametrize("near", [0, 1, 4, 7])
def test_the_search_finds_what_comparing_all_finds(near: int):
    draw = random.Random(near)
    looks = {str(k): draw.getrandbits(63) << 1 for k in range(60)}
    for name, look in list(looks.items()):
        looks[f"{name}~"] = look ^ sum(1 << bit for bit in draw.sample(range(1, 64), draw.randint(0, 9)))
    table = Looks(looks, near)
    for look in looks.values():
        plain = {
            (bits, name) for name, other in looks.items() if (bits := (look ^ other).bit_count()) <= near
        }
        assert set(table.near_to(look)) == plain
