"""Conversions: a file or one a split, whole or not at all; captions drawn alike in every run."""

import json
from pathlib import Path

import pytest

from llava.data import convert as module
from llava.data.convert import convert
from llava.data.record import read_records
from llava.data.sources import Faults, Options
from llava.errors import ConfigError, DataError
from tests.data.sources.layouts import CORPORA


@pytest.fixture
def levir(tmp_path: Path) -> Path:
    return CORPORA["levir-cc"].write(tmp_path / "levir")


def test_a_file_for_each_split(tmp_path: Path, levir: Path):
    done = convert("levir-cc", levir, tmp_path / "out" / "l_{split}.jsonl")
    train, test = tmp_path / "out/l_train.jsonl", tmp_path / "out/l_test.jsonl"
    assert done.files == {train: 1, test: 1}
    expected = [item.record for item in CORPORA["levir-cc"].items]
    assert [*read_records(train), *read_records(test)] == expected
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["l_test.jsonl", "l_train.jsonl"]


def test_several_splits_do_not_end_up_in_one_file_unasked(tmp_path: Path, levir: Path):
    out = tmp_path / "out/r.jsonl"
    with pytest.raises(ConfigError, match=r"splits test, train; .*--out r_\{split\}.jsonl"):
        convert("levir-cc", levir, out)
    assert not list((tmp_path / "out").iterdir())
    assert convert("levir-cc", levir, out, split="test").files == {out: 1}
    assert convert("levir-cc", levir, out, split="all", overwrite=True).files == {out: 2}
    with pytest.raises(DataError, match="no record of dev; it has test, train"):
        convert("levir-cc", levir, tmp_path / "dev.jsonl", split="dev")
    with pytest.raises(ConfigError, match="leave one away"):
        convert("levir-cc", levir, tmp_path / "{split}.jsonl", split="test")


def test_a_source_without_splits(tmp_path: Path):
    source = CORPORA["llava"].write(tmp_path)
    assert convert("llava", source, tmp_path / "r.jsonl").splits == {"": 1}
    for out, split in (("{split}.jsonl", None), ("x.jsonl", "train")):
        with pytest.raises(ConfigError, match="says no splits"):
            convert("llava", source, tmp_path / out, split=split)
    (record,) = read_records(tmp_path / "r.jsonl")
    assert record == CORPORA["llava"].items[0].record  # the conversation too


def test_a_file_in_the_way_stays(tmp_path: Path, levir: Path):
    out = tmp_path / "r.jsonl"
    out.write_text("mine")
    with pytest.raises(DataError, match="exists; give another name, or --overwrite"):
        convert("levir-cc", levir, out, split="test")
    assert out.read_text() == "mine"


def test_a_late_fault_leaves_nothing_and_the_old_file_alone(tmp_path: Path, levir: Path):
    out = tmp_path / "out/r.jsonl"
    convert("levir-cc", levir, out, split="all")
    before = out.read_bytes()
    file = levir / "LevirCCcaptions.json"
    whole = file.read_text()
    file.write_text(whole[:-5])  # all entries are there, the end is not
    with pytest.raises(DataError, match=r"LevirCCcaptions.json, line 1: no JSON"):
        convert("levir-cc", levir, out, split="all", overwrite=True)
    document = json.loads(whole)
    document["images"].append(document["images"][0])
    file.write_text(json.dumps(document))
    with pytest.raises(DataError, match="uid 'levir-cc/train_000005' comes twice"):
        convert("levir-cc", levir, out, split="all", overwrite=True)
    assert out.read_bytes() == before
    assert [path.name for path in out.parent.iterdir()] == ["r.jsonl"]


def test_a_full_disk_is_said_and_nothing_is_left(
    tmp_path: Path, levir: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(DataError, match="No space left"):
        convert("levir-cc", levir, tmp_path / "out/r.jsonl", split="all")
    assert not list((tmp_path / "out").iterdir())


def test_fewer_captions_are_the_same_ones_in_every_run(tmp_path: Path):
    source = CORPORA["changechat-captions"].write(tmp_path)
    drawn = []
    for k in range(2):
        convert("changechat", source, tmp_path / f"{k}.jsonl", max_captions=3)
        drawn.append(read_records(tmp_path / f"{k}.jsonl")[0].change_caption)
    assert drawn[0] == drawn[1] and len(drawn[0]) == 3
    assert list(drawn[0]) == sorted(drawn[0])  # in their order
    with pytest.raises(ConfigError, match="at least 1"):
        convert("changechat", source, tmp_path / "x.jsonl", max_captions=0)


def test_faults_left_out_are_told(tmp_path: Path, levir: Path):
    file = levir / "LevirCCcaptions.json"
    document = json.loads(file.read_text())
    document["images"][0]["filename"] = ""
    file.write_text(json.dumps(document))
    done = convert("levir-cc", levir, tmp_path / "r.jsonl", options=Options(faults=Faults(skip=True)))
    assert done.files == {tmp_path / "r.jsonl": 1}
    (message,) = done.faults
    assert "images[0]: field 'filename' is ''" in message


def test_words_of_every_alphabet_and_odd_line_ends_survive(tmp_path: Path):
    words = "дорога 道路\u2028\u0085 x"
    pair = {"image_A": "a.png", "image_B": "b.png", "captions": [words], "changeflag": None}
    (tmp_path / "c.json").write_text(json.dumps([pair]))
    convert("changechat", tmp_path / "c.json", tmp_path / "r.jsonl")
    assert "дорога" in (tmp_path / "r.jsonl").read_text(encoding="utf-8")
    assert read_records(tmp_path / "r.jsonl")[0].change_caption == (words,)
