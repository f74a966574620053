"""Where roads and buildings alone change: the mask tells what the plan put there, and every kind of pair occurs."""

import hashlib
from collections import Counter

import numpy as np
import pytest

from llava.errors import ConfigError
from llava.synth import World, built
from llava.synth.describe import UNCHANGED
from llava.synth.dice import Dice
from llava.synth.phrases import PLACES, ROAD_WAYS
from llava.synth.questions import open_questions
from llava.synth.task_lists import ask
from llava.tasks.answers import PLACES as CELLS
from llava.tasks.answers import parse_binary, parse_counts, parse_places
from llava.tasks.definitions import TASKS
from llava.tasks.labels import labels_from_mask

WORLD = World(seed=2, size=128, changes="built")


@pytest.fixture(scope="module")
def pairs():
    return list(WORLD.pairs(0, 96))


def _planned(pair) -> tuple[int, int]:
    roads = sum(change.count for change in pair.changes if change.subject == "road")
    return roads, sum(change.count for change in pair.changes) - roads


@pytest.mark.parametrize(
    ("seed", "split", "size", "index", "digest"),
    [(0, "train", 256, 8, "5ee6982479303e29"), (3, "test", 112, 24, "e265bee7e7776f98")],
)
def test_pairs_are_pinned(seed, split, size, index, digest):
    world = World(seed, split, size, "built")
    pair = world.pair(index)
    parts = (pair.before, pair.after, pair.classes_before, pair.classes_after)
    found = hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts))
    answers = [(task, [answer for _, answer in rounds]) for task, rounds in world.asked(index).rounds]
    found.update(repr((pair.captions, pair.changes, answers)).encode())
    assert found.hexdigest()[:16] == digest, "changed pairs need another llava.synth.built.VERSION"


@pytest.mark.parametrize("size", [64, 112, 256])
def test_the_mask_shows_as_many_objects_as_were_planned(size):
    for pair in World(seed=5, size=size, changes="built").pairs(0, 48):
        assert (pair.labels.roads, pair.labels.buildings) == _planned(pair), pair.uid
        assert pair.labels.changed == pair.changed
        assert pair.labels == labels_from_mask(pair.change_mask)


def test_half_of_the_pairs_changed_and_unchanged_ones_have_fixed_captions(pairs):
    assert all(a.changed != b.changed for a, b in zip(pairs[::2], pairs[1::2], strict=True))
    for pair in pairs:
        if not pair.changed:
            assert pair.captions == UNCHANGED and not pair.change_mask.any()


def test_plants_and_water_come_and_go_in_both_kinds_of_pair(pairs):
    for changed in (False, True):
        passing = [
            pair
            for pair in pairs
            if pair.changed == changed and (pair.binary_mask & (pair.change_mask == 0)).any()
        ]
        assert len(passing) >= 12
    names = {
        thing.name
        for pair in pairs
        if not pair.changed
        for thing in pair.instances
        if thing.presence != "both"
    }
    assert names == {"trees", "field", "water"}


def test_every_kind_of_pair_occurs(pairs):
    changed = [pair.labels for pair in pairs if pair.changed]
    counts = {
        kind: Counter(min(getattr(labels, kind), 5) for labels in changed) for kind in ("roads", "buildings")
    }
    assert set(counts["roads"]) == {0, 1, 2, 3} and {0, 1, 5} <= set(counts["buildings"])
    assert max(labels.buildings for labels in changed) >= 10
    small = [labels for labels in changed if not labels.road_places and not labels.building_places]
    assert small and all((labels.roads, labels.buildings) == (0, 1) for labels in small)
    assert any(labels.roads and not labels.buildings for labels in changed)
    assert any(labels.buildings and not labels.roads for labels in changed)
    assert any(labels.buildings and labels.roads for labels in changed)
    for kind in ("road_places", "building_places"):
        seen = Counter(place for labels in changed for place in getattr(labels, kind))
        assert set(seen) == set(CELLS) and min(seen.values()) >= 2, seen


def test_every_recipe_and_cell_has_its_turn():
    drawn = [WORLD._built(2 * k) for k in range(108)]
    assert Counter(recipe for recipe, _ in drawn) == Counter(built.RECIPES * 9)
    assert set(Counter(cell for _, cell in drawn).values()) == {12}
    assert WORLD._built(7) == WORLD._built(6)


def test_objects_stand_apart_and_are_not_tiny():
    """At the default size: 3 pixels between objects of one class, 30 pixels each."""
    for pair in World(seed=7, size=256, changes="built").pairs(0, 24):
        for value, planned in zip((1, 2), _planned(pair), strict=True):
            hits = pair.change_mask == value
            grown = np.zeros_like(hits)  # one pixel fatter: what stands 3 apart stays apart
            padded = np.pad(hits, 1)
            for y in range(3):
                for x in range(3):
                    grown |= padded[y : y + 256, x : x + 256]
            for mask, area in ((hits, 30), (grown, 1)):
                labels = labels_from_mask(mask * np.uint8(value), min_area=area)
                assert (labels.roads, labels.buildings)[value - 1] == planned, pair.uid


def test_captions_name_number_and_place(pairs):
    for pair in pairs:
        for text in pair.captions if pair.changed else ():
            assert text == text.lower().strip() and "." not in text and "  " not in text and "{" not in text
            for change in pair.changes:
                whole = change.subject != "road" or change.manner == "street"
                words = PLACES[change.place] if whole else ROAD_WAYS[change.place or change.manner]
                assert any(word in text for word in words), (text, change)
            for change in pair.changes:
                if change.subject == "road" and change.count > 1:
                    assert ("two", "three")[change.count - 2] in text


def test_answers_are_the_labels_in_every_task(pairs):
    for index, pair in enumerate(pairs):
        asked = WORLD.asked(index, pair.change_mask)
        tasks = [task for task, _ in asked.rounds]
        assert tasks == ["binary", "count", "loc", "open", "open", "open", "open", "dialog"]
        told = dict(asked.rounds)
        for task in ("binary", "count", "loc"):
            assert told[task][0][0] == TASKS[task].question
        labels = pair.labels
        assert told["binary"][0][1] == ("Yes" if pair.changed else "No")
        counts = parse_counts(told["count"][0][1])
        assert (counts.roads, counts.buildings, counts.valid, counts.partial) == (
            labels.roads,
            labels.buildings,
            True,
            False,
        )
        places = parse_places(told["loc"][0][1])
        assert (places.roads, places.buildings) == (set(labels.road_places), set(labels.building_places))
        assert places.valid and not places.partial and not places.unknown
        questions, answers = zip(*told["dialog"], strict=True)
        assert questions == TASKS["dialog"].rounds
        assert parse_binary(answers[0]) == pair.changed
        assert (parse_counts(answers[1]).roads, parse_counts(answers[1]).buildings) == _planned(pair)
        assert answers[2] == pair.canonical


def _mask(*boxes: tuple[int, int, int, int, int]) -> np.ndarray:
    mask = np.zeros((90, 90), dtype=np.uint8)
    for value, y0, x0, y1, x1 in boxes:
        mask[y0:y1, x0:x1] = value
    return mask


@pytest.mark.parametrize(
    ("mask", "true", "false"),
    [
        (_mask(), {"No new road.", "Neither.", "No building.", "No road there."}, {"Roads.", "1 road."}),
        (
            _mask((1, 0, 0, 10, 90), (2, 40, 5, 50, 15), (2, 60, 5, 70, 15)),
            {"1 road.", "2 buildings.", "Yes, 1 new road.", "Yes, 2 new buildings.", "More buildings.", "Roads.",
             "The upper half.", "Yes, in the top-left.", "No road there."},
            {"Yes, in the bottom-right.", "More roads.", "Buildings.", "Neither.", "The lower half."},
        ),
        (
            _mask((2, 80, 80, 83, 83)),
            {"Buildings.", "The right half.", "The lower half.", "Yes, 1 new building."},
            {"Yes, in the bottom-right.", "No building."},
        ),
        (_mask((1, 10, 10, 30, 30), (2, 60, 60, 80, 80)), {"As many of each."}, {"Roads.", "The left half."}),
    ],
)  # fmt: skip
def test_open_questions_are_answered_by_the_mask(mask, true, false):
    said = {answer for k in range(300) for _, answer in open_questions(mask, labels_from_mask(mask), Dice(k))}
    assert true <= said and not said & false, said
    for k in range(20):
        asked = [question for question, _ in open_questions(mask, labels_from_mask(mask), Dice(k))]
        assert len(asked) == len(set(asked)) == 4


def test_cells_with_a_trace_of_the_class_are_not_asked_about():
    mask = _mask((2, 80, 80, 83, 83))
    asked = [
        question for k in range(300) for question, _ in open_questions(mask, labels_from_mask(mask), Dice(k))
    ]
    assert any("road appear in the bottom-right" in question for question in asked)
    assert not any("building appear in the bottom-right" in question for question in asked)
    assert not any("new building in the bottom-right" in question for question in asked)


def test_a_mask_that_contradicts_the_plan_is_no_truth(pairs):
    changed = next(k for k, pair in enumerate(pairs) if pair.changed)
    with pytest.raises(AssertionError, match="the plan has"):
        WORLD.asked(changed, np.zeros((128, 128), dtype=np.uint8))
    pair = pairs[changed]
    more = pair.change_mask.copy()
    more[tuple(np.argwhere(more == 0)[0])] = (
        2 - (more == 2).any()
    )  # one object more, of a class that is not there
    with pytest.raises(AssertionError, match="the plan has"):
        WORLD.asked(changed, more)
    assert ask(pair.change_mask, pair.scene, pair.captions, pair.key) == WORLD.asked(changed)


def test_the_two_worlds_are_told_apart():
    assert World(size=64).uid(3) == "synth/train_000003"
    assert World(size=64, changes="built").uid(3) == "synth-built/train_000003"
    with pytest.raises(ConfigError, match="roads and buildings alone"):
        World(size=64).asked(0)
    with pytest.raises(ConfigError, match="any, built"):
        World(size=64, changes="roads")
