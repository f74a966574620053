"""`llava data`: convert, check and show as a user types them, with their exit statuses."""

import json
from pathlib import Path

import pytest
from PIL import Image

from llava.cli import main
from llava.synth.export import export_levir_mci


@pytest.fixture(scope="module")
def mci(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_levir_mci({"train": 3, "test": 2}, tmp_path_factory.mktemp("mci"), size=48)


def test_convert_check_show(mci: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["data", "convert", "levir-mci", str(mci), "--out", str(mci / "{split}.jsonl")]) == 0
    assert "train.jsonl: 3 records" in capsys.readouterr().err
    train, test, report = mci / "train.jsonl", mci / "test.jsonl", tmp_path / "report.json"
    check = ["data", "check", str(train), "--test", str(test), "--json", str(report), "--workers", "1"]
    assert main(check) == 0
    said = capsys.readouterr()
    assert "15 images checked, 0 faults" in said.out and "check: 15/15 images" in said.err
    assert json.loads(report.read_text())["images"] == 15
    sheet = tmp_path / "sheet.png"
    numbers = tmp_path / "numbers.json"
    show = [
        "data",
        "show",
        str(train),
        str(test),
        "--sheet",
        str(sheet),
        "--json",
        str(numbers),
        "--side",
        "48",
    ]
    assert main(show) == 0
    assert "pairs               5" in capsys.readouterr().out
    assert json.loads(numbers.read_text())["captions"] == 25
    assert Image.open(sheet).width > 3 * 3 * 48


def test_faults_leaks_and_strict_set_the_exit_status(
    mci: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "test.jsonl"
    convert = ["data", "convert", "levir-mci", str(mci), "--out", str(out), "--split", "test"]
    assert main(convert) == 0
    assert main(convert) == 1  # it is there
    assert main([*convert, "--overwrite"]) == 0
    capsys.readouterr()
    assert main(["data", "check", str(out), "--workers", "1"]) == 1  # paths count from the list's own folder
    assert "missing, 6 times" in capsys.readouterr().out
    root = ["--root", str(mci), "--workers", "1"]
    assert main(["data", "check", str(out), "--test", str(out), *root, "--show", "1"]) == 1
    assert "leak, 4 times" in capsys.readouterr().out
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    twin = tmp_path / "twin.jsonl"
    twin.write_text(json.dumps({**rows[0], "change_flag": None}) + "\n" + json.dumps({**rows[0], "uid": "b"}))
    assert main(["data", "check", str(twin), *root]) == 0
    assert main(["data", "check", str(twin), *root, "--strict"]) == 1
    assert "repeat, 1 times" in capsys.readouterr().out


def test_a_list_of_sources_and_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["data", "convert", "--list"]) == 0
    said = capsys.readouterr().out
    assert "levir-cc" in said and "SOURCE: one of its JSON files" in said
    assert main(["data", "convert", "levir-cc"]) == 1
    assert main(["data", "convert", "levir", "x", "--out", str(tmp_path / "y")]) == 1
    assert "known: cc-foundation" in capsys.readouterr().err
    assert main(["data", "check"]) == 1
    assert main(["data", "show", str(tmp_path / "none.jsonl")]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_skipped_faults_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    entry = {"img_id": "1", "sentences": ["a car"]}
    (tmp_path / "val.json").write_text(json.dumps([entry, {"img_id": "2", "sentences": [""]}]))
    convert = ["data", "convert", "spot-the-diff", str(tmp_path), "--out", str(tmp_path / "r.jsonl")]
    assert main(convert) == 1
    assert main([*convert, "--skip-faults", "--images", "std"]) == 0
    said = capsys.readouterr().err
    assert "entry 1: field 'sentences[0]' is ''" in said and "r.jsonl: 1 records" in said
    row = json.loads((tmp_path / "r.jsonl").read_text())
    assert row["img2_path"] == "std/resized_images/1_2.png"


def test_a_sheet_of_changed_pairs_alone(mci: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    row = {"uid": "a", "img1_path": "a", "img2_path": "b", "change_caption": ["x"], "change_flag": 0}
    (tmp_path / "r.jsonl").write_text(json.dumps(row))
    show = ["data", "show", str(tmp_path / "r.jsonl"), "--sheet", str(tmp_path / "s.png"), "--only"]
    assert main([*show, "changed"]) == 1
    assert "no record says that its pair is changed" in capsys.readouterr().err
    assert main([*show, "unchanged"]) == 0  # its images are missing: an empty frame says so
    assert (tmp_path / "s.png").is_file()


def test_half_a_character_can_be_told_and_drawn(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    row = {"uid": "\ud800", "img1_path": "a", "img2_path": "b", "change_caption": ["\ud800 x"]}
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(row))
    assert main(["data", "check", str(path), "--workers", "1"]) == 1
    sheet, numbers = str(tmp_path / "s.png"), str(tmp_path / "n.json")
    assert main(["data", "show", str(path), "--sheet", sheet, "--json", numbers]) == 0
    assert "\\ud800" in capfd.readouterr().out


def test_help_teaches(capsys: pytest.CaptureFixture[str]):
    for action in ("convert", "check", "show"):
        with pytest.raises(SystemExit, match="0"):
            main(["data", action, "--help"])
        assert "examples:" in capsys.readouterr().out
