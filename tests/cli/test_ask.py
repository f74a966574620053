"""`llava ask`: a question, a task, a history, and what an answer means."""

import json
from pathlib import Path
from typing import Any

import pytest

from llava.captioner import ChangeCaptioner
from llava.cli import main
from llava.tasks.definitions import TASK_NAMES, TASKS
from tests.model.delta_vlm.tiny import tiny_model
from tests.tiny import random_pair


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command for a random DeltaVLM and a pair of noise."""
    folder = tmp_path_factory.mktemp("ask")
    model, processor = tiny_model()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    paths = [str(folder / f"{name}.png") for name in ("before", "after")]
    for path, image in zip(paths, random_pair(0), strict=True):
        image.save(path)
    return ["ask", "--model", str(folder), "--device", "cpu", *paths]


@pytest.fixture(scope="module")
def captioner(words: list[str]) -> ChangeCaptioner:
    return ChangeCaptioner.from_pretrained(words[2], device="cpu")


def told(words: list[str], capsys: pytest.CaptureFixture[str], *more: str) -> Any:
    assert main([*words, *more, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_question_in_words(
    words: list[str], captioner: ChangeCaptioner, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "why", "--max-new-tokens", "7"]) == 0
    answer = captioner.ask(*words[5:], "why", max_new_tokens=7)
    assert capsys.readouterr().out == answer.text + "\n"
    row = told(words, capsys, "why", "--num-beams", "2", "--repetition-penalty", "1.5")
    how: dict[str, Any] = {"num_beams": 2, "repetition_penalty": 1.5, "max_new_tokens": 128}
    assert row["text"] == captioner.ask(*words[5:], "why", **how).text
    assert (row["img1_path"], row["question"]) == (words[5], "why") and "parsed" not in row


@pytest.mark.parametrize("name", TASK_NAMES)
def test_a_task_asks_its_own_questions_in_its_own_way(
    name: str, words: list[str], captioner: ChangeCaptioner, capsys: pytest.CaptureFixture[str]
) -> None:
    task = TASKS[name]
    rows = told(words, capsys, "--task", name)
    rows = rows if isinstance(rows, list) else [rows]
    assert [row["question"] for row in rows] == list(task.rounds)
    assert {row["task"] for row in rows} == {name}
    history: list[tuple[str, str]] = []
    for row in rows:
        how: dict[str, Any] = {"num_beams": task.num_beams, "max_new_tokens": task.max_new_tokens}
        assert row["text"] == captioner.ask(*words[5:], row["question"], history=history, **how).text
        history.append((row["question"], row["text"]))


@pytest.mark.parametrize("name", TASK_NAMES)
def test_what_an_answer_means_stands_beside_it(
    name: str, words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {
        "binary": "Yes, it did.",
        "count": "There are 2 new roads and no new building.",
        "loc": "roads: [top-left]. buildings: [bottom-right, center-center].",
    }
    meant = {
        "binary": True,
        "count": {"roads": 2, "buildings": 0},
        "loc": {"roads": ["top-left"], "buildings": ["center-center", "bottom-right"]},
        "dialog": {"changed": None, "roads": None, "buildings": None},
    }
    monkeypatch.setattr(ChangeCaptioner, "_decode", lambda *_: said.get(name, "trees"))
    rows = told(words, capsys, "--task", name, "--max-new-tokens", "2")
    last = rows[-1] if isinstance(rows, list) else rows
    assert (last["parsed"], last["valid"]) == (meant.get(name), name != "dialog")
    assert name != "dialog" or all("parsed" not in row for row in rows[:2])


def test_a_history_comes_before_the_question(
    words: list[str], captioner: ChangeCaptioner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rounds = [("why", "so"), ("where", "there")]
    file = tmp_path / "h.json"
    file.write_text(json.dumps(rounds))
    said = told(words, capsys, "who", "--history", str(file), "--max-new-tokens", "6")
    wanted = captioner.ask(*words[5:], "who", history=rounds, max_new_tokens=6)
    assert said["text"] == wanted.text
    assert abs(said["log_probability"] - wanted.log_probability) < 1e-4
    record = {"uid": "x", "img1_path": "a", "img2_path": "b", "conversation": rounds}
    file.write_text(json.dumps(record))
    assert told(words, capsys, "who", "--history", str(file), "--max-new-tokens", "6")["text"] == wanted.text


@pytest.mark.parametrize(
    ("content", "why"),
    [("{", "one JSON value"), ('[["why"]]', "conversation"), ('{"uid": "x"}', "img1_path"), (None, "exist")],
    ids=str,
)
def test_a_history_that_is_none_is_refused(
    content: str | None, why: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "h.json"
    if content is not None:
        file.write_text(content)
    assert main([*words, "who", "--history", str(file)]) == 1
    said = capsys.readouterr().err
    assert "h.json" in said and why in said


def test_without_a_question_it_is_the_one_for_a_caption(
    words: list[str], captioner: ChangeCaptioner, capsys: pytest.CaptureFixture[str]
) -> None:
    row = told(words, capsys, "--max-new-tokens", "6")
    assert row["question"] == captioner.caption_question and row["changed"] is not None
    assert row["text"] == captioner.caption(*words[5:], max_new_tokens=6).text
    assert main([*words, "--task", "colour"]) == 1
    assert "binary" in capsys.readouterr().err  # the known ones are listed
