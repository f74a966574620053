"""Readers of foreign files: each format is understood, each fault named with file, line and field."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from llava.errors import DataError
from llava.eval import predictions as module
from llava.eval.predictions import References, join, read_predictions, read_references, same_references

SAME = ["nothing has changed", "there is no difference"]
ROADS = ["a road appears", "a road is built"]


def lines(path: Path, *entries: Any) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


def whole(path: Path, value: Any, **layout: Any) -> Path:
    path.write_text(json.dumps(value, **layout), encoding="utf-8")
    return path


def levir_cc() -> dict[str, Any]:
    def image(name: str, split: str, texts: list[str], flag: int) -> dict[str, Any]:
        sentences = [{"raw": f" {text} .", "tokens": text.split(), "imgid": 3, "sentid": 7} for text in texts]
        return {
            "filename": f"{name}.png",
            "filepath": split,
            "imgid": 3,
            "split": split,
            "changeflag": flag,
            "sentids": [7],
            "sentences": sentences,
        }

    images = [image("train_000001", "train", ROADS, 1), image("test_000001", "test", SAME, 0)]
    return {"dataset": "x", "images": [*images, image("test_000002", "test", ROADS, 1)]}


COCO = {
    "images": [{"id": 7, "file_name": "dir/test_000001.png"}, {"id": 8, "file_name": "dir/test_000002.png"}],
    "annotations": [
        {"id": 1, "image_id": 8, "caption": ROADS[0]},
        {"id": 2, "image_id": 7, "caption": SAME[0]},
        {"id": 3, "image_id": 8, "caption": ROADS[1]},
    ],
}


# --- formats --------------------------------------------------------------------------------------

CAPTIONS = {"a": "a road appears", "b": ""}


@pytest.mark.parametrize(
    "write",
    [
        lambda path: lines(path, *({"uid": uid, "pred": text} for uid, text in CAPTIONS.items())),
        lambda path: lines(path, *({"id": uid, "answer": [text]} for uid, text in CAPTIONS.items())),
        lambda path: whole(path, [{"image_id": uid, "caption": text} for uid, text in CAPTIONS.items()]),
        lambda path: whole(path, [{"uid": u, "prediction": t} for u, t in CAPTIONS.items()], indent=2),
        lambda path: whole(path, CAPTIONS),
        lambda path: whole(path, CAPTIONS, indent=1),
    ],
    ids=["lines", "other names", "coco results", "indented list", "object", "indented object"],
)
def test_predictions_are_read_from_what_people_have(tmp_path, write):
    path = write(tmp_path / "p.json")
    assert read_predictions(path).captions == CAPTIONS
    text = path.read_bytes()
    for name, content in (
        ("bom", b"\xef\xbb\xbf" + text),
        ("blank", b"\n \r\n" + text + b"\n\n"),
        ("packed", gzip.compress(text)),
        ("windows", text.replace(b"\n", b"\r\n")),
    ):
        (tmp_path / name).write_bytes(content)
        assert read_predictions(tmp_path / name).captions == CAPTIONS, name


def test_a_folder_stands_for_its_predictions(tmp_path):
    lines(
        tmp_path / "predictions.jsonl", {"uid": "a", "pred": "x", "change_caption": ROADS, "change_flag": 1}
    )
    found = read_predictions(tmp_path)
    assert (
        found.captions == {"a": "x"}
        and found.references == {"a": tuple(ROADS)}
        and found.flags == {"a": True}
    )


def test_a_single_line_is_a_record(tmp_path):
    assert read_predictions(lines(tmp_path / "p", {"uid": 5, "pred": "x"})).captions == {"5": "x"}


def test_repeats_are_kept_aside_and_failures_named(tmp_path):
    path = lines(
        tmp_path / "p",
        {"uid": "a", "pred": "x", "change_caption": ROADS},
        {"uid": "b", "error": "cannot be read", "change_caption": SAME},
        {"uid": "a", "pred": "y", "change_caption": ROADS},
        {"uid": "a", "pred": "x"},
    )
    found = read_predictions(path)
    assert (
        found.captions == {"a": "x"} and found.repeats == (("a", "y"), ("a", "x")) and found.failed == ("b",)
    )
    with pytest.raises(DataError, match=r"1 of 2 pairs of .* have no prediction: b"):
        join(found)
    assert join(found, missing="empty").predictions == {"a": "x", "b": ""}
    assert join(found, missing="skip").num_left_out == 1
    passed = join(found, pass_failed=True)  # for a report of what a run has done
    assert passed.predictions == {"a": "x"} and passed.num_left_out == 1
    with pytest.raises(DataError, match="no prediction"):  # c is not what the run speaks of
        join(found, References(path, {"a": ROADS, "b": SAME, "c": SAME}), pass_failed=True)


def test_levir_cc_gives_one_split(tmp_path):
    path = whole(tmp_path / "levir.json", levir_cc())
    found = read_references(path)
    assert (
        list(found.sentences) == ["test_000001.png", "test_000002.png"] and "split 'test'" in found.notes[0]
    )
    assert found.sentences["test_000002.png"] == (" a road appears .", " a road is built .")
    assert found.flags == {"test_000001.png": False, "test_000002.png": True}
    assert list(read_references(path, "train").sentences) == ["train_000001.png"]
    assert len(read_references(path, "all").sentences) == 3
    with pytest.raises(DataError, match=r"no split 'dev'; splits: train \(1\), test \(2\)"):
        read_references(path, "dev")
    tokens = levir_cc()
    for image in tokens["images"]:
        image["sentences"] = [{"tokens": sentence["tokens"]} for sentence in image["sentences"]]
    assert read_references(whole(path, tokens)).sentences["test_000002.png"] == tuple(ROADS)


def test_coco_gathers_captions_by_image(tmp_path):
    found = read_references(whole(tmp_path / "coco.json", COCO, indent=1))
    assert found.sentences == {"8": tuple(ROADS), "7": (SAME[0],)}
    results = whole(tmp_path / "r.json", [{"image_id": 7, "caption": "p"}, {"image_id": 8, "caption": "q"}])
    assert join(read_predictions(results), found).predictions == {"7": "p", "8": "q"}
    named = whole(tmp_path / "n.json", {"test_000001": "p", "x/test_000002.jpg": "q"})
    assert join(read_predictions(named), found).predictions == {"7": "p", "8": "q"}


def test_records_are_references(tmp_path):
    record = {
        "uid": "a",
        "img1_path": "A/a.png",
        "img2_path": "B/a.png",
        "change_caption": ROADS,
        "change_flag": 1,
    }
    for path in (lines(tmp_path / "r.jsonl", record), whole(tmp_path / "r.json", [record])):
        found = read_references(path)
        assert found.sentences == {"a": tuple(ROADS)} and found.flags == {"a": True}
    by_split = lines(
        tmp_path / "s.jsonl",
        {"split": "test", "filename": "t.png", "captions": ROADS},
        {"split": "val", "filename": "v.png", "captions": "one road appears"},
    )
    assert list(read_references(by_split).sentences) == ["t.png"]
    assert read_references(by_split, "val").sentences == {"v.png": ("one road appears",)}
    assert read_references(whole(tmp_path / "m.json", {"a": ROADS, "b": "x"})).sentences["b"] == ("x",)


# --- the same pairs -------------------------------------------------------------------------------


def test_uids_match_by_the_name_of_the_image(tmp_path):
    references = read_references(whole(tmp_path / "levir.json", levir_cc()))
    said = {"levir-cc/test_000001": "p", "levir-cc/test_000002": "q"}
    task = join(read_predictions(whole(tmp_path / "p.json", said)), references)
    assert task.predictions == {"test_000001.png": "p", "test_000002.png": "q"}
    assert task.changed == {"test_000001.png": False, "test_000002.png": True}
    assert any("'levir-cc/test_000001' is 'test_000001.png'" in note for note in task.notes)
    two = {"x/test_000001": "p", "y/test_000001.png": "q", "test_000002": "r"}
    with pytest.raises(DataError, match="two uids of predictions for one pair"):
        join(read_predictions(whole(tmp_path / "p.json", two)), references)


def test_names_that_do_not_tell_pairs_apart_match_nothing(tmp_path):
    references = read_references(whole(tmp_path / "r.json", {"north/1.png": ROADS, "south/1.png": SAME}))
    with pytest.raises(DataError, match="1 uids have no references"):
        join(read_predictions(whole(tmp_path / "p.json", {"1": "x"})), references)


def test_strangers_and_missing_pairs_are_named(tmp_path):
    references = read_references(whole(tmp_path / "r.json", {"a": ROADS, "b": SAME}))
    found = read_predictions(whole(tmp_path / "p.json", {"a": "x", "c": "y"}))
    with pytest.raises(DataError, match=r"1 uids have no references in .*: c\. There the uids are: a, b"):
        join(found, references)
    with pytest.raises(DataError, match=r"1 of 2 pairs .* have no prediction: b"):
        join(found, references, unknown="skip")
    task = join(found, references, unknown="skip", missing="skip")
    assert task.predictions == {"a": "x"} and task.num_left_out == 1 and len(task.notes) == 2
    with pytest.raises(DataError, match="has no references inside"):
        join(found)


def test_a_flag_counts_more_than_what_references_say(tmp_path):
    path = lines(
        tmp_path / "p",
        {"uid": "a", "pred": "x", "change_caption": ROADS, "change_flag": 0},
        {"uid": "b", "pred": "x", "change_caption": [*SAME, ROADS[0]]},
    )
    task = join(read_predictions(path))
    assert (
        task.changed == {"a": False, "b": False}
        and "1 pairs count as their change flag says" in task.notes[0]
    )


def test_other_references_for_one_pair_are_refused(tmp_path):
    tasks = {
        name: join(
            read_predictions(lines(tmp_path / name, {"uid": "a", "pred": "x", "change_caption": texts}))
        )
        for name, texts in (("one", ROADS), ("two", SAME))
    }
    same_references({"one": tasks["one"]})
    with pytest.raises(DataError, match="one and two have other references for uid 'a'"):
        same_references(tasks)
    path = lines(
        tmp_path / "three",
        {"uid": "a", "pred": "x", "change_caption": ROADS},
        {"uid": "a", "pred": "x", "change_caption": SAME},
    )
    with pytest.raises(DataError, match=r"line 2: uid 'a' has other references than before, at .*line 1"):
        read_predictions(path)


# --- faults ---------------------------------------------------------------------------------------

FAULTS = {
    b"": "is empty",
    b"\n \n": "is empty",
    b"[]": "holds no predictions",
    b"3": "line 1: is int, expected a JSON object",
    b'{"uid": "a", "pred": "x"}\n{"uid": "b", "pred"\n': "line 2: no JSON: .* at column",
    b'{"uid": "a"\n{"uid": "b", "pred": "x"}\n': "line 1: no JSON",
    b'[{"uid": "a", "pred": "x"},\n {"uid": "b"}]': "entry 1: has no caption; looked for .*, found uid",
    b'[{"uid": "a",\n "pred": x}]': "line 2: no JSON",
    b'{"uid": "a", "pred": "x"}\n[1]\n': "line 2: is list, expected a JSON object",
    b'{"pred": "x", "name": "a"}\n{"pred": "x", "name": "b"}': "line 1: has no uid; looked for .*, found name, pred",
    b'{"uid": "a", "pred": null}': "line 1: field 'pred' is None, expected a string; \"\" stands for no answer",
    b'{"uid": "a", "pred": ["x", "y"]}': r"field 'pred' is \['x', 'y'\]",
    b'{"uid": "a", "pred": 3}': "field 'pred' is 3",
    b'{"uid": 1.5, "pred": "x"}': "field 'uid' is 1.5, expected a non-empty string",
    b'{"uid": true, "pred": "x"}': "field 'uid' is True",
    b'{"uid": " ", "pred": "x"}': "field 'uid' is ' '",
    b'{"uid": "a", "pred": "x", "change_flag": 2}': "field 'change_flag' is 2, expected 0, 1",
    b'{"uid": "a", "pred": "x", "change_flag": "1"}': "field 'change_flag' is '1'",
    b'{"uid": "a", "pred": "x", "change_caption": {"a": 1}}': "field 'change_caption' is .*expected a list",
    b'{"uid": "a", "pred": "x", "change_caption": ["a", 3]}': r"field 'change_caption\[1\]' is 3",
    b'{"uid": "a", "pred": "x", "change_caption": ["a", " "]}': r"field 'change_caption\[1\]' is ' '",
    b'{"uid": "a", "uid": "b", "pred": "x"}': "field 'uid' comes twice",
    b'{"uid": "a", "pred": "x"}\n{"uid": "b", "pred": "caf\xe9"}': r"line 2: is not UTF-8 \(byte 0xe9\)",
    '{"uid": "a", "pred": "x"}'.encode("utf-16"): "is not UTF-8",
    b'{"uid": ' + b"9" * 5000 + b', "pred": "x"}': "line 1: no JSON that can be read",
    b"[" * 100_000: "nested too deeply",
    b'{"images": [], "annotations": []}': "looks like references",
    b"\x1f\x8bbroken": "damaged or cut off gzip",
    gzip.compress(b'{"uid": "a", "pred": "x"}' * 100)[:-9]: "damaged or cut off gzip",
    b'{"a": {"b": 1}}': "key 'a': field 'pred' is",
}


@pytest.mark.parametrize("content", FAULTS, ids=lambda content: repr(content[:40]))
def test_a_fault_is_named_with_file_and_line(tmp_path, content):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=FAULTS[content]) as error:
        read_predictions(path)
    assert str(error.value).startswith(str(path)) and len(str(error.value)) < 600


REFERENCE_FAULTS = [
    ({"images": {}}, "field 'images' is {}, expected a list"),
    ({"images": [3]}, r"images\[0\]: is int"),
    ({"images": [{"sentences": [{"raw": "a"}]}]}, r"images\[0\]: has no uid"),
    (
        {"images": [{"filename": "a.png", "sentences": [{"raw": 3}]}]},
        r"images\[0\]: field 'sentences\[0\]\.raw' is 3",
    ),
    (
        {"images": [{"filename": "a.png", "sentences": [{"tokens": "a"}]}]},
        r"field 'sentences\[0\]\.tokens' is 'a'",
    ),
    ({"images": [{"filename": "a.png", "sentences": [{}]}]}, r"field 'sentences\[0\]' is {}"),
    ({"images": [{"filename": "a.png", "split": 3, "sentences": []}]}, "field 'split' is 3"),
    ({"images": [{"filename": "a.png"}]}, "holds no references"),
    ({"annotations": [{"caption": "a"}]}, r"annotations\[0\]: is no object with image_id and caption"),
    ({"annotations": [{"image_id": [], "caption": "a"}]}, r"annotations\[0\]: field 'image_id' is \[\]"),
    ({"annotations": [{"image_id": 1, "caption": None}]}, r"annotations\[0\]: field 'caption' is None"),
    ({"images": [{"file_name": "a"}], "annotations": []}, r"images\[0\]: is no object with an id"),
    ({"a": 3}, "field 'references' is 3"),
    ([{"uid": "a", "split": "x"}, {"uid": "b", "split": "y"}], "has the splits x, y; choose with --split"),
]


@pytest.mark.parametrize(("content", "message"), REFERENCE_FAULTS, ids=lambda value: str(value)[:40])
def test_a_fault_in_references_is_named(tmp_path, content, message):
    path = whole(tmp_path / "r.json", content)
    with pytest.raises(DataError, match=message) as error:
        read_references(path)
    assert str(error.value).startswith(str(path))


def test_what_is_no_file_is_named(tmp_path):
    for path, message in (
        (tmp_path / "none", "does not exist"),
        (tmp_path, "predictions.jsonl does not exist"),
    ):
        for read in (read_predictions, read_references):
            with pytest.raises(DataError, match=message):
                read(path)


def test_sizes_are_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_LINE", 200)
    monkeypatch.setattr(module, "MAX_TEXT", 100)
    short = {"uid": "a", "pred": "x"}
    with pytest.raises(DataError, match="line 2: is longer than"):
        read_predictions(lines(tmp_path / "p", short, {"uid": "b", "pred": "x" * 300}))
    with pytest.raises(DataError, match="line 2: field 'pred' has 150 characters, more than the 100"):
        read_predictions(lines(tmp_path / "p", short, {"uid": "b", "pred": "x" * 150}))
    monkeypatch.setattr(module, "MAX_FILE", 400)
    packed = tmp_path / "bomb.gz"
    packed.write_bytes(gzip.compress(b'{"uid": "a", "pred": "x"}\n' * 100_000))
    for path in (packed, whole(tmp_path / "l", [short] * 30), whole(tmp_path / "i", [short] * 30, indent=1)):
        with pytest.raises(DataError, match="is larger than"):
            read_predictions(path)


# --- anything at all ------------------------------------------------------------------------------

NAMES = st.sampled_from(
    ["uid", "pred", "change_caption", "change_flag", "images", "annotations", "split"]
) | st.text(max_size=3)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def read_all(path: Path) -> None:
    """Whatever the file holds, each reader returns what it promises, or says what is wrong with this file."""
    for read in (read_predictions, read_references):
        try:
            found = read(path)
        except DataError as error:
            assert str(error).startswith(str(path))
        else:
            texts = found.captions if read is read_predictions else found.sentences
            assert all(isinstance(uid, str) and uid.strip() for uid in texts)
            assert all(isinstance(text, str) for group in texts.values() for text in group)


@FUZZ
@given(st.binary(max_size=200))
@example(b"\xef\xbb\xbf")
@example(b'{"uid": "a"}\x00')
def test_any_bytes_are_read_or_refused(tmp_path, content):
    (tmp_path / "f").write_bytes(content)
    read_all(tmp_path / "f")


@FUZZ
@given(st.lists(VALUES, max_size=4), st.booleans())
def test_any_json_is_read_or_refused(tmp_path, values, as_lines):
    path = tmp_path / "f"
    if as_lines:
        lines(path, *values)
    else:
        whole(path, values)
    read_all(path)
    for value in values:
        read_all(whole(path, value))


@FUZZ
@given(st.data())
def test_a_cut_or_changed_file_is_read_or_refused(tmp_path, data):
    text = "\n".join(
        json.dumps({"uid": f"u{i}", "pred": "a road", "change_caption": ROADS}) for i in range(4)
    ).encode()
    for good in (text, json.dumps(levir_cc()).encode(), json.dumps(COCO, indent=1).encode()):
        place = data.draw(st.integers(0, len(good)))
        other = data.draw(st.binary(max_size=3))
        (tmp_path / "f").write_bytes(good[:place] + other + good[place + len(other) :])
        read_all(tmp_path / "f")
        (tmp_path / "f").write_bytes(good[:place])
        read_all(tmp_path / "f")
