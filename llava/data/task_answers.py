"""Answers of task records held against their task, their flag and their mask."""

from collections.abc import Iterator

from llava.data.record import Record
from llava.tasks.answers import PLACES, parse_binary, parse_counts, parse_places
from llava.tasks.labels import Labels

MASKED = ("binary", "count", "loc", "dialog")
"""Tasks whose answers a mask of roads and buildings holds."""

_DIALOGUE = 3
"""Rounds of a dialogue whose first is answered yes or no and whose second is answered with numbers."""


def answer_faults(record: Record) -> Iterator[tuple[str, str]]:
    """(kind, message) of what is wrong with a task record, without its mask; kinds are those of `llava.data.check`."""
    task, answers = record.task, [answer for _, answer in record.conversation]
    if task == "caption":
        return
    if not answers:
        yield "answer", f"task {task!r} has no question and answer; they belong into the conversation"
        return
    if task != "dialog" and len(answers) > 1:
        yield "answer", f"task {task!r} is one question and its answer, here are {len(answers)} rounds"
        return
    if task == "dialog" and len(answers) != _DIALOGUE:
        return
    if task in ("binary", "dialog"):
        changed = parse_binary(answers[0])
        if changed is None:
            yield "answer", f"{answers[0]!r} is neither yes nor no"
        elif record.change_flag is not None and changed != record.change_flag:
            yield "answer-flag", f"the answer is {answers[0]!r}, change_flag is {int(record.change_flag)}"
    if task in ("count", "dialog"):
        text = answers[task == "dialog"]
        counts = parse_counts(text)
        if not counts.valid:
            yield "answer", f"{text!r} gives no number of roads or of buildings"
        elif record.change_flag is False and (counts.roads or counts.buildings):
            yield "answer-flag", f"the answer is {text!r}, change_flag is 0"
    if task == "loc":
        places = parse_places(answers[0])
        if not places.valid or places.unknown:
            yield "answer", f"{answers[0]!r} does not give places of roads and of buildings"
        elif record.change_flag is False and (places.roads or places.buildings):
            yield "answer-flag", f"the answer is {answers[0]!r}, change_flag is 0"


def mask_differences(record: Record, labels: Labels) -> Iterator[str]:
    """What a task record's answers say otherwise than its mask; answers that cannot be read say nothing."""
    task, answers = record.task, [answer for _, answer in record.conversation]
    if not answers or (task == "dialog" and len(answers) != _DIALOGUE):
        return
    if task in ("binary", "dialog"):
        changed = parse_binary(answers[0])
        if changed is not None and changed != labels.changed:
            yield f"the answer is {answers[0]!r}, the mask is {'not ' * labels.changed}empty"
    if task in ("count", "dialog"):
        text = answers[task == "dialog"]
        counts = parse_counts(text)
        if counts.valid and (counts.roads, counts.buildings) != (labels.roads, labels.buildings):
            yield f"the answer is {text!r}, the mask shows {labels.roads} roads and {labels.buildings} buildings"
    if task == "loc":
        places = parse_places(answers[0])
        there = (set(labels.road_places), set(labels.building_places))
        if places.valid and (places.roads, places.buildings) != there:
            shown = ", ".join(
                f"{name} in {' '.join(place for place in PLACES if place in cells) or 'no cell'}"
                for name, cells in zip(("roads", "buildings"), there, strict=True)
            )
            yield f"the answer is {answers[0]!r}, the mask shows {shown}"
