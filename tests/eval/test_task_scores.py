"""Scores of each task, by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from llava.data.record import Record
from llava.errors import DataError, MissingDependencyError
from llava.eval.meteor import Meteor, find_jar, shared_meteor
from llava.eval.task_scores.binary import binary_table, read_from_captions
from llava.eval.task_scores.count import count_tables
from llava.eval.task_scores.dialog import DialogTruth, agree, dialog_tables
from llava.eval.task_scores.loc import loc_tables
from llava.eval.task_scores.open import open_tables, token_f1
from llava.eval.task_scores.scoring import Sample, changed_of, score_samples
from llava.eval.task_scores.texts import WordNumbers, id_table, read_words
from llava.java import find_java
from llava.tasks.answers import PLACES, Counts, Places, parse_counts, parse_places
from llava.tasks.reading import middle, read_answer

NONE = Places(frozenset(), frozenset())


def by_number(values: list[Any]) -> dict[str, Any]:
    return {str(i): value for i, value in enumerate(values)}


# --- binary -----------------------------------------------------------------------------------------


def test_binary_by_hand() -> None:
    said = by_number([True, True, False, None, False, None])
    truth = by_number([True, False, True, True, False, False])
    row = binary_table(said, truth).predictions
    # an unreadable answer is wrong: a miss of a changed pair, a false alarm of an unchanged one
    assert row.counts == {"tp": 1, "fp": 2, "fn": 2, "tn": 1}
    assert (row.n, row.n_invalid) == (6, 2)
    assert row.values == {
        "accuracy": pytest.approx(100 / 3),
        "precision": pytest.approx(100 / 3),
        "recall": pytest.approx(100 / 3),
        "F1": pytest.approx(100 / 3),
    }


def test_binary_of_invalid_answers_alone_and_without_changed_pairs() -> None:
    row = binary_table(by_number([None, None]), by_number([True, False])).predictions
    assert (row.values["accuracy"], row.n_invalid) == (0, 2)
    quiet = binary_table(by_number([False, False]), by_number([False, False]))
    assert quiet.predictions.values == {"accuracy": 100, "precision": 0, "recall": 0, "F1": 0}
    assert quiet.predictions.zero_division == ("precision", "recall", "F1")
    assert any("0.00*" in line for line in quiet.lines())


def test_captions_are_read_word_for_word() -> None:
    references = {"a": ["The scene is the same."], "b": ["a house is built"], "c": ["Nothing changed ."]}
    truth = {"a": False, "b": True, "c": False}
    said = {"a": "nothing changed", "b": "the scene is the same.", "c": "no change at all"}
    assert read_from_captions(said, references, truth) == {"a": False, "b": False, "c": True}
    said["b"] = "a house is built"  # a changed pair's sentence is not among them
    assert read_from_captions(said, references, truth)["b"] is True


def test_keys_are_joined_and_complete() -> None:
    with pytest.raises(DataError, match="1 uids have no answer: b"):
        binary_table({"a": True}, {"a": True, "b": False})
    with pytest.raises(DataError, match="1 uids have an answer but no truth: c"):
        loc_tables({"a": NONE, "c": NONE}, {"a": NONE})
    with pytest.raises(DataError, match="no samples"):
        count_tables({}, {}, {})
    backwards = binary_table({"b": True, "a": False}, {"a": False, "b": True})
    assert backwards.predictions.values["accuracy"] == 100  # by key, not by place


# --- count ------------------------------------------------------------------------------------------


def test_count_by_hand() -> None:
    said = by_number([Counts(1, 2), Counts(0, 5, partial=True), Counts(0, 0, valid=False), Counts(1, 0)])
    truth = by_number([Counts(1, 4), Counts(2, 5), Counts(0, 3), Counts(0, 0)])
    everything, changed = count_tables(said, truth, by_number([True, True, True, False]))
    assert (everything.name, changed.name) == ("all", "changed")
    row = everything.predictions
    assert (row.n, row.n_invalid, row.counts) == (4, 1, {"partial": 1})
    assert row.values == {
        "roads MAE": 0.75,  # 0, 2, 0, 1
        "roads RMSE": pytest.approx(1.25**0.5),
        "roads bias": -0.25,  # 0, -2, 0, +1
        "roads exact": 50,
        "buildings MAE": 1.25,  # 2, 0, 3, 0
        "buildings RMSE": pytest.approx(3.25**0.5),
        "buildings bias": -1.25,
        "buildings exact": 50,
        "both exact": 0,
    }
    assert changed.predictions.n == 3 and changed.predictions.values["roads MAE"] == pytest.approx(2 / 3)


def test_counts_of_invalid_answers_alone() -> None:
    """They are none of either, also where that is right; and none is left out."""
    said = by_number([parse_counts(text) for text in ("", "who knows", "several roads")])
    truth = by_number([Counts(1, 4), Counts(0, 0), Counts(2, 0)])
    everything, changed = count_tables(said, truth, by_number([True, False, True]))
    row = everything.predictions
    assert (row.n, row.n_invalid, row.counts) == (3, 3, {})
    assert row.values == {
        "roads MAE": 1,  # 1, 0, 2
        "roads RMSE": pytest.approx((5 / 3) ** 0.5),
        "roads bias": -1,
        "roads exact": pytest.approx(100 / 3),
        "buildings MAE": pytest.approx(4 / 3),  # 4, 0, 0
        "buildings RMSE": pytest.approx((16 / 3) ** 0.5),
        "buildings bias": pytest.approx(-4 / 3),
        "buildings exact": pytest.approx(200 / 3),
        "both exact": pytest.approx(100 / 3),
    }
    row = changed.predictions
    assert (row.n, row.n_invalid) == (2, 2)
    assert row.values == {
        "roads MAE": 1.5,  # 1, 2
        "roads RMSE": pytest.approx(2.5**0.5),
        "roads bias": -1.5,
        "roads exact": 0,
        "buildings MAE": 2,  # 4, 0
        "buildings RMSE": pytest.approx(8**0.5),
        "buildings bias": -2,
        "buildings exact": 50,
        "both exact": 0,
    }
    assert everything.rows[1].values == everything.predictions.values  # as "always none" is


def test_constant_counts_are_floors() -> None:
    truth = by_number([Counts(0, 0), Counts(0, 1), Counts(1, 1), Counts(3, 8)])
    nothing, median, middle_row = count_tables(truth, truth, by_number([True] * 4))[0].rows[1:]
    assert nothing.values["buildings MAE"] == 2.5
    assert median.name == "always 0 and 1, the medians" and median.values["buildings MAE"] == 2
    assert middle_row.name == "always 1.00 and 2.50, the means"
    assert middle_row.values["buildings RMSE"] == pytest.approx(10.25**0.5)
    assert middle_row.values["buildings bias"] == 0


def test_unchanged_pairs_alone_give_no_table_of_changed_ones() -> None:
    (table,) = count_tables({"a": Counts(0, 0)}, {"a": Counts(0, 0)}, {"a": False})
    assert table.predictions.values["both exact"] == 100


# --- places -----------------------------------------------------------------------------------------


def places(roads: str, buildings: str = "") -> Places:
    return parse_places(f"roads {roads} buildings {buildings}")


def test_places_by_hand() -> None:
    said = by_number(
        [places("TL TC", "CC"), places("", "BR"), NONE, Places(frozenset(), frozenset(), valid=False)]
    )
    truth = by_number([places("TL", "CC"), places("", ""), NONE, places("TR BL")])
    roads, buildings, both = loc_tables(said, truth)
    row = roads.predictions
    assert (row.n, row.n_invalid) == (4, 1)
    assert row.counts == {"hits": 1, "claimed": 2, "true": 3}
    assert row.values == {
        "precision": 50,
        "recall": pytest.approx(100 / 3),
        "F1": 40,
        "jaccard_paper": 12.5,  # 1/2, 0, 0, 0
        "jaccard": 62.5,  # 1/2, 1, 1, 0
        "subset accuracy": 50,
        "Hamming loss": pytest.approx(100 * 3 / 36),
    }
    assert buildings.predictions.values["precision"] == 50
    assert buildings.predictions.values["jaccard_paper"] == 25  # 1, 0 (one claimed, none true), 0, 0
    assert buildings.predictions.values["jaccard"] == 75
    assert both.predictions.counts == {"hits": 2, "claimed": 4, "true": 4}
    assert both.predictions.values["subset accuracy"] == 25
    assert both.predictions.values["Hamming loss"] == pytest.approx(100 * 4 / 72)


def test_places_of_invalid_answers_alone() -> None:
    """They are no cells, also where that is right; and none is left out."""
    said = by_number([parse_places(text) for text in ("", "No change", "['top-left']")])
    truth = by_number([places("TL TC", "CC"), NONE, places("", "BR")])
    roads, buildings, both = (table.predictions for table in loc_tables(said, truth))
    assert {(row.n, row.n_invalid) for row in (roads, buildings, both)} == {(3, 3)}
    assert [row.counts["true"] for row in (roads, buildings, both)] == [2, 2, 4]
    for row in (roads, buildings, both):
        assert row.counts == {"hits": 0, "claimed": 0, "true": row.counts["true"]}
        assert [row.values[name] for name in ("precision", "recall", "F1", "jaccard_paper")] == [0, 0, 0, 0]
        assert row.zero_division == ("precision",)
    for name in ("jaccard", "subset accuracy"):  # right where nothing is true
        assert roads.values[name] == pytest.approx(200 / 3)  # of the second and third
        assert buildings.values[name] == pytest.approx(100 / 3)  # of the second
        assert both.values[name] == pytest.approx(100 / 3)
    assert roads.values["Hamming loss"] == buildings.values["Hamming loss"] == pytest.approx(100 * 2 / 27)
    assert both.values["Hamming loss"] == pytest.approx(100 * 4 / 54)


def test_places_without_any_cell_divide_by_nothing() -> None:
    row = loc_tables({"a": NONE}, {"a": NONE})[0].predictions
    assert row.values["F1"] == 0 and row.zero_division == ("precision", "recall", "F1")
    assert (row.values["jaccard_paper"], row.values["jaccard"], row.values["subset accuracy"]) == (
        0,
        100,
        100,
    )


def test_unknown_labels_are_counted() -> None:
    row = loc_tables({"a": places("TL nowhere")}, {"a": places("TL")})[0].predictions
    assert row.counts["unknown"] == 1 and row.values["precision"] == 100


def test_constant_places_are_floors() -> None:
    truth = by_number([places("TL", "TL")] * 2 + [places("", "CC")] * 3)
    none, every, often = loc_tables(truth, truth)[0].rows[1:]
    assert none.values["subset accuracy"] == 60
    assert every.values["recall"] == 100 and every.values["precision"] == pytest.approx(100 * 2 / 45)
    assert often.values == none.values
    assert loc_tables(truth, truth)[2].rows[2].values["recall"] == 100


def test_a_table_does_not_depend_on_the_order_of_samples() -> None:
    truth = {f"u{i}": places(PLACES[i % 4]) for i in range(8)}
    backwards = dict(reversed(truth.items()))
    assert loc_tables(truth, truth) == loc_tables(backwards, backwards)


# --- open -------------------------------------------------------------------------------------------


def test_open_answers_by_hand() -> None:
    gold = {"a": "Yes, two houses.", "b": "No.", "c": "The left side", "d": "Yes"}
    said = {"a": "yes two houses", "b": "Yes, one", "c": "left", "d": ""}
    tables, _ = open_tables(said, gold, meteor=False)
    row = tables[0].predictions
    assert row.values == {
        "exact": 25,
        "token F1": pytest.approx((100 + 0 + 50 + 0) / 4),
        "yes/no": pytest.approx(100 / 3),
    }
    assert (row.n, row.n_invalid) == (4, 1)
    assert row.counts == {"yes/no questions": 3, "agreements": 1}
    assert tables[1].name == "words" and tables[1].predictions.values["METEOR"] is None
    assert (tables[1].predictions.values["BLEU-1"] or 0) > 0 and tables[1].rows[1].name == "constant"
    assert tables[0].rows[1].name.startswith("always '")


def test_open_answers_that_say_nothing_at_all() -> None:
    tables, _ = open_tables({"a": "", "b": " "}, {"a": "Yes, two.", "b": "The left side"}, meteor=False)
    row = tables[0].predictions
    assert (row.n, row.n_invalid, row.values) == (2, 2, {"exact": 0, "token F1": 0, "yes/no": 0})
    assert tables[1].predictions.values["BLEU-1"] == 0


def test_token_f1() -> None:
    assert token_f1("a a b", "a b c") == pytest.approx(100 * 4 / 6)
    assert (token_f1("", ""), token_f1("", "a"), token_f1("!", "?")) == (100, 0, 100)


def test_open_questions_without_yes_or_no() -> None:
    assert open_tables({"a": "left"}, {"a": "left"}, meteor=False)[0][0].predictions.values["yes/no"] is None


# --- METEOR -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def meteor() -> Meteor:
    if find_java() is None:
        pytest.skip("no Java here")
    try:
        find_jar()
    except MissingDependencyError:
        pytest.skip("no METEOR jar here")
    return shared_meteor()


def dialog_of(last: str, changed: bool = True) -> DialogTruth:
    return DialogTruth(("Yes", "1 road changed and no building changed.", last), changed)


def test_meteor_of_open_answers_and_of_dialogues(meteor: Meteor) -> None:
    gold = {"a": "Many houses are built along the road.", "b": "The left side", "c": "a tree grows"}
    said = {"a": "Some buildings appear beside the road.", "b": "left", "c": "A tree grows"}
    alone, each = meteor.score(
        ["some buildings appear beside the road", "left", "a tree grows"],
        [["many houses are built along the road"], ["the left side"], ["a tree grows"]],
    )
    assert 0 < each[0] < 1 and 0 < each[1] < 1 and each[2] == 1
    tables, notes = open_tables(said, gold)
    assert tables[1].predictions.values["METEOR"] == pytest.approx(100 * alone) and notes == ()
    truth = {uid: dialog_of(text) for uid, text in gold.items()}
    answers = {uid: (*truth[uid].answers[:2], text) for uid, text in said.items()}
    tables, notes = dialog_tables(answers, truth, "own")
    (table,) = (table for table in tables if table.name == "round 3, own history")
    assert table.predictions.values["METEOR"] == pytest.approx(100 * alone) and notes == ()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Tree house.", 100),  # the same words
        ("house tree", 40),  # all words, each by itself: the whole penalty, 0.6
        ("a wide lake", 0),  # no word
    ],
)
def test_known_values_of_meteor(meteor: Meteor, text: str, value: float) -> None:
    tables, _ = open_tables({"u": text}, {"u": "tree house"})
    assert tables[1].predictions.values["METEOR"] == pytest.approx(value)
    truth = {"u": dialog_of("tree house")}
    tables, _ = dialog_tables({"u": (*truth["u"].answers[:2], text)}, truth, "gold")
    (table,) = (table for table in tables if table.name == "round 3, gold history")
    assert table.predictions.values["METEOR"] == pytest.approx(value)


# --- word numbers -----------------------------------------------------------------------------------


def test_word_numbers() -> None:
    words = WordNumbers(["house", "road", "house", "is"])
    assert len(words) == 3
    assert words.of("a house is is new House") == "0 1 3 3 0 0"


def test_words_of_a_caption_file(tmp_path: Path) -> None:
    sentence = {"tokens": ["a", "road", "is", "built"]}
    images = [{"sentences": [sentence] * 5 + [{"tokens": ["a", "rare", "road", "road"]}]}]
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"images": images}))
    words = read_words(path)  # more than five times: a (6), road (7)
    assert len(words) == 2 and words.of("a road is built") == "1 2 0 0"
    path.write_text("a\nroad\n")
    assert read_words(path).of("road a b") == "2 1 0"
    path.write_text('{"images": [{}]}')
    with pytest.raises(DataError, match=r"captions\.json is no caption file"):
        read_words(path)
    with pytest.raises(DataError, match="none"):
        read_words(tmp_path / "none")


def test_unknown_words_match_each_other_in_ids_alone() -> None:
    words = WordNumbers(["a", "is", "built"])
    said, references = {"u": "a villa is built"}, {"u": ["a house is built"]}
    assert id_table(said, references, words, "", meteor=False).predictions.values["BLEU-4"] == pytest.approx(
        100
    )
    tables, _ = open_tables(said, {"u": "a house is built"}, words=words, meteor=False)
    assert (tables[1].predictions.values["BLEU-4"] or 0) < 1


def test_the_notebook_of_open_questions_leaves_references_as_they_are() -> None:
    words = WordNumbers(["the", "left", "side"])
    tables, _ = open_tables({"u": "The left side."}, {"u": "The left side."}, words=words, meteor=False)
    assert tables[1].predictions.values["BLEU-1"] == pytest.approx(100)
    # "The" and "side." are unknown on the reference's side only
    assert tables[2].predictions.values["BLEU-1"] == pytest.approx(100 / 3)


# --- dialogues --------------------------------------------------------------------------------------


def test_dialogues_by_hand() -> None:
    truth = {
        "a": DialogTruth(
            ("Yes", "1 road changed and 3 buildings changed.", "a lane with houses"), True, ("a road",)
        ),
        "b": DialogTruth(
            ("No", "No road changed and no building changed.", "it is as before"), False, ("no change",)
        ),
    }
    said = {
        "a": ("Yes", "1 road changed and 2 buildings changed.", "a lane with houses"),
        "b": ("No", "1 road changed and no building changed.", "what"),
    }
    tables, _ = dialog_tables(said, truth, "own", meteor=False)
    found = {table.name: table.predictions for table in tables}
    assert found["round 1, own history"].values["accuracy"] == 100
    assert found["round 2, own history, all"].values["buildings MAE"] == 0.5
    assert found["round 2, own history, changed"].values["roads MAE"] == 0
    assert found["consistency, own history"].values == {"consistent": 50}
    assert found["round 3, own history"].n == 2
    assert found["round 3, own history, captions"].n == 2


def test_dialogues_that_say_nothing_at_all() -> None:
    truth = {name: dialog_of("a road is built", changed=name == "a") for name in "ab"}
    tables, _ = dialog_tables(dict.fromkeys(truth, ("", "what", "")), truth, "own", meteor=False)
    found = {table.name: table.predictions for table in tables}
    first, second = found["round 1, own history"], found["round 2, own history, all"]
    assert (first.values["accuracy"], first.n, first.n_invalid) == (0, 2, 2)
    assert (second.n, second.n_invalid) == (2, 2) and second.values["both exact"] == 0
    assert found["round 3, own history"].values["ROUGE-L"] == 0
    assert found["consistency, own history"].values == {"consistent": 0}


def test_a_dialogue_of_four_rounds_counts_each_class_by_itself() -> None:
    assert middle(("Yes", "2 roads changed", "no building changed", "a road")) == Counts(2, 0)


@pytest.mark.parametrize(
    ("changed", "counts", "together"),
    [
        (True, "1 road and no building", True),
        (False, "no road and no building", True),
        (True, "no road and no building", False),
        (False, "no road and 2 buildings", False),
        (None, "no road and no building", False),
        (False, "who knows", False),
    ],
)
def test_when_two_answers_agree(changed: bool | None, counts: str, together: bool) -> None:
    assert agree(changed, parse_counts(counts)) is together


def test_dialogues_have_three_rounds_and_as_many_answers() -> None:
    truth = {"a": DialogTruth(("Yes", "1 road"), True)}
    with pytest.raises(DataError, match="'a' has 2 rounds and 2 answers"):
        dialog_tables({"a": ("Yes", "1 road")}, truth, "own")


# --- all of them ------------------------------------------------------------------------------------


def record(uid: str, task: str | None, rounds: list[tuple[str, str]], **fields: Any) -> Record:
    return Record(
        uid=uid, img1_path="a.png", img2_path="b.png", task=task, conversation=tuple(rounds), **fields
    )


LOC = "roads: ['top-left']. buildings: []."


def all_tasks() -> list[Sample]:
    """A right answer to each task, and a wrong one to binary."""
    caption = ("a road is built",)
    dialog = [("Any?", "Yes"), ("How many?", "1 road changed and no building changed."), ("Say.", "a road")]
    said = tuple(answer for _, answer in dialog)
    return [
        Sample(
            record=record("c", "caption", [], change_caption=caption, change_flag=True),
            said="a road is built",
        ),
        Sample(record=record("b1", "binary", [("Any?", "Yes")], change_flag=True), said="Yes"),
        Sample(record=record("b2", "binary", [("Any?", "No")]), said="Yes"),
        Sample(
            record=record("n", "count", [("How many?", "1 new road and no new building")]),
            said="1 road, 0 houses",
        ),
        Sample(record=record("l", "loc", [("Where?", LOC)]), said=LOC),
        Sample(record=record("o", "open", [("Why?", "So it is.")]), said="so it is"),
        Sample(record=record("d", "dialog", dialog), said=said[-1], rounds={"own": said, "gold": said}),
    ]


def test_every_task_at_once() -> None:
    scored = score_samples(all_tasks(), meteor=False, resamples=0)
    tasks = scored.tasks
    assert list(tasks) == ["caption", "binary", "count", "loc", "open", "dialog"]
    assert scored.captions is not None and scored.captions.num_pairs == 1
    assert [tasks[name].n for name in tasks] == [1, 2, 1, 1, 1, 1]
    assert tasks["binary"].value("answers", "accuracy") == 50
    assert tasks["binary"].table("captions").predictions.n == 1
    assert tasks["count"].value("all", "both exact") == 100
    assert tasks["loc"].value("both", "F1") == 100
    assert tasks["open"].value("answers", "exact") == 100
    assert tasks["dialog"].value("consistency, own history", "consistent") == 100
    assert tasks["dialog"].table("round 3, gold history, captions").predictions.n == 1  # joined by the pair
    assert tasks["binary"].per_sample == {"b1": 100, "b2": 0}
    figures = scored.figures()
    assert (figures["binary_accuracy"], figures["loc_exact"], figures["count_roads_MAE"]) == (50, 100, 0)
    assert {name.split("_")[0] for name in figures} == {"binary", "count", "loc", "open", "dialog"}
    for task in tasks.values():
        assert json.loads(json.dumps(task.to_dict()))["n"] == task.n
        assert task.text().startswith(f"{task.task}: {task.n} samples")
        for table in task.tables:
            assert table.predictions.name == "predictions"


def test_captions_alone_have_no_tasks_unless_they_say_so() -> None:
    sample = all_tasks()[0]
    assert list(score_samples([sample], meteor=False, resamples=0).tasks) == ["caption"]
    plain = Sample(record=record("c", None, [], change_caption=("a road",), change_flag=True), said="a road")
    assert score_samples([plain], meteor=False, resamples=0).tasks == {}


def test_what_cannot_be_scored_is_named() -> None:
    samples = all_tasks()
    with pytest.raises(DataError, match="1 uids come twice: c"):
        score_samples([*samples, samples[0]], meteor=False)
    with pytest.raises(DataError, match="no answers"):
        score_samples([])
    two = record("x", "loc", [("Where?", LOC), ("And?", LOC)])
    with pytest.raises(DataError, match="'x' of task 'loc' has 2 rounds"):
        score_samples([Sample(record=two, said=LOC)])
    with pytest.raises(DataError, match="'o' does not say"):
        changed_of(record("o", "open", [("Why?", "So")]))
    silent = Sample(record=samples[-1].record, said="a road")
    with pytest.raises(DataError, match="no answers by round"):
        score_samples([silent])


def test_gold_answers_that_cannot_be_read_are_told() -> None:
    odd = Sample(record=record("n", "count", [("How many?", "a few")], change_flag=True), said="1 road")
    scores = score_samples([odd]).tasks["count"]
    assert "1 gold answers could not be read and count as 0 and 0: n" in scores.notes[0]
    assert scores.value("all", "roads MAE") == 1
    odd = Sample(record=record("b", "binary", [("Any?", "No")], change_flag=True), said="No")
    scores = score_samples([odd]).tasks["binary"]
    assert "1 gold answers differ from the change flag" in scores.notes[0]
    assert scores.value("answers", "accuracy") == 0


def test_what_cannot_be_read_is_not_right_where_nothing_changed() -> None:
    """Nothing is what it counts as, which is the truth here; yet nobody has said it."""
    gold = {"count": "No roads and no buildings changed.", "loc": "roads: []. buildings: []."}
    for task, answer in gold.items():
        one = record("a", task, [("What?", answer)], change_flag=False)
        told = [score_samples([Sample(record=one, said=said)]).tasks[task] for said in (answer, "well, well")]
        assert [scores.per_sample["a"] for scores in told] == [100, 0]
        assert [scores.n_invalid for scores in told] == [0, 1]


def test_answers_as_their_task_reads_them() -> None:
    assert read_answer("binary", "Yes") == (True, True)
    assert read_answer("binary", "now") == (None, False)
    assert read_answer("count", "2 roads") == ({"roads": 2, "buildings": 0}, True)
    assert read_answer("count", "who knows") == (None, False)
    assert read_answer("loc", "roads [BR, TL]") == (
        {"roads": ["top-left", "bottom-right"], "buildings": []},
        True,
    )
    assert read_answer("loc", "here and there") == (None, False)
    assert read_answer("open", " ") == (None, False)
    assert read_answer("dialog", "x", ("Yes", "1 road", "x")) == (
        {"changed": True, "roads": 1, "buildings": 0},
        True,
    )
