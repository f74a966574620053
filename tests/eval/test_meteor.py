"""METEOR through its jar: equal to the plain scorer, and no text can hang it or shift its answers."""

import random
import sys
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava.errors import DataError, LlavaError, MissingDependencyError
from llava.eval import meteor as module
from llava.eval.meteor import MAX_WORDS, Meteor, clean, corpus_meteor, find_jar, require_meteor, shared_meteor
from llava.java import find_java

needs_meteor = pytest.mark.usefixtures("meteor")

HOSTILE = [
    "a road ||| some houses",
    "|||",
    "||||| a |||||| road",
    "a road\nEVAL ||| 1.0",
    "a\r\nroad\rappears",
    "a\troad\x00\x07\x1b[31m appears\x85\u2028\u2029\x0b\x0c",
    "a road \U0001f697 appears \u200b\ufeff",
    "caf\u00e9 \u9053\u8def",
    "\ud800 half a pair",
    "",
    "   ",
    "SCORE",
    "!!! ... ???",
    "word " * 10_000,
]
PLAIN = [
    (
        "some houses are built along the road",
        ["many houses are built along the roads", "a residential area appears"],
    ),
    ("the scene is the same as before", ["there is no difference", "the scene is the same as before"]),
    ("a road appears, and trees vanish", ["trees are removed, a road shows up"]),
]


@pytest.fixture(scope="module")
def meteor():
    if find_java() is None:
        pytest.skip("no Java here")
    try:
        find_jar()
    except MissingDependencyError:
        pytest.skip("no METEOR jar here")
    return shared_meteor()


def random_sentence(dice: random.Random, longest: int = 14) -> str:
    words = "a the some many houses house buildings road roads trees appear appeared built , are is on desert"
    return " ".join(dice.choices(words.split(), k=dice.randint(1, longest)))


@needs_meteor
def test_equals_plain_pycocoevalcap(meteor, monkeypatch):
    monkeypatch.setenv("PATH", f"{find_java().parent}")
    from pycocoevalcap.meteor.meteor import Meteor as Plain

    dice = random.Random(0)
    predictions = [random_sentence(dice) for _ in range(40)] + [text for text, _ in PLAIN]
    references = [[random_sentence(dice) for _ in range(5)] for _ in range(40)] + [
        group for _, group in PLAIN
    ]
    plain = Plain()
    mean, each = plain.compute_score(
        dict(enumerate(references)), {i: [text] for i, text in enumerate(predictions)}
    )
    for stream in (plain.meteor_p.stdout, plain.meteor_p.stderr):
        stream.close()
    assert meteor.score(predictions, references) == (mean, each)
    assert 0 < mean < 1


@needs_meteor
def test_hostile_captions_do_not_touch_their_neighbours(meteor):
    _, alone = meteor.score([text for text, _ in PLAIN], [group for _, group in PLAIN])
    predictions, references = [], []
    for text in HOSTILE:
        predictions += [PLAIN[0][0], text, PLAIN[1][0], PLAIN[2][0]]
        references += [PLAIN[0][1], ["a road appears", text[:60]], PLAIN[1][1], PLAIN[2][1]]
    references = [[text if clean(text) else "nothing" for text in group] for group in references]
    mean, each = meteor.score(predictions, references)
    assert len(each) == len(predictions) and 0 < mean < 1
    for start in range(0, len(each), 4):
        assert [each[start], each[start + 2], each[start + 3]] == alone


@needs_meteor
def test_empty_captions_score_nothing_and_perfect_ones_everything(meteor):
    same = "some houses are built along the road"
    assert meteor.score(["", "  "], [[same], [same, "a road"]]) == (0.0, [0.0, 0.0])
    assert meteor.score([same], [[same, "a road"]]) == (1.0, [1.0])
    mean, each = meteor.score([same, ""], [[same], [same]])
    assert each == [1.0, 0.0] and 0 < mean < 1


@needs_meteor
def test_a_set_is_scored_from_the_sums_of_its_statistics(meteor):
    """As the jar does it, for random sets with perfect, empty and foreign captions among them."""
    dice = random.Random(1)
    for size in (1, 2, 7, 40):
        references = [[random_sentence(dice) for _ in range(3)] for _ in range(size)]
        predictions = [random_sentence(dice) for _ in range(size)]
        for i in range(size):
            predictions[i] = dice.choice([predictions[i], predictions[i], references[i][1], "", "qqq www"])
        whole, each = meteor.score(predictions, references)
        rows = meteor.statistics(predictions, references)
        assert rows.shape == (size, 23)
        assert corpus_meteor(rows) == pytest.approx(each, abs=1e-12)
        assert corpus_meteor(rows.sum(0)) == pytest.approx(whole, abs=1e-12)


def test_statistics_of_nothing_score_nothing():
    assert corpus_meteor(np.zeros((2, 23))).tolist() == [0, 0]
    assert np.isnan(corpus_meteor(np.full(23, np.nan)))


@needs_meteor
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.text(max_size=60), max_size=40))
def test_no_text_hangs_or_shifts_meteor(texts):
    """Whatever stands between two known captions, more of it than one batch holds, both score as alone."""
    caption, group = PLAIN[0]
    scores = corpus_meteor(shared_meteor().statistics([caption, *texts, caption], [group] * (len(texts) + 2)))
    alone = corpus_meteor(shared_meteor().statistics([caption], [group]))[0]
    assert scores[0] == scores[-1] == alone and ((scores >= 0) & (scores <= 1)).all()


@needs_meteor
def test_references_must_have_words(meteor):
    with pytest.raises(DataError, match="caption 1"):
        meteor.score(["a", "b"], [["a"], ["b", "\n"]])
    with pytest.raises(DataError, match="1 captions and 0 lists"):
        meteor.score(["a"], [])


@pytest.mark.parametrize("text", HOSTILE)
def test_a_cleaned_caption_is_one_line_without_marks(text):
    line = clean(text)
    assert "|||" not in line and len(line.splitlines()) <= 1 and len(line.split()) <= MAX_WORDS
    line.encode()
    assert clean(line) == line


def test_cleaning_leaves_captions_alone():
    for text in ("a road, and (2) trees - appear", "caf\u00e9 \u9053\u8def \U0001f697", "a | b"):
        assert clean(text) == text


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A Meteor whose Java is a Python script: `fake("code")`."""

    def start(code: str, timeout: float = 20.0) -> Meteor:
        java = tmp_path / "java"
        java.write_text(f"#!{sys.executable}\nimport sys, time\n{code}\n")
        java.chmod(0o755)
        monkeypatch.setattr(module, "find_jar", lambda: tmp_path / "meteor-1.5.jar")
        return Meteor(java=java, timeout=timeout)

    return start


@pytest.mark.skipif(sys.platform == "win32", reason="the fake Java is a script")
def test_silence_ends_in_an_error_and_a_reaped_process(fake):
    meteor = fake("time.sleep(600)", timeout=0.5)
    start = time.monotonic()
    with pytest.raises(LlavaError, match=r"did not answer within 0\.5 s"):
        meteor.score(["a" * 1000] * 3, [["b " * 40_000]] * 3)  # more than a pipe holds: the write blocks
    assert time.monotonic() - start < 20
    assert meteor.closed and meteor._process.returncode is not None
    with pytest.raises(LlavaError, match="closed"):
        meteor.score(["a"], [["b"]])


@pytest.mark.skipif(sys.platform == "win32", reason="the fake Java is a script")
@pytest.mark.parametrize("answer", ["Error: no such thing", "1.0 2.0", "nan?"])
def test_an_answer_that_is_no_statistics_is_an_error(fake, answer):
    meteor = fake(f"print({answer!r}, flush=True); time.sleep(600)")
    with pytest.raises(LlavaError, match="no statistics"):
        meteor.statistics(["a"], [["b"]])
    assert meteor.closed


@pytest.mark.skipif(sys.platform == "win32", reason="the fake Java is a script")
def test_many_questions_are_answered_in_order(fake):
    """The fake answers with the caption's length in the first place; every question is asked once."""
    meteor = fake(
        "for line in sys.stdin:\n"
        "    words = line.split('|||')[-1].split()\n"
        "    print(len(words), *[0] * 22, flush=True)\n"
    )
    captions = ["w " * (i % 70) for i in range(500)]
    rows = meteor.statistics(captions, [["r"]] * 500)
    assert rows[:, 0].tolist() == [i % 70 for i in range(500)] and len(meteor._known) == 70


@pytest.mark.skipif(sys.platform == "win32", reason="the fake Java is a script")
def test_death_is_reported_with_its_last_words(fake):
    meteor = fake("sys.stdin.readline(); sys.exit('no memory for the heap')")
    with pytest.raises(LlavaError, match="no memory for the heap"):
        meteor.score(["a"], [["b"]])


@pytest.mark.skipif(sys.platform == "win32", reason="the fake Java is a script")
def test_the_process_ends_with_the_block_and_with_the_object(fake):
    with fake("time.sleep(600)") as meteor:
        process = meteor._process
    assert process.returncode is not None
    meteor.close()
    process = fake("time.sleep(600)")._process
    assert process.returncode is not None


def test_without_java_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setattr("llava.java.find_java", lambda: None)
    for start in (Meteor, require_meteor):
        with pytest.raises(MissingDependencyError, match="METEOR needs Java"):
            start()
