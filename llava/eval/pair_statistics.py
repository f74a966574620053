"""What each pair adds to a set's scores: numbers whose sums over any pairs give every metric of those pairs.

BLEU is a function of summed counts, METEOR of the jar's summed statistics, ROUGE-L and CIDEr-D are means, and
the change decision is counted. So a subset, a resample of the pairs or an exchange of captions between two
systems costs one matrix product. BLEU's counts, ROUGE-L and CIDEr-D are pycocoevalcap's.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from llava.errors import DataError, LlavaError, MissingDependencyError
from llava.eval.meteor import NUM_STATISTICS, Meteor, corpus_meteor, shared_meteor
from llava.eval.tokenizers import Treatment
from llava.tasks.caption import says_change

Subset = Literal["all", "changed", "unchanged"]
SUBSETS: tuple[Subset, ...] = get_args(Subset)
METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr-D", "Sm")
PARTS = ("BLEU-4", "METEOR", "ROUGE-L", "CIDEr-D")
"""Sm is their mean."""
DECISIONS = ("accuracy", "false_alarm_rate", "miss_rate")

Array = npt.NDArray[np.float64]
Measure = Callable[[Sequence[str], Sequence[Sequence[str]]], list[float]]
"""A further score: (captions, references) -> one value a caption, as a fraction of 1; a set's is their mean."""

# Columns of a table of statistics, [pairs, NUM_COLUMNS]; columns of further measures follow.
ONE, SAID, CLOSEST, GUESSES, MATCHES = 0, 1, 2, slice(3, 7), slice(7, 11)
ROUGE, CIDER, CHANGED, ALARM, MISS = 11, 12, 13, 14, 15
METEOR = slice(16, 16 + NUM_STATISTICS)
NUM_COLUMNS = METEOR.stop

# pycocoevalcap's guards against empty counts.
_TINY, _SMALL = 1e-15, 1e-9


def set_scores(sums: Array, further: Sequence[str] = ()) -> dict[str, Array]:
    """All metrics in percent from summed statistics; NaN where a metric could not or must not be given.

    sums: [..., NUM_COLUMNS + further], one row a set. further: names of the measures behind the columns.
    Returns METRICS, DECISIONS and `further`, each [...].
    """
    scores: dict[str, Array] = {}
    precisions = (sums[..., MATCHES] + _TINY) / (sums[..., GUESSES] + _SMALL)
    ratio = (sums[..., SAID] + _TINY) / (sums[..., CLOSEST] + _SMALL)
    brevity = np.exp(np.minimum(0, 1 - 1 / ratio))
    for n, product in enumerate(np.moveaxis(np.cumprod(precisions, -1), -1, 0), start=1):
        scores[f"BLEU-{n}"] = product ** (1 / n) * brevity
    scores["METEOR"] = corpus_meteor(sums[..., METEOR])
    scores["ROUGE-L"] = sums[..., ROUGE] / sums[..., ONE]
    scores["CIDEr-D"] = sums[..., CIDER] / sums[..., ONE]
    scores["Sm"] = sum((scores[name] for name in PARTS), np.zeros(sums.shape[:-1])) / len(PARTS)
    unchanged = sums[..., ONE] - sums[..., CHANGED]
    with np.errstate(divide="ignore", invalid="ignore"):  # a set without changed, or unchanged, pairs
        scores["accuracy"] = 1 - (sums[..., ALARM] + sums[..., MISS]) / sums[..., ONE]
        scores["false_alarm_rate"] = sums[..., ALARM] / unchanged
        scores["miss_rate"] = sums[..., MISS] / sums[..., CHANGED]
    for column, name in enumerate(further, start=NUM_COLUMNS):
        scores[name] = sums[..., column] / sums[..., ONE]
    return {name: 100 * values for name, values in scores.items()}


class PairStatistics:
    """References with their truth, from which the statistics of any set of captions are made.

    references: uid -> sentences, treated. changed: uid -> whether the pair truly changed. treat: for captions.
    further: more measures by name. Where METEOR is wanted and cannot be had, `notes` says why.
    """

    def __init__(
        self,
        references: Mapping[str, list[str]],
        changed: Mapping[str, bool],
        treat: Treatment,
        *,
        meteor: bool = True,
        further: Mapping[str, Measure] | None = None,
    ) -> None:
        # Sorted: sums run in this order, so equal input in any order gives equal bits.
        self.uids = sorted(references)
        self.references = [references[uid] for uid in self.uids]
        self.changed = np.array([changed[uid] for uid in self.uids], dtype=bool)
        self.treat = treat
        self.further = dict(further or {})
        self.notes: list[str] = []
        self._meteor = self._start_meteor() if meteor else None
        self._words: dict[tuple[str, tuple[str, ...]], list[float]] = {}
        self._ciders: dict[Subset, tuple[Any, list[Any]]] = {}

    @property
    def has_meteor(self) -> bool:
        """Whether METEOR was asked for and is there; false once it broke down."""
        return self._meteor is not None

    def rows(self, subset: Subset) -> npt.NDArray[np.intp]:
        """Which pairs belong to a subset, as indices into `uids`."""
        wanted = {"all": np.ones_like(self.changed), "changed": self.changed, "unchanged": ~self.changed}
        return np.flatnonzero(wanted[subset])

    def tables(
        self,
        said: Mapping[str, str],
        subsets: Sequence[Subset] = SUBSETS,
        *,
        treated: bool = False,
        further: bool = False,
    ) -> dict[Subset, Array]:
        """The statistics of captions: for each subset that has pairs, [its pairs, columns].

        said: uid -> caption. treated: the captions are in scored form already. further: with the other measures.
        """
        captions = [said[uid] for uid in self.uids]
        lines = captions if treated else self.treat(captions)
        whole = np.full((len(lines), NUM_COLUMNS + len(self.further)), np.nan)
        whole[:, ONE] = 1
        whole[:, CHANGED] = self.changed
        told = np.array([says_change(text) for text in captions], dtype=bool)
        whole[:, ALARM] = told & ~self.changed
        whole[:, MISS] = ~told & self.changed
        whole[:, SAID : ROUGE + 1] = [
            self._words_of(line, group) for line, group in zip(lines, self.references, strict=True)
        ]
        whole[:, METEOR] = self._meteor_of(lines)
        if further:
            for column, measure in enumerate(self.further.values(), start=NUM_COLUMNS):
                whole[:, column] = measure(lines, self.references)
        tables = {}
        for subset in subsets:
            rows = self.rows(subset)
            if len(rows):
                tables[subset] = whole[rows]
                tables[subset][:, CIDER] = self._cider_of(subset, [lines[row] for row in rows])
        return tables

    def _words_of(self, line: str, references: list[str]) -> list[float]:
        """BLEU's counts and ROUGE-L of one caption; asked once, as unchanged pairs repeat themselves."""
        key = (line, tuple(references))
        if key not in self._words:
            coco = _pycocoevalcap()
            counts = coco["cook_test"](line, coco["cook_refs"](references))
            words = counts["testlen"]
            closest = min((abs(length - words), length) for length in counts["reflen"])[1]
            rouge = coco["Rouge"]().calc_score([line], references)
            self._words[key] = [words, closest, *counts["guess"], *counts["correct"], rouge]
        return self._words[key]

    def _cider_of(self, subset: Subset, lines: Sequence[str]) -> Array:
        """CIDEr-D of each caption, with the document frequencies of the subset's references.

        NaN on a set without changed pairs, whose references share all their n-grams, so that it is 0 by
        construction, and on a single pair, where every n-gram is in every document.
        """
        rows = self.rows(subset)
        if len(rows) < 2 or not self.changed[rows].any():
            return np.full(len(rows), np.nan)
        coco = _pycocoevalcap()
        if subset not in self._ciders:
            cider = coco["CiderScorer"]()
            cider.crefs = [coco["cook_for_cider"](self.references[row]) for row in rows]
            cider.compute_doc_freq()
            self._ciders[subset] = cider, list(cider.crefs)
        cider, cooked = self._ciders[subset]
        # A caption that meets the same references again has the same value. The scorer goes through as many
        # references as there are captions, and takes the number of documents from all of them.
        first: dict[tuple[str, tuple[str, ...]], int] = {}
        keys = [(line, tuple(self.references[row])) for line, row in zip(lines, rows, strict=True)]
        for place, key in enumerate(keys):
            first.setdefault(key, place)
        others = set(range(len(keys))).difference(first.values())
        cider.crefs = [cooked[place] for place in (*first.values(), *others)]
        cider.ctest = [coco["cook_for_cider"]([line])[0] for line, _ in first]
        values = dict(zip(first, cider.compute_cider(), strict=True))
        return np.array([values[key] for key in keys], dtype=np.float64)

    def _start_meteor(self) -> Meteor | None:
        """The shared METEOR, or a warning and a note that say why there is none."""
        try:
            return shared_meteor()
        except MissingDependencyError as error:
            self._do_without_meteor(error)
            return None

    def _do_without_meteor(self, error: LlavaError) -> None:
        self.notes.append(f"METEOR and Sm are not given. {error}")
        warnings.warn(self.notes[-1], stacklevel=5)

    def _meteor_of(self, lines: Sequence[str]) -> Array:
        """[n, 23]; a process that breaks down is replaced once, then the other scores come without METEOR."""
        for attempt in range(2):
            if self._meteor is None:
                break
            try:
                return self._meteor.statistics(lines, self.references)
            except DataError:
                raise
            except LlavaError as error:
                self._meteor = None
                if attempt:
                    self._do_without_meteor(error)
                else:
                    self._meteor = self._start_meteor()
        return np.full((len(lines), NUM_STATISTICS), np.nan)


@lru_cache
def _pycocoevalcap() -> dict[str, Any]:
    try:
        from pycocoevalcap.bleu.bleu_scorer import cook_refs, cook_test
        from pycocoevalcap.cider.cider_scorer import CiderScorer
        from pycocoevalcap.cider.cider_scorer import cook_refs as cook_for_cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise MissingDependencyError(
            f"caption scores need pycocoevalcap ({error}). Install the extra: pip install 'llava[eval]'"
        ) from error
    return {
        "cook_refs": cook_refs,
        "cook_test": cook_test,
        "Rouge": Rouge,
        "CiderScorer": CiderScorer,
        "cook_for_cider": cook_for_cider,
    }
