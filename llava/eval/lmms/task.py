"""Change captioning as a task of lmms-eval: the functions its YAML files name. How to run it: `llava.eval.lmms`.

A document is a record of `llava.data.record` as a dict; it needs captions. Nothing here imports lmms-eval.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.data.conversation import QUESTION
from llava.data.images import load_pair
from llava.data.record import Record, parse_record
from llava.errors import DataError
from llava.eval.metrics import score
from llava.tasks.caption import says_change

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image

METRICS = (
    "Sm",
    "BLEU-4",
    "METEOR",
    "ROUGE-L",
    "CIDEr-D",
    "change_accuracy",
    "false_alarm_rate",
    "miss_rate",
)
Doc = Mapping[str, Any]
Settings = Mapping[str, Any] | None
"""The task's `lmms_eval_specific_kwargs`: `root` (of the image paths, default here), `pre_prompt`, `post_prompt`."""


def check_records(docs: "Dataset") -> "Dataset":
    """The same records, all of them sound: found out before a model answers.

    Raises:
        DataError: a field is missing or of another kind, a record has no captions, a uid comes twice.
    """
    seen: set[str] = set()
    for number, doc in enumerate(docs):
        record = _record(doc, f"record {number}")
        if not record.change_caption:
            raise DataError(f"record {number}, uid {record.uid!r}: has no change_caption to score against")
        if record.uid in seen:
            raise DataError(f"record {number}: uid {record.uid!r} was used before")
        seen.add(record.uid)
    return docs


def levir_cc_test(docs: "Dataset") -> "Dataset":
    """LEVIR-CC's `images` entries as records, those of the test split alone."""

    def to_record(entry: Doc) -> dict[str, Any]:
        folder, name = f"images/{entry['split']}", entry["filename"]
        return {
            "uid": Path(name).stem,
            "img1_path": f"{folder}/A/{name}",
            "img2_path": f"{folder}/B/{name}",
            "change_caption": [sentence["raw"].strip() for sentence in entry["sentences"]],
            "change_flag": entry["changeflag"],
        }

    test = docs.filter(lambda entry: entry["split"] == "test")
    return check_records(test.map(to_record, remove_columns=docs.column_names))


def doc_to_visual(doc: Doc, settings: Settings = None) -> "list[Image.Image]":
    """The two images, before and after, in RGB."""
    root = Path((settings or {}).get("root", "."))
    return list(load_pair(root / doc["img1_path"], root / doc["img2_path"]))


def doc_to_text(doc: Doc, settings: Settings = None) -> str:
    """The question, the same for every pair."""
    settings = settings or {}
    return f"{settings.get('pre_prompt', '')}{QUESTION}{settings.get('post_prompt', '')}"


def doc_to_target(doc: Doc) -> list[str]:
    """The references."""
    return list(_record(doc).change_caption)


def process_results(doc: Doc, results: Sequence[str]) -> dict[str, dict[str, Any]]:
    """For every metric the pair with its answer: scores are of the set."""
    record = _record(doc)
    changed = record.change_flag
    if changed is None:
        changed = 2 * sum(map(says_change, record.change_caption)) > len(record.change_caption)
    answered = {
        "uid": record.uid,
        "pred": results[0],
        "change_caption": list(record.change_caption),
        "change_flag": int(changed),
    }
    return dict.fromkeys(METRICS, answered)


def _record(doc: Doc, where: str = "document") -> Record:
    return parse_record(dict(doc), where)


def _aggregate(metric: str, answered: Sequence[Mapping[str, Any]]) -> float | None:
    rows = ((row["uid"], row["pred"], tuple(row["change_caption"]), row["change_flag"]) for row in answered)
    return _scores(tuple(rows))[metric]


@lru_cache(maxsize=1)  # lmms-eval asks for one metric at a time
def _scores(rows: tuple[tuple[str, str, tuple[str, ...], int], ...]) -> dict[str, float | None]:
    predictions = {uid: pred for uid, pred, _, _ in rows}
    if len(predictions) != len(rows):
        raise DataError(f"{len(rows) - len(predictions)} answers are of a uid that has one; each counts once")
    scores = score(
        predictions,
        {uid: captions for uid, _, captions, _ in rows},
        {uid: bool(changed) for uid, _, _, changed in rows},
        baselines=False,
    )
    captions = scores.captions()
    assert captions is not None
    decision = scores.decision.to_dict()
    return {**captions.to_dict(), **decision, "change_accuracy": decision["accuracy"]}


sm = partial(_aggregate, "Sm")
bleu4 = partial(_aggregate, "BLEU-4")
meteor = partial(_aggregate, "METEOR")
rouge_l = partial(_aggregate, "ROUGE-L")
cider_d = partial(_aggregate, "CIDEr-D")
change_accuracy = partial(_aggregate, "change_accuracy")
false_alarm_rate = partial(_aggregate, "false_alarm_rate")
miss_rate = partial(_aggregate, "miss_rate")
