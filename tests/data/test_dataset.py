"""Records to samples: prompts and answers that join to the conversation's own ids."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llava.data.conversation import IGNORE, pair_conversation
from llava.data.dataset import CaptionDataset
from llava.data.record import Record
from llava.errors import DataError, ImageError
from tests.tiny import random_image, tiny_model


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    made = []
    for i in range(3):
        random_image(2 * i).save(tmp_path / f"{i}a.png")
        random_image(2 * i + 1).save(tmp_path / f"{i}b.png")
        captions = (f"house {i} is built", "the scene is the same", "a road")
        made.append(
            Record(uid=f"r{i}", img1_path=f"{i}a.png", img2_path=f"{i}b.png", change_caption=captions)
        )
    return made


def test_prompt_and_answer_join_to_the_whole_conversation(records: list[Record], tmp_path: Path):
    _, processor = tiny_model()
    sample = CaptionDataset(records, tmp_path, processor)[1]
    assert len(sample.answers) == 3
    for caption, (ids, labels) in zip(records[1].change_caption, sample.answers, strict=True):
        whole = processor.encode(pair_conversation(answer=caption))
        expanded = processor.expand(whole["input_ids"], [processor.image_seq_length] * 2)
        assert sample.prompt + ids == expanded
        assert labels == whole["labels"][-len(labels) :]
        assert processor.tokenizer.decode([t for t in labels if t != IGNORE]) == caption + "<|im_end|>"
    assert set(sample.prompt_labels) == {IGNORE}


def test_pixels_are_the_processors_with_and_without_cache(records: list[Record], tmp_path: Path):
    _, processor = tiny_model()
    plain, cached = (CaptionDataset(records, tmp_path, processor, cache=cache) for cache in (False, True))
    expected = processor.image_processor.preprocess([random_image(4), random_image(5)])["pixel_values"]
    for pixels in (plain[2].pixel_values, cached[2].pixel_values, cached[2].pixel_values):
        torch.testing.assert_close(pixels, expected)


def test_masks_become_shares_of_patches(records: list[Record], tmp_path: Path):
    _, processor = tiny_model()
    mask = np.zeros((32, 64), np.uint8)
    mask[:8, 16:24] = 255  # half of the second patch of the first row
    Image.fromarray(mask).save(tmp_path / "mask.png")
    told = [replace(record, mask_path="mask.png") for record in records]
    assert CaptionDataset(told, tmp_path, processor)[0].changed_share is None
    share = CaptionDataset(told, tmp_path, processor, masks=True)[0].changed_share
    assert share is not None
    assert share.tolist() == [0, 0.5] + [0] * 14


def test_random_captions_change_with_the_epoch_and_repeat_with_the_seed(
    records: list[Record], tmp_path: Path
):
    _, processor = tiny_model()

    def drawn(seed: int) -> list[list[int]]:
        data = CaptionDataset(records, tmp_path, processor, captions="random", seed=seed)
        out = []
        for epoch in range(8):
            data.set_epoch(epoch)
            out.append([data[i].answers[0][0] for i in range(3)])
        return out

    assert drawn(0) == drawn(0) != drawn(1)
    assert len({str(epoch) for epoch in drawn(0)}) > 1


def test_a_record_without_caption_and_a_broken_image_are_named(records: list[Record], tmp_path: Path):
    _, processor = tiny_model()
    bare = Record(uid="bare", img1_path="0a.png", img2_path="0b.png")
    with pytest.raises(DataError, match="'bare'"):
        CaptionDataset([*records, bare], tmp_path, processor)
    (tmp_path / "1b.png").write_bytes((tmp_path / "1b.png").read_bytes()[:-30])
    with pytest.raises(ImageError, match=r"1b\.png"):
        CaptionDataset(records, tmp_path, processor)[1]
