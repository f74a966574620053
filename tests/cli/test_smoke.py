"""`llava smoke`: six tasks from drawn pairs to scores, without network, for a new model and for one that is given."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from llava.cli import main
from llava.tasks.definitions import TASK_NAMES
from tests.tiny import tiny_model


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket, address: Any) -> None:
        raise AssertionError(f"something calls {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)


def test_all_tasks_with_a_new_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["smoke", "--out", str(tmp_path), "--max-new-tokens", "4"]) == 0
    told = capsys.readouterr()
    assert [line.split()[0] for line in told.out.splitlines()[:-1:2]] == list(TASK_NAMES)
    assert "untrained" in told.err and "report.html" in told.err
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert set(metrics["tasks"]) == set(TASK_NAMES)
    lines = [json.loads(line) for line in (tmp_path / "eval" / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 9 and {line["task"] for line in lines} == set(TASK_NAMES)
    assert (tmp_path / "eval" / "report.html").is_file()
    for figure in ("binary_accuracy", "loc_F1", "count_exact", "open_exact", "dialog_consistent"):
        assert figure in told.out


def test_a_model_of_ones_own_and_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor = tiny_model()
    model.save_pretrained(tmp_path / "mine")
    processor.save_pretrained(tmp_path / "mine")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "empty"))
    words = ["smoke", "--model", str(tmp_path / "mine"), "--device", "cpu", "--pairs", "1"]
    assert main([*words, "--max-new-tokens", "2"]) == 0
    assert "9 answers of" in capsys.readouterr().err
    lengths: list[Any] = []
    with monkeypatch.context() as patched:  # a real model's answers are not cut
        patched.setattr(
            "llava.eval.run.run_evaluation", lambda *given, **_: lengths.append(given[4].options) or 1 / 0
        )
        for more in ([], ["--max-new-tokens", "3"]):
            with pytest.raises(ZeroDivisionError):
                main([*words, *more])
    assert lengths == [{}, {"max_new_tokens": 3}]
    assert list((tmp_path / "empty").iterdir()) == []
    assert main([*words[:-1], "0"]) == 1
    assert "--pairs 0" in capsys.readouterr().err
