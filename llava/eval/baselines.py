"""What a model must beat: one sentence for every pair, and one fixed sentence for each true answer.

The sentences are reference sentences: the best few by BLEU-4, which is quickly computed for all of them when a
whole set gets the same sentence, and of those the one with the highest Sm.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from llava.eval.pair_statistics import PARTS, PairStatistics, set_scores
from llava.tasks.caption import NO_CHANGE_CAPTION

NUM_CANDIDATES = 5
"""Reference sentences, the best by BLEU-4, of which a baseline takes the one with the highest Sm."""


def baselines(pairs: PairStatistics) -> Iterator[tuple[str, tuple[str, ...], dict[str, str]]]:
    """For each baseline its name, its sentences and what it says of each uid."""

    def constant(sentence: str) -> dict[str, str]:
        return dict.fromkeys(pairs.uids, sentence)

    best = _best_sentence(pairs, OneSentence(pairs.references).best(), constant)
    yield "constant", (best,), constant(best)

    truth = dict(zip(pairs.uids, pairs.changed, strict=True))
    if len(set(truth.values())) < 2:
        return  # with one answer for all pairs this is the constant
    unchanged = OneSentence([pairs.references[row] for row in pairs.rows("unchanged")])
    same = NO_CHANGE_CAPTION if NO_CHANGE_CAPTION in unchanged.sentences else unchanged.best()[0]

    def by_flag(sentence: str) -> dict[str, str]:
        return {uid: sentence if changed else same for uid, changed in truth.items()}

    changed = OneSentence([pairs.references[row] for row in pairs.rows("changed")])
    best = _best_sentence(pairs, changed.best(beside=unchanged.counts(same)), by_flag)
    yield "true flag + one sentence", (same, best), by_flag(best)


def _best_sentence(
    pairs: PairStatistics, candidates: Sequence[str], captions_of: Callable[[str], Mapping[str, str]]
) -> str:
    """The candidate with the highest Sm; where a metric is not given, by the mean of the others."""

    def quality(sentence: str) -> float:
        table = pairs.tables(captions_of(sentence), ("all",), treated=True)["all"]
        scores = set_scores(table.sum(0))
        return sum(float(scores[name]) for name in PARTS if not math.isnan(scores[name]))

    return max(candidates, key=quality)


class OneSentence:
    """BLEU-4 of the same sentence said for every pair of a set, for thousands of sentences in a second.

    Clipped matches of an n-gram are then the number of pairs whose references hold it (n-grams that a
    sentence repeats count once, which makes the value a lower bound).
    """

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        self.num_pairs = len(references)
        self.sentences = sorted({text for texts in references for text in texts})
        self.pairs_with: Counter[tuple[str, ...]] = Counter()
        self.lengths: Counter[frozenset[int]] = Counter()
        self._known: dict[int, int] = {}
        for texts in references:
            words = [text.split() for text in texts]
            self.pairs_with.update({gram for line in words for n in range(1, 5) for gram in _ngrams(line, n)})
            self.lengths[frozenset(map(len, words))] += 1

    def counts(self, sentence: str) -> list[int]:
        """Sums over the set: matches of 1- to 4-grams, 1- to 4-grams said, words of closest references."""
        words = sentence.split()
        matches = [sum(self.pairs_with[gram] for gram in set(_ngrams(words, n))) for n in range(1, 5)]
        said = [self.num_pairs * len(_ngrams(words, n)) for n in range(1, 5)]
        return [*matches, *said, self._closest(len(words))]

    def _closest(self, num_words: int) -> int:
        if num_words not in self._known:
            self._known[num_words] = sum(
                num * min((abs(length - num_words), length) for length in lengths)[1]
                for lengths, num in self.lengths.items()
            )
        return self._known[num_words]

    def best(self, beside: Sequence[int] = (0,) * 9) -> list[str]:
        """The best sentences of the references; `beside`: the counts of what is said for the other pairs."""

        def bleu4(sentence: str) -> float:
            *counts, closest = map(sum, zip(self.counts(sentence), beside, strict=True))
            precisions = [
                (match + 1e-9) / (said + 1e-9) for match, said in zip(counts[:4], counts[4:], strict=True)
            ]
            return sum(map(math.log, precisions)) / 4 + min(0.0, 1 - closest / counts[4])

        return sorted(self.sentences, key=lambda text: (-bleu4(text), text))[:NUM_CANDIDATES]


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
