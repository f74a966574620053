"""Whether a caption states a change, and how text is normalised before scoring."""

import gzip
import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.tasks.caption import NO_CHANGE_CAPTION, normalise, says_change

LEVIR_CC = Path(__file__).parents[3] / "shared/real/levir_cc_captions.jsonl.gz"

TEMPLATES = {
    "there is no difference",
    "the two scenes seem identical",
    NO_CHANGE_CAPTION,
    "no change has occurred",
    "almost nothing has changed",
}

UNCHANGED = [
    *sorted(TEMPLATES),
    "The two scenes seem identical .",
    "no obvious change",
    "there are no changes",
    "nothing has changed",
    "unchanged",
    "identical",
    "There is no significant difference between the two images.",
    "I cannot see any noticeable differences between Image1 and Image2.",
    "There aren't any changes",
    "the road and the houses remain unchanged",
    "no houses, roads or trees have appeared",
    "no buildings were removed or added",
    "there doesn't appear to be any change",
    "the two images appear to be the same",
    "the houses built along the road remain unchanged",
    "hardly any changes",
    "",
    " ... ",
]
CHANGED = [
    "some houses are built along the road",
    "a villa with a pool on the left",
    "few houses appear in the forest",
    "three same houses are located by the road",
    "many similar houses are located at the crossroad",
    "the trees are no longer lush",
    "the road remains unchanged while houses appear",
    "the road remains unchanged, but two houses appear",
    "no change except a new road",
    "apart from a new building, the scene is the same",
    "two identical houses are built",
    "a new house appears in the otherwise unchanged scene",
    "the images are not identical",
    "not only houses but also roads appear",
    "a few changes: a house is built",
    "houses without roads appear",
    "Two houses appear. Nothing else has changed.",
    "there is a difference",
]


@pytest.mark.parametrize("text", UNCHANGED)
def test_no_change_is_understood(text):
    assert not says_change(text)


@pytest.mark.parametrize("text", CHANGED)
def test_change_is_understood(text):
    assert says_change(text)


@pytest.mark.skipif(not LEVIR_CC.is_file(), reason="the captions of LEVIR-CC are not here")
def test_every_caption_of_levir_cc_is_understood():
    with gzip.open(LEVIR_CC, "rt", encoding="utf-8") as lines:
        captions = {text for line in lines for text in json.loads(line)["captions"]}
    assert len(captions) == 19266
    assert {text for text in captions if not says_change(text)} == TEMPLATES


@pytest.mark.parametrize("text", ["not the house, " * 2000, "no x, " + "y, " * 5000, "there is no " * 5000])
def test_endless_captions_are_read_in_time(text):
    start = time.monotonic()
    says_change(text)
    assert time.monotonic() - start < 5


@given(st.text())
def test_any_text_has_an_answer_that_case_and_space_do_not_change(text):
    text = text.encode(errors="ignore").decode().lower()
    assert says_change(f"  {text}\n") == says_change(text)


def test_normalisation_is_that_of_the_release():
    assert normalise(" A road.  Houses,\ttoo , at 0.5 m .\n") == "a road houses, too , at 05 m"
    assert normalise("...") == ""
