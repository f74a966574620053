"""Systems side by side: the better one is named, equal ones are not told apart, and nothing depends on order."""

import json
import random

import pytest

from llava.errors import ConfigError, DataError
from llava.eval.compare import compare
from llava.eval.metrics import score

pytest.importorskip("pycocoevalcap.bleu.bleu")
SAME = ["there is no difference", "nothing has changed"]


@pytest.fixture(scope="module")
def references() -> dict[str, list[str]]:
    dice = random.Random(0)
    things, places = (
        ["houses", "roads", "trees", "villas"],
        ["in the desert", "along the road", "on the left"],
    )

    def told() -> list[str]:
        return [f"some {dice.choice(things)} appear {dice.choice(places)}" for _ in range(3)]

    return {f"p{i:03}": SAME if i % 2 else told() for i in range(120)}


def system(references, seed: int, right: float) -> dict[str, str]:
    dice = random.Random(seed)
    pool = [text for texts in references.values() for text in texts]
    return {
        uid: dice.choice(texts) if dice.random() < right else dice.choice(pool)
        for uid, texts in references.items()
    }


def test_the_better_system_is_named(references):
    good, bad = system(references, 1, 0.95), system(references, 2, 0.3)
    found = compare({"bad": bad, "good": good}, references, meteor=False, resamples=300)
    (one,) = found.versus
    assert "good is better than bad" in one.verdict and "change decision: good is better" in one.verdict
    assert one.judged.metric == "CIDEr-D" and one.judged.p < 0.01  # no Sm without METEOR
    low, high = one.judged.interval
    assert 0 < low < one.judged.difference < high
    (back,) = compare({"good": good, "bad": bad}, references, meteor=False, resamples=300).versus
    assert back.judged.difference == pytest.approx(-one.judged.difference)
    assert "good is better than bad" in back.verdict


def test_equal_systems_are_not_told_apart(references):
    said = system(references, 1, 0.6)
    (one,) = compare({"a": said, "b": dict(said)}, references, meteor=False, resamples=50).versus
    assert all(row.difference == 0 and row.p == 1 and row.interval == (0, 0) for row in one.differences)
    assert one.verdict.count("no difference shown") == 2
    twins = {name: system(references, seed, 0.6) for seed, name in enumerate("ab")}
    (one,) = compare(twins, references, meteor=False, resamples=200).versus
    assert "no difference shown between a and b" in one.verdict


def test_differences_are_those_of_the_scores(references):
    systems = {
        "a": system(references, 1, 0.9),
        "b": system(references, 2, 0.5),
        "c": system(references, 3, 0.5),
    }
    found = compare(systems, references, meteor=False, resamples=20)
    assert [(one.first, one.second) for one in found.versus] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert found.versus[0].alpha == pytest.approx(0.05 / 3) and "Bonferroni" in found.table()
    alone = {name: score(said, references, meteor=False, baselines=False) for name, said in systems.items()}
    for name, row in zip(systems, found.systems, strict=True):
        assert row.captions == alone[name].predictions.captions
    for row in found.versus[1].differences:
        values = [
            (alone[name].captions(row.subset).to_dict() | alone[name].decision.to_dict())[row.metric]
            for name in ("a", "c")
        ]
        assert [row.first, row.second] == pytest.approx(values)
    assert not [
        row for row in found.versus[0].differences if (row.subset, row.metric) == ("unchanged", "CIDEr-D")
    ]


def test_order_of_uids_does_not_matter(references):
    systems = {"a": system(references, 1, 0.9), "b": system(references, 2, 0.5)}
    found = compare(systems, references, meteor=False, resamples=50)
    turned = {name: dict(reversed(said.items())) for name, said in systems.items()}
    assert compare(turned, dict(reversed(references.items())), meteor=False, resamples=50) == found


def test_table_and_json_say_the_same(references):
    systems = {"a": system(references, 1, 0.9), "b": system(references, 2, 0.5)}
    found = compare(systems, references, meteor=False, resamples=50)
    values = json.loads(json.dumps(found.to_dict()))
    table = found.table()
    assert max(map(len, table.splitlines())) <= 120
    for row in values["versus"][0]["differences"]:
        if (row["subset"], row["metric"]) in {
            ("all", "CIDEr-D"),
            ("all", "accuracy"),
            ("changed", "ROUGE-L"),
        }:
            assert f"{row['difference']:+.2f}" in table and f"{row['interval'][0]:+.2f}" in table
    assert values["versus"][0]["verdict"] in table


def test_what_cannot_be_compared_is_refused(references):
    said = system(references, 1, 0.9)
    with pytest.raises(DataError, match="1 uids have no prediction: p005"):
        compare({"a": said, "b": {u: t for u, t in said.items() if u != "p005"}}, references, meteor=False)
    with pytest.raises(ConfigError, match="needs two systems"):
        compare({"a": said}, references)
