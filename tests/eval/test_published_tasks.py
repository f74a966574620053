"""The published tables of the six tasks, as far as they follow from each other, by our own scores."""

import pytest

from llava.eval.scores import CaptionScores
from llava.eval.task_scores.binary import Confusion, binary_table
from llava.eval.task_scores.loc import loc_tables
from llava.eval.task_scores.tables import Table, rate
from llava.tasks.answers import PLACES, Places

CHANGED, UNCHANGED = 964, 965

# method: true positives, false positives; accuracy, precision, recall, F1 as printed
BINARY = {
    "GPT-4o": (835, 164, 84.81, 83.58, 86.62, 85.07),
    "Qwen-VL-Plus": (246, 88, 58.22, 73.65, 25.52, 37.90),
    "GLM-4V-Plus": (662, 87, 79.83, 88.38, 68.67, 77.29),
    "Gemini-1.5-Pro": (805, 153, 83.83, 84.03, 83.51, 83.77),
    "DeltaVLM": (882, 34, 93.99, 96.29, 91.49, 93.83),
    "without CSRM": (3, 1, 50.13, 75.00, 0.31, 0.62),
    "without ViT tuning": (786, 4, 90.57, 99.49, 81.54, 89.62),
}


def answers(tp: int, fp: int, fn: int, tn: int) -> Table:
    """The scores of so many answers, through the evaluator."""
    truth = [True] * (tp + fn) + [False] * (fp + tn)
    said = [True] * tp + [False] * fn + [True] * fp + [False] * tn
    return binary_table(
        {str(i): answer for i, answer in enumerate(said)}, {str(i): true for i, true in enumerate(truth)}
    )


@pytest.mark.parametrize("method", BINARY)
def test_a_row_of_the_classification_table_follows_from_whole_numbers(method: str) -> None:
    tp, fp, *printed = BINARY[method]
    row = answers(tp, fp, CHANGED - tp, UNCHANGED - fp).predictions
    assert [round(value or 0, 2) for value in row.values.values()] == printed
    assert row.counts == {"tp": tp, "fp": fp, "fn": CHANGED - tp, "tn": UNCHANGED - fp}


@pytest.mark.parametrize("method", BINARY)
def test_no_other_whole_numbers_give_the_row(method: str) -> None:
    tp, fp, *printed = BINARY[method]
    hits = [number for number in range(CHANGED + 1) if round(100 * number / CHANGED, 2) == printed[2]]
    found = []
    for hit in hits:
        for alarms in range(UNCHANGED + 1):
            one = Confusion(hit, alarms, CHANGED - hit, UNCHANGED - alarms)
            if [round(v, 2) for v in (one.accuracy, one.precision, one.recall, one.f1)] == printed:
                found.append((hit, alarms))
    assert found == [(tp, fp)]


def test_trivial_answers_to_the_test_set() -> None:
    always, never = answers(882, 34, 82, 931).rows[1:]
    assert [round(always.values[name] or 0, 2) for name in ("accuracy", "F1")] == [49.97, 66.64]
    assert round(never.values["accuracy"] or 0, 2) == 50.03
    assert (always.zero_division, never.zero_division) == ((), ("precision",))


# class, method: precision, recall, F1, Jaccard with empty = 0, subset accuracy
LOC = {
    ("roads", "GPT-4o"): (30.44, 27.01, 28.62, 7.80, 33.85),
    ("roads", "Qwen-VL-Plus"): (15.42, 1.40, 2.56, 0.25, 67.19),
    ("roads", "GLM-4V-Plus"): (21.99, 33.32, 26.49, 7.93, 6.79),
    ("roads", "Gemini-1.5-Pro"): (43.01, 40.55, 41.74, 9.62, 48.63),
    ("roads", "DeltaVLM"): (69.63, 66.32, 67.94, 14.00, 70.92),
    ("buildings", "GPT-4o"): (55.63, 33.70, 41.98, 14.09, 41.47),
    ("buildings", "Qwen-VL-Plus"): (22.23, 20.78, 21.48, 6.52, 7.26),
    ("buildings", "GLM-4V-Plus"): (38.98, 57.83, 46.57, 17.93, 17.11),
    ("buildings", "Gemini-1.5-Pro"): (65.71, 51.75, 57.90, 18.62, 45.62),
    ("buildings", "DeltaVLM"): (77.79, 80.22, 78.99, 23.15, 65.53),
}


@pytest.mark.parametrize(("kind", "method"), LOC)
def test_localisation_f1_follows_from_precision_and_recall(kind: str, method: str) -> None:
    precision, recall, f1, *_ = LOC[kind, method]
    hits = round(100 * precision * recall)  # whole numbers with the printed precision and recall
    claimed, true = round(hits * 100 / precision), round(hits * 100 / recall)
    assert (round(rate(hits, claimed), 2), round(rate(hits, true), 2)) == (precision, recall)
    # Both are rounded to 0.005; what that can do to the last digit of F1 is allowed.
    assert rate(2 * hits, claimed + true) == pytest.approx(f1, abs=0.011)


def test_published_jaccard_below_subset_accuracy_needs_empty_pairs_as_0() -> None:
    """DeltaVLM's row for roads: exact sets for 70.92 % of the pairs, and a mean Jaccard of 14.00."""
    cells = frozenset(PLACES[:1])
    nothing = Places(frozenset(), frozenset())
    truth = {str(i): Places(cells, frozenset()) if i < 15 else nothing for i in range(100)}
    said = {str(i): truth[str(i)] if i < 14 or i >= 43 else nothing for i in range(100)}
    said |= {str(i): Places(cells, frozenset()) for i in range(15, 43)}
    values = loc_tables(said, truth)[0].predictions.values
    assert values["jaccard_paper"] == pytest.approx(14) and values["subset accuracy"] == 71
    assert (values["jaccard"] or 0) >= (
        values["subset accuracy"] or 0
    )  # impossible for the published pair of values


def test_the_sm_of_the_caption_table() -> None:
    deltavlm = CaptionScores(1929, 85.78, 77.15, 69.24, 62.51, 39.47, 75.01, 136.72)
    assert deltavlm.sm == pytest.approx(78.43, abs=0.005)
