"""A report on one or two runs: one HTML file with scores, distributions and every pair, that opens from disk.

The page itself is in report_page/; this module checks the runs, gathers what the page shows and writes the
file, pictures last and one after the other, so that neither this process nor the reader waits for all of them.
"""

import base64
import hashlib
import html
import json
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeAlias

from PIL import Image

from llava.errors import ConfigError, DataError, ImageError
from llava.eval.compare import Comparison
from llava.eval.metrics import mostly_changed, some
from llava.eval.pictures import Encoding, PairFiles, encode_pair
from llava.eval.scores import Scores
from llava.eval.task_scores.scoring import stated_change
from llava.eval.task_scores.tables import TaskScores
from llava.tasks.caption import says_change

Images = Literal["embed", "link"]
PICTURED_PAIRS = 2000
SMALL_SIDE, LARGE_SIDE, MANY_PAIRS = 256, 512, 500
"""Longer side of embedded pictures: small from so many pairs on."""

ANSWER = "Answer"
"""Name of the score that all tasks share: how well a record was answered, 0 to 100."""
RIGHT = 99.999
"""An answer of this score is a right one, whatever its sums left of 100."""

_SCRIPTS = (
    "core.js",
    "tasks.js",
    "charts.js",
    "summary.js",
    "stage.js",
    "gallery.js",
    "viewer.js",
    "main.js",
)
_MARK = re.compile(r"\{\{(\w+)\}\}")

ChangeMap: TypeAlias = Callable[[str], "Image.Image | None"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ReportRun:
    """One evaluation as a report shows it."""

    name: str
    lines: Sequence[Mapping[str, Any]]
    """As in predictions.jsonl: `uid`, `pred`, `change_caption`; `change_flag`, `img1_path`, `img2_path`, `mask_path`
    and `confidence` where known. Lines without a `pred` (pairs that could not be read) are left out."""
    scores: Scores | Mapping[str, Any] | None
    """The scores of the captions among these lines, or their `to_dict()`; None where there are none."""
    tasks: Mapping[str, TaskScores] = field(default_factory=dict)
    """Scores by task, where lines name a `task`; such lines have a `conversation` with the gold answers, and may have
    `question`, `history`, `answers`, `parsed` and `valid`."""
    per_pair: Mapping[str, Mapping[str, float]] | None = None
    """uid -> score by name, in percent; Sm, or CIDEr-D, is what is sorted by. Default: those of `scores`."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Model, data, date, command, versions: what a reader needs to believe the numbers."""
    root: Path | None = None
    """Folder the lines' paths count from; None for a report without pictures."""
    change_map: ChangeMap | None = None
    """uid -> where the model sees change, grey, bright for change, of any size; called for one pair after another."""


@dataclass(frozen=True)
class _Pair:
    """One line, checked."""

    uid: str
    said: str
    references: tuple[str, ...]
    changed: bool
    files: PairFiles | None
    confidence: float | None
    task: str | None = None
    asked: tuple[Any, ...] = ()
    """Of a task: question, gold rounds before it, what was said in those, parsed value, whether it could be read."""


def write_report(
    path: str | Path,
    runs: Sequence[ReportRun],
    *,
    title: str = "What changed?",
    intro: str = "",
    images: Images = "embed",
    max_image_pairs: int = PICTURED_PAIRS,
    image_side: int | None = None,
    quality: int = 78,
    on_skip: Callable[[str, str], None] | None = None,
    comparison: Comparison | None = None,
) -> Path:
    """Write the report of one run, or of two runs on the same pairs; it replaces an older one when complete.

    Args:
        path: the HTML file; its folder is made if need be.
        runs: one run, or two with the same uids and references.
        title, intro: what is said above the scores.
        images: "embed" puts the photographs into the file; "link" refers to the files by paths relative to it,
            which is small, and works while both stay where they are.
        max_image_pairs: show pictures of so many pairs; of more, half are pairs with a wrong change decision, and
            all are spread evenly over the scores. Every pair's text is in the report.
        image_side: longer side of embedded pictures; 512 up to 500 pairs, 256 beyond, by default.
        quality: of their JPEG encoding, 1 to 95.
        on_skip: called with uid and reason for a pair whose pictures cannot be read; the page says it too. By
            default such a pair is an error.
        comparison: of two runs, whether the differences of their scores mean anything.

    Raises:
        ConfigError: no run, or more than two; an option out of its range.
        DataError: runs that do not cover the same pairs, lines with a fault, scores of another number of pairs.
        ImageError: a picture that cannot be read, without `on_skip`; pair and file are named.
    """
    _check_options(runs, images, max_image_pairs, image_side, quality)
    path = Path(path)
    pairs = [_pairs(run) for run in runs]
    _check_same(runs, pairs)
    columns, tables = _columns(runs, pairs)
    chosen = _pictured(pairs, tables, max_image_pairs)
    side = image_side or (LARGE_SIDE if len(chosen) <= MANY_PAIRS else SMALL_SIDE)
    how = Encoding(side=side, quality=quality, link_from=path.parent if images == "link" else None)
    skipped: dict[str, str] = {}

    def skip(uid: str, error: ImageError) -> None:
        if on_skip is None:
            raise ImageError(f"pair {uid!r}: {error}") from error
        skipped[uid] = str(error)
        on_skip(uid, str(error))

    pictures = _pictures(runs, pairs[0], chosen, how, skip)
    first = next(pictures, None)
    data = {
        "title": title,
        "intro": intro,
        "runs": [_run(run) for run in runs],
        "comparison": comparison and comparison.to_dict(),
        "columns": columns,
        "pairs": [
            [
                pair.uid,
                int(pair.changed),
                list(pair.references),
                [
                    _said(run, run_pairs[i], table[i])
                    for run, run_pairs, table in zip(runs, pairs, tables, strict=True)
                ],
                *([pair.task, *pair.asked[:2]] if pair.task else []),
            ]
            for i, pair in enumerate(pairs[0])
        ],
        "pictures": {"images": images, "side": side, "shown": len(chosen), "chosen": sorted(chosen)},
        "layers": {
            "maps": [run.change_map is not None for run in runs],
            "truth": any(pair.files is not None and pair.files.truth is not None for pair in pairs[0]),
        },
        "ratio": first[1]["size"][0] / first[1]["size"][1] if first else 1,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("w", encoding="utf-8", errors="replace", newline="\n") as file:
            file.writelines(_page(title, data, chain([first] if first else [], pictures), skipped))
        return part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _check_options(
    runs: Sequence[ReportRun], images: str, max_image_pairs: int, image_side: int | None, quality: int
) -> None:
    if not 1 <= len(runs) <= 2:
        raise ConfigError(f"a report shows one run, or two side by side; these are {len(runs)}")
    if images not in ("embed", "link"):
        raise ConfigError(f"images={images!r}: give 'embed' or 'link'")
    if max_image_pairs < 0:
        raise ConfigError(f"max_image_pairs={max_image_pairs} must be at least 0")
    if image_side is not None and not 16 <= image_side <= 4096:
        raise ConfigError(f"image_side={image_side} must be 16 to 4096 pixels")
    if not 1 <= quality <= 95:
        raise ConfigError(f"quality={quality} must be 1 to 95")


def _pairs(run: ReportRun) -> list[_Pair]:
    pairs: dict[str, _Pair] = {}
    for line in run.lines:
        uid = line.get("uid")
        where = f"run {run.name!r}, pair {uid!r}"
        if not isinstance(uid, str):
            raise DataError(f"{where}: 'uid' must be a string")
        if uid in pairs:
            raise DataError(f"{where}: comes twice; every pair is shown once")
        if line.get("pred") is None:
            continue
        task = line.get("task")
        references = line.get("change_caption") or ()
        if task is not None and not (task == "caption" and references):
            references = [answer for _, answer in line.get("conversation", ())[-1:]]
        texts = [line["pred"], *references]
        if isinstance(references, str) or not all(isinstance(text, str) for text in texts):
            raise DataError(f"{where}: 'pred' must be a string and 'change_caption' a list of strings")
        flag = line.get("change_flag")
        if flag is None:
            gold = references if task == "caption" else [answer for _, answer in line.get("conversation", ())]
            said = stated_change(task, gold) if task else None
            flag = mostly_changed(references) if said is None else said
        pairs[uid] = _Pair(
            uid=uid,
            said=line["pred"],
            references=tuple(references),
            changed=bool(flag),
            files=_files(line, run.root),
            confidence=line.get("confidence"),
            task=task,
            asked=_asked(line) if task else (),
        )
    if not pairs:
        raise DataError(f"run {run.name!r} has no predictions, so there is nothing to show")
    return list(pairs.values())


def _asked(line: Mapping[str, Any]) -> tuple[Any, ...]:
    """What the page says of an answer to a task beside the answer; see `_Pair.asked`."""
    rounds = [list(one) for one in line.get("conversation", ())]
    question = line.get("question") or (rounds[-1][0] if rounds else "")
    said = list(next(iter((line.get("answers") or {}).values()), ()))[:-1]
    return question, rounds[:-1], said, line.get("parsed"), line.get("valid", True)


def _files(line: Mapping[str, Any], root: Path | None) -> PairFiles | None:
    if root is None or not line.get("img1_path") or not line.get("img2_path"):
        return None
    mask = line.get("mask_path")
    return PairFiles(root / line["img1_path"], root / line["img2_path"], root / mask if mask else None)


def _check_same(runs: Sequence[ReportRun], pairs: list[list[_Pair]]) -> None:
    """Two runs: order the second one as the first; both: the scores are of these pairs."""
    for run, own in zip(runs, pairs, strict=True):
        named = Counter(pair.task or "caption" for pair in own)
        found = {name: scores.n for name, scores in run.tasks.items() if name != "caption"}
        if run.scores is not None:
            found["caption"] = int(_scores(run).get("pairs") or 0)
        for task in named | found:
            if named[task] != found.get(task, 0):
                raise DataError(
                    f"run {run.name!r}: its scores are of {found.get(task, 0)} pairs, its predictions are "
                    f"{named[task]} ({task}); score them again"
                )
    if len(pairs) == 1:
        return
    first, second = pairs
    by_uid = {pair.uid: pair for pair in second}
    alone = {pair.uid for pair in first} ^ by_uid.keys()
    if alone:
        raise DataError(
            f"{len(alone)} pairs are in one of the two runs only: {some(alone)}. Compare runs on one set"
        )
    for pair in first:
        if sorted(pair.references) != sorted(by_uid[pair.uid].references):
            raise DataError(
                f"pair {pair.uid!r} has other references in the second run; score both against one file"
            )
    pairs[1] = [by_uid[pair.uid] for pair in first]


def _scores(run: ReportRun) -> Mapping[str, Any]:
    return run.scores.to_dict() if isinstance(run.scores, Scores) else run.scores or {}


def _columns(
    runs: Sequence[ReportRun], pairs: list[list[_Pair]]
) -> tuple[list[str], list[list[list[float | None]]]]:
    """Names of the per-pair scores, the most telling first, and for each run a row a pair."""
    given = []
    for run in runs:
        scores = run.per_pair
        if scores is None:
            scores = run.scores.per_pair if isinstance(run.scores, Scores) else {}
        answered = {uid: value for task in run.tasks.values() for uid, value in task.per_sample.items()}
        given.append(
            {uid: {ANSWER: value, **scores.get(uid, {})} for uid, value in answered.items()}
            if answered
            else scores
        )
    names = dict.fromkeys(name for scores in given for row in scores.values() for name in row)
    first = [name for name in (ANSWER, "Sm", "CIDEr-D") if name in names]
    columns = list(dict.fromkeys([*first, *names]))
    confident = any(pair.confidence is not None for own in pairs for pair in own)
    tables = []
    for scores, own in zip(given, pairs, strict=True):
        table: list[list[float | None]] = []
        for pair in own:
            row: list[float | None] = [_rounded(scores.get(pair.uid, {}).get(name)) for name in columns]
            if confident:
                row.append(_rounded(None if pair.confidence is None else 100 * pair.confidence))
            table.append(row)
        tables.append(table)
    return columns + ["Confidence"] * confident, tables


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _pictured(pairs: list[list[_Pair]], tables: list[list[list[float | None]]], limit: int) -> list[int]:
    """Which pairs get pictures, see `write_report`; in the order of the pairs."""
    have = [i for i, pair in enumerate(pairs[0]) if pair.files is not None]
    if len(have) <= limit:
        return have
    have.sort(key=lambda i: (tables[0][i] or [None])[0] or 0.0)
    wrong = [
        i
        for i in have
        if any(
            own[i].task in (None, "caption") and says_change(own[i].said) != own[i].changed for own in pairs
        )
    ]
    chosen = _spread(wrong, limit // 2)
    taken = set(chosen)
    return sorted(chosen + _spread([i for i in have if i not in taken], limit - len(chosen)))


def _spread(items: list[int], count: int) -> list[int]:
    """`count` items at even distances, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    step = (len(items) - 1) / max(count - 1, 1)
    return [items[round(k * step)] for k in range(count)]


def _run(run: ReportRun) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": run.name,
        "scores": _scores(run),
        "facts": [[key, text] for key, text in run.facts.items()],
    }
    if run.tasks:
        found["tasks"] = [scores.to_dict() for scores in run.tasks.values()]
    return found


def _said(run: ReportRun, pair: _Pair, scores: list[float | None]) -> list[Any]:
    """What was said, whether it states a change (of a caption) or is right, and the scores; of a task, more."""
    if pair.task is None:
        return [pair.said, int(says_change(pair.said)), scores]
    if pair.task == "caption":
        return [pair.said, int(says_change(pair.said)), scores, *pair.asked[2:]]
    right = run.tasks[pair.task].per_sample.get(pair.uid, 0.0) >= RIGHT
    return [pair.said, int(right), scores, *pair.asked[2:]]


def _pictures(
    runs: Sequence[ReportRun],
    pairs: Sequence[_Pair],
    chosen: Sequence[int],
    how: Encoding,
    skip: Callable[[str, ImageError], None],
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Index and encoded pictures of the chosen pairs, a few pairs in memory at a time."""
    workers = max(1, min(8, os.cpu_count() or 1))
    with ThreadPoolExecutor(workers) as pool:
        coming: deque[tuple[int, Future[dict[str, Any]]]] = deque()
        todo = iter(chosen)

        def start(index: int) -> None:
            files = pairs[index].files
            assert files is not None
            # A model may stand behind a change map: it is asked here, from one thread.
            try:
                maps = [run.change_map and run.change_map(pairs[index].uid) for run in runs]
            except ImageError as error:
                failed: Future[dict[str, Any]] = Future()
                failed.set_exception(error)
                coming.append((index, failed))
            else:
                coming.append((index, pool.submit(encode_pair, files, maps, how)))

        try:
            for index in todo:
                start(index)
                if len(coming) > 2 * workers:
                    break
            while coming:
                index, made = coming.popleft()
                try:
                    yield index, made.result()
                except ImageError as error:
                    skip(pairs[index].uid, error)
                for following in todo:
                    start(following)
                    break
        finally:
            for _, made in coming:
                made.cancel()


def _page(
    title: str,
    data: Mapping[str, Any],
    pictures: Iterable[tuple[int, Mapping[str, Any]]],
    skipped: Mapping[str, str],
) -> Iterator[str]:
    """The file piece by piece."""
    style = _asset("style.css")
    script = '"use strict";\n(() => {\n' + "\n".join(map(_asset, _SCRIPTS)) + "\n})();\n"
    # Only this very script and style may run; nothing may be fetched, pictures beside the file excepted.
    sources = "data: 'self' file:" if data["pictures"]["images"] == "link" else "data:"
    policy = (
        f"default-src 'none'; img-src {sources}; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = {
        "title": lambda: [html.escape(title)],
        "policy": lambda: [policy],
        "style": lambda: [style],
        "data": lambda: [_json(data)],
        "script": lambda: [script],
        "pictures": lambda: (
            f'<script type="application/json" id="pictures-{index}">{_json(pair)}</script>\n'
            for index, pair in pictures
        ),
        "skipped": lambda: [_json(skipped)],  # complete only now, behind the pictures
    }
    for number, piece in enumerate(_MARK.split(_asset("page.html"))):
        yield from parts[piece]() if number % 2 else [piece]


def _asset(name: str) -> str:
    return resources.files("llava.eval").joinpath("report_page", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(value: Any) -> str:
    """JSON that is safe inside a `script` element: pure ASCII, and no character that HTML reads."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
