"""Caption scores: equal to pycocoevalcap, independent of order, with known extremes and published figures."""

import gzip
import json
import random
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from llava.errors import ConfigError, DataError, LlavaError, MissingDependencyError
from llava.eval.baselines import OneSentence
from llava.eval.meteor import find_jar, shared_meteor
from llava.eval.metrics import METRICS, mostly_changed, score
from llava.java import find_java
from llava.tasks.caption import NO_CHANGE_CAPTION, normalise

pytest.importorskip("pycocoevalcap.bleu.bleu")
LEVIR_CC = Path(__file__).parents[3] / "shared/real/levir_cc_captions.jsonl.gz"
NO_CHANGE = [
    "there is no difference",
    "the two scenes seem identical",
    NO_CHANGE_CAPTION,
    "no change has occurred",
    "almost nothing has changed",
]


def has_meteor() -> bool:
    try:
        return find_java() is not None and find_jar().is_file()
    except MissingDependencyError:
        return False


needs_meteor = pytest.mark.skipif(not has_meteor(), reason="no Java or no METEOR jar here")


@pytest.fixture(scope="module")
def references() -> dict[str, list[str]]:
    """Forty pairs in LEVIR-CC's manner, half of them unchanged."""
    dice = random.Random(0)

    def sentence() -> str:
        number, thing = dice.choice(["some", "many", "two"]), dice.choice(["houses", "buildings", "roads"])
        where = dice.choice(["along the road", "on the bareland", "in the desert"])
        return f"{number} {thing} are built {where}"

    return {f"p{i:02}": NO_CHANGE if i % 2 else [sentence() for _ in range(5)] for i in range(40)}


@pytest.fixture(scope="module")
def predictions(references) -> dict[str, str]:
    """Every kind of answer: right, a false alarm (p03), a miss (p06), none at all (p08)."""
    dice = random.Random(1)
    said = {uid: dice.choice(texts) for uid, texts in references.items()}
    return said | {"p03": "Two houses are built .", "p06": "No change has occurred.", "p08": ""}


def assert_equals_plain(predictions, references) -> None:
    """The whole set's scores are those of pycocoevalcap's own scorers, METEOR's those of its jar."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    said = {uid: [normalise(text)] for uid, text in predictions.items()}
    true = {uid: [normalise(text) for text in texts] for uid, texts in references.items()}
    result = score(predictions, references, meteor=has_meteor(), baselines=False)
    got = result.captions().to_dict()
    bleu, bleus = Bleu(4).compute_score(true, said, verbose=0)
    (rouge, rouges), (cider, ciders) = Rouge().compute_score(true, said), Cider().compute_score(true, said)
    expected = dict(zip(METRICS, bleu, strict=False)) | {"ROUGE-L": rouge, "CIDEr-D": cider}
    each = {"BLEU-4": bleus[3], "ROUGE-L": rouges, "CIDEr-D": ciders}
    if has_meteor():
        expected["METEOR"], each["METEOR"] = shared_meteor().score(
            [text for (text,) in said.values()], list(true.values())
        )
    assert {name: got[name] / 100 for name in expected} == pytest.approx(expected, abs=1e-11)
    for name, values in each.items():
        assert [result.per_pair[uid][name] / 100 for uid in said] == pytest.approx(list(values), abs=1e-11)


def test_equals_plain_pycocoevalcap(references, predictions):
    assert_equals_plain(predictions, references)
    dice = random.Random(3)
    words = ["a", "the", "road", "house", "houses", ",", "built", "are", "trees", "caf\u00e9", "1", "new"]

    def sentence() -> str:
        return " ".join(dice.choices(words, k=dice.randint(1, 12)))

    for size in (2, 30):
        random_references = {f"r{i}": [sentence() for _ in range(dice.randint(1, 6))] for i in range(size)}
        assert_equals_plain({uid: sentence() for uid in random_references}, random_references)


@needs_meteor
def test_sm_is_the_mean_of_four_on_every_set(references, predictions):
    result = score(predictions, references)
    for row in result.rows:
        for subset in ("all", "changed"):
            values = row.captions[subset].to_dict()
            four = [values[name] for name in ("BLEU-4", "METEOR", "ROUGE-L", "CIDEr-D")]
            assert values["Sm"] == pytest.approx(sum(four) / 4) and values["Sm"] >= 0
    assert set(result.per_pair["p08"].values()) == {0}


def test_the_change_decision_is_counted(references, predictions):
    told = score(predictions, references, meteor=False, baselines=False).decision
    assert (told.num_changed, told.num_unchanged) == (20, 20)
    assert (told.false_alarms, told.misses) == (1, 2)  # no answer is a miss
    assert (told.accuracy, told.false_alarm_rate, told.miss_rate) == (92.5, 5, 10)


def test_unchanged_pairs_alone_have_no_cider(references, predictions):
    result = score(predictions, references, meteor=False)
    for row in result.rows:
        assert row.captions["unchanged"].cider_d is None and row.captions["unchanged"].sm is None
    only = {uid: texts for uid, texts in references.items() if texts is NO_CHANGE}
    alone = score({uid: predictions[uid] for uid in only}, only, meteor=False)
    assert alone.captions().cider_d is None and alone.captions("changed") is None
    assert [row.name for row in alone.baselines] == ["constant"]


def test_order_does_not_matter(references, predictions):
    result = score(predictions, references, meteor=False)
    uids = random.Random(2).sample(sorted(references), len(references))
    again = score({u: predictions[u] for u in reversed(uids)}, {u: references[u] for u in uids}, meteor=False)
    assert again == result


def test_intervals_hold_the_score_and_repeat_with_the_seed(references, predictions):
    result = score(predictions, references, meteor=False, resamples=200)
    for subset, by_name in result.intervals.items():
        values = result.captions(subset).to_dict() | result.decision.to_dict()
        for name, (low, high) in by_name.items():
            assert low <= values[name] <= high and low < high, (subset, name)
    assert set(result.intervals["all"]) == {*METRICS, "accuracy", "false_alarm_rate", "miss_rate"} - {
        "METEOR",
        "Sm",
    }
    assert set(result.intervals["unchanged"]) == {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"}
    assert score(predictions, references, meteor=False, resamples=200).intervals == result.intervals
    assert score(predictions, references, meteor=False, resamples=200, seed=1).intervals != result.intervals
    none = score(predictions, references, meteor=False, resamples=0)
    assert none.intervals == {} and "interval" not in none.table()


def test_repeats_change_no_score_and_their_effect_is_told(references, predictions):
    once = score(predictions, references, meteor=False)
    again = [("p00", predictions["p00"]), ("p00", predictions["p00"]), ("p03", "another caption")]
    twice = score(predictions, references, meteor=False, repeats=again)
    assert twice.rows == once.rows and twice.intervals == once.intervals
    told = twice.repeats
    assert (told.num_captions, told.num_uids, told.num_conflicting) == (3, 2, 1)
    more = {**references, "x": references["p00"], "y": references["p00"], "z": references["p03"]}
    said = {**predictions, "x": predictions["p00"], "y": predictions["p00"], "z": "another caption"}
    counted = score(said, more, meteor=False, baselines=False).captions()
    assert told.captions.to_dict() == pytest.approx(counted.to_dict())
    assert "3 captions beyond the first of 2 uids, 1 of them with another caption" in twice.table()
    with pytest.raises(DataError, match="'nobody' has no first one"):
        score(predictions, references, meteor=False, repeats=[("nobody", "a")])


def test_a_further_measure_is_averaged_with_intervals(references, predictions):
    def words(captions, groups):
        assert len(captions) == len(groups)
        return [len(text.split()) / 100 for text in captions]

    result = score(predictions, references, meteor=False, further={"words": words})
    said = [len(normalise(text).split()) for text in predictions.values()]
    assert result.captions().further == {"words": pytest.approx(sum(said) / len(said))}
    low, high = result.intervals["all"]["words"]
    assert low < result.captions().to_dict()["words"] < high and "words" in result.table()
    assert result.baselines[0].captions["all"].further == {}


def test_the_table_fits_a_screen(references, predictions):
    again = [("p00", predictions["p00"])]
    result = score(predictions, references, meteor=False, repeats=again)
    assert max(map(len, result.table().splitlines())) <= 120


def test_perfect_and_disjoint_captions(references):
    perfect = score({uid: texts[0] for uid, texts in references.items()}, references, meteor=False)
    values = perfect.captions().to_dict()
    assert all(values[f"BLEU-{n}"] == pytest.approx(100) for n in range(1, 5))
    assert values["ROUGE-L"] == pytest.approx(100) and perfect.decision.accuracy == 100
    disjoint = score(
        dict.fromkeys(references, "zzz yyy xxx www vvv"), references, meteor=False, baselines=False
    )
    assert all(
        abs(disjoint.captions().to_dict()[name]) < 1e-3 for name in METRICS if name not in ("METEOR", "Sm")
    )
    nothing = score(dict.fromkeys(references, ""), references, meteor=False, baselines=False)
    assert nothing.captions().bleu1 == 0 and nothing.decision.misses == 20


def test_case_dots_and_spaces_are_not_scored(references, predictions):
    loud = {uid: f" {text.upper()} . " for uid, text in predictions.items()}
    assert (
        score(loud, references, meteor=False).captions()
        == score(predictions, references, meteor=False).captions()
    )


def test_the_given_truth_is_used(references, predictions):
    changed = dict.fromkeys(references, True)
    result = score(predictions, references, changed, meteor=False, baselines=False)
    assert result.captions("unchanged") is None and result.captions("changed") == result.captions()


def test_a_baseline_is_the_best_of_all_reference_sentences(references):
    result = score(dict.fromkeys(references, "x"), references, meteor=False)
    constant, by_flag = result.baselines
    sentences = {text for texts in references.values() for text in texts}

    def bleu4(said: dict[str, str]) -> float:
        return score(said, references, meteor=False, baselines=False).captions().bleu4

    quick = OneSentence(list(references.values())).best()
    assert quick[0] == max(sorted(sentences), key=lambda text: bleu4(dict.fromkeys(references, text)))
    assert constant.sentences[0] in quick
    same, other = by_flag.sentences
    assert same == NO_CHANGE_CAPTION and by_flag.decision.accuracy == 100
    flagged = {uid: same if texts is NO_CHANGE else other for uid, texts in references.items()}
    assert score(flagged, references, meteor=False).captions() == by_flag.captions["all"]


def test_every_uid_is_scored_once(references, predictions):
    with pytest.raises(DataError, match="1 uids have no prediction: p05"):
        score({uid: text for uid, text in predictions.items() if uid != "p05"}, references)
    with pytest.raises(DataError, match=r"6 uids have a prediction but no references: x0, .*, x4, \.{3}"):
        score(predictions | {f"x{i}": "a" for i in range(6)}, references)
    with pytest.raises(DataError, match="have no change flag"):
        score(predictions, references, {"p00": True})
    with pytest.raises(DataError, match="no references"):
        score({}, {})
    with pytest.raises(ConfigError, match="resamples=-1"):
        score(predictions, references, meteor=False, resamples=-1)
    with pytest.raises(ConfigError, match="unknown tokenizer 'spacy'; known: ptb, release"):
        score(predictions, references, meteor=False, tokenizer="spacy")


def test_unusable_text_is_named(references, predictions):
    with pytest.raises(DataError, match="prediction of 'p01' is None"):
        score(predictions | {"p01": None}, references)
    for fault in ("a string", [], None, ["a", "."], ["a", 3]):
        with pytest.raises(DataError, match="'p01'"):
            score(predictions, references | {"p01": fault})


def test_without_java_the_rest_is_scored(references, predictions, monkeypatch):
    monkeypatch.setattr("llava.eval.meteor._shared", None)
    monkeypatch.setattr("llava.java.find_java", lambda: None)
    with pytest.warns(UserWarning, match="METEOR and Sm are not given"):
        result = score(predictions, references)
    assert result.captions().meteor is None and result.captions().sm is None
    assert result.captions() == score(predictions, references, meteor=False).captions()
    assert "needs Java" in result.notes[0] and "needs Java" in result.table()


def test_meteor_that_breaks_down_is_replaced_once(references, predictions, monkeypatch):
    class Broken:
        def statistics(self, *_):
            raise LlavaError("METEOR ended on its own")

    starts = []

    def start():
        starts.append(Broken())
        return starts[-1]

    monkeypatch.setattr("llava.eval.pair_statistics.shared_meteor", start)
    with pytest.warns(UserWarning, match="ended on its own"):
        result = score(predictions, references)
    assert len(starts) == 2 and result.captions().sm is None
    assert result.captions() == score(predictions, references, meteor=False).captions()
    assert [note for note in result.notes if "ended on its own" in note]


def test_the_result_identifies_its_texts(references, predictions):
    result = score(predictions, references, meteor=False, baselines=False)
    other = score(predictions | {"p00": "other"}, references, meteor=False, baselines=False)
    assert result.predictions_sha256 != other.predictions_sha256
    assert result.references_sha256 == other.references_sha256
    assert len(result.predictions_sha256) == 64 and result.num_pairs == 40
    with pytest.raises(FrozenInstanceError):
        result.num_pairs = 41


def test_table_and_json_say_the_same(references, predictions):
    result = score(predictions, references, meteor=False)
    values = json.loads(json.dumps(result.to_dict()))
    table = result.table()
    assert f"{values['predictions']['captions']['changed']['CIDEr-D']:.2f}" in table
    assert values["baselines"][1]["sentences"][1] in table
    unchanged = next(line for line in table.splitlines() if line.startswith("unchanged"))
    assert unchanged.split()[-2:] == ["-", "-"]


# The two baselines on LEVIR-CC's test split, as published beside CCExpert's predictions.
CONSTANT = {"BLEU-4": 51.49, "METEOR": 27.77, "ROUGE-L": 60.60, "CIDEr-D": 101.93, "Sm": 60.45}
BY_FLAG = {"BLEU-4": 64.01, "METEOR": 39.91, "ROUGE-L": 73.13, "CIDEr-D": 125.01, "Sm": 75.51}


@pytest.fixture(scope="module")
def levir_cc() -> dict[str, list[str]]:
    if not LEVIR_CC.is_file():
        pytest.skip("the captions of LEVIR-CC are not here")
    with gzip.open(LEVIR_CC, "rt", encoding="utf-8") as lines:
        records = [record for record in map(json.loads, lines) if record["split"] == "test"]
    return {record["filename"]: record["captions"] for record in records}


@needs_meteor
def test_the_baselines_score_as_published(levir_cc):
    constant = dict.fromkeys(levir_cc, NO_CHANGE_CAPTION)
    result = score(constant, levir_cc, baselines=False)
    values = result.captions().to_dict()
    assert {name: values[name] for name in CONSTANT} == pytest.approx(CONSTANT, abs=0.05)
    assert (result.num_pairs, result.decision.num_unchanged, result.decision.misses) == (1929, 965, 964)
    other = "some houses are built along the road"
    said = {uid: other if mostly_changed(texts) else NO_CHANGE_CAPTION for uid, texts in levir_cc.items()}
    values = score(said, levir_cc, baselines=False).captions().to_dict()
    assert {name: values[name] for name in BY_FLAG} == pytest.approx(BY_FLAG, abs=0.05)


@needs_meteor
def test_real_references_score_as_plain_pycocoevalcap(levir_cc):
    """Forty real pairs, each answered with a reference of itself or its neighbour."""
    uids = sorted(levir_cc)[:: len(levir_cc) // 40][:40]
    references = {uid: levir_cc[uid] for uid in uids}
    said = {uid: levir_cc[uids[i - i % 2]][i % 5] for i, uid in enumerate(uids)}
    assert_equals_plain(said, references)


@needs_meteor
def test_the_constant_sentence_on_synthetic_captions(references):
    """The same path without the real captions: perfect on unchanged pairs, elsewhere one word matches."""
    result = score(dict.fromkeys(references, NO_CHANGE_CAPTION), references, baselines=False)
    unchanged = result.captions("unchanged").to_dict()
    assert all(unchanged[name] == pytest.approx(100) for name in METRICS if name not in ("CIDEr-D", "Sm"))
    changed = result.captions("changed")
    assert changed.bleu2 < 1e-3 < changed.bleu1 < 20 and changed.meteor < 10
    assert 40 < result.captions().sm < 70 and result.decision.accuracy == 50
