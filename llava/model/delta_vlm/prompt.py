"""How a question, and the rounds before it, become the text that the model reads; and answers what it learns.

One function renders for training, evaluation and chat, so that a model is always asked as it was taught:
- "natural": words as they are, `Question: ... Answer: ...` a round, `Answer:` at the end.
- "reference": the release's training: lower case, without `. ! " ( ) * # : ; ~`, rounds as `q ... a ...`, no mark at
  the end; answers are cleaned alike.
- "reference_bare": the same, without the `q` before a question that stands alone, as the release was evaluated.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from llava.data.conversation import IMAGE_TOKEN
from llava.errors import ConfigError, DataError

STYLES = ("natural", "reference", "reference_bare")
QFORMER_TEXTS = ("prompt", "question")

_REMOVED = re.compile(r'[.!"()*#:;~]')


class Prompt(NamedTuple):
    """A rendered prompt."""

    text: str
    start: int
    """Where in `text` the current round begins; what is before it may be cut away, the rest never."""


def clean(text: str, style: str) -> str:
    """A question or an answer as `style` writes it; image marks are removed in every style.

    Raises:
        ConfigError: an unknown style.
    """
    if style not in STYLES:
        raise ConfigError(f"unknown prompt style {style!r}; known: {', '.join(STYLES)}")
    text = text.replace(IMAGE_TOKEN, " ")
    if style != "natural":
        text = " ".join(_REMOVED.sub(" ", text.lower()).split())
    return text.strip()


def render_prompt(history: Sequence[tuple[str, str]], question: str, style: str) -> Prompt:
    """The prompt for `question` after rounds of (question, answer), oldest first.

    Raises:
        DataError: nothing is left of the question.
        ConfigError: an unknown style.
    """
    asked = clean(question, style)
    if not asked:
        raise DataError(f"the question {question!r} is empty in prompt style {style!r}")
    ask, answer = ("Question:", "Answer:") if style == "natural" else ("q", "a")
    before = "".join(
        f"{word} "
        for earlier, answered in history
        for word in (ask, clean(earlier, style), answer, clean(answered, style))
        if word
    )
    if style == "natural":
        return Prompt(f"{before}{ask} {asked} {answer}", len(before))
    alone = style == "reference_bare" and not history
    return Prompt(before + (asked if alone else f"{ask} {asked}"), len(before))
