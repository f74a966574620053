"""The one scoring of change captions: caption metrics, the change decision, and the baselines to beat.

All figures are percentages. Text is normalised as the CCExpert release does (`llava.tasks.caption.normalise`)
and split at spaces, without the PTB tokenizer; BLEU, ROUGE-L and CIDEr-D come from pycocoevalcap, METEOR 1.5
from its jar. Sm = (BLEU-4 + METEOR + ROUGE-L + CIDEr-D) / 4. CIDEr-D takes its document frequencies from the
references of the set it is computed on, so its value on a subset does not compare with that on the whole.
"""

import hashlib
import json
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, get_args

from llava.errors import DataError, MissingDependencyError
from llava.eval.meteor import Meteor, shared_meteor
from llava.tasks.caption import NO_CHANGE_CAPTION, normalise, says_change

Subset = Literal["all", "changed", "unchanged"]
SUBSETS: tuple[Subset, ...] = get_args(Subset)
METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr-D", "Sm")

NUM_CANDIDATES = 5
"""Reference sentences, the best by BLEU-4, of which a baseline takes the one with the highest Sm."""


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

    @property
    def sm(self) -> float | None:
        if self.meteor is None or self.cider_d is None:
            return None
        return (self.bleu4 + self.meteor + self.rouge_l + self.cider_d) / 4

    def to_dict(self) -> dict[str, float | int | None]:
        bleu = (self.bleu1, self.bleu2, self.bleu3, self.bleu4)
        values = (*bleu, self.meteor, self.rouge_l, self.cider_d, self.sm)
        return {"pairs": self.num_pairs, **dict(zip(METRICS, values, strict=True))}


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
class Scores:
    """The result of `score`: predictions first, baselines beside them, and what identifies the run."""

    predictions: ScoreRow
    baselines: tuple[ScoreRow, ...]
    num_pairs: int
    predictions_sha256: str
    references_sha256: str
    notes: tuple[str, ...] = ()
    per_pair: Mapping[str, Mapping[str, float]] = field(default_factory=dict, repr=False)
    """uid -> {"ROUGE-L", and where computed "CIDEr-D", "METEOR"}, in percent; not part of `to_dict`."""

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
            "notes": list(self.notes),
        }

    def table(self) -> str:
        """The whole result as aligned text."""
        width = max(len(row.name) for row in self.rows)
        lines = [f"{'':9}  {'':{width}}  {'pairs':>6}  " + "  ".join(f"{name:>7}" for name in METRICS)]
        for subset in SUBSETS:
            for row in self.rows:
                scores = row.captions[subset]
                if scores is None:
                    continue
                values = scores.to_dict()
                cells = "  ".join(f"{percent(values[name]):>7}" for name in METRICS)
                label = subset if row is self.predictions else ""
                lines.append(f"{label:9}  {row.name:{width}}  {scores.num_pairs:6}  {cells}")
        lines += ["", f"{'change':9}  {'':{width}}  {'accuracy':>8}  {'false alarms':>20}  {'misses':>20}"]
        for row in self.rows:
            told = row.decision
            alarms = f"{told.false_alarms} of {told.num_unchanged} ({percent(told.false_alarm_rate)})"
            misses = f"{told.misses} of {told.num_changed} ({percent(told.miss_rate)})"
            accuracy = percent(told.accuracy)
            lines.append(f"{'':9}  {row.name:{width}}  {accuracy:>8}  {alarms:>20}  {misses:>20}")
        lines.append("")
        for row in self.baselines:
            lines.append(f"{row.name}: " + " / ".join(f'"{sentence}"' for sentence in row.sentences))
        lines += [f"note: {note}" for note in self.notes]
        hashes = (self.predictions_sha256[:16], self.references_sha256[:16])
        lines.append("sha256 of predictions {}, references {}".format(*hashes))
        return "\n".join(lines)


def percent(value: float | int | None) -> str:
    """Two decimals, or a dash for what is not given."""
    return "-" if value is None else f"{value:.2f}"


def score(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    changed: Mapping[str, bool] | None = None,
    meteor: bool = True,
    baselines: bool = True,
) -> Scores:
    """Score one caption a pair against its references.

    predictions: uid -> caption; an empty one matches nothing and states no change. references: uid ->
    sentences, the same uids. changed: uid -> whether the pair truly changed; without it a pair is unchanged
    when none of its references states a change. meteor: False leaves METEOR and Sm out. baselines: also
    score what needs no model: the best constant sentence, and one fixed sentence for each true answer.
    Without Java a warning is given and noted, METEOR and Sm are None and the rest stands.
    Raises DataError, naming the uids, when the three do not cover the same pairs or hold unusable text,
    MissingDependencyError without pycocoevalcap, LlavaError when METEOR breaks down half-way.
    """
    _require_same_uids("prediction", predictions, references)
    for uid, text in predictions.items():
        _require_text(text, f"the prediction of {uid!r}")
    sentences = {uid: _references(uid, texts) for uid, texts in references.items()}
    if changed is None:
        changed = {uid: any(map(says_change, texts)) for uid, texts in references.items()}
    _require_same_uids("change flag", changed, references)

    notes: list[str] = []
    scorer = _Scorer(sentences, changed, _start_meteor(notes) if meteor else None)
    rows = _baselines(scorer) if baselines else ()
    return Scores(
        predictions=scorer.row("predictions", predictions),
        baselines=tuple(rows),
        num_pairs=len(references),
        predictions_sha256=_sha256(dict(predictions)),
        references_sha256=_sha256({uid: list(texts) for uid, texts in references.items()}),
        notes=tuple(notes),
        per_pair=scorer.per_pair(predictions),
    )


class _Scorer:
    """References with their truth, against which any set of captions is scored; references are normalised."""

    def __init__(
        self, references: Mapping[str, list[str]], changed: Mapping[str, bool], meteor: Meteor | None
    ) -> None:
        # Sorted: sums run in this order, so equal input in any order gives equal bits.
        self.references = {uid: references[uid] for uid in sorted(references)}
        self.changed = changed
        self.meteor = meteor

    def uids(self, subset: Subset) -> list[str]:
        wanted = (True, False) if subset == "all" else (subset == "changed",)
        return [uid for uid in self.references if self.changed[uid] in wanted]

    def row(self, name: str, said: Mapping[str, str], sentences: tuple[str, ...] = ()) -> ScoreRow:
        """All scores of one set of captions, as written."""
        told = {uid: says_change(said[uid]) for uid in self.references}
        changed, unchanged = self.uids("changed"), self.uids("unchanged")
        decision = ChangeDecision(
            num_changed=len(changed),
            num_unchanged=len(unchanged),
            false_alarms=sum(told[uid] for uid in unchanged),
            misses=sum(not told[uid] for uid in changed),
        )
        captions = {subset: self.captions(said, subset) for subset in SUBSETS}
        return ScoreRow(name, sentences, captions, decision)

    def captions(self, said: Mapping[str, str], subset: Subset = "all") -> CaptionScores | None:
        uids = self.uids(subset)
        if not uids:
            return None
        bleu, _ = self._coco("bleu", said, uids)
        rouge, _ = self._coco("rouge", said, uids)
        return CaptionScores(
            num_pairs=len(uids),
            bleu1=100 * bleu[0],
            bleu2=100 * bleu[1],
            bleu3=100 * bleu[2],
            bleu4=100 * bleu[3],
            meteor=100 * self._meteor(said, uids)[0] if self.meteor else None,
            rouge_l=100 * float(rouge),
            cider_d=100 * float(self._coco("cider", said, uids)[0]) if self._cider_is_given(uids) else None,
        )

    def per_pair(self, said: Mapping[str, str]) -> dict[str, dict[str, float]]:
        uids = self.uids("all")
        each: dict[str, Sequence[float]] = {"ROUGE-L": self._coco("rouge", said, uids)[1]}
        if self._cider_is_given(uids):
            each["CIDEr-D"] = self._coco("cider", said, uids)[1]
        if self.meteor:
            each["METEOR"] = self._meteor(said, uids)[1]
        return {
            uid: {name: 100 * float(column[row]) for name, column in each.items()}
            for row, uid in enumerate(uids)
        }

    def _cider_is_given(self, uids: Sequence[str]) -> bool:
        return len(uids) > 1 and any(self.changed[uid] for uid in uids)

    def _coco(self, name: str, said: Mapping[str, str], uids: Sequence[str]) -> tuple[Any, Any]:
        """(score of the set, score of each pair) by a scorer of pycocoevalcap, as fractions."""
        options = {"verbose": 0} if name == "bleu" else {}
        return _coco_scorer(name).compute_score(
            {uid: self.references[uid] for uid in uids},
            {uid: [normalise(said[uid])] for uid in uids},
            **options,
        )

    def _meteor(self, said: Mapping[str, str], uids: Sequence[str]) -> tuple[float, list[float]]:
        assert self.meteor is not None
        captions = [normalise(said[uid]) for uid in uids]
        return self.meteor.score(captions, [self.references[uid] for uid in uids])


def _baselines(scorer: _Scorer) -> Iterator[ScoreRow]:
    """What a model must beat: one sentence for every pair, and one for each true answer.

    The sentences are reference sentences: the best few by BLEU-4, which is quickly computed for all of them
    when a whole set gets the same sentence, and of those the one with the highest Sm.
    """
    subsets = {subset: [scorer.references[uid] for uid in scorer.uids(subset)] for subset in SUBSETS}

    everywhere = _OneSentence(subsets["all"])

    def constant(sentence: str) -> dict[str, str]:
        return dict.fromkeys(scorer.references, sentence)

    best = _best_sentence(scorer, everywhere.best(), constant)
    yield scorer.row("constant", constant(best), (best,))

    if not subsets["changed"] or not subsets["unchanged"]:
        return  # with one answer for all pairs this is the constant
    unchanged = _OneSentence(subsets["unchanged"])
    same = NO_CHANGE_CAPTION if NO_CHANGE_CAPTION in unchanged.sentences else unchanged.best()[0]

    def by_flag(sentence: str) -> dict[str, str]:
        return {uid: sentence if scorer.changed[uid] else same for uid in scorer.references}

    candidates = _OneSentence(subsets["changed"]).best(beside=unchanged.counts(same))
    best = _best_sentence(scorer, candidates, by_flag)
    yield scorer.row("true flag + one sentence", by_flag(best), (same, best))


def _best_sentence(
    scorer: _Scorer, candidates: Sequence[str], captions_of: Callable[[str], Mapping[str, str]]
) -> str:
    """The candidate with the highest Sm; where a metric is not given, by the mean of the others."""

    def quality(sentence: str) -> float:
        scores = scorer.captions(captions_of(sentence))
        assert scores is not None
        return sum(part or 0.0 for part in (scores.bleu4, scores.meteor, scores.rouge_l, scores.cider_d))

    return max(candidates, key=quality)


class _OneSentence:
    """BLEU-4 of the same sentence said for every pair of a set, for thousands of sentences in a second.

    Clipped matches of an n-gram are then the number of pairs whose references hold it (n-grams that a
    sentence repeats count once, which makes the value a lower bound).
    """

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        self.num_pairs = len(references)
        self.sentences = sorted({text for texts in references for text in texts})
        self.pairs_with: Counter[tuple[str, ...]] = Counter()
        self.lengths: Counter[frozenset[int]] = Counter()
        for texts in references:
            words = [text.split() for text in texts]
            self.pairs_with.update({gram for line in words for n in range(1, 5) for gram in _ngrams(line, n)})
            self.lengths[frozenset(map(len, words))] += 1

    def counts(self, sentence: str) -> list[int]:
        """Sums over the set: matches of 1- to 4-grams, 1- to 4-grams said, words of closest references."""
        words = sentence.split()
        matches = [sum(self.pairs_with[gram] for gram in set(_ngrams(words, n))) for n in range(1, 5)]
        said = [self.num_pairs * len(_ngrams(words, n)) for n in range(1, 5)]
        closest = sum(
            num * min((abs(length - len(words)), length) for length in lengths)[1]
            for lengths, num in self.lengths.items()
        )
        return [*matches, *said, closest]

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


def _start_meteor(notes: list[str]) -> Meteor | None:
    """The shared METEOR, or a warning and a note that say why there is none."""
    try:
        return shared_meteor()
    except MissingDependencyError as error:
        notes.append(f"METEOR and Sm are not given. {error}")
        warnings.warn(notes[-1], stacklevel=3)
        return None


@lru_cache
def _coco_scorer(name: str) -> Any:
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise MissingDependencyError(
            f"caption scores need pycocoevalcap ({error}). Install the extra: pip install 'llava[eval]'"
        ) from error
    return {"bleu": Bleu, "rouge": Rouge, "cider": Cider}[name]()


def _require_text(text: object, what: str) -> None:
    if not isinstance(text, str):
        raise DataError(f"{what} is {text!r}, expected a string; an empty one stands for no answer")


def _references(uid: str, texts: object) -> list[str]:
    if not isinstance(texts, Sequence) or isinstance(texts, str) or not texts:
        raise DataError(f"the references of {uid!r} are {texts!r}, expected a list of at least one sentence")
    for number, text in enumerate(texts):
        _require_text(text, f"reference {number} of {uid!r}")
    sentences = [normalise(text) for text in texts]
    if not all(sentences):
        raise DataError(f"reference {sentences.index('')} of {uid!r} is empty; remove it from the data")
    return sentences


def _require_same_uids(what: str, given: Mapping[str, object], references: Mapping[str, object]) -> None:
    if not references:
        raise DataError("there are no references, so nothing can be scored")
    for uids, fault in (
        (references.keys() - given.keys(), f"have no {what}"),
        (given.keys() - references.keys(), f"have a {what} but no references"),
    ):
        if uids:
            named = ", ".join(sorted(map(str, uids))[:5]) + (", ..." if len(uids) > 5 else "")
            raise DataError(
                f"{len(uids)} uids {fault}: {named}. Every pair must be scored once: complete the set or "
                "leave the pairs out on both sides"
            )


def _sha256(texts: Mapping[str, object]) -> str:
    """Of the texts as given, before any treatment; the order of the uids does not matter."""
    return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()
