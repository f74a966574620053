"""What `llava.eval.metrics.score` returns: the scores with all that belongs to them, as values and as text."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llava.eval.pair_statistics import DECISIONS, METRICS, SUBSETS, Subset
from llava.eval.resample import LEVEL, Interval

Intervals = Mapping[Subset, Mapping[str, Interval]]


@dataclass(frozen=True)
class CaptionScores:
    """Caption metrics of one set of pairs, in percent; None where a metric could not or must not be given.

    CIDEr-D, and Sm with it, is None on a set without changed pairs, where the references share all their
    n-grams and it is 0 by construction, and on a single pair, where every n-gram is in every document.
    """

    num_pairs: int
    bleu1: float
    bleu2: float
    bleu3: float
    bleu4: float
    meteor: float | None
    rouge_l: float
    cider_d: float | None
    further: Mapping[str, float] = field(default_factory=dict)
    """Scores asked for beside these (SPICE, BERTScore), by name."""

    @property
    def sm(self) -> float | None:
        if self.meteor is None or self.cider_d is None:
            return None
        return (self.bleu4 + self.meteor + self.rouge_l + self.cider_d) / 4

    def to_dict(self) -> dict[str, float | int | None]:
        bleu = (self.bleu1, self.bleu2, self.bleu3, self.bleu4)
        values = (*bleu, self.meteor, self.rouge_l, self.cider_d, self.sm)
        return {"pairs": self.num_pairs, **dict(zip(METRICS, values, strict=True)), **self.further}


@dataclass(frozen=True)
class ChangeDecision:
    """How often the captions tell change from no change, read by `says_change`."""

    num_changed: int
    num_unchanged: int
    false_alarms: int
    """Unchanged pairs whose caption states a change."""
    misses: int
    """Changed pairs whose caption states none."""

    @property
    def accuracy(self) -> float:
        total = self.num_changed + self.num_unchanged
        return 100 * (total - self.false_alarms - self.misses) / total

    @property
    def false_alarm_rate(self) -> float | None:
        """False alarms in percent of the unchanged pairs."""
        return 100 * self.false_alarms / self.num_unchanged if self.num_unchanged else None

    @property
    def miss_rate(self) -> float | None:
        """Misses in percent of the changed pairs."""
        return 100 * self.misses / self.num_changed if self.num_changed else None

    def to_dict(self) -> dict[str, float | int | None]:
        return {
            "accuracy": self.accuracy,
            "changed": self.num_changed,
            "unchanged": self.num_unchanged,
            "false_alarms": self.false_alarms,
            "false_alarm_rate": self.false_alarm_rate,
            "misses": self.misses,
            "miss_rate": self.miss_rate,
        }


@dataclass(frozen=True)
class ScoreRow:
    """One set of captions with all its scores: the predictions, or a baseline."""

    name: str
    sentences: tuple[str, ...]
    """What a baseline says; empty for predictions."""
    captions: Mapping[Subset, CaptionScores | None]
    """Scores by subset; None for a subset without pairs."""
    decision: ChangeDecision

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "sentences": list(self.sentences),
            "captions": {name: scores and scores.to_dict() for name, scores in self.captions.items()},
            "decision": self.decision.to_dict(),
        }


@dataclass(frozen=True)
class Repeats:
    """What happens when captions that came again under one uid are counted, as evaluations that pad their
    last batch on several GPUs do."""

    num_captions: int
    """Captions beyond each uid's first."""
    num_uids: int
    num_conflicting: int
    """Uids whose captions are not all the same."""
    captions: CaptionScores
    """Scores with every caption counted."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "captions": self.num_captions,
            "uids": self.num_uids,
            "conflicting": self.num_conflicting,
            "scores_if_counted": self.captions.to_dict(),
        }


@dataclass(frozen=True)
class Scores:
    """The result of `score`: predictions first, baselines beside them, and what identifies the run."""

    predictions: ScoreRow
    baselines: tuple[ScoreRow, ...]
    num_pairs: int
    predictions_sha256: str
    references_sha256: str
    notes: tuple[str, ...] = ()
    per_pair: Mapping[str, Mapping[str, float]] = field(default_factory=dict, repr=False)
    """uid -> {"BLEU-4", "ROUGE-L", and where computed "CIDEr-D", "METEOR", "Sm", further measures}, in percent,
    each pair scored as a set of its own (CIDEr-D with the set's frequencies); not part of `to_dict`."""
    intervals: Intervals = field(default_factory=dict)
    """Of the predictions' scores, by METRICS, DECISIONS (under "all") and further measures."""
    resamples: int = 0
    """Resamples behind the intervals."""
    seed: int = 0
    tokenizer: str = "release"
    repeats: Repeats | None = None

    @property
    def rows(self) -> tuple[ScoreRow, ...]:
        return (self.predictions, *self.baselines)

    @property
    def decision(self) -> ChangeDecision:
        return self.predictions.decision

    def captions(self, subset: Subset = "all") -> CaptionScores | None:
        """The predictions' caption metrics on one subset."""
        return self.predictions.captions[subset]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "pairs": self.num_pairs,
            "predictions": self.predictions.to_dict(),
            "baselines": [row.to_dict() for row in self.baselines],
            "predictions_sha256": self.predictions_sha256,
            "references_sha256": self.references_sha256,
            "tokenizer": self.tokenizer,
            "intervals": {
                subset: {name: list(ends) for name, ends in by_name.items()}
                for subset, by_name in self.intervals.items()
            },
            "resampling": {"resamples": self.resamples, "seed": self.seed, "level": LEVEL},
            "repeats": self.repeats and self.repeats.to_dict(),
            "notes": list(self.notes),
        }

    def table(self) -> str:
        """The whole result as aligned text, up to 118 columns wide."""
        lines = caption_table(self.rows, self.intervals)
        lines += ["", *decision_table(self.rows, self.intervals), ""]
        lines += [*self._further_lines(), *self._repeat_lines()]
        for row in self.baselines:
            lines.append(f"{row.name}: " + " / ".join(f'"{sentence}"' for sentence in row.sentences))
        if self.intervals:
            lines.append(
                f"{LEVEL} % intervals: {self.resamples} resamples of the pairs, seed {self.seed}; CIDEr-D with the "
                "full set's document frequencies"
            )
        lines += [f"note: {note}" for note in self.notes]
        if self.tokenizer != "release":
            lines.append(
                f"words by the {self.tokenizer} tokenizer: published scores of change captions are without it"
            )
        hashes = (self.predictions_sha256[:16], self.references_sha256[:16])
        lines.append("sha256 of predictions {}, references {}".format(*hashes))
        return "\n".join(lines)

    def _further_lines(self) -> list[str]:
        lines = []
        for subset in SUBSETS:
            scores, ends = self.predictions.captions[subset], self.intervals.get(subset, {})
            for name, value in (scores.further if scores else {}).items():
                among = " ({} to {})".format(*map(percent, ends[name])) if name in ends else ""
                lines.append(f"{subset:9}  {name} {percent(value)}{among}")
        return [*lines, ""] if lines else []

    def _repeat_lines(self) -> list[str]:
        again, once = self.repeats, self.captions()
        if again is None or once is None:
            return []
        differ = (
            f"{again.num_conflicting} of them with another caption"
            if again.num_conflicting
            else "all the same"
        )
        lines = [
            f"repeats: {again.num_captions} captions beyond the first of {again.num_uids} uids, {differ}. Only the "
            "first is scored."
        ]
        values, counted = once.to_dict(), again.captions.to_dict()
        moved = [
            f"{name} {percent(counted[name])} ({_signed(counted[name], values[name])})"
            for name in ("Sm", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr-D")
            if counted[name] is not None and values[name] is not None
        ]
        lines.append(
            "         With every caption counted, as multi-GPU evaluations that pad their last batch do:"
        )
        return [*lines, "         " + ", ".join(moved)]


def _signed(value: float | int | None, other: float | int | None) -> str:
    assert value is not None and other is not None
    return f"{value - other:+.2f}"


def caption_table(rows: Sequence[ScoreRow], intervals: Intervals | None = None) -> list[str]:
    """Lines of caption metrics, subset by subset; intervals: of the first row, written beneath it."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'':9}  {'':{width}}  {'pairs':>6}  " + "  ".join(f"{name:>7}" for name in METRICS)]
    for subset in SUBSETS:
        label: str = subset
        for row in rows:
            if (scores := row.captions[subset]) is None:
                continue
            values = scores.to_dict()
            cells = "  ".join(f"{percent(values[name]):>7}" for name in METRICS)
            lines.append(f"{label:9}  {row.name:{width}}  {scores.num_pairs:6}  {cells}")
            label = ""
            for name, ends in _ends(intervals, subset) if row is rows[0] else ():
                cells = "  ".join(f"{ends.get(metric, ''):>7}" for metric in METRICS)
                lines.append(f"{'':9}  {name:>{width}}  {'':6}  {cells}".rstrip())
    return lines


def decision_table(rows: Sequence[ScoreRow], intervals: Intervals | None = None) -> list[str]:
    """Lines of the change decision: accuracy, false alarms among the unchanged pairs, misses among the changed."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'change':9}  {'':{width}}  {'accuracy':>8}  {'false alarms':>20}  {'misses':>20}"]
    for row in rows:
        told = row.decision
        alarms = f"{told.false_alarms} of {told.num_unchanged} ({percent(told.false_alarm_rate)})"
        misses = f"{told.misses} of {told.num_changed} ({percent(told.miss_rate)})"
        accuracy = percent(told.accuracy)
        lines.append(f"{'':9}  {row.name:{width}}  {accuracy:>8}  {alarms:>20}  {misses:>20}")
        for name, ends in _ends(intervals, "all") if row is rows[0] else ():
            accuracy, alarms, misses = (ends.get(metric, "") for metric in DECISIONS)
            lines.append(f"{'':9}  {name:>{width}}  {accuracy:>8}  {alarms:>19}   {misses:>19}".rstrip())
    return lines


def _ends(intervals: Intervals | None, subset: Subset) -> Iterator[tuple[str, dict[str, str]]]:
    """The lower ends with their label, then the upper ones."""
    by_name = (intervals or {}).get(subset, {})
    for side, label in enumerate((f"{LEVEL} % from", "to") if by_name else ()):
        yield label, {name: percent(ends[side]) for name, ends in by_name.items()}


def percent(value: float | int | None) -> str:
    """Two decimals, or a dash for what is not given."""
    return "-" if value is None else f"{value:.2f}"
