"""How much room the synthetic captions leave: a perfect describer against the best fixed sentence.

Prints Sm (mean of BLEU-4, METEOR, ROUGE-L, CIDEr-D, in percent) over pairs of the synthetic test split for
(a) the canonical sentence of the truth, (b) one fixed sentence for all changed pairs, (c) both over the whole set with
the change flag given. Needs pycocoevalcap and Java:  python benchmarks/synth_captions.py [pairs]
"""

import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO

from llava.synth import World, describe
from llava.synth.describe import UNCHANGED

Scores = dict[str, float]


def score(said: Sequence[str], references: Sequence[Sequence[str]], meteor: bool = True) -> Scores:
    """The four metrics in percent and their mean `sm`; without METEOR, Java is not needed and `sm` is over three."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge

    results = {k: [text] for k, text in enumerate(said)}
    truth = {k: list(texts) for k, texts in enumerate(references)}
    with redirect_stdout(StringIO()):
        found = {
            "bleu4": Bleu(4).compute_score(truth, results)[0][3],
            "rouge": Rouge().compute_score(truth, results)[0],
            "cider": Cider().compute_score(truth, results)[0],
        }
        if meteor:
            found["meteor"] = Meteor().compute_score(truth, results)[0]
    found = {name: 100 * float(value) for name, value in found.items()}
    return {**found, "sm": sum(found.values()) / len(found)}


def show(title: str, scores: Scores) -> None:
    print(f"{title:44s}" + "  ".join(f"{name} {value:6.2f}" for name, value in scores.items()), flush=True)


def main(pairs: int = 500) -> None:
    world = World(seed=0, split="test")
    references, canonical = [], []
    for index in range(pairs):  # plans and words only: no pixels are needed here
        scene = world.scene(index)
        references.append(world.captions(index))
        canonical.append(describe.sentence(scene.changes, scene.ground) if scene.changes else UNCHANGED[2])
    changed = [k for k in range(pairs) if references[k] != UNCHANGED]
    theirs = [references[k] for k in changed]
    show("(a) canonical, changed pairs", score([canonical[k] for k in changed], theirs))
    human = score([r[0] for r in theirs], [r[1:] for r in theirs])
    show("    one reference against the other four", human)

    sentences = Counter(text for texts in theirs for text in texts)
    grams = Counter(
        gram for text in sentences for gram in zip(*(text.split()[k:] for k in range(3)), strict=False)
    )
    likely = sorted(sentences, key=lambda text: -_common(text, grams))[:60] + [
        t for t, _ in sentences.most_common(60)
    ]
    ranked = sorted(set(likely), key=lambda text: -score([text] * len(changed), theirs, meteor=False)["sm"])
    tried = [(score([text] * len(changed), theirs), text) for text in ranked[:5]]
    best, text = max(tried, key=lambda pair: pair[0]["sm"])
    show("(b) best fixed sentence, changed pairs", best)
    print(f"    {text!r}")

    whole = score(canonical, references)
    fixed = score([text if k in set(changed) else UNCHANGED[2] for k in range(pairs)], references)
    show("(c) canonical, all pairs", whole)
    show("    flag and fixed sentence, all pairs", fixed)
    print(
        f"    gap {whole['sm'] - fixed['sm']:.2f}; {len(sentences)} distinct captions of {5 * len(changed)}"
    )
    lengths = [len(text.split()) for texts in theirs for text in texts]
    words = {word for text in sentences for word in text.split()}
    print(
        f"    {sum(lengths) / len(lengths):.1f} words a caption, longest {max(lengths)}; {len(words)} distinct words"
    )


def _common(text: str, grams: Counter[tuple[str, ...]]) -> int:
    words = text.split()
    return sum(grams[gram] for gram in zip(*(words[k:] for k in range(3)), strict=False)) // max(
        len(words), 1
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
