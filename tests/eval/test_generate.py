"""Captions for a set: every uid once, in order, whatever the batch size; shuffling leaves nobody their images."""

import json
from pathlib import Path

import pytest

from llava.captioner import ChangeCaptioner
from llava.data.record import Record, read_records
from llava.errors import DataError
from llava.eval.__main__ import main
from llava.eval.generate import of_first_pairs, predict, score_answers, shuffle_pairs
from tests.tiny import random_image, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five records, their images, and a model."""
    path = tmp_path_factory.mktemp("eval")
    rows = []
    for i in range(5):
        random_image(i).save(path / f"{i}.png")
        captions = (
            ["a road is built", "a street is built"] if i % 2 else ["the scene is the same as before"] * 2
        )
        fields = {"uid": f"u{i}", "img1_path": f"{i}.png", "img2_path": "0.png", "change_caption": captions}
        rows.append(json.dumps(fields | ({} if i == 3 else {"change_flag": i % 2})))
    (path / "data.jsonl").write_text("\n".join(rows))
    model, processor = tiny_model()
    model.save_pretrained(path / "model")
    processor.save_pretrained(path / "model")
    return path


def test_answers_do_not_depend_on_the_batch_size(folder: Path):
    records = read_records(folder / "data.jsonl")
    captioner = ChangeCaptioner.from_pretrained(folder / "model")
    one, three = (predict(captioner, records, folder, batch_size=size, say=False) for size in (1, 3))
    assert list(one) == [record.uid for record in records]
    assert [a.text for a in one.values()] == [a.text for a in three.values()]


def test_the_change_flag_comes_from_the_record_or_else_from_its_captions(folder: Path):
    records = read_records(folder / "data.jsonl")
    captioner = ChangeCaptioner.from_pretrained(folder / "model")
    scores = score_answers(predict(captioner, records, folder, say=False), records, baselines=False)
    assert (scores.decision.num_changed, scores.decision.num_unchanged) == (2, 3)


def test_shuffled_pairs_keep_words_and_lose_images():
    records = [
        Record(uid=str(i), img1_path=f"a{i}", img2_path=f"b{i}", change_caption=(str(i),)) for i in range(20)
    ]
    shuffled = shuffle_pairs(records)
    assert [(r.uid, r.change_caption) for r in shuffled] == [(r.uid, r.change_caption) for r in records]
    assert sorted(r.img1_path for r in shuffled) == sorted(r.img1_path for r in records)
    assert all(r.img1_path[1:] == r.img2_path[1:] != r.uid for r in shuffled)
    with pytest.raises(DataError, match="at least two"):
        shuffle_pairs(records[:1])


def test_the_first_pairs_come_with_all_that_is_asked_of_them():
    records = [
        Record(uid=f"{task}{i}", img1_path=f"a{i}", img2_path=f"b{i}", change_caption=("x",), task=task)
        for task in ("caption", "open")
        for i in (2, 1, 3)
    ]
    assert [r.uid for r in of_first_pairs(records, 2)] == ["caption2", "caption1", "open2", "open1"]
    assert of_first_pairs(records, None) == records == of_first_pairs(records, 9)


def test_the_launcher_writes_predictions_and_metrics(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    command = [
        "--model",
        str(folder / "model"),
        "--data",
        str(folder / "data.jsonl"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*command, "--limit", "4"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [line["uid"] for line in lines] == ["u0", "u1", "u2", "u3"]
    assert lines[1]["change_caption"] == ["a road is built", "a street is built"]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["scores"]["predictions"]["captions"]["all"]["pairs"] == 4
    assert "Sm" in capsys.readouterr().out
    assert main([*command[:3], str(tmp_path / "none.jsonl"), *command[4:]]) == 1
    assert "none.jsonl does not exist" in capsys.readouterr().err


def test_records_of_one_pair_are_shown_the_same_other_pair() -> None:
    asked = [
        Record(
            uid=f"{pair}-{task}", img1_path=f"a{pair}", img2_path=f"b{pair}", mask_path=f"m{pair}", task=task
        )
        for pair in range(4)
        for task in ("binary", "loc")
    ]
    shown = shuffle_pairs(asked)
    assert [one.uid for one in shown] == [one.uid for one in asked]
    for before, one in zip(asked, shown, strict=True):
        assert one.img1_path != before.img1_path and one.img1_path[1:] == one.img2_path[1:]
        assert one.mask_path == f"m{one.img1_path[1:]}"
    assert [one.img1_path for one in shown[::2]] == [one.img1_path for one in shown[1::2]]
    assert len({one.img1_path for one in shown}) == 4
    with pytest.raises(DataError, match="at least two pairs"):
        shuffle_pairs(asked[:2])
