"""A page to judge captions by eye: one HTML file with pictures, words and scores that opens from disk."""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops, ImageFilter

from llava.eval.metrics import METRICS, SUBSETS, Scores, percent
from llava.tasks.caption import says_change

MAX_SIDE = 512
"""Pictures are shrunk to this many pixels a side: a page of a hundred pairs stays below ten megabytes."""
JPEG_QUALITY = 85
MAP_LEVELS = 32
MAP_COLOUR = (255, 92, 0)
TRUTH_COLOUR = (0, 200, 255)

TILES = ("Sm", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr-D")


@dataclass(frozen=True, eq=False)
class PairRow:
    """One pair as the page shows it."""

    uid: str
    before: Image.Image
    after: Image.Image
    references: Sequence[str]
    prediction: str
    changed: bool
    """The truth."""
    change_map: Image.Image | None = None
    """Grey, 0 to 255, bright where the model sees change; any size, it is stretched over the pictures."""
    truth: Image.Image | None = None
    """The true mask, zero where nothing changed."""
    score: float | None = None

    @property
    def verdict(self) -> str:
        """ "right", "missed change" or "false alarm": whether the caption tells change from no change."""
        if says_change(self.prediction) == self.changed:
            return "right"
        return "missed change" if self.changed else "false alarm"


def write_page(
    path: Path,
    title: str,
    rows: Sequence[PairRow],
    scores: Scores,
    *,
    made: Mapping[str, str] | None = None,
    intro: str = "",
    score_name: str = "score",
) -> Path:
    """Write the page and return its path; missing folders are made.

    The file needs nothing beside it and no network: pictures are data URIs, and its own policy forbids any
    request. rows: the pairs to show, in this order; they may be fewer than were scored. made: how the result
    came about, name -> text (command, seed, time, model). score_name: what `PairRow.score` is.
    """
    import jinja2

    source = resources.files("llava.eval").joinpath("page.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(source).generate(
        title=title,
        intro=intro,
        tiles=list(_tiles(scores)),
        metrics=METRICS,
        table=list(_table(scores)),
        scores=scores,
        percent=percent,
        made=dict(made or {}),
        score_name=score_name,
        num_shown=len(rows),
        counts={
            "all": len(rows),
            "changed": sum(row.changed for row in rows),
            "unchanged": sum(not row.changed for row in rows),
            "wrong": sum(row.verdict != "right" for row in rows),
        },
        has_map=any(row.change_map is not None for row in rows),
        has_truth=any(row.truth is not None for row in rows),
        cards=(_card(row) for row in rows),  # one at a time: the pictures are most of the page
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open(
        "w", encoding="utf-8", errors="replace"
    ) as file:  # a caption may hold half a surrogate pair
        file.writelines(page)
    return part.replace(path)


def _tiles(scores: Scores) -> Iterator[dict[str, Any]]:
    """The headline figures with each baseline's beside them."""
    rows = [(row.name, row.captions["all"], row.decision) for row in scores.rows]
    for name in TILES:
        values = [
            (label, percent(captions.to_dict()[name] if captions else None)) for label, captions, _ in rows
        ]
        yield {"name": name, "value": values[0][1], "beside": values[1:]}
    told = [(label, percent(decision.accuracy)) for label, _, decision in rows]
    yield {"name": "Change told right, %", "value": told[0][1], "beside": told[1:]}


def _table(scores: Scores) -> Iterator[dict[str, Any]]:
    """Rows of the score table: predictions and baselines, subset by subset."""
    for subset in SUBSETS:
        for row in scores.rows:
            captions = row.captions[subset]
            if captions is None:
                continue
            values = captions.to_dict()
            yield {
                "subset": subset,
                "name": row.name,
                "model": row is scores.predictions,
                "pairs": captions.num_pairs,
                "values": [percent(values[name]) for name in METRICS],
            }


def _card(row: PairRow) -> dict[str, Any]:
    before = _shrink(row.before)
    size = before.size
    return {
        "row": row,
        "ratio": f"{size[0]} / {size[1]}",
        "before": _jpeg(before),
        # One frame for both dates, or the wipe would compare different places.
        "after": _jpeg(row.after.convert("RGB").resize(size, Image.Resampling.BICUBIC)),
        "map": None if row.change_map is None else _overlay(row.change_map, size, MAP_COLOUR),
        "truth": None if row.truth is None else _overlay(_outline(row.truth, size), size, TRUTH_COLOUR),
    }


def _shrink(image: Image.Image) -> Image.Image:
    image = image.convert("RGB")
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    return image


def _outline(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A mask as bright edges around a faint inside, so that the change map stays visible under it."""
    inside = mask.convert("L").point(lambda value: 255 if value else 0).resize(size, Image.Resampling.NEAREST)
    edge = ImageChops.difference(inside, inside.filter(ImageFilter.MinFilter(5)))
    return ImageChops.lighter(edge, inside.point(lambda value: value // 5))


def _overlay(grey: Image.Image, size: tuple[int, int], colour: tuple[int, int, int]) -> str:
    """A one-colour layer whose opacity follows the grey value, as a small palette PNG."""
    way = Image.Resampling.BICUBIC if grey.width < size[0] else Image.Resampling.BOX
    levels = grey.convert("L").resize(size, way).point(lambda value: value * MAP_LEVELS // 256)
    layer = Image.frombytes("P", size, levels.tobytes())
    layer.putpalette(bytes(colour) * MAP_LEVELS)
    opacity = bytes(round(200 * level / (MAP_LEVELS - 1)) for level in range(MAP_LEVELS))
    return _data_uri(layer, "PNG", optimize=True, transparency=opacity)


def _jpeg(image: Image.Image) -> str:
    return _data_uri(image, "JPEG", quality=JPEG_QUALITY, optimize=True)


def _data_uri(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
