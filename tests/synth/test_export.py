"""Exports have the published layouts, hold the world's pairs, and survive interruption."""

import json

import numpy as np
import pytest
from PIL import Image

from llava.cli import main
from llava.errors import ConfigError, DataError
from llava.synth import World
from llava.synth.export import export_levir_cc, export_levir_cd, export_levir_mci, export_records

COUNTS = {"train": 3, "test": 2}
SIZE = 64


def _read(path):
    return np.asarray(Image.open(path))


def _files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_records(tmp_path):
    export_records(COUNTS, tmp_path, seed=4, size=SIZE)
    for split, count in COUNTS.items():
        lines = [json.loads(line) for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
        assert len(lines) == count
        for line, pair in zip(lines, World(4, split, SIZE).pairs(0, count), strict=True):
            assert line["uid"] == pair.uid
            assert line["change_flag"] == int(pair.changed)
            assert tuple(line["change_caption"]) == pair.captions
            assert (_read(tmp_path / line["img1_path"]) == pair.before).all()
            assert (_read(tmp_path / line["img2_path"]) == pair.after).all()
            assert ((_read(tmp_path / line["mask_path"]) > 0) == pair.binary_mask).all()


def test_levir_cc(tmp_path):
    export_levir_cc(COUNTS, tmp_path, size=SIZE)
    images = json.loads((tmp_path / "LevirCCcaptions.json").read_text())["images"]
    assert [image["imgid"] for image in images] == list(range(5))
    assert [key for image in images for key in image["sentids"]] == list(range(25))
    for image in images:
        pair = World(0, image["split"], SIZE).pair(int(image["filename"][-10:-4]))
        assert image["filepath"] == image["split"]
        assert image["changeflag"] == int(pair.changed)
        assert [" ".join(s["tokens"]) for s in image["sentences"]] == list(pair.captions)
        assert [s["raw"].strip().removesuffix(" .") for s in image["sentences"]] == list(pair.captions)
        assert [s["sentid"] for s in image["sentences"]] == image["sentids"]
        for letter, pixels in (("A", pair.before), ("B", pair.after)):
            assert (_read(tmp_path / "images" / image["split"] / letter / image["filename"]) == pixels).all()
    assert not (tmp_path / "images/train/label").exists()


@pytest.mark.parametrize("buildings_only", [False, True])
def test_levir_cd(tmp_path, buildings_only):
    export_levir_cd({"train": 6}, tmp_path, size=SIZE, buildings_only=buildings_only)
    for index, pair in enumerate(World(0, "train", SIZE).pairs(0, 6)):
        label = _read(tmp_path / f"train/label/train_{index:06d}.png")
        assert set(np.unique(label)) <= {0, 255}
        assert ((label == 255) == (pair.change_mask == 2 if buildings_only else pair.binary_mask)).all()
        assert (_read(tmp_path / f"train/A/train_{index:06d}.png") == pair.before).all()


def test_levir_mci(tmp_path):
    export_levir_mci({"val": 6}, tmp_path, size=SIZE)
    assert (tmp_path / "LevirCCcaptions.json").is_file()
    for index, pair in enumerate(World(0, "val", SIZE).pairs(0, 6)):
        label = _read(tmp_path / f"images/val/label/val_{index:06d}.png")
        assert label.shape == (SIZE, SIZE, 3)
        assert (label[..., 0] == np.array([0, 128, 255])[pair.change_mask]).all()
        coloured = _read(tmp_path / f"images/val/label_rgb/val_{index:06d}.png")
        assert (coloured[pair.change_mask == 1] == (255, 255, 0)).all()
        assert (coloured[pair.change_mask == 2] == (255, 0, 0)).all()


def test_workers_write_the_same_files(tmp_path):
    export_records({"train": 20}, tmp_path / "one", size=32)
    export_records({"train": 20}, tmp_path / "two", size=32, workers=2)
    assert _files(tmp_path / "one") == _files(tmp_path / "two")
    for name in _files(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_an_interrupted_export_goes_on(tmp_path, monkeypatch):
    drawn = []
    pair = World.pair

    def failing(self, index):
        if index == 2 and len(drawn) < 3:
            drawn.append("stop")
            raise KeyboardInterrupt
        drawn.append(index)
        return pair(self, index)

    monkeypatch.setattr(World, "pair", failing)
    with pytest.raises(KeyboardInterrupt):
        export_records({"train": 4}, tmp_path, size=32)
    assert not (tmp_path / "train.jsonl").exists()
    export_records({"train": 4}, tmp_path, size=32)
    assert drawn == [0, 1, "stop", 2, 3]
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == 4
    assert not list(tmp_path.rglob("*.part"))
    export_records({"train": 6}, tmp_path, size=32)  # and may grow
    assert drawn[-2:] == [4, 5]


def test_another_export_in_the_folder_is_refused(tmp_path):
    export_records({"train": 1}, tmp_path, size=32)
    with pytest.raises(DataError, match="seed=0 there, 1 now"):
        export_records({"train": 1}, tmp_path, size=32, seed=1)
    with pytest.raises(DataError, match=r"change_rate=0.5 there, 0.1 now\)"):
        export_records({"train": 1}, tmp_path, size=32, change_rate=0.1)
    (tmp_path / "other/images").mkdir(parents=True)
    with pytest.raises(DataError, match="something else"):
        export_records({"train": 1}, tmp_path / "other", size=32)


@pytest.mark.parametrize("counts", [{}, {"train": 0}, {"dev": 1}, {"train": -1}])
def test_nonsense_counts_are_refused(tmp_path, counts):
    with pytest.raises(ConfigError):
        export_records(counts, tmp_path, size=32)


def test_command_line(tmp_path, capsys):
    arguments = ["--train", "2", "--size", "32", "--workers", "1"]
    assert main(["synth", str(tmp_path / "cd"), "--layout", "levir-cd", *arguments]) == 0
    assert (tmp_path / "cd/train/label/train_000001.png").is_file()
    assert main(["synth", "--preview", str(tmp_path / "sheet.png"), "--count", "3", "--size", "64"]) == 0
    assert Image.open(tmp_path / "sheet.png").width > 3 * 2 * 64
    rare = ["--train", "4", "--change-rate", "0.25", "--layout", "tasks", "--size", "64"]
    assert main(["synth", str(tmp_path / "rare"), *arguments, *rare]) == 0
    lines = [json.loads(line) for line in (tmp_path / "rare/train.jsonl").read_text().splitlines()]
    assert len({line["img1_path"] for line in lines if line["change_flag"]}) == 1
    assert len({line["img1_path"] for line in lines}) == 4
    assert main(["synth", *arguments]) == 1
    assert "OUT" in capsys.readouterr().err
