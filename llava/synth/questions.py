"""Open questions about a pair, answered from the mask of its roads and buildings alone."""

from collections.abc import Callable, Iterator

import numpy as np

from llava.synth.dice import Dice
from llava.tasks.answers import PLACES
from llava.tasks.labels import BUILDING, ROAD, Labels

CLASSES = {ROAD: ("road", "roads"), BUILDING: ("building", "buildings")}
CLEAR = 20
"""Percent by which one area has to be larger than another to be called larger; closer ones are not asked about."""

Round = tuple[str, str]
Asked = Callable[[np.ndarray, Labels, Dice], Round | None]
"""From a mask [H, W], its labels and a choice of words to a question and its answer; None where that is not clear."""


def open_questions(mask: np.ndarray, labels: Labels, dice: Dice, count: int = 4) -> list[Round]:
    """`count` different questions with short answers.

    Args:
        mask: 0 none, 1 road, 2 building; [H, W].
        labels: of the mask.
        dice: where choices come from.
        count: at most 4.
    """
    rounds: list[Round] = []
    for ask in dice.shuffled(_KINDS):
        asked = ask(mask, labels, dice)
        if asked is not None and len(rounds) < count:
            rounds.append(asked)
    return rounds


def _exists(mask: np.ndarray, labels: Labels, dice: Dice) -> Round | None:
    one, many, number = _one_class(labels, dice)
    question = dice.pick((f"Was any {one} built?", f"Is there a new {one}?", f"Did a {one} appear?"))
    return (
        question,
        f"Yes, {_number(number)} new {one if number == 1 else many}." if number else f"No new {one}.",
    )


def _exists_in_cell(mask: np.ndarray, labels: Labels, dice: Dice) -> Round | None:
    """Asked of cells that hold more than 5 % of the class, or nothing of it."""
    value = dice.pick((ROAD, BUILDING))
    one = CLASSES[value][0]
    there = labels.road_places if value == ROAD else labels.building_places
    touched = {PLACES[k] for k, cell in enumerate(_cells(mask)) if (cell == value).any()}
    free = [place for place in PLACES if place not in touched]
    wanted = list(there) if (there and dice.chance(60)) or not free else free
    if not wanted:
        return None
    place = dice.pick(wanted)
    question = dice.pick(
        (f"Is there a new {one} in the {place} part?", f"Did any {one} appear in the {place} cell?")
    )
    return question, f"Yes, in the {place}." if place in there else f"No {one} there."


def _dominates(mask: np.ndarray, labels: Labels, dice: Dice) -> Round | None:
    question = dice.pick(
        ("Which take more new ground, roads or buildings?", "Is the change mostly roads or mostly buildings?")
    )
    found = _larger(int((mask == ROAD).sum()), int((mask == BUILDING).sum()))
    return None if found is None else (question, ("Neither.", "Roads.", "Buildings.")[found])


def _side(mask: np.ndarray, labels: Labels, dice: Dice) -> Round | None:
    height, width = mask.shape
    upright = dice.chance(50)
    names = ("upper", "lower") if upright else ("left", "right")
    first, second = (mask[: height // 2], mask[-(height // 2) :]) if upright else (
        mask[:, : width // 2], mask[:, -(width // 2) :])  # fmt: skip
    found = _larger(int((first > 0).sum()), int((second > 0).sum()))
    question = dice.pick(
        (
            f"Which half changed more, the {names[0]} or the {names[1]} one?",
            f"Is more of the change in the {names[0]} or in the {names[1]} half?",
        )
    )
    return None if found is None else (question, "Neither." if not found else f"The {names[found - 1]} half.")


def _how_many(mask: np.ndarray, labels: Labels, dice: Dice) -> Round | None:
    one, many, number = _one_class(labels, dice)
    question = dice.pick(
        (f"How many {many} are new?", f"How many {many} were built?", f"Count the new {many}.")
    )
    return question, f"{_number(number).capitalize()} {one if number < 2 else many}."


def _more(mask: np.ndarray, labels: Labels, dice: Dice) -> Round | None:
    question = dice.pick(
        (
            "Are there more new roads or more new buildings?",
            "Which are more, the new roads or the new buildings?",
        )
    )
    if not labels.changed:
        return question, "Neither."
    if labels.roads == labels.buildings:
        return question, "As many of each."
    return question, "More roads." if labels.roads > labels.buildings else "More buildings."


_KINDS: tuple[Asked, ...] = (_exists, _exists_in_cell, _dominates, _side, _how_many, _more)


def _one_class(labels: Labels, dice: Dice) -> tuple[str, str, int]:
    """One class: its noun, the same for several, and how many there are."""
    value = dice.pick((ROAD, BUILDING))
    return (*CLASSES[value], labels.roads if value == ROAD else labels.buildings)


def _number(number: int) -> str:
    return str(number) if number else "no"


def _larger(first: int, second: int) -> int | None:
    """0 if both areas are empty, else 1 or 2, the clearly larger one; None if they are too close."""
    if first == second == 0:
        return 0
    low, high = sorted((first, second))
    if low * (100 + CLEAR) > high * 100:
        return None
    return 1 if first == high else 2


def _cells(mask: np.ndarray) -> Iterator[np.ndarray]:
    """The cells of the 3 x 3 grid, row by row, cut as `llava.tasks.labels` cuts them."""
    height, width = mask.shape
    for k in range(9):
        row, column = divmod(k, 3)
        yield mask[
            row * height // 3 : (row + 1) * height // 3, column * width // 3 : (column + 1) * width // 3
        ]
