"""Which of two systems is better, and whether the pairs at hand can tell: paired tests on common pairs.

A system's training is one throw of the dice. These tests say how a difference would move with other pairs; how
it would move with another seed, only other seeds say.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from llava.errors import ConfigError
from llava.eval.metrics import decision_hits, prepare, require_captions, score_row, sha256_of
from llava.eval.pair_statistics import DECISIONS, METRICS, SUBSETS, Array, Measure, Subset, set_scores
from llava.eval.resample import (
    LEVEL,
    RESAMPLES,
    Interval,
    bootstrap_p,
    exchanged_sums,
    interval,
    mcnemar_p,
    permutation_p,
    resampled_sums,
)
from llava.eval.scores import ScoreRow, caption_table, decision_table
from llava.eval.tokenizers import load_treatment

SHOWN = ("BLEU-4", "METEOR", "ROUGE-L", "CIDEr-D", "Sm")
JUDGED = ("Sm", "CIDEr-D", "ROUGE-L")
"""The verdict goes by the first of these that is given."""
ALPHA = 0.05


@dataclass(frozen=True)
class Difference:
    """One metric of the second system minus the first's, in percent points."""

    subset: Subset
    metric: str
    first: float
    second: float
    interval: Interval | None
    """Of the difference, by paired bootstrap."""
    p_bootstrap: float
    p: float
    """By exchanging the two systems' captions at random; two-sided."""

    @property
    def difference(self) -> float:
        return self.second - self.first

    def to_dict(self) -> dict[str, Any]:
        return {
            "subset": self.subset,
            "metric": self.metric,
            "first": self.first,
            "second": self.second,
            "difference": self.difference,
            "interval": self.interval and list(self.interval),
            "p_bootstrap": self.p_bootstrap,
            "p": self.p,
        }


@dataclass(frozen=True)
class Versus:
    """Two systems side by side."""

    first: str
    second: str
    differences: tuple[Difference, ...]
    only_first_right: int
    """Pairs whose change decision the first system alone gets right."""
    only_second_right: int
    alpha: float
    """What p has to be below, given how many comparisons there are."""

    @property
    def mcnemar(self) -> float:
        return mcnemar_p(self.only_first_right, self.only_second_right)

    @property
    def judged(self) -> Difference:
        """The difference the verdict goes by."""
        on_all = {one.metric: one for one in self.differences if one.subset == "all"}
        return next(on_all[name] for name in JUDGED if name in on_all)

    @property
    def verdict(self) -> str:
        """Plain words."""
        one = self.judged
        among = f" ({one.interval[0]:+.2f} to {one.interval[1]:+.2f})" if one.interval else ""
        facts = f"{one.metric} {one.difference:+.2f}{among}, p = {_p(one.p)}"
        if one.p >= self.alpha:
            caption = f"captions: no difference shown between {self.first} and {self.second}; {facts}"
        else:
            better, worse = (self.second, self.first) if one.difference > 0 else (self.first, self.second)
            caption = (
                f"captions: {better} is better than {worse}; {self.second} against {self.first}: {facts}"
            )
        facts = (
            f"{self.first} alone is right on {self.only_first_right} pairs, {self.second} alone on "
            f"{self.only_second_right}, p = {_p(self.mcnemar)}"
        )
        if self.mcnemar >= self.alpha:
            decision = f"change decision: no difference shown; {facts}"
        else:
            better = self.second if self.only_second_right > self.only_first_right else self.first
            decision = f"change decision: {better} is better; {facts}"
        return f"{caption}\n{decision}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "first": self.first,
            "second": self.second,
            "differences": [one.to_dict() for one in self.differences],
            "mcnemar": {
                "only_first_right": self.only_first_right,
                "only_second_right": self.only_second_right,
                "p": self.mcnemar,
            },
            "alpha": self.alpha,
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`."""

    num_pairs: int
    systems: tuple[ScoreRow, ...]
    versus: tuple[Versus, ...]
    """Every two systems, in the order given."""
    sha256: Mapping[str, str]
    """Of each system's captions on the common pairs, and of the "references"."""
    resamples: int
    seed: int
    tokenizer: str
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "pairs": self.num_pairs,
            "systems": [row.to_dict() for row in self.systems],
            "versus": [one.to_dict() for one in self.versus],
            "sha256": dict(self.sha256),
            "tokenizer": self.tokenizer,
            "resampling": {"resamples": self.resamples, "seed": self.seed, "level": LEVEL},
            "notes": list(self.notes),
        }

    def table(self) -> str:
        """The whole result as aligned text."""
        lines = [*caption_table(self.systems), "", *decision_table(self.systems)]
        for one in self.versus:
            lines += ["", f"{one.second} minus {one.first}, {self.num_pairs} common pairs"]
            lines.append(f"{'':9}  {'':16}  {'difference':>10}  {f'{LEVEL} % from':>9}  {'to':>7}  {'p':>7}")
            subset = ""
            for row in one.differences:
                if row.metric not in (*SHOWN, *DECISIONS):
                    continue
                low, high = (f"{end:+.2f}" for end in row.interval) if row.interval else ("-", "-")
                label = row.subset if row.subset != subset else ""
                subset = row.subset
                name = row.metric.replace("_", " ")
                lines.append(
                    f"{label:9}  {name:16}  {row.difference:+10.2f}  {low:>9}  {high:>7}  {_p(row.p):>7}"
                )
            lines += one.verdict.split("\n")
        lines += [
            "",
            f"{LEVEL} % intervals: paired bootstrap, {self.resamples} resamples; p: as many random exchanges of "
            f"captions, McNemar's exact test",
            f"for the change decision; seed {self.seed}; CIDEr-D with the common pairs' document frequencies.",
        ]
        if len(self.versus) > 1:
            lines.append(
                f"{len(self.versus)} comparisons, so a verdict asks for p < {self.versus[0].alpha:.3g} (Bonferroni)."
            )
        lines.append("What another training seed would change is not in these figures.")
        lines += [f"note: {note}" for note in self.notes]
        lines.append("sha256 of " + ", ".join(f"{name} {value[:16]}" for name, value in self.sha256.items()))
        return "\n".join(lines)


def compare(
    systems: Mapping[str, Mapping[str, str]],
    references: Mapping[str, Sequence[str]],
    changed: Mapping[str, bool] | None = None,
    *,
    meteor: bool = True,
    tokenizer: str = "release",
    further: Mapping[str, Measure] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Every two of the systems on the same pairs.

    systems: name -> (uid -> caption), all of the same uids as references; the other arguments as in
    `llava.eval.metrics.score`, and its errors. Raises ConfigError for fewer than two systems or no resamples.
    """
    if len(systems) < 2 or resamples < 1:
        raise ConfigError(
            f"a comparison needs two systems and a resample, not {len(systems)} and {resamples}"
        )
    treat = load_treatment(tokenizer)
    for said in systems.values():
        require_captions(said, references)
    pairs = prepare(references, changed, treat, meteor=meteor, further=further)
    tables = {name: pairs.tables(said, further=True) for name, said in systems.items()}
    names = tuple(pairs.further)
    alpha = ALPHA / math.comb(len(systems), 2)
    return Comparison(
        num_pairs=len(pairs.uids),
        systems=tuple(score_row(name, table, further=names) for name, table in tables.items()),
        versus=tuple(
            _versus(first, second, tables[first], tables[second], names, resamples, seed, alpha)
            for first, second in combinations(tables, 2)
        ),
        sha256={
            **{name: sha256_of(dict(said)) for name, said in systems.items()},
            "references": sha256_of({uid: list(texts) for uid, texts in references.items()}),
        },
        resamples=resamples,
        seed=seed,
        tokenizer=tokenizer,
        notes=tuple(pairs.notes),
    )


def _versus(
    first: str,
    second: str,
    first_tables: Mapping[Subset, Array],
    second_tables: Mapping[Subset, Array],
    further: Sequence[str],
    resamples: int,
    seed: int,
    alpha: float,
) -> Versus:
    differences: list[Difference] = []
    for subset in SUBSETS:
        if subset in first_tables:
            metrics = (*METRICS, *further, *(DECISIONS if subset == "all" else ()))
            one, two = first_tables[subset], second_tables[subset]
            differences += _differences(subset, metrics, one, two, further, resamples, seed)
    right, other = (decision_hits(tables["all"]) for tables in (first_tables, second_tables))
    return Versus(
        first, second, tuple(differences), int((right & ~other).sum()), int((other & ~right).sum()), alpha
    )


def _differences(
    subset: Subset,
    metrics: Sequence[str],
    first: Array,
    second: Array,
    further: Sequence[str],
    resamples: int,
    seed: int,
) -> list[Difference]:
    real = [set_scores(table.sum(0), further) for table in (first, second)]
    drawn = [set_scores(resampled_sums(table, resamples, seed), further) for table in (first, second)]
    # Another stream than the resamples': a seed that is lucky in one is not in both.
    swapped = [set_scores(sums, further) for sums in exchanged_sums(first, second, resamples, seed + 1)]
    found = []
    for name in metrics:
        before, after = (float(scores[name]) for scores in real)
        if np.isnan(before) or np.isnan(after):
            continue
        moved = drawn[1][name] - drawn[0][name]
        exchanged = swapped[1][name] - swapped[0][name]
        found.append(
            Difference(
                subset,
                name,
                before,
                after,
                interval(moved),
                bootstrap_p(moved),
                permutation_p(after - before, exchanged),
            )
        )
    return found


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
