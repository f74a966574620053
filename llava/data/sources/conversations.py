"""Conversations about a pair, whatever form they are published in: checked rounds, and their images' marks."""

import re
from collections.abc import Iterable

from llava.data.conversation import IMAGE_TOKEN, PAIR_INTRODUCTION
from llava.data.sources.base import text_of
from llava.errors import DataError

SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

_MARK = re.compile(rf"[ \t]*{re.escape(IMAGE_TOKEN)}[ \t]*")
_BLANKS = re.compile(r"\s+")

Rounds = tuple[tuple[str, str], ...]


def rounds_of(turns: Iterable[tuple[object, object, str]], where: str) -> Rounds:
    """(question, answer) rounds of turns (speaker, text, name of the field).

    A system turn may come first; it is checked and left out, since every model here has its own. The marks
    of the two images stand in the first question, or nowhere; they are taken out, together with the words of the
    release's prompt around them.

    Raises:
        DataError: an unknown speaker, turns that do not alternate, images marked in another way.
    """
    spoken: list[tuple[str, str]] = []
    for speaker, text, what in turns:
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise DataError(f"{where}: {what} is spoken by {speaker!r}; known: {', '.join(sorted(SPEAKERS))}")
        spoken.append((SPEAKERS[speaker], text_of(text, what, where)))
    if spoken and spoken[0][0] == "system":
        spoken = spoken[1:]
    roles = [role for role, _ in spoken]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise DataError(
            f"{where}: the turns are {', '.join(roles) or 'none'}; question and answer must alternate and end "
            "with an answer"
        )
    texts = [text for _, text in spoken]
    marks = [text.count(IMAGE_TOKEN) for text in texts]
    if marks[0] not in (0, 2) or any(marks[1:]):
        raise DataError(
            f"{where}: {IMAGE_TOKEN} stands {marks[0]} times in the first question and {sum(marks[1:])} times after "
            "it; a pair is marked twice in the first question, or not at all"
        )
    texts[0] = _MARK.sub(" ", texts[0].removeprefix(PAIR_INTRODUCTION))
    texts = [text.strip() for text in texts]
    if not texts[0]:
        raise DataError(f"{where}: the first question holds nothing but image marks")
    return tuple(zip(texts[::2], texts[1::2], strict=True))


def same_question(one: str, other: str) -> bool:
    """Whether two questions are the same but for case and blanks."""
    return _BLANKS.sub(" ", one).strip().casefold() == _BLANKS.sub(" ", other).strip().casefold()
