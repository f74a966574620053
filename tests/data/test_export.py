"""Exports have the forms that other trainers read, and come back through our own readers as they were."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.cli import main
from llava.data.conversation import IMAGE_TOKEN, QUESTION
from llava.data.export import FORMS, export
from llava.data.record import Record, read_records
from llava.data.sources import Options, read
from llava.errors import ConfigError, DataError
from llava.synth.export import export_tasks
from llava.tasks.definitions import TASK_NAMES

READERS = {"messages": "messages", "sharegpt": "llava"}

CAPTIONED = Record(
    uid="a",
    img1_path="A/a.png",
    img2_path="B/a.png",
    change_caption=("one", "two"),
    change_flag=True,
    task="caption",
)
SPOKEN = Record(
    uid="b", img1_path="A/b.png", img2_path="B/b.png", conversation=(("How many?", "2"), ("Where?", "Left"))
)


def _write(path: Path, *records: Record) -> Path:
    path.write_text("".join(json.dumps(record.to_dict()) + "\n" for record in records))
    return path


def test_the_forms_of_both_projects(tmp_path: Path):
    source = _write(tmp_path / "r.jsonl", CAPTIONED, SPOKEN)
    assert export(source, tmp_path / "m.jsonl", "messages", question="What?", images="data") == 3
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert lines[1] == {
        "messages": [
            {"role": "user", "content": "<image><image>What?"},
            {"role": "assistant", "content": "two"},
        ],
        "images": ["data/A/a.png", "data/B/a.png"],
        "uid": "a",
        "task": "caption",
        "changeflag": 1,
    }
    assert export(source, tmp_path / "s.json", "sharegpt") == 3
    assert json.loads((tmp_path / "s.json").read_text())[2] == {
        "conversations": [
            {"from": "human", "value": "<image><image>How many?"},
            {"from": "gpt", "value": "2"},
            {"from": "human", "value": "Where?"},
            {"from": "gpt", "value": "Left"},
        ],
        "images": ["A/b.png", "B/b.png"],
        "uid": "b",
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_six_tasks_come_back_as_they_were(tmp_path: Path, form: str, ending: str):
    folder = export_tasks({"train": 4}, tmp_path, size=48)
    records = read_records(folder / "train.jsonl")
    out = tmp_path / f"out.{ending}"
    count = export(folder / "train.jsonl", out, form)
    assert count == 4 * (5 + 8)
    back = [item.record for item in read(READERS[form], out, Options(caption_question=QUESTION))]
    expected = []
    for record in records:
        for caption in record.change_caption or ("",):
            single = replace(record, change_caption=(caption,) if caption else ())
            expected.append(replace(single, mask_path=None, uid=f"{READERS[form]}/out_{len(expected):06d}"))
    assert back == expected


WORDS = st.text(min_size=1, max_size=12).filter(lambda text: text.strip()) | st.just(f"a {IMAGE_TOKEN} b")


@settings(max_examples=80, deadline=None)
@given(
    rounds=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3),
    flag=st.sampled_from((None, True, False)),
    task=st.sampled_from((None, *TASK_NAMES)),
    form=st.sampled_from(sorted(FORMS)),
)
def test_any_words_come_back(tmp_path_factory: pytest.TempPathFactory, rounds, flag, task, form):
    folder = tmp_path_factory.mktemp("any")
    record = replace(SPOKEN, conversation=tuple(rounds), change_flag=flag, task=task)
    out = folder / "o.jsonl"
    export(_write(folder / "r.jsonl", record), out, form)
    (item,) = read(READERS[form], out)
    found = item.record
    assert (found.change_flag, found.task) == (flag, task)
    words = [text.replace(IMAGE_TOKEN, "< image >").strip() for turn in rounds for text in turn]
    assert [text for turn in found.conversation for text in turn] == words


def test_what_cannot_be_exported_is_said(tmp_path: Path):
    source = _write(tmp_path / "r.jsonl", CAPTIONED, replace(SPOKEN, conversation=()))
    with pytest.raises(DataError, match=r"r\.jsonl: 'b' has no caption and no conversation"):
        export(source, tmp_path / "o.jsonl", "messages")
    with pytest.raises(ConfigError, match="known: messages, sharegpt"):
        export(source, tmp_path / "o.jsonl", "alpaca")
    with pytest.raises(ConfigError, match=r"must end in \.jsonl"):
        export(source, tmp_path / "o.txt", "messages")
    with pytest.raises(ConfigError, match="is empty"):
        export(source, tmp_path / "o.jsonl", "messages", question=" ")
    assert [path.name for path in tmp_path.iterdir()] == ["r.jsonl"]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source, out = _write(tmp_path / "r.jsonl", CAPTIONED), tmp_path / "o.jsonl"
    command = ["data", "export", str(source), str(out), "--form", "sharegpt", "--question", "Q?"]
    assert main(command) == 0
    assert "o.jsonl: 2 entries" in capsys.readouterr().err
    assert json.loads(out.read_text().splitlines()[0])["conversations"][0]["value"] == "<image><image>Q?"
    assert main(command) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    with pytest.raises(SystemExit, match="0"):
        main(["data", "export", "--help"])
    assert "dataset_info.json" in capsys.readouterr().out
