"""What a list of records holds, in numbers: pairs, captions, words, image sizes."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from llava.data.record import Record
from llava.tasks.definitions import TASK_NAMES

COMMON = 5
"""Captions that are listed as the commonest."""


@dataclass(frozen=True)
class Lengths:
    """Words of captions."""

    mean: float
    median: float
    p95: int
    longest: int

    @staticmethod
    def of(counts: Sequence[int]) -> "Lengths":
        """Of a list of numbers that is not empty."""
        ordered = sorted(counts)
        rank = -(-95 * len(ordered) // 100)  # the smallest that 95 % do not exceed
        return Lengths(
            round(statistics.fmean(ordered), 2), statistics.median(ordered), ordered[rank - 1], ordered[-1]
        )


@dataclass(frozen=True)
class Statistics:
    """Numbers of a list of records. Words are what stands between blanks, in lower case, without full stops."""

    pairs: int
    """Records; several may ask about one pair of images."""
    distinct_pairs: int
    """Different pairs of images."""
    changed: int
    unchanged: int
    """Neither `changed` nor `unchanged` is a pair whose record does not say."""
    masks: int
    conversations: int
    tasks: tuple[tuple[str, int], ...]
    """(task, records), of the records that say one."""
    captions: int
    captions_per_pair: tuple[int, float, int]
    """Fewest, mean, most."""
    words: Lengths | None
    """Of a caption; None without captions."""
    words_changed: Lengths | None
    """The same, of pairs that are said to have changed."""
    distinct_words: int
    distinct_captions: int
    common_captions: tuple[tuple[str, int], ...]
    sizes: tuple[tuple[str, int], ...]
    """("WIDTHxHEIGHT", images), the commonest first, of the images that were opened."""
    sized: int
    """Images that were opened for their size."""
    unreadable: int
    """Those that could not be opened."""

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return asdict(self)

    def table(self) -> str:
        """As aligned text."""
        said = self.changed + self.unchanged
        share = f" ({100 * self.changed / said:.1f} % of those that say)" if said else ""
        few, mean, many = self.captions_per_pair
        rows = [
            ("pairs", f"{self.pairs}"),
            *([("  of images", f"{self.distinct_pairs}")] if self.distinct_pairs < self.pairs else []),
            ("changed", f"{self.changed}{share}"),
            ("unchanged", f"{self.unchanged}"),
            ("not said", f"{self.pairs - said}"),
            ("with mask", f"{self.masks}"),
            ("conversations", f"{self.conversations}"),
            *((f"  task {name}", f"{count}") for name, count in self.tasks),
            ("captions", f"{self.captions}, {few} to {many} a pair, mean {mean:.2f}"),
            ("words a caption", _words(self.words)),
            ("  of changed pairs", _words(self.words_changed)),
            ("distinct words", f"{self.distinct_words}"),
            ("distinct captions", f"{self.distinct_captions}"),
        ]
        rows += [("common caption", f"{count} x {text!r}") for text, count in self.common_captions]
        rows += [("image size", f"{count} x {size}") for size, count in self.sizes[:COMMON]]
        if len(self.sizes) > COMMON:
            rows.append(("image size", f"and {len(self.sizes) - COMMON} more"))
        if self.sized or self.unreadable:
            rows.append(("", f"sizes of {self.sized} images looked at, {self.unreadable} cannot be opened"))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:{width}}  {value}".rstrip() for name, value in rows)


def _words(lengths: Lengths | None) -> str:
    if lengths is None:
        return "-"
    return (
        f"mean {lengths.mean}, median {lengths.median:g}, 95 % up to {lengths.p95}, longest {lengths.longest}"
    )


def describe(records: Sequence[Record], root: str | Path | None = None, *, sizes: int = 1000) -> Statistics:
    """Numbers of some records.

    Args:
        records: each counted as often as it is listed.
        root: folder that their paths count from; None opens no image.
        sizes: pairs whose images are opened for their size, spread evenly over the list.
    """
    counts, changed_counts = [], []
    words: Counter[str] = Counter()
    texts: Counter[str] = Counter()
    for record in records:
        for caption in record.change_caption:
            spoken = caption.lower().replace(".", "").split()
            words.update(spoken)
            texts[" ".join(spoken)] += 1
            counts.append(len(spoken))
            if record.change_flag:
                changed_counts.append(len(spoken))
    tasks = Counter(record.task for record in records)
    per_pair = [len(record.change_caption) for record in records] or [0]
    found, unreadable = (
        _sizes(spread(records, sizes), Path(root)) if root is not None else (Counter[str](), 0)
    )
    return Statistics(
        pairs=len(records),
        distinct_pairs=len({(record.img1_path, record.img2_path) for record in records}),
        changed=sum(record.change_flag is True for record in records),
        unchanged=sum(record.change_flag is False for record in records),
        masks=sum(record.mask_path is not None for record in records),
        conversations=sum(bool(record.conversation) for record in records),
        tasks=tuple((name, tasks[name]) for name in TASK_NAMES if tasks[name]),
        captions=len(counts),
        captions_per_pair=(min(per_pair), round(statistics.fmean(per_pair), 4), max(per_pair)),
        words=Lengths.of(counts) if counts else None,
        words_changed=Lengths.of(changed_counts) if changed_counts else None,
        distinct_words=len(words),
        distinct_captions=len(texts),
        common_captions=tuple(texts.most_common(COMMON)),
        sizes=tuple(found.most_common()),
        sized=sum(found.values()),
        unreadable=unreadable,
    )


def spread(records: Sequence[Record], count: int) -> list[Record]:
    """`count` of the records, evenly spread over the list; all of them, if it is no longer."""
    if len(records) <= count:
        return list(records)
    return [records[k * len(records) // count] for k in range(count)]


def _sizes(records: Sequence[Record], root: Path) -> tuple["Counter[str]", int]:
    """How often each size comes among the images, by their headers; and how many have none."""
    found: Counter[str] = Counter()
    unreadable = 0
    for record in records:
        for path in record.paths(root):
            try:
                with Image.open(path) as image:
                    found[f"{image.width}x{image.height}"] += 1
            except (
                Exception
            ):  # Pillow raises nearly anything on damaged headers; `llava data check` says what it is
                unreadable += 1
    return found, unreadable
