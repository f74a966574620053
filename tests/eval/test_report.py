"""The report as a file: what is in it, what it asks for, how it comes about; a browser tests it at work."""

import base64
import hashlib
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llava.errors import ConfigError, DataError, ImageError
from llava.eval import report
from llava.eval.pictures import Encoding, PairFiles, encode_pair, layer
from llava.eval.report import write_report
from tests.eval.report_runs import EVIL, make_run, pictures


class Scripts(HTMLParser):
    """Text of every `script` by its id, as a browser would cut it out."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self.tags: list[str] = []
        self._id: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "script":
            self._id = dict(attrs).get("id") or "main"
            self.found[self._id] = ""

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._id = None

    def handle_data(self, data: str) -> None:
        if self._id is not None:
            self.found[self._id] += data


def read(path: Path) -> dict[str, Any]:
    """id -> parsed JSON of the page's data."""
    found = Scripts(path.read_text("utf-8")).found
    return {name: json.loads(text) for name, text in found.items() if name != "main"}


def image(address: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(address.split(",", 1)[1])))


def test_everything_is_in_the_file_and_the_file_is_in_its_place(tmp_path: Path) -> None:
    run = make_run(3, tmp_path / "data", facts={"model": "runs/tiny", "command": "llava eval"})
    path = write_report(tmp_path / "new" / "r.html", [run], title="Tiny & co", intro="Held-out pairs.")
    assert [entry.name for entry in path.parent.iterdir()] == ["r.html"]
    assert "<title>Tiny &amp; co</title>" in path.read_text("utf-8")
    found = read(path)
    data = found["data"]
    assert data["columns"] == ["CIDEr-D", "ROUGE-L"]
    assert [pair[0] for pair in data["pairs"]] == ["set/00000", "set/00001", "set/00002"]
    assert data["pairs"][1][2] == run.lines[1]["change_caption"]
    assert data["runs"][0]["facts"] == [["model", "runs/tiny"], ["command", "llava eval"]]
    assert data["runs"][0]["scores"] == run.scores
    assert data["layers"] == {"maps": [False], "truth": True}
    assert [name for name in found if name.startswith("pictures-")] == [
        "pictures-0",
        "pictures-1",
        "pictures-2",
    ]
    assert image(found["pictures-0"]["before"]).size == (64, 48)


def test_the_page_asks_nobody_and_runs_one_script_only(tmp_path: Path) -> None:
    page = write_report(tmp_path / "r.html", [make_run(2, tmp_path)]).read_text("utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert (
        policy and policy[1].startswith("default-src 'none'; img-src data:; ") and "unsafe" not in policy[1]
    )
    for tag, source in (("style", "style-src"), ("script", "script-src")):
        code = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert code
        digest = base64.b64encode(hashlib.sha256(code[1].encode()).digest()).decode()
        assert f"{source} 'sha256-{digest}'" in policy[1]
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|<link|@import|url\(|<iframe", page)


@given(st.text(st.characters()))
def test_no_text_leaves_its_place(text: str) -> None:
    page = f'<script type="application/json" id="data">{report._json({"text": text})}</script><p>end</p>'
    parsed = Scripts(page)
    assert parsed.tags == ["script", "p"] and page.isascii()
    assert json.loads(parsed.found["data"]) == {"text": text}


def test_evil_text_everywhere_changes_no_markup(tmp_path: Path) -> None:
    plain = write_report(tmp_path / "plain.html", [make_run(1)], title="t").read_text("utf-8")
    run = make_run(1, name=EVIL, facts={EVIL: EVIL})
    line = {**run.lines[0], "uid": EVIL, "pred": EVIL, "change_caption": [EVIL]}
    path = write_report(
        tmp_path / "r.html", [replace(run, lines=[line], per_pair={EVIL: {EVIL: 1.0}})], title=EVIL
    )
    assert Scripts(path.read_text("utf-8")).tags == Scripts(plain).tags
    assert read(path)["data"]["pairs"][0][0] == EVIL


def test_a_failure_leaves_the_old_report_and_names_the_pair_and_the_file(tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    path.write_text("old")
    run = make_run(9, tmp_path)
    run.lines[7]["img2_path"] = "gone.png"  # type: ignore[index]
    with pytest.raises(ImageError, match=r"'set/00007'.*gone\.png"):
        write_report(path, [run])
    assert path.read_text() == "old" and not list(tmp_path.glob("*.part"))


def test_missing_and_broken_pictures_are_named_and_the_rest_is_there(tmp_path: Path) -> None:
    run = make_run(4, tmp_path)
    (tmp_path / "broken.png").write_bytes((tmp_path / "before.png").read_bytes()[:200])
    run.lines[0]["img1_path"] = "gone.png"  # type: ignore[index]
    run.lines[2]["img1_path"] = "broken.png"  # type: ignore[index]
    told: list[tuple[str, str]] = []
    found = read(write_report(tmp_path / "r.html", [run], on_skip=lambda uid, why: told.append((uid, why))))
    assert [uid for uid, _ in told] == ["set/00000", "set/00002"]
    assert "gone.png" in told[0][1] and "broken.png" in told[1][1]
    assert found["skipped"] == dict(told)
    assert "pictures-1" in found and "pictures-3" in found and "pictures-0" not in found


def test_pictures_come_one_after_the_other(tmp_path: Path) -> None:
    asked = []
    run = make_run(200, tmp_path, change_map=lambda uid: asked.append(uid))
    pairs = report._pairs(run)
    made = report._pictures([run], pairs, range(200), Encoding(side=64), lambda *_: None)
    assert next(made)[0] == 0
    assert len(asked) < 40  # the other pairs have not been touched
    made.close()


def test_beyond_the_limit_the_wrong_and_the_whole_range_are_pictured(tmp_path: Path) -> None:
    run = make_run(100, tmp_path)
    data = read(write_report(tmp_path / "r.html", [run], max_image_pairs=20))["data"]
    chosen = data["pictures"]["chosen"]
    assert len(chosen) == 20 == data["pictures"]["shown"] and len(data["pairs"]) == 100
    wrong = [i for i in chosen if data["pairs"][i][1] != data["pairs"][i][3][0][1]]
    assert len(wrong) == 10
    ranks = sorted(range(100), key=lambda i: data["pairs"][i][3][0][2][0])
    told_right = [i for i in ranks if i not in wrong]
    assert {told_right[0], told_right[-1]} <= set(chosen)
    nothing = read(write_report(tmp_path / "n.html", [run], max_image_pairs=0))
    assert list(nothing) == ["data", "skipped"]


def test_two_runs_are_put_in_one_order(tmp_path: Path) -> None:
    first, second = make_run(6), make_run(6, seed=1, name="longer")
    mixed = replace(second, lines=second.lines[::-1])
    data = read(write_report(tmp_path / "r.html", [first, mixed]))["data"]
    assert [run["name"] for run in data["runs"]] == ["tiny", "longer"]
    for pair, a, b in zip(data["pairs"], first.lines, second.lines, strict=True):
        assert [said[0] for said in pair[3]] == [a["pred"], b["pred"]]
        assert pair[3][1][2][0] == pytest.approx(second.per_pair[b["uid"]]["CIDEr-D"], abs=1e-3)  # type: ignore[index]


def test_runs_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    run = make_run(4)
    with pytest.raises(DataError, match=r"2 pairs are in one of the two runs only: set/00004, set/00005"):
        write_report(tmp_path / "r.html", [run, make_run(6, name="b")])
    other = make_run(4, name="b")
    other.lines[2]["change_caption"][0] = "another"
    with pytest.raises(DataError, match="'set/00002' has other references"):
        write_report(tmp_path / "r.html", [run, other])
    with pytest.raises(DataError, match="scores are of 4 pairs, its predictions are 3"):
        write_report(tmp_path / "r.html", [replace(run, lines=run.lines[:3])])
    with pytest.raises(DataError, match="'set/00000': comes twice"):
        write_report(tmp_path / "r.html", [replace(run, lines=[*run.lines, run.lines[0]])])
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    "options",
    [{"images": "copy"}, {"max_image_pairs": -1}, {"image_side": 4}, {"quality": 99}],
    ids=lambda options: next(iter(options)),
)
def test_options_out_of_range_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        write_report(tmp_path / "r.html", [make_run(1)], **options)
    with pytest.raises(ConfigError, match="these are 3"):
        write_report(tmp_path / "r.html", [make_run(1)] * 3)


@pytest.mark.parametrize("field", ["uid", "pred", "change_caption"])
def test_a_line_of_another_kind_is_named(tmp_path: Path, field: str) -> None:
    run = make_run(2)
    run.lines[1][field] = 7 if field != "change_caption" else "one sentence"  # type: ignore[index]
    with pytest.raises(DataError, match=r"run 'tiny', pair ('set/00001'|7)"):
        write_report(tmp_path / "r.html", [run])


def test_links_are_relative_and_quoted_and_what_browsers_cannot_show_is_embedded(tmp_path: Path) -> None:
    data = tmp_path / "my data#1"
    run = make_run(2, data)
    Image.open(data / "before.png").save(data / "before.tif")
    run.lines[1]["img1_path"] = "before.tif"  # type: ignore[index]
    path = write_report(tmp_path / "out" / "r.html", [run], images="link")
    found = read(path)
    assert found["pictures-0"]["before"] == "../my%20data%231/before.png"
    assert found["pictures-0"]["size"] == [64, 48]
    assert found["pictures-0"]["truth"].startswith("data:image/png")
    assert found["pictures-1"]["before"].startswith("data:image/jpeg")


def test_both_dates_share_one_frame_and_layers_lie_on_it(tmp_path: Path) -> None:
    pictures(tmp_path, (640, 480))
    Image.new("RGBA", (1280, 960), "red").save(tmp_path / "larger.png")
    files = PairFiles(tmp_path / "before.png", tmp_path / "larger.png", tmp_path / "mask.png")
    grey = Image.linear_gradient("L").resize((9, 9))
    pair = encode_pair(files, [grey, None], Encoding(side=256))
    assert pair["size"] == [256, 192]
    shown = [image(pair[name]) for name in ("before", "after", "truth")]
    assert [picture.size for picture in shown] == [(256, 192)] * 3
    assert pair["maps"][1] is None
    drawn = image(pair["maps"][0])
    assert drawn.size == (9, 9)  # the browser enlarges it
    opacity = drawn.convert("RGBA").getchannel("A")
    assert opacity.getpixel((4, 0)) < 20 and opacity.getpixel((4, 8)) > 150  # type: ignore[operator]
    outline = shown[2].convert("RGBA").getchannel("A")
    inside, edge, outside = (outline.getpixel(at) for at in ((7, 7), (4, 4), (60, 60)))
    assert outside == 0 and edge > 150 and 0 < inside < 100  # type: ignore[operator]


def test_a_large_layer_is_shrunk() -> None:
    assert image(layer(Image.new("L", (1000, 500), 255), (100, 50), (1, 2, 3))).size == (100, 50)
