"""The change map: where it is high, how it lies on the image, and the picture made of it."""

import numpy as np
import pytest
import torch
from PIL import Image

from llava.errors import ConfigError, DataError
from llava.model.change_map import SCORES, change_map, levels_to_map, outstanding, overlay, pair_distance


def stream_with_one_change(
    side: int = 9, place: tuple[int, int] = (2, 6), strength: float = 6.0
) -> torch.Tensor:
    """[1, N, D] of nearly equal tokens and one that differs."""
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(8, generator=generator) + 0.1 * torch.randn(1, side * side, 8, generator=generator)
    change[0, place[0] * side + place[1]] += strength * torch.randn(8, generator=generator)
    return change


@pytest.mark.parametrize("score", sorted(SCORES))
def test_the_map_is_high_where_the_odd_token_stands(score: str) -> None:
    drawn = change_map(stream_with_one_change(), (90, 180), score=score)
    assert drawn.shape == (1, 90, 180) and drawn.dtype == torch.float32
    assert drawn.min() >= 0 and drawn.max() <= 1
    row, column = divmod(int(drawn[0].argmax()), 180)
    assert 20 <= row < 30 and 120 <= column < 140
    assert drawn[0, 50:].max() < 0.5 < drawn[0, 25, 130]


def test_equal_tokens_are_no_change() -> None:
    same = torch.ones(2, 16, 4) + 1e-6 * torch.randn(2, 16, 4)
    assert change_map(same, (8, 8)).max() == 0


def test_each_image_of_a_batch_is_scaled_by_itself() -> None:
    loud, quiet = stream_with_one_change(strength=50.0), stream_with_one_change(place=(7, 1))
    together = change_map(torch.cat([loud, quiet]), (40, 30))
    assert torch.allclose(together, torch.cat([change_map(loud, (40, 30)), change_map(quiet, (40, 30))]))


def test_the_map_does_not_depend_on_the_scale_of_the_stream() -> None:
    change = stream_with_one_change()
    assert torch.allclose(change_map(change, (30, 30)), change_map(1000 * change, (30, 30)), atol=1e-4)


def test_patches_that_leave_a_margin_lie_where_they_were_cut() -> None:
    scores = torch.zeros(1, 9)
    scores[0, 2] = 100.0  # top right of 3 x 3 patches, which cover 30 of 40 pixels
    drawn = levels_to_map(outstanding(scores), (40, 40), covered=0.75)[0]
    assert drawn[5, 25] > 0.9 and drawn[5, 12] == 0 and drawn[25, 25] == 0
    assert (drawn[0, 30:] == drawn[0, 29]).all()  # beyond the last patch


def test_pair_distance_makes_a_map_too() -> None:
    before = torch.randn(1, 16, 4)
    after = before.clone()
    after[0, 5] += 3
    drawn = levels_to_map(outstanding(pair_distance(before, after)), (4, 4))[0]
    assert int(drawn.argmax()) == 5 and (drawn > 0).sum() == 1


def test_with_a_head_the_map_is_its_probability() -> None:
    change = torch.zeros(1, 9, 4)
    change[0, 4, 1] = 1.0
    head = torch.nn.Linear(4, 1)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.0, 4.0, 0.0, 0.0]]))
        head.bias.fill_(-2.0)
        drawn = change_map(change, (3, 3), head=head)[0]
    assert drawn[1, 1] == torch.tensor(2.0).sigmoid()
    assert torch.allclose(drawn[0], torch.tensor(-2.0).sigmoid())  # no rank: an image may change nowhere


def test_wrong_input_is_named() -> None:
    with pytest.raises(DataError, match="15 tokens"):
        change_map(torch.zeros(1, 15, 4), (8, 8))
    with pytest.raises(ConfigError, match="known: mean-angle, median, median-angle"):
        change_map(torch.zeros(1, 16, 4), (8, 8), score="norm")
    with pytest.raises(DataError, match=r"4 x 3 pixels, the image 5 x 5"):
        overlay(Image.new("RGB", (5, 5)), np.zeros((3, 4), np.float32))


def test_overlay_keeps_what_did_not_change_and_brightens_with_the_score() -> None:
    after = Image.new("RGB", (256, 2), (90, 90, 90))
    scores = np.tile(np.linspace(0, 1, 256, dtype=np.float32), (2, 1))
    pixels = np.asarray(overlay(after, scores)).astype(float)
    assert (pixels[:, 0] == 90).all()
    # under full opacity: relative luminance rises all along, so the order shows without hue
    ramp = np.asarray(overlay(after, scores, opacity=1.0)).astype(float)[0, 64:]
    linear = (ramp / 255) ** 2.2
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance) > -0.004).all() and luminance[-1] > 2 * luminance[0]
