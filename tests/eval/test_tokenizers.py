"""Words by the PTB tokenizer: as pycocoevalcap's, text by text, whatever the texts hold."""

import random
import sys

import pytest

from llava.errors import ConfigError, LlavaError, MissingDependencyError
from llava.eval import tokenizers
from llava.eval.metrics import score
from llava.eval.tokenizers import PtbTokenizer, load_treatment
from llava.java import find_java

TEXTS = [
    "A road, near the houses, appears.",
    'It\'s built (on the left) - "here"; etc.',
    "the U.S.A. has 10,000.5 houses ... or so!",
    "a | b & c <d> \\ `e'",
    "caf\u00e9 \u9053\u8def",
]
HOSTILE = [
    "",
    "  ",
    "...",
    "a\nb\rc\x00d\x85e\u2028f",
    "\ud800",
    "\U0001f697",
    "-lrb-",
    "word " * 10_000,
    "\ufeff",
]


@pytest.fixture(scope="module")
def ptb() -> PtbTokenizer:
    if find_java() is None:
        pytest.skip("no Java here")
    try:
        return PtbTokenizer()
    except MissingDependencyError:
        pytest.skip("pycocoevalcap's tokenizer is not here")


def test_equals_pycocoevalcap(ptb, monkeypatch):
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer as Plain

    monkeypatch.setenv("PATH", str(ptb.java.parent))
    monkeypatch.setenv(
        "JAVA_TOOL_OPTIONS", "-Dfile.encoding=UTF-8"
    )  # the plain one leaves that to the machine
    plain = Plain().tokenize({i: [{"caption": text}] for i, text in enumerate(sorted(TEXTS))})
    assert ptb(sorted(TEXTS)) == [line for (line,) in plain.values()]


def test_no_text_touches_another(ptb):
    alone = ptb(TEXTS)
    mixed = [text for pair in zip(TEXTS, HOSTILE[: len(TEXTS)], strict=True) for text in pair] + HOSTILE[
        len(TEXTS) :
    ]
    fresh = PtbTokenizer(ptb.java)
    dice = random.Random(0)
    order = dice.sample(range(len(mixed)), len(mixed))
    found = dict(zip([mixed[i] for i in order], fresh([mixed[i] for i in order]), strict=True))
    assert [found[text] for text in TEXTS] == alone
    assert [found[text] for text in ("", "  ", "...", "\ud800", "\ufeff")] == [""] * 5
    assert found["a\nb\rc\x00d\x85e\u2028f"] == "a b c d e f" and len(found[HOSTILE[7]].split()) == 10_000


def test_scores_by_ptb_are_of_its_words(ptb):
    pytest.importorskip("pycocoevalcap.bleu.bleu")
    references = {"a": ["A road, appears!"], "b": ["nothing has changed"]}
    said = {"a": "a road appears", "b": "nothing (at all) has changed"}
    by_ptb = score(said, references, meteor=False, tokenizer="ptb", resamples=0)
    by_hand = {uid: ptb([text])[0] for uid, text in said.items()}
    plain = score(by_hand, {uid: ptb(texts) for uid, texts in references.items()}, meteor=False, resamples=0)
    assert by_ptb.captions() == plain.captions() and by_ptb.per_pair["a"]["ROUGE-L"] == pytest.approx(100)
    assert by_ptb.tokenizer == "ptb" and "words by the ptb tokenizer" in by_ptb.table()


@pytest.mark.skipif(sys.platform == "win32", reason="the fake Java is a script")
@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("time.sleep(600)", r"did not end within 0\.5 s"),
        ("print('one line')", "gave 1 lines for 2"),
        ("sys.exit('no memory')", "no memory"),
    ],
)
def test_a_run_that_fails_is_an_error(tmp_path, monkeypatch, code, message):
    java = tmp_path / "java"
    java.write_text(f"#!{sys.executable}\nimport sys, time\n{code}\n")
    java.chmod(0o755)
    monkeypatch.setattr(tokenizers, "_find_jar", lambda: tmp_path / "x.jar")
    with pytest.raises(LlavaError, match=message):
        PtbTokenizer(java, timeout=0.5 if "sleep" in code else 60)(["a", "b"])


def test_what_is_missing_is_said(monkeypatch):
    with pytest.raises(ConfigError, match="unknown tokenizer 'x'; known: ptb, release"):
        load_treatment("x")
    monkeypatch.setattr("llava.java.find_java", lambda: None)
    with pytest.raises(MissingDependencyError, match="the PTB tokenizer needs Java"):
        load_treatment("ptb")
