"""`llava report` and `llava card` on folders as an evaluation leaves them."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava.cli import main
from llava.eval.metrics import score, sha256_of
from tests.eval.report_runs import make_run, pictures
from tests.eval.test_report import read

pytest.importorskip("pycocoevalcap.bleu.bleu")


def evaluation(folder: Path, seed: int = 0, **run: Any) -> Path:
    """predictions.jsonl, metrics.json and maps/ of eight pairs; their pictures are in data/ beside the folder."""
    data = folder.parent / "data"
    fields = pictures(data)
    lines = [{**line, **fields} for line in make_run(8, seed=seed).lines]
    (folder / "maps" / "set").mkdir(parents=True)
    for line in lines[:2]:
        line["map_path"] = f"maps/{line['uid']}.png"
        Image.new("L", (27, 27), 200).save(folder / line["map_path"])
    scores = score(
        {line["uid"]: line["pred"] for line in lines},
        {line["uid"]: line["change_caption"] for line in lines},
        {line["uid"]: bool(line["change_flag"]) for line in lines},
        meteor=False,
        resamples=20,
    )
    facts = {"model": "runs/mine", "data": "data/test.jsonl", "root": str(data), **run}
    (folder / "predictions.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
    )
    content = {"scores": scores.to_dict(), "run": facts}
    (folder / "metrics.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_a_folder_becomes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = evaluation(tmp_path / "a", versions={"llava": "0.1.0", "torch": "2.13"})
    assert main(["report", str(folder), "--no-meteor"]) == 0
    assert capsys.readouterr().out.startswith(f"{folder / 'report.html'}: 8 pairs, ")
    found = read(folder / "report.html")
    data = found["data"]
    kept = json.loads((folder / "metrics.json").read_text())
    assert data["runs"][0]["scores"] == kept["scores"]  # with intervals and baselines, as evaluated
    assert data["runs"][0]["name"] == "runs/mine"
    assert ["versions", "llava 0.1.0, torch 2.13"] in data["runs"][0]["facts"]
    assert data["columns"][0] == "CIDEr-D" and data["layers"] == {"maps": [True], "truth": True}
    assert [found[f"pictures-{i}"]["maps"][0] is not None for i in range(3)] == [True, True, False]


def test_two_folders_are_compared(tmp_path: Path) -> None:
    folders = [evaluation(tmp_path / name, seed) for seed, name in enumerate("ab")]
    out = tmp_path / "both.html"
    assert main(["report", *map(str, folders), "--out", str(out), "--no-meteor", "--pairs", "0"]) == 0
    data = read(out)["data"]
    assert [run["name"] for run in data["runs"]] == ["a", "b"]
    versus = data["comparison"]["versus"][0]
    assert {"interval", "p"} <= versus["differences"][0].keys()
    assert "change decision" in versus["verdict"]


def test_a_bare_file_of_predictions_is_scored_on_the_way(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "a")
    bare = tmp_path / "elsewhere" / "said.jsonl"
    bare.parent.mkdir()
    (folder / "predictions.jsonl").rename(bare)
    assert main(["report", str(bare), "--no-meteor", "--root", str(tmp_path / "data")]) == 0
    found = read(bare.parent / "report.html")
    assert found["data"]["runs"][0]["scores"]["baselines"] and found["pictures-0"]["before"].startswith(
        "data:"
    )


def test_other_references_are_scored_anew_and_pictures_found_by_the_images_name(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "a")
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    told = [
        {
            "uid": f"{row['uid']}.png",
            "change_caption": [f"{row['pred']} indeed"],
            "change_flag": row["change_flag"],
        }
        for row in rows
    ]
    (tmp_path / "told.json").write_text(json.dumps(told))
    words = ["report", str(folder), "--no-meteor", "--references", str(tmp_path / "told.json")]
    assert main(words) == 0
    found = read(folder / "report.html")
    run = found["data"]["runs"][0]
    assert run["scores"]["references_sha256"] == sha256_of(
        {row["uid"]: row["change_caption"] for row in told}
    )
    assert run["scores"]["baselines"] and found["pictures-0"]["before"] is not None
    assert [found[f"pictures-{i}"]["maps"][0] is not None for i in range(3)] == [True, True, False]


def test_a_run_that_passed_over_a_pair_is_reported(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "a")
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    lost = {key: value for key, value in rows[-1].items() if key != "pred"} | {"error": "cut short"}
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows[:-1], lost]))
    (folder / "metrics.json").unlink()
    assert main(["report", str(folder), "--no-meteor", "--root", str(tmp_path / "data")]) == 0
    assert len(read(folder / "report.html")["data"]["pairs"]) == 7


def test_scores_of_other_predictions_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = evaluation(tmp_path / "a")
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    first = json.loads(lines[0]) | {"pred": "something else"}
    (folder / "predictions.jsonl").write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")
    assert main(["report", str(folder), "--no-meteor"]) == 1
    assert "has scores of other predictions" in capsys.readouterr().err
    assert not (folder / "report.html").exists()


def test_pictures_that_are_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = evaluation(tmp_path / "a")
    (tmp_path / "data" / "after.png").unlink()
    assert main(["report", str(folder), "--no-meteor"]) == 1
    assert "pair 'set/00000'" in (said := capsys.readouterr().err) and "after.png" in said
    assert main(["report", str(folder), "--no-meteor", "--skip-errors"]) == 3
    assert capsys.readouterr().err.count("skipped the pictures of set/") == 8
    assert len(read(folder / "report.html")["skipped"]) == 8


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "expected an object with 'scores' and 'run'"),
        ('{"scores": {"pairs": 8}}', "has no 'pairs' or no 'predictions'"),
        ('{"scores": {"pairs": 8, "predictions": {}}}', "has no 'captions' or no 'decision'"),
    ],
)
def test_a_broken_metrics_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, words: str
) -> None:
    folder = evaluation(tmp_path / "a")
    (folder / "metrics.json").write_text(content)
    for command in (["report", str(folder)], ["card", str(folder), "--out", str(tmp_path / "README.md")]):
        assert main(command) == 1
        said = capsys.readouterr().err
        assert str(folder / "metrics.json") in said and words in said and "Traceback" not in said


def test_a_card_from_two_evaluations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [evaluation(tmp_path / name, seed) for seed, name in enumerate("ab")]
    out = tmp_path / "model" / "README.md"
    command = [
        "card",
        *map(str, folders),
        "--out",
        str(out),
        "--license",
        "mit",
        "--test-set",
        "One set",
        "Other set",
    ]
    assert main(command) == 0
    said = capsys.readouterr()
    assert said.out == f"{out}: 2 test sets\n"
    assert "--base-model" in said.err and "--license" not in said.err
    text = out.read_text(encoding="utf-8")
    assert text.startswith("---\nlicense: mit\n") and "name: One set" in text and "type: other-set" in text
    assert "# mine\n" in text
    assert main(command) == 1  # it is there
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    assert [entry.name for entry in out.parent.iterdir()] == ["README.md"]


def test_a_card_asks_for_what_it_cannot_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [evaluation(tmp_path / "a"), evaluation(tmp_path / "b", model="runs/other")]
    out = str(tmp_path / "README.md")
    assert main(["card", *map(str, folders), "--out", out]) == 1
    assert "say with --name" in capsys.readouterr().err
    assert main(["card", str(folders[0]), "--out", out, "--test-set", "x", "y"]) == 1
    assert "--test-set gives 2 for 1 folders" in capsys.readouterr().err
    assert main(["card", str(tmp_path), "--out", out]) == 1
    assert "metrics.json does not exist" in capsys.readouterr().err
