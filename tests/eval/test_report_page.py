"""The report in a real browser: 2,000 pairs, every filter, the keyboard, hostile texts, no request."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava.eval.report import ReportRun, write_report
from llava.tasks.caption import says_change
from llava.tasks.definitions import TASK_NAMES
from tests.eval.browser import Browser, Page, browser, needs_chromium
from tests.eval.report_runs import EVIL, make_run, task_run
from tests.eval.test_task_run import ROUNDS

pytestmark = needs_chromium
MANY = 2000
TASKS = list(TASK_NAMES)
FITS = """[...document.querySelectorAll('.card-text')]
  .filter((text) => text.scrollHeight > text.clientHeight + 1).map((text) => text.textContent)"""
"""Texts that their card cuts off."""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture
def page(chromium: Browser) -> Page:
    return chromium.page()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def many(folder: Path) -> ReportRun:
    grey = Image.linear_gradient("L").resize((27, 27))
    return make_run(MANY, folder, facts={"model": "runs/tiny"}, change_map=lambda uid: grey)


@pytest.fixture(scope="module")
def report(folder: Path, many: ReportRun) -> str:
    return write_report(folder / "many.html", [many], title="Many").as_uri()


@pytest.fixture(scope="module")
def small(folder: Path, many: ReportRun) -> str:
    few = make_run(40, folder, change_map=many.change_map)
    return write_report(folder / "small.html", [few]).as_uri()


def count(page: Page) -> int:
    page.settle()
    return int(
        "".join(filter(str.isdigit, page.js("document.getElementById('count').textContent.split('of')[0]")))
    )


def shown(page: Page, number: int = 8) -> list[str]:
    """uids of the first cards, in the order they lie on the page."""
    page.js("document.getElementById('pairs').scrollIntoView()")
    page.settle()
    return list(
        page.js(
            "[...document.querySelectorAll('.card')].sort((a, b) => a.ariaPosInSet - b.ariaPosInSet)"
            f".map((card) => card.querySelector('.uid').textContent).slice(0, {number})"
        )
    )


def choose(page: Page, label: str, value: str) -> None:
    page.js(
        f"(() => {{ const select = document.querySelector('select[aria-label=\"{label}\"]'); select.value = '{value}';"
        " select.dispatchEvent(new Event('change')) })()"
    )


def right(line: Any) -> bool:
    return says_change(line["pred"]) == bool(line["change_flag"])


def test_two_thousand_pairs_open_quietly_and_few_are_in_the_page(page: Page, report: str) -> None:
    page.open(report)
    assert page.complaints() == []
    assert page.requests() == [report]
    assert count(page) == MANY
    page.js("document.getElementById('pairs').scrollIntoView()")
    page.wait(
        "[...document.querySelectorAll('.card .before, .card .after')].every((one) => one.naturalWidth === 64)"
    )
    assert 0 < page.js("document.querySelectorAll('.card').length") < 60
    page.js("scrollTo(0, document.documentElement.scrollHeight)")
    page.wait(f"document.querySelector('.card[aria-posinset=\"{MANY}\"] img')")
    page.settle()
    assert page.js("document.querySelectorAll('.card').length") < 60
    assert page.complaints() == []


def test_filters_find_what_python_finds(page: Page, report: str, many: ReportRun) -> None:
    page.open(report)
    page.js("document.querySelector('.segments button:nth-child(2)').click()")
    assert count(page) == MANY // 2
    choose(page, "Decision", "0:wrong")
    missed = [line["uid"] for line in many.lines if line["change_flag"] and not right(line)]
    assert count(page) == len(missed) > 0
    page.js("document.getElementById('reset').click()")
    assert count(page) == MANY
    page.js("document.querySelector('[data-outcome=\"0:alarm\"]').click()")
    alarms = [line for line in many.lines if not line["change_flag"] and not right(line)]
    assert count(page) == len(alarms) > 0
    assert str(len(alarms)) in page.js("document.querySelector('[data-outcome=\"0:alarm\"] b').textContent")
    page.js("document.getElementById('reset').click()")
    page.js(
        "(() => { const search = document.getElementById('search'); search.value = 'POND formed';"
        " search.dispatchEvent(new Event('input')) })()"
    )
    page.wait(
        "document.getElementById('count').textContent.length && !document.getElementById('reset').hidden"
    )
    assert count(page) == sum("pond" in " ".join([ln["pred"], *ln["change_caption"]]) for ln in many.lines)
    assert page.js("document.querySelector('.card mark').textContent.toLowerCase()") in ("pond", "formed")
    assert page.complaints() == []


def test_a_range_of_scores_by_numbers_and_by_the_histogram(page: Page, report: str, many: ReportRun) -> None:
    page.open(report)
    assert many.per_pair is not None
    values = sorted(round(row["CIDEr-D"], 3) for row in many.per_pair.values())
    page.js(
        "for (const [label, value] of [['min score', 100], ['max score', 200]]) {"
        ' const input = document.querySelector(`[aria-label="${label}"]`); input.value = value;'
        " input.dispatchEvent(new Event('change')) }"
    )
    assert count(page) == sum(100 <= value <= 200 for value in values)
    page.js("document.getElementById('reset').click()")
    page.js("document.getElementById('score-chart').scrollIntoView({ block: 'center' })")
    page.settle()
    box = page.js("document.querySelector('#score-chart svg').getBoundingClientRect().toJSON()")
    middle = box["top"] + box["height"] / 2
    page.click(box["left"] + box["width"] * 0.6, middle, (box["left"] + box["width"] * 0.9, middle))
    low, high = page.js("[...document.querySelectorAll('.bound')].map((input) => Number(input.value))")
    assert 100 < low < high
    assert count(page) == sum(low <= value <= high for value in values) < MANY
    page.click(box["left"] + box["width"] * 0.7, middle)
    assert count(page) == MANY


def test_orders(page: Page, report: str, many: ReportRun) -> None:
    page.open(report)
    assert many.per_pair is not None
    by_score = sorted(many.per_pair, key=lambda uid: many.per_pair[uid]["CIDEr-D"])  # type: ignore[index]
    assert shown(page) == by_score[:8]
    choose(page, "Sort", "best")
    assert shown(page) == by_score[::-1][:8]
    choose(page, "Score", "1")
    assert shown(page) == sorted(many.per_pair, key=lambda uid: -many.per_pair[uid]["ROUGE-L"])[:8]  # type: ignore[index]
    choose(page, "Sort", "uid")
    assert shown(page, 3) == ["set/00000", "set/00001", "set/00002"]
    choose(page, "Sort", "random")
    first = shown(page)
    page.js("document.getElementById('shuffle').click()")
    assert shown(page) != first
    page.open("about:blank")
    page.open(report)
    choose(page, "Sort", "random")
    assert shown(page) == first  # the same for everyone


def test_all_by_keyboard(page: Page, small: str) -> None:
    page.open(small)
    focused = "document.activeElement"
    page.key("/", code=191)
    assert page.js(f"{focused}.id") == "search"
    for letter in "set/0002":
        page.key(letter)
    page.wait("document.getElementById('count').textContent.startsWith('10 of')")
    page.key("Escape")
    page.js("document.querySelector('.card[tabindex=\"0\"]').focus()")
    start = page.js(f"Number({focused}.ariaPosInSet)")
    page.key("ArrowRight")
    assert page.js(f"Number({focused}.ariaPosInSet)") == start + 1
    page.key("End")
    assert page.js(f"Number({focused}.ariaPosInSet)") == 10
    page.key("Home")
    page.key("Tab")
    assert page.js(f"{focused}.type") == "range"
    page.key("ArrowRight")
    assert page.js(f"{focused}.value") == "51"
    assert page.js(f"{focused}.closest('.stage').style.getPropertyValue('--wipe')") == "51%"
    page.key("Tab")
    page.key("Enter")
    assert page.js("document.getElementById('viewer').open")
    uid = page.js("document.querySelector('#viewer .uid').textContent")
    assert page.js("decodeURIComponent(location.hash)") == f"#{uid}"
    assert page.js(f"{focused}.type") == "range"
    page.key("ArrowLeft")
    assert page.js(f"{focused}.value") == "50"
    page.key("j")
    following = page.js("document.querySelector('#viewer .uid').textContent")
    assert following != uid and page.js("decodeURIComponent(location.hash)") == f"#{following}"
    page.key("m")
    assert page.js("!document.querySelector('#viewer [data-layer=map0]').hidden")
    page.key("s")
    assert page.js("document.querySelector('#viewer .stage').classList.contains('split')")
    page.key("Escape")
    assert not page.js("document.getElementById('viewer').open")
    assert page.js("location.hash") == ""
    assert page.js(f"{focused}.getAttribute('aria-label')") == following
    page.key("?", code=191)
    assert page.js("document.getElementById('keys').open")
    assert page.complaints() == []


def test_the_wipe_by_mouse(page: Page, small: str) -> None:
    page.open(small)
    page.js("document.getElementById('pairs').scrollIntoView()")
    page.settle()
    box = page.js("document.querySelector('.card .frame').getBoundingClientRect().toJSON()")
    row = box["top"] + box["height"] / 2
    page.click(box["left"] + box["width"] / 2, row, (box["left"] + box["width"] * 0.25, row))
    wipe = page.js(
        "Number.parseFloat(document.querySelector('.card .stage').style.getPropertyValue('--wipe'))"
    )
    assert wipe == pytest.approx(25, abs=4)


def test_a_link_to_a_pair_opens_it(page: Page, small: str) -> None:
    page.open(f"{small}#set%2F00031")
    page.wait("document.querySelector('#viewer[open] .uid')?.textContent === 'set/00031'")
    page.wait("document.querySelector('#viewer img.after').naturalWidth === 64")
    page.js("location.hash = '#set/00004'")
    page.wait("document.querySelector('#viewer[open] .uid')?.textContent === 'set/00004'")
    page.js("location.hash = '#%E0%A4%A'")  # no text at all
    page.wait("!document.getElementById('viewer').open")
    assert page.complaints() == []


def test_hostile_texts_are_texts(page: Page, folder: Path) -> None:
    run = make_run(2, folder, name=EVIL, facts={EVIL: EVIL})
    lines = [{**run.lines[0], "uid": EVIL, "pred": EVIL, "change_caption": [EVIL, EVIL]}, run.lines[1]]
    scores = {**run.scores, "notes": [EVIL]}  # type: ignore[dict-item]
    hostile = replace(run, lines=lines, scores=scores, per_pair={EVIL: {EVIL: 1.0}})
    page.open(write_report(folder / "evil.html", [hostile], title=EVIL, intro=EVIL).as_uri())
    page.js("document.querySelector('.card .open').click()")
    page.settle()
    assert page.js("typeof window.hit") == "undefined"
    assert page.js("document.querySelectorAll('img[src=x], img[onerror]').length") == 0
    whole = page.js("document.getElementById('title').textContent")
    assert whole.startswith("</script><!--<img src=x onerror=") and "&amp; {{data}}" in whole
    assert page.js("document.querySelector('.prediction').textContent").startswith("</script><!--<img")
    assert page.complaints() == []


def test_two_runs_side_by_side(page: Page, folder: Path, many: ReportRun) -> None:
    first = make_run(60, folder, name="short", change_map=many.change_map)
    second = make_run(60, folder, seed=3, name="long")
    page.open(write_report(folder / "two.html", [first, second]).as_uri())
    assert count(page) == 60
    said = page.js(
        "[...document.querySelector('.card').querySelectorAll('.prediction')].map((one) => one.textContent)"
    )
    assert len(said) == 2
    assert first.per_pair is not None and second.per_pair is not None
    gains = {uid: second.per_pair[uid]["CIDEr-D"] - first.per_pair[uid]["CIDEr-D"] for uid in first.per_pair}
    order = sorted(gains, key=lambda uid: -gains[uid])
    choose(page, "Sort", "gain")
    assert shown(page) == order[:8]
    choose(page, "Sort", "loss")
    assert shown(page) == order[::-1][:8]
    choose(page, "Decision", "fixed")
    mended = [a["uid"] for a, b in zip(first.lines, second.lines, strict=True) if not right(a) and right(b)]
    assert count(page) == len(mended) > 0
    assert page.js("[...document.querySelectorAll('#table .difference')].length") == 3
    choose(page, "of", "2")
    assert "B \u2212 A" in page.js("document.querySelector('#score-chart h2').textContent")
    page.js("document.querySelector('.card .open').click()")
    assert page.js("document.querySelectorAll('#viewer .pair-scores tbody td.difference').length") == 2
    assert page.js(FITS) == []
    assert page.complaints() == []


def test_linked_pictures_come_from_beside_the_file(page: Page, folder: Path) -> None:
    path = write_report(folder / "deep" / "linked.html", [make_run(6, folder)], images="link")
    page.open(path.as_uri())
    page.js("document.getElementById('pairs').scrollIntoView()")
    page.wait("document.querySelectorAll('.card img.after').length > 2")
    page.wait("[...document.querySelectorAll('.card img')].every((image) => image.naturalWidth === 64)")
    assert set(page.requests()) == {
        path.as_uri(),
        *((folder / n).as_uri() for n in ("before.png", "after.png")),
    }
    assert page.complaints() == []


def test_pairs_without_pictures_say_why(page: Page, folder: Path) -> None:
    run = make_run(3, folder)
    run.lines[0]["img1_path"] = "gone.png"  # type: ignore[index]
    page.open(write_report(folder / "gaps.html", [run], on_skip=lambda *_: None).as_uri())
    choose(page, "Sort", "uid")
    page.wait("/gone.png/.test(document.querySelector('.card .why')?.textContent)")
    assert "1 pair could not be read: set/00000" in page.js(
        "document.getElementById('pictures-fact').textContent"
    )


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_can_be_read_and_nothing_sticks_out(page: Page, small: str, dark: bool) -> None:
    page.look(390, 844, dark=dark, mobile=True)
    page.open(small)
    assert page.js("document.documentElement.scrollWidth") <= 390
    assert page.js(FITS) == []
    ratios = page.js(
        """(() => {
          const light = (colour) => {
            const canvas = new OffscreenCanvas(1, 1).getContext('2d');
            canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
            const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((value) =>
              (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const behind = (element) => {
            const colour = getComputedStyle(element).backgroundColor;
            return colour === 'rgba(0, 0, 0, 0)' ? behind(element.parentElement) : colour;
          };
          return ['h1', '.intro', '.tile .name', '.notes p', '#table td', '.uid', '.reference', '.chip.wrong']
            .map((selector) => {
              const element = document.querySelector(selector);
              const [a, b] = [light(getComputedStyle(element).color), light(behind(element))].sort((a, b) => b - a);
              return [selector, (a + 0.05) / (b + 0.05)];
            });
        })()"""
    )
    assert [(selector, ratio) for selector, ratio in ratios if ratio < 4.5] == []
    dim = page.js("Number(/\\d+/.exec(getComputedStyle(document.body).backgroundColor)[0])")
    assert (dim < 60) == dark


def test_tasks_have_tables_and_their_answers_say_what_was_asked(page: Page, folder: Path) -> None:
    page.open(write_report(folder / "tasks.html", [task_run(folder)]).as_uri())
    heads = "[...document.querySelectorAll('#tasks h2')].map((head) => head.textContent)"
    assert page.js(heads) == TASKS[1:]  # captions have their own table
    heads = "[...document.querySelectorAll('#tasks .task-table:first-child thead th')].map((cell) => cell.textContent)"
    assert {"accuracy", "roads MAE", "jaccard_paper", "token F1"} <= set(page.js(heads))
    assert page.js("document.querySelectorAll('#decision .cell').length") == 4  # of the captions alone
    assert (
        sum(page.js("[...document.querySelectorAll('#decision .cell b')].map((cell) => +cell.textContent)"))
        == 2
    )
    for task in TASKS:
        page.js(
            f"[...document.querySelectorAll('#tools button')].find((b) => b.textContent === '{task} 2').click()"
        )
        assert count(page) == 2
        named = page.js("[...document.querySelectorAll('.card .question b')].map((one) => one.textContent)")
        assert set(named) == {task}  # those near the window exist
        assert page.js(FITS) == []
    page.js("location.hash = 'dialog1'")
    page.wait("document.querySelector('#viewer .round')")
    text = page.js("document.getElementById('viewer').textContent")
    for said in (*ROUNDS[1], "Yes, I think", "read as changed: yes; roads: 1; buildings: 0", "Gold answer"):
        assert said in text
    page.js("location.hash = ''")
    page.js("document.getElementById('reset').click()")
    assert count(page) == 12


def test_two_runs_of_tasks_stand_side_by_side(page: Page, folder: Path) -> None:
    runs = [replace(task_run(folder), name=name) for name in ("first", "second")]
    page.open(write_report(folder / "two-tasks.html", runs).as_uri())
    rows = "[...document.querySelectorAll('#tasks .task-table tbody')][0].querySelectorAll('tr.model').length"
    assert page.js(rows) == 2
    assert page.js(FITS) == []


def test_tasks_without_captions_leave_no_empty_panels(page: Page, folder: Path) -> None:
    run = task_run(folder)
    alone = [line for line in run.lines if line["task"] == "loc"]
    only = replace(run, lines=alone, scores=None, tasks={"loc": run.tasks["loc"]})
    page.open(write_report(folder / "loc.html", [only]).as_uri())
    assert page.js("[document.getElementById('table'), document.getElementById('decision')]") == [None, None]
    assert count(page) == 2
