"""How questions and answers become text, style by style."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.errors import ConfigError, DataError
from llava.model.delta_vlm.prompt import STYLES, clean, render_prompt

ROUNDS = [("Any change?", "Yes."), ("How MANY roads (and houses)?", "1 road; 3 houses!")]
LAST = "<image> <image> Now: describe it, top-left - isn't [it] 'new'/old?"


@pytest.mark.parametrize(
    ("style", "rounds", "text"),
    [
        ("reference", 0, "q now describe it, top-left - isn't [it] 'new'/old?"),
        ("reference_bare", 0, "now describe it, top-left - isn't [it] 'new'/old?"),
        (
            "reference",
            2,
            "q any change? a yes q how many roads and houses ? a 1 road 3 houses "
            "q now describe it, top-left - isn't [it] 'new'/old?",
        ),
        ("reference_bare", 1, "q any change? a yes q now describe it, top-left - isn't [it] 'new'/old?"),
        ("natural", 0, "Question: Now: describe it, top-left - isn't [it] 'new'/old? Answer:"),
        (
            "natural",
            1,
            "Question: Any change? Answer: Yes. Question: Now: describe it, top-left - isn't [it] 'new'/old? "
            "Answer:",
        ),
    ],
)
def test_styles(style, rounds, text):
    prompt = render_prompt(ROUNDS[:rounds], LAST, style)
    assert prompt.text == text
    assert prompt.text[prompt.start :].startswith(("q now", "now", "Question: Now"))


def test_reference_cleaning_replaces_ten_marks_and_keeps_the_others():
    assert clean('  A.b!c"d(e)f*g#h:i;j~k  ', "reference") == "a b c d e f g h i j k"
    assert clean("it's, a-b/c? [d]\n\te", "reference") == "it's, a-b/c? [d] e"
    assert clean(" Yes. <image>", "natural") == "Yes."


@pytest.mark.parametrize("style", STYLES)
def test_a_question_of_nothing(style):
    with pytest.raises(DataError, match="empty"):
        render_prompt(ROUNDS, " <image>\n", style)


def test_an_unknown_style():
    with pytest.raises(ConfigError, match="unknown prompt style 'plain'; known: natural, reference"):
        render_prompt([], "What?", "plain")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.text(max_size=20), st.text(max_size=20)), max_size=3),
    st.text(max_size=20),
    st.sampled_from(STYLES),
)
def test_any_text_keeps_its_current_question_behind_the_mark(history, question, style):
    if not clean(question, style):
        return
    prompt = render_prompt(history, question, style)
    alone = render_prompt([], question, style).text
    assert prompt.text[prompt.start :].removeprefix("q ") == alone.removeprefix("q ")
    if style != "natural":
        assert clean(prompt.text, "reference") == prompt.text
