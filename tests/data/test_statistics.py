"""Numbers of a list counted by hand, and a contact sheet that shows its pairs where they belong."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava.data.record import Record, read_records
from llava.data.sheet import GAP, LINE, contact_sheet
from llava.data.statistics import Lengths, describe, spread
from llava.errors import ConfigError
from llava.synth.export import export_records


def _record(uid: str, captions: tuple[str, ...], flag: bool | None, **fields: str) -> Record:
    return Record(uid=uid, img1_path=f"{uid}a.png", img2_path=f"{uid}b.png", change_caption=captions,
                  change_flag=flag, **fields)  # fmt: skip


def test_numbers_are_those_counted_by_hand(tmp_path: Path):
    records = [
        _record("1", ("A road appears .", "a road appears"), True, mask_path="m.png"),
        _record("2", ("nothing",), False),
        _record("3", ("one two three four",), None),
    ]
    Image.new("RGB", (20, 10)).save(tmp_path / "1a.png")
    Image.new("RGB", (20, 10)).save(tmp_path / "2b.png")
    Image.new("RGB", (7, 7)).save(tmp_path / "1b.png")
    found = describe(records, tmp_path)
    assert (found.pairs, found.changed, found.unchanged, found.masks) == (3, 1, 1, 1)
    assert (found.captions, found.captions_per_pair) == (4, (1, 1.3333, 2))
    assert found.words == Lengths(mean=2.75, median=3.0, p95=4, longest=4)
    assert found.words_changed == Lengths(mean=3.0, median=3.0, p95=3, longest=3)
    assert (found.distinct_words, found.distinct_captions) == (8, 3)
    assert found.common_captions[0] == ("a road appears", 2)
    assert found.sizes == (("20x10", 2), ("7x7", 1))
    assert (found.sized, found.unreadable) == (3, 3)
    table = found.table()
    assert "1 (50.0 % of those that say)" in table and "2 x 20x10" in table
    assert describe(records).sized == 0  # no root, no image
    assert describe([]).words is None


def test_the_95th_percentile_is_not_exceeded_by_95_percent():
    assert Lengths.of(list(range(1, 101))).p95 == 95
    assert Lengths.of([3]).p95 == 3


def test_records_of_each_task_are_counted():
    records = [_record(str(k), (), None, task=task) for k, task in enumerate(("loc", "open", "loc"))]
    records.append(_record("x", ("a",), True))
    found = describe(records)
    assert found.tasks == (("loc", 2), ("open", 1))
    assert [line.split() for line in found.table().splitlines() if "task" in line] == [
        ["task", "loc", "2"],
        ["task", "open", "1"],
    ]
    assert "task" not in describe(records[-1:]).table()
    again = describe([*records, replace(records[0], uid="again")])
    assert (again.pairs, again.distinct_pairs) == (5, 4)
    assert "  of images         4" in again.table() and "of images" not in found.table()


def test_spread_takes_evenly():
    records = [_record(str(k), ("x",), None) for k in range(10)]
    assert [record.uid for record in spread(records, 5)] == ["0", "2", "4", "6", "8"]
    assert spread(records, 10) == spread(records, 99) == records


def test_the_sheet_shows_before_after_and_mask_side_by_side(tmp_path: Path):
    export_records({"train": 4}, tmp_path, size=64)
    records = read_records(tmp_path / "train.jsonl")
    sheet = np.asarray(contact_sheet(records, tmp_path, columns=2, side=64))
    width = 3 * 64 + 8
    assert sheet.shape[1] == 2 * (width + GAP) + GAP
    x, y = GAP + width + GAP, GAP + 2 * LINE  # the second pair
    for k, path in enumerate(records[1].to_dict()[name] for name in ("img1_path", "img2_path", "mask_path")):
        shown = sheet[y : y + 64, x + k * 68 : x + k * 68 + 64]
        with Image.open(tmp_path / path) as picture:
            assert (shown == np.asarray(picture.convert("RGB"))).all()


def test_a_broken_pair_is_drawn_as_an_empty_frame(tmp_path: Path):
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "1a.png")
    (tmp_path / "1b.png").write_bytes(b"no image")
    long = _record("1", ("word " * 300,), True)
    sheet = np.asarray(contact_sheet([long], tmp_path, side=96))
    assert not (sheet == (0, 0, 255)).all(-1).any()
    assert ((sheet[..., 0] > 150) & (sheet[..., 1] < 60)).any()  # red words


def test_a_mask_of_small_numbers_can_be_seen(tmp_path: Path):
    for name in ("1a.png", "1b.png"):
        Image.new("RGB", (32, 32), "green").save(tmp_path / name)
    Image.new("L", (32, 32), 1).save(tmp_path / "m.png")
    record = _record("1", (), None, mask_path="m.png")
    sheet = np.asarray(contact_sheet([record], tmp_path, side=32))
    y, x = GAP + 2 * LINE, GAP + 2 * 36
    assert (sheet[y : y + 32, x : x + 32] == 255).all()


def test_senseless_sheets_are_refused(tmp_path: Path):
    record = _record("1", ("x",), None)
    for records, options in (([], {}), ([record], {"columns": 0}), ([record], {"side": 3})):
        with pytest.raises(ConfigError, match="contact sheet"):
            contact_sheet(records, tmp_path, **options)
