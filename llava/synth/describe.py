"""Words for what changed, as five people would put it: one meaning, several wordings.

Every choice of words has a usual answer and some others; `usual` gives the sentence of usual answers alone.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

from llava.synth.dice import Dice
from llava.synth.phrases import COUNTS, GROUNDS, NOUNS, OLD, PLACES, ROAD_WAYS, ROADS, TEMPLATES, VERB_FORMS
from llava.synth.scene import Change

UNCHANGED = (
    "there is no difference",
    "the two scenes seem identical",
    "the scene is the same as before",
    "no change has occurred",
    "almost nothing has changed",
)
"""The five sentences of LEVIR-CC for a pair without change."""

_MANY_ROADS = ("street", "parallel")

Choose: TypeAlias = Callable[[Sequence[str]], str]
"""Picks one of several wordings, the first being the usual one."""


def usual(options: Sequence[str]) -> str:
    """The usual wording."""
    return options[0]


def varied(dice: Dice, percent: int = 38) -> Choose:
    """A chooser that takes the usual wording in `percent` of 100 cases, else one of the others."""

    def choose(options: Sequence[str]) -> str:
        if len(options) == 1 or dice.chance(percent):
            return options[0]
        return options[1 + dice.below(len(options) - 1)]

    return choose


def captions(changes: Sequence[Change], dice: Dice, ground: str, count: int = 5) -> tuple[str, ...]:
    """`count` captions of one pair; without changes LEVIR-CC's five sentences."""
    if not changes:
        return UNCHANGED[:count]
    return tuple(sentence(changes, ground, varied(dice)) for _ in range(count))


def sentence(changes: Sequence[Change], ground: str, choose: Choose = usual) -> str:
    """One sentence about all changes; the usual wording unless told otherwise."""
    return " and ".join(clause(change, ground, choose) for change in changes)


def clause(change: Change, ground: str, choose: Choose = usual) -> str:
    """One change in words, on ground of that class."""
    templates = TEMPLATES[change.action, change.subject, change.former]
    if change.manner in _MANY_ROADS:
        templates = ROADS
    turn = _turn(change) % len(templates)
    template = choose(templates[turn:] + templates[:turn])
    several = change.count > 1 and change.manner != "row"
    colour = choose((change.colour, "")) if change.colour else ""
    verbs = {word: forms[several] for word, forms in VERB_FORMS.items()}
    if change.manner == "row":
        subject = f"a row of {choose(NOUNS['house'][1]).format(c=colour)}"
    else:
        subject = count_words(change.subject, change.count, choose, colour)
    text = template.format(
        s=subject,
        n=choose(NOUNS[change.subject][0]).format(c=colour),
        l=place(change, choose),
        g=choose(GROUNDS[ground][0]),
        c=choose(("along the road", "beside the road"))
        if change.context == "road"
        else _floor(ground, choose),
        old=choose(OLD[change.former]) if change.former else "",
        **verbs,
    )
    return " ".join(text.split())


def _turn(change: Change) -> int:
    """Which of the templates is the usual one: it goes by the column of the place, for roads by the way they run.

    Were it the same everywhere, one fixed sentence would share its frame with most captions.
    """
    order = PLACES if _has_place(change) else ROAD_WAYS
    return list(order).index(change.manner if change.manner == "curved" else change.place)


def _has_place(change: Change) -> bool:
    """Whether a cell of the grid says where it is; for roads from edge to edge the way they run does."""
    return change.subject != "road" or change.manner == "street"


def _floor(ground: str, choose: Choose) -> str:
    """ "on the grass", in other words, or nothing."""
    return choose(("", *GROUNDS[ground][1]))


def place(change: Change, choose: Choose) -> str:
    """Where a change lies: "on the left side"; of a road the way it runs."""
    if not _has_place(change):
        return choose(ROAD_WAYS[change.place or change.manner])
    return choose(PLACES[change.place])


def count_words(name: str, count: int, choose: Choose, colour: str = "") -> str:
    """ "a house", "two white houses", "some houses", ... A wood has no number."""
    one, many = NOUNS[name]
    if count > 1 and name != "trees":
        return f"{choose(COUNTS[min(count, 7)])} {choose(many).format(c=colour)}".replace("  ", " ")
    noun = " ".join(choose(one).format(c=colour).split())
    return noun if name == "trees" else f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def single(things: Sequence[tuple[str, str]], ground: str, dice: Dice, count: int = 5) -> list[str]:
    """`count` captions of one image.

    Args:
        things: (class name, place) of what is visible.
        ground: class of the bare ground.
        dice: where wordings come from.
    """
    groups: dict[str, list[str]] = {}
    for name, where in things:
        groups.setdefault(name, []).append(where)
    return [_single(groups, ground, varied(dice)) for _ in range(count)]


def _single(groups: dict[str, list[str]], ground: str, choose: Choose) -> str:
    """One sentence that names every group of things, where it is if it is in one place, and the ground."""
    floor = choose(GROUNDS[ground][0])
    on = f"{'in' if floor == 'desert' else 'on'} the {floor}"
    parts = []
    for name, places in groups.items():
        noun = count_words(name, len(places), choose)
        where = choose(PLACES[places[0]]) if len(set(places)) == 1 and name != "road" else ""
        parts.append(f"{noun} {where}".strip())
    if not parts:
        return choose((f"there is only {floor}", f"nothing but {floor}", f"{floor} without anything {on}"))
    listed = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    return choose((f"{listed} {on}", f"{on} there are {listed}", f"a scene with {listed}"))
