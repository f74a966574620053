"""Runs for the tests of the report: made-up pairs, files and scores of any number, in a moment."""

import random
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from llava.eval.report import ReportRun
from llava.tasks.caption import says_change

LONG = "a row of white villas with blue pools replaces the dense woods along the winding road near the right edge"
CHANGED = (LONG, "two houses are built", "a pond has formed at upper left")
SAME = ("the scene is the same as before", "there is no difference")
EVIL = "</script><!--<img src=x onerror=\"window.hit='yes'\">\u2028&amp; {{data}} \ud800 'q'"


def pictures(folder: Path, size: tuple[int, int] = (64, 48)) -> dict[str, str]:
    """Two photographs and a mask in `folder`; the fields of a line that name them."""
    before = Image.effect_noise(size, 60).convert("RGB")
    after = before.copy()
    mask = Image.new("L", size, 0)
    for image, colour in ((after, (200, 40, 40)), (mask, 255)):
        ImageDraw.Draw(image).rectangle((8, 8, 30, 30), fill=colour)
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in (("before.png", before), ("after.png", after), ("mask.png", mask)):
        image.save(folder / name)
    return {"img1_path": "before.png", "img2_path": "after.png", "mask_path": "mask.png"}


def scores_of(lines: list[dict[str, Any]], notes: tuple[str, ...] = ()) -> dict[str, Any]:
    """Scores as `Scores.to_dict` writes them; the caption metrics are made up, the decision is counted."""
    told = [(line["change_flag"], says_change(line["pred"])) for line in lines]
    changed = sum(flag for flag, _ in told)
    alarms = sum(said and not flag for flag, said in told)
    misses = sum(flag and not said for flag, said in told)
    metrics = dict.fromkeys(
        ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr-D", "Sm"), 50.25
    )
    decision = {
        "accuracy": 100 * (1 - (alarms + misses) / len(lines)),
        "changed": changed,
        "unchanged": len(lines) - changed,
        "false_alarms": alarms,
        "false_alarm_rate": 100 * alarms / max(1, len(lines) - changed),
        "misses": misses,
        "miss_rate": 100 * misses / max(1, changed),
    }
    captions = {
        "all": {"pairs": len(lines), **metrics},
        "changed": {"pairs": changed, **metrics},
        "unchanged": {"pairs": len(lines) - changed, **metrics, "CIDEr-D": None, "Sm": None},
    }
    constant = {"name": "constant", "sentences": [SAME[0]], "captions": captions, "decision": decision}
    return {
        "pairs": len(lines),
        "predictions": {"name": "predictions", "sentences": [], "captions": captions, "decision": decision},
        "baselines": [constant],
        "predictions_sha256": "a" * 64,
        "references_sha256": "b" * 64,
        "tokenizer": "release",
        "intervals": {"all": {"Sm": [48.5, 52.5], "accuracy": [70.0, 90.0]}},
        "resampling": {"resamples": 1000, "seed": 0, "level": 95},
        "notes": list(notes),
    }


def make_run(
    count: int, folder: Path | None = None, *, seed: int = 0, name: str = "tiny", **more: Any
) -> ReportRun:
    """A run of `count` pairs, every other one changed, one in five told wrongly; with pictures in `folder`."""
    dice = random.Random(seed)
    fields = pictures(folder) if folder is not None else {}
    lines = []
    for i in range(count):
        flag = i % 2
        right = dice.random() > 0.2
        said = dice.choice(CHANGED if bool(flag) == right else SAME)
        references = list(CHANGED if flag else SAME)
        lines.append(
            {"uid": f"set/{i:05}", "pred": said, "change_caption": references, "change_flag": flag, **fields}
        )
    per_pair = {
        line["uid"]: {"ROUGE-L": 100 * dice.random(), "CIDEr-D": 300 * dice.random()} for line in lines
    }
    options: dict[str, Any] = {"scores": scores_of(lines), "per_pair": per_pair, "root": folder, **more}
    return ReportRun(name=name, lines=lines, **options)


def task_run(folder: Path) -> ReportRun:
    """Two pairs asked all six tasks, both answered as if there were a new road."""
    from llava.eval.task_scores.scoring import Sample, score_samples
    from llava.tasks.reading import read_answer
    from tests.eval.test_task_run import COUNTS, PLACES, ROUNDS, records

    said = {
        "caption": "a road is built",
        "binary": "Yes.",
        "count": COUNTS[0],
        "loc": PLACES[0],
        "open": "yes",
    }
    rounds = {"own": ("Yes, I think", *ROUNDS[0][1:])}
    fields = pictures(folder)
    lines, samples = [], []
    for record in records():
        task = str(record.task)
        answer = said.get(task, ROUNDS[0][-1])
        mine = rounds if task == "dialog" else {}
        value, valid = read_answer(task, answer, mine.get("own", ()))
        samples.append(Sample(record=record, said=answer, rounds=mine))
        line = {**record.to_dict(), **fields, "pred": answer, "parsed": value, "valid": valid}
        if record.conversation:
            line["question"] = record.conversation[-1][0]
        lines.append(
            {**line, "answers": {mode: list(texts) for mode, texts in mine.items()}} if mine else line
        )
    scored = score_samples(samples, meteor=False, resamples=0)
    return ReportRun(name="tasks", lines=lines, scores=scored.captions, tasks=scored.tasks, root=folder)
