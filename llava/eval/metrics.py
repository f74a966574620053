"""The one scoring of change captions: caption metrics, the change decision, and the baselines to beat.

All figures are percentages. Text is normalised as the CCExpert release does (`llava.tasks.caption.normalise`)
and split at spaces, or by the PTB tokenizer; BLEU, ROUGE-L and CIDEr-D come from pycocoevalcap, METEOR 1.5
from its jar. Sm = (BLEU-4 + METEOR + ROUGE-L + CIDEr-D) / 4. CIDEr-D takes its document frequencies from the
references of the set it is computed on, so its value on a subset does not compare with that on the whole.
Intervals come from resampled pairs, with those frequencies held fixed.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from llava.errors import ConfigError, DataError
from llava.eval.baselines import baselines as the_baselines
from llava.eval.pair_statistics import (
    ALARM,
    CHANGED,
    DECISIONS,
    METRICS,
    MISS,
    ONE,
    SUBSETS,
    Array,
    Measure,
    PairStatistics,
    Subset,
    set_scores,
)
from llava.eval.resample import RESAMPLES, Interval, interval, resampled_sums
from llava.eval.scores import CaptionScores, ChangeDecision, Repeats, ScoreRow, Scores
from llava.eval.tokenizers import Treatment, load_treatment
from llava.tasks.caption import says_change


def score(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    changed: Mapping[str, bool] | None = None,
    meteor: bool = True,
    baselines: bool = True,
    *,
    tokenizer: str = "release",
    further: Mapping[str, Measure] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    repeats: Sequence[tuple[str, str]] = (),
) -> Scores:
    """Score one caption a pair against its references.

    predictions: uid -> caption; an empty one matches nothing and states no change. references: uid ->
    sentences, the same uids. changed: uid -> whether the pair truly changed; without it as most of its
    references say (`mostly_changed`). meteor: False leaves METEOR and Sm out. baselines: also
    score what needs no model: the best constant sentence, and one fixed sentence for each true answer.
    tokenizer: "release" or "ptb". further: more measures of the predictions by name (`Spice`, `BertScore`).
    resamples, seed: of the intervals; 0 resamples for none. repeats: (uid, caption) of captions that came again
    and do not count; what they would do is in `Scores.repeats`.
    Where METEOR cannot be had, or breaks down twice, a warning is given and noted, METEOR and Sm are None and
    the rest stands. Raises DataError, naming the uids, when the three do not cover the same pairs or hold
    unusable text, MissingDependencyError without pycocoevalcap.
    """
    treat = load_treatment(tokenizer)
    if resamples < 0:
        raise ConfigError(f"resamples={resamples} must be at least 0")
    predictions = dict(predictions)
    require_captions(predictions, references)
    pairs = prepare(references, changed, treat, meteor=meteor, further=further)
    names = tuple(pairs.further)
    tables = pairs.tables(predictions, further=True)
    rows = [
        score_row(name, pairs.tables(said, treated=True), sentences)
        for name, sentences, said in (the_baselines(pairs) if baselines else ())
    ]
    counted = _repeats(predictions, list(repeats), references, pairs, treat, meteor) if repeats else None
    return Scores(
        predictions=score_row("predictions", tables, further=names),
        baselines=tuple(rows),
        num_pairs=len(pairs.uids),
        predictions_sha256=sha256_of(predictions),
        references_sha256=sha256_of({uid: list(texts) for uid, texts in references.items()}),
        notes=tuple(pairs.notes),
        per_pair=_per_pair(pairs, tables["all"]),
        intervals=_intervals(tables, names, resamples, seed),
        resamples=resamples,
        seed=seed,
        tokenizer=tokenizer,
        repeats=counted,
    )


def prepare(
    references: Mapping[str, Sequence[str]],
    changed: Mapping[str, bool] | None,
    treat: Treatment,
    *,
    meteor: bool = True,
    further: Mapping[str, Measure] | None = None,
) -> PairStatistics:
    """Checked references, ready for any captions of their pairs; arguments and errors as in `score`."""
    if not references:
        raise DataError("there are no references, so nothing can be scored")
    for uid, texts in references.items():
        _require_references(uid, texts)
    if changed is None:
        changed = {uid: mostly_changed(texts) for uid, texts in references.items()}
    _require_same_uids("change flag", changed, references)
    lines = iter(treat([text for texts in references.values() for text in texts]))
    sentences = {uid: [next(lines) for _ in texts] for uid, texts in references.items()}
    for uid, group in sentences.items():
        if not all(group):
            raise DataError(f"reference {group.index('')} of {uid!r} is empty; remove it from the data")
    return PairStatistics(sentences, changed, treat, meteor=meteor, further=further)


def mostly_changed(references: Sequence[str]) -> bool:
    """Whether most of a pair's references state a change: the truth where no flag is given."""
    return 2 * sum(map(says_change, references)) > len(references)


def require_captions(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> None:
    """Raises DataError, naming the uids, unless each pair with references has one caption, and no other has."""
    _require_same_uids("prediction", predictions, references)
    for uid, text in predictions.items():
        _require_text(text, f"the prediction of {uid!r}")


def score_row(
    name: str,
    tables: Mapping[Subset, Array],
    sentences: tuple[str, ...] = (),
    further: Sequence[str] = (),
) -> ScoreRow:
    """All scores of one set of captions from its tables of statistics (`PairStatistics.tables`)."""
    captions = {
        subset: _caption_scores(tables[subset], further) if subset in tables else None for subset in SUBSETS
    }
    return ScoreRow(name, sentences, captions, _decision(tables["all"]))


def _caption_scores(table: Array, further: Sequence[str] = ()) -> CaptionScores:
    scores = {name: float(value) for name, value in set_scores(table.sum(0), further).items()}
    given = {name: None if math.isnan(value) else value for name, value in scores.items()}
    return CaptionScores(
        num_pairs=len(table),
        bleu1=scores["BLEU-1"],
        bleu2=scores["BLEU-2"],
        bleu3=scores["BLEU-3"],
        bleu4=scores["BLEU-4"],
        meteor=given["METEOR"],
        rouge_l=scores["ROUGE-L"],
        cider_d=given["CIDEr-D"],
        further={name: scores[name] for name in further},
    )


def _decision(table: Array) -> ChangeDecision:
    num, changed, alarms, misses = (int(table[:, column].sum()) for column in (ONE, CHANGED, ALARM, MISS))
    return ChangeDecision(
        num_changed=changed, num_unchanged=num - changed, false_alarms=alarms, misses=misses
    )


def decision_hits(table: Array) -> npt.NDArray[np.bool_]:
    """[pairs]: where the caption tells change from no change rightly."""
    return (table[:, ALARM] + table[:, MISS]) == 0


def _per_pair(pairs: PairStatistics, table: Array) -> dict[str, dict[str, float]]:
    further = tuple(pairs.further)
    columns = set_scores(table, further)
    given = {
        name: columns[name]
        for name in ("BLEU-4", "METEOR", "ROUGE-L", "CIDEr-D", "Sm", *further)
        if not math.isnan(columns[name][0])
    }
    return {
        uid: {name: float(column[row]) for name, column in given.items()}
        for row, uid in enumerate(pairs.uids)
    }


def _intervals(
    tables: Mapping[Subset, Array], further: Sequence[str], resamples: int, seed: int
) -> dict[Subset, dict[str, Interval]]:
    """Intervals of what the table has; those of the change decision only on all pairs."""
    found: dict[Subset, dict[str, Interval]] = {}
    for subset, table in tables.items() if resamples else ():
        values = set_scores(resampled_sums(table, resamples, seed), further)
        names = (*METRICS, *further, *(DECISIONS if subset == "all" else ()))
        ends = {name: interval(values[name]) for name in names}
        found[subset] = {name: pair for name, pair in ends.items() if pair is not None}
    return found


def _repeats(
    predictions: Mapping[str, str],
    repeats: Sequence[tuple[str, str]],
    references: Mapping[str, Sequence[str]],
    pairs: PairStatistics,
    treat: Treatment,
    meteor: bool,
) -> Repeats:
    """Every caption as a pair of its own, the way a list of results is scored."""
    said: dict[str, set[str]] = {}
    for uid, text in repeats:
        if uid not in predictions:
            raise DataError(f"a repeated caption of {uid!r} has no first one")
        _require_text(text, f"a repeated prediction of {uid!r}")
        said.setdefault(uid, {predictions[uid]}).add(text)
    every = [*predictions.items(), *repeats]
    changed = dict(zip(pairs.uids, map(bool, pairs.changed), strict=True))
    expanded = prepare(
        {str(place): references[uid] for place, (uid, _) in enumerate(every)},
        {str(place): changed[uid] for place, (uid, _) in enumerate(every)},
        treat,
        meteor=meteor and pairs.has_meteor,
    )
    table = expanded.tables({str(place): text for place, (_, text) in enumerate(every)}, ("all",))["all"]
    return Repeats(
        num_captions=len(repeats),
        num_uids=len(said),
        num_conflicting=sum(len(texts) > 1 for texts in said.values()),
        captions=_caption_scores(table),
    )


def _require_text(text: object, what: str) -> None:
    if not isinstance(text, str):
        raise DataError(f"{what} is {text!r}, expected a string; an empty one stands for no answer")


def _require_references(uid: str, texts: object) -> None:
    if not isinstance(texts, Sequence) or isinstance(texts, str) or not texts:
        raise DataError(f"the references of {uid!r} are {texts!r}, expected a list of at least one sentence")
    for number, text in enumerate(texts):
        _require_text(text, f"reference {number} of {uid!r}")


def _require_same_uids(what: str, given: Mapping[str, object], references: Mapping[str, object]) -> None:
    for uids, fault in (
        (references.keys() - given.keys(), f"have no {what}"),
        (given.keys() - references.keys(), f"have a {what} but no references"),
    ):
        if uids:
            raise DataError(
                f"{len(uids)} uids {fault}: {some(uids)}. Every pair must be scored once: complete the set or "
                "leave the pairs out on both sides"
            )


def some(uids: Iterable[str]) -> str:
    """The first few of many, for a message."""
    ordered = sorted(map(str, uids))
    return ", ".join(ordered[:5]) + (", ..." if len(ordered) > 5 else "")


def sha256_of(texts: Mapping[str, object]) -> str:
    """Of the texts as given, before any treatment; the order of the uids does not matter."""
    return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()
