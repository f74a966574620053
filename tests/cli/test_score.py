"""`llava score`: tables and JSON from files of every kind, faults as one line, exit statuses scripts can trust."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from llava.cli import main
from llava.errors import MissingDependencyError
from llava.eval.meteor import require_meteor

pytest.importorskip("pycocoevalcap.bleu.bleu")
SAME = ["there is no difference", "nothing has changed"]
QUICK = ("--no-meteor", "--resamples", "20")


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    dice = random.Random(0)

    def told() -> list[str]:
        return [f"some {dice.choice(['houses', 'roads'])} appear on the {dice.choice(['left', 'right'])}"] * 2

    return [
        {
            "uid": f"set/test_{i}",
            "pred": (texts := told() if i % 2 else SAME)[i % 3 % 2],
            "change_caption": texts,
        }
        for i in range(24)
    ]


@pytest.fixture
def file(tmp_path: Path, records: list[dict[str, Any]]) -> Path:
    return write(tmp_path / "a.jsonl", records)


def write(path: Path, entries: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


def run(*words: Any) -> int:
    return main(["score", *map(str, words)])


def test_a_table_with_everything_a_reader_asks_for(file, capsys):
    assert run(file, *QUICK) == 0
    out = capsys.readouterr().out
    for word in ("constant", "true flag + one sentence", "false alarms", "misses", "95 % from", "sha256 of"):
        assert word in out
    assert "24" in out.splitlines()[1] and "repeats" not in out


def test_json_has_the_same_and_how_it_was_made(file, capsys):
    assert run(file, *QUICK, "--json", "--seed", 3, "--no-baselines") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["scores"]["pairs"] == 24 and found["scores"]["baselines"] == []
    assert found["scores"]["predictions"]["captions"]["all"]["BLEU-1"] == pytest.approx(100)
    assert found["scores"]["resampling"] == {"resamples": 20, "seed": 3, "level": 95}
    assert found["run"]["predictions"] == [str(file)] and found["run"]["missing"] == "error"


def test_order_and_repeats_change_no_score(file, records, tmp_path, capsys):
    run(file, *QUICK, "--json")
    once = json.loads(capsys.readouterr().out)["scores"]
    shuffled = random.Random(1).sample(records, len(records))
    run(write(tmp_path / "b.jsonl", shuffled + shuffled[:7]), *QUICK, "--json")
    twice = json.loads(capsys.readouterr().out)["scores"]
    repeats = twice.pop("repeats")
    assert once.pop("repeats") is None and twice == once
    assert (repeats["captions"], repeats["uids"], repeats["conflicting"]) == (7, 7, 0)
    run(write(tmp_path / "b.jsonl", shuffled + shuffled[:7]), *QUICK)
    assert "repeats: 7 captions beyond the first of 7 uids, all the same" in capsys.readouterr().out


def test_references_from_another_file(records, tmp_path, capsys):
    images = [
        {
            "filename": f"{record['uid'].split('/')[1]}.png",
            "split": "test",
            "changeflag": i % 2,
            "sentences": [{"raw": f" {text} ."} for text in record["change_caption"]],
        }
        for i, record in enumerate(records)
    ]
    levir = tmp_path / "levir.json"
    levir.write_text(json.dumps({"images": [*images, {**images[0], "filename": "v.png", "split": "val"}]}))
    said = write(tmp_path / "p.jsonl", [{"uid": record["uid"], "pred": record["pred"]} for record in records])
    assert run(said, "--references", levir, *QUICK, "--json") == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert scores["predictions"]["decision"]["accuracy"] == 100
    assert "split 'test'" in scores["notes"][0] and "matched by the image's name" in scores["notes"][1]
    assert run(said, "--references", levir, "--split", "val") == 1
    assert "24 uids have no references" in capsys.readouterr().err


def test_missing_pairs_are_refused_or_counted(file, records, tmp_path, capsys):
    part = write(tmp_path / "part.jsonl", records[:-2])
    assert run(part, "--references", file, *QUICK) == 1
    assert "2 of 24 pairs" in capsys.readouterr().err
    assert run(part, "--references", file, "--missing", "skip", *QUICK) == 3
    assert "2 pairs without a prediction are left out" in capsys.readouterr().out
    assert run(part, "--references", file, "--missing", "empty", *QUICK, "--json") == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert scores["pairs"] == 24 and scores["predictions"]["decision"]["misses"] == 1
    assert run(file, "--references", part, *QUICK) == 1
    assert "2 uids have no references" in capsys.readouterr().err
    assert run(file, "--references", part, "--unknown", "skip", *QUICK) == 0


def test_two_files_are_compared_on_common_pairs(file, records, tmp_path, capsys):
    worse = [record | {"pred": "a pond" if i % 4 else record["pred"]} for i, record in enumerate(records)]
    other = write(tmp_path / "run" / "predictions.jsonl", [*worse[1:], worse[1]])
    assert run(file, tmp_path / "run", "--no-meteor", "--resamples", 200) == 0
    out = capsys.readouterr().out
    assert "run minus a.jsonl, 23 common pairs" in out and "a.jsonl is better than run" in out
    assert (
        "a.jsonl: 1 pairs that not all files have" in out
        and "run: 1 captions of uids that came before" in out
    )
    assert run(file, other, *QUICK, "--json") == 0
    found = json.loads(capsys.readouterr().out)["comparison"]
    assert found["pairs"] == 23 and found["versus"][0]["mcnemar"]["only_second_right"] == 0
    apart = write(tmp_path / "c.jsonl", [records[0] | {"uid": "x"}])
    assert run(file, apart, *QUICK) == 1
    assert "no uid in common: a.jsonl has set/test_0, " in capsys.readouterr().err
    assert run(file, file, *QUICK) == 1
    assert "given twice" in capsys.readouterr().err


def test_a_fault_is_one_line(file, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_bytes(b'{"uid": "a", "pred": "x"}\n{"uid": \xff}\n')
    for words, message in (
        ([tmp_path / "none.jsonl"], "none.jsonl does not exist"),
        ([tmp_path / "bad.jsonl"], "bad.jsonl, line 2: is not UTF-8"),
        ([file, "--split", "test"], "--split chooses among the pairs of --references"),
        ([file, "--bertscore-layer", 3], "goes with --bertscore"),
        ([file, "--seed", -1], "--seed -1"),
        ([file, "--resamples", -1], "resamples=-1"),
        ([file, file, "--resamples", 0], "needs at least 1"),
        ([file, "--bertscore", tmp_path / "none", "--bertscore-layer", 1], "cannot be loaded"),
    ):
        assert run(*words, "--no-meteor") == 1
        captured = capsys.readouterr()
        assert message in captured.err and captured.out == "" and captured.err.count("\n") == 1
    with pytest.raises(SystemExit) as error:
        run(file, "--missing", "maybe")
    assert error.value.code == 2


def test_without_java_the_rest_comes_and_the_status_tells(file, monkeypatch, capsys):
    monkeypatch.setattr("llava.eval.meteor._shared", None)
    monkeypatch.setattr("llava.java.find_java", lambda: None)
    assert run(file, "--resamples", 20, "--no-baselines") == 3
    captured = capsys.readouterr()
    assert "METEOR needs Java" in captured.err and "warning: METEOR and Sm are not given" in captured.err
    assert "100.00" in captured.out and "note: METEOR and Sm are not given" in captured.out
    assert run(file, "--spice", "--no-meteor") == 1
    assert "SPICE needs" in capsys.readouterr().err


def test_with_meteor_sm_is_there(file, capsys):
    try:
        require_meteor()
    except MissingDependencyError:
        pytest.skip("no Java or no METEOR jar here")
    assert run(file, "--resamples", 20, "--no-baselines", "--json") == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert scores["predictions"]["captions"]["all"]["METEOR"] == pytest.approx(100)
    low, high = scores["intervals"]["all"]["Sm"]
    assert low <= scores["predictions"]["captions"]["all"]["Sm"] <= high


def test_captions_no_terminal_can_write_are_escaped(tmp_path, capsysbinary):
    odd = [{"uid": f"u{i}", "pred": "x", "change_caption": ["a \ud800 caf\u00e9 appears"]} for i in range(2)]
    assert run(write(tmp_path / "odd.jsonl", odd), *QUICK) == 0
    assert b"\\ud800" in capsysbinary.readouterr().out


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as error:
        run("--help")
    assert error.value.code == 0
    out = capsys.readouterr().out
    assert "llava score predictions.jsonl" in out and "exit status: 0 done" in out
    assert max(map(len, out.splitlines())) <= 120
