"""The result page: self-contained, complete, and nothing that is shown can become markup."""

import base64
import io
import re

import pytest
from PIL import Image

from llava.eval.metrics import score
from llava.eval.page import PairRow, write_page

pytest.importorskip("pycocoevalcap.bleu.bleu")
EVIL = "</p><script>alert('x')</script> & \"quoted\" \ud800"


@pytest.fixture(scope="module")
def scores():
    references = {"a": ["a road appears"], "b": ["there is no difference"], "c": ["two houses are built"]}
    predictions = {"a": "a road appears", "b": "a house is built", "c": ""}
    return score(predictions, references, meteor=False)


def row(uid="a", changed=True, prediction="a road appears", **more) -> PairRow:
    before, after = Image.new("RGB", (64, 48), "green"), Image.new("RGBA", (128, 96), "red")
    return PairRow(uid, before, after, ["a road appears"], prediction, changed, **more)


def pictures(page: str) -> list[Image.Image]:
    return [
        Image.open(io.BytesIO(base64.b64decode(code)))
        for code in re.findall(r'src="data:image/\w+;base64,([^"]+)"', page)
    ]


def test_the_page_shows_words_scores_and_how_it_was_made(tmp_path, scores):
    made = {"Command": "llava quickstart --seed 0", "Time": "3 min"}
    path = write_page(tmp_path / "new" / "page.html", "Tiny model", [row(score=12.345)], scores, made=made)
    page = path.read_text("utf-8")
    for text in (
        "Tiny model",
        "a road appears",
        "llava quickstart --seed 0",
        "12.35",
        scores.predictions_sha256,
    ):
        assert text in page
    assert f"{scores.captions().rouge_l:.2f}" in page and scores.baselines[0].sentences[0] in page
    assert [entry.name for entry in path.parent.iterdir()] == ["page.html"]


def test_all_text_is_escaped(tmp_path, scores):
    evil = row(uid=EVIL, prediction=EVIL)
    evil = PairRow(EVIL, evil.before, evil.after, [EVIL], EVIL, True, score=1.0)
    path = write_page(
        tmp_path / "p.html", EVIL, [evil], scores, made={EVIL: EVIL}, intro=EVIL, score_name=EVIL
    )
    page = path.read_text("utf-8")
    assert page.count("<script>") == 1 and "alert('x')" not in page
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; &#34;quoted&#34;" in page


def test_the_page_asks_nobody_for_anything(tmp_path, scores):
    page = write_page(tmp_path / "p.html", "t", [row()], scores).read_text("utf-8")
    assert "default-src 'none'" in page
    assert not re.search(r"https?:|<link|@import|url\(|src=\"(?!data:)", page)


def test_both_dates_share_one_frame_and_layers_lie_on_it(tmp_path, scores):
    grey = Image.linear_gradient("L").resize((9, 9))
    mask = Image.new("L", (64, 48), 0)
    mask.paste(1, (8, 8, 30, 30))
    rows = [row(change_map=grey, truth=mask), row(uid="b")]
    found = pictures(write_page(tmp_path / "p.html", "t", rows, scores).read_text("utf-8"))
    assert [picture.format for picture in found] == ["JPEG", "JPEG", "PNG", "PNG", "JPEG", "JPEG"]
    assert {picture.size for picture in found} == {(64, 48)}
    opacity = found[2].convert("RGBA").getchannel("A")
    assert opacity.getpixel((32, 0)) < 20 and opacity.getpixel((32, 47)) > 150
    outline = found[3].convert("RGBA").getchannel("A")
    assert [outline.getpixel(at) for at in ((2, 2), (8, 8))] == [0, 200] and 0 < outline.getpixel(
        (19, 19)
    ) < 100


def test_large_pictures_are_shrunk(tmp_path, scores):
    large = PairRow("x", Image.new("RGB", (2000, 1000)), Image.new("RGB", (2000, 1000)), ["r"], "p", True)
    found = pictures(write_page(tmp_path / "p.html", "t", [large], scores).read_text("utf-8"))
    assert {picture.size for picture in found} == {(512, 256)} and large.before.size == (2000, 1000)


@pytest.mark.parametrize(
    ("changed", "prediction", "verdict"),
    [
        (True, "a road appears", "right"),
        (False, "nothing has changed", "right"),
        (True, "nothing has changed", "missed change"),
        (True, "", "missed change"),
        (False, "a road appears", "false alarm"),
    ],
)
def test_the_decision_is_marked(tmp_path, scores, changed, prediction, verdict):
    one = row(changed=changed, prediction=prediction)
    assert one.verdict == verdict
    page = write_page(tmp_path / "p.html", "t", [one], scores).read_text("utf-8")
    card = re.search(r"<article.*?</article>", page, re.DOTALL).group()
    assert verdict in card
    assert f'data-changed="{str(changed).lower()}" data-wrong="{str(verdict != "right").lower()}"' in card
    assert f"Wrong decision {int(verdict != 'right')}" in page


def test_a_page_without_pairs_or_layers_has_no_dead_buttons(tmp_path, scores):
    page = write_page(tmp_path / "p.html", "t", [], scores).read_text("utf-8")
    assert 'data-all="' not in page and "<article" not in page
