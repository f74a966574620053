"""One evaluation: a prediction for every uid once, on any number of processes, and the scores of all of them.

The same function runs from the command line, under torchrun, in a notebook and inside training. Batches are
formed from the records alone and dealt whole to the ranks, so neither the number of ranks nor a broken-off run
changes what the model computes. In a folder each rank appends to its own file; what is there is never made
again, and rank 0 brings the files together in the records' order.
"""

import hashlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
import transformers
from PIL import Image
from torch import nn

from llava import __version__, distributed
from llava.captioner import Answer, ChangeCaptioner
from llava.data.conversation import QUESTION
from llava.data.mixture import unique
from llava.data.record import Record
from llava.data.results import ResultFile
from llava.errors import ConfigError, DataError, ImageError, MissingDependencyError
from llava.eval.generate import Progress, answer_batches, make_batches, score_texts
from llava.eval.metrics import Scores
from llava.generation import Generation
from llava.model.change_vlm import ChangeVLMForConditionalGeneration
from llava.model.processing import ChangeVLMProcessor
from llava.tasks.caption import normalise

Line = dict[str, Any]

PREDICTIONS, METRICS, REPORT, MAPS = "predictions.jsonl", "metrics.json", "report.html", "maps"
MAP_SIDE = 108
"""Longer side of a kept change map: four pixels for each of the 27 patches of the usual tower."""
_PART = "predictions.rank{}.jsonl"
_NUMBERS = ("log_probability", "confidence", "tokens", "seconds")
_AUTOCAST = {None: None, "bfloat16": torch.bfloat16, "float16": torch.float16}

SEE_FOLDER = 30.0
"""Seconds in which a network file system must show one node what another has written."""


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """How an evaluation is done."""

    question: str = QUESTION
    """What is asked of every pair, where the call names no questions of its own."""
    batch_size: int = 16
    """Pairs at once on each process."""
    generation: Generation | None = None
    """How text is made; the captioner's own settings by default."""
    autocast: str | None = None
    """Compute in "bfloat16" or "float16" while the weights stay what they are: for float32 weights in training."""
    workers: int | None = None
    """Threads that read images; by default the processors shared by the processes of this machine, 2 to 8."""
    skip_errors: bool = False
    """Record pairs that cannot be read, and score the others; the scores say how many."""
    overwrite: bool = False
    """Throw away what the folder holds of an earlier run."""
    meteor: bool = True
    baselines: bool = True
    report: bool = True
    """Write report.html beside the scores."""
    maps: bool = True
    """Keep the change maps of a model with fusion, as grey pictures in the folder maps/, for the report."""
    timeout: float = distributed.TIMEOUT
    """Seconds without progress after which a rank is given up."""
    quiet: bool = False
    """No progress on standard error."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size={self.batch_size} must be at least 1")
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"workers={self.workers} must be at least 1")
        if not self.timeout > 0:
            raise ConfigError(f"timeout={self.timeout} must be above 0 seconds")
        if self.autocast not in _AUTOCAST:
            raise ConfigError(f"autocast={self.autocast!r}: give 'bfloat16', 'float16' or None")


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    scores: Scores
    skipped: Mapping[str, str]
    """uid -> why the pair could not be read; those pairs are not scored."""
    lines: Sequence[Line]
    """The lines of predictions.jsonl, in the records' order; on rank 0, elsewhere none."""


def evaluate(
    model: ChangeCaptioner | nn.Module,
    records: Sequence[Record],
    root: str | Path,
    *args: Any,
    **options: Any,
) -> Scores:
    """The scores of `run_evaluation`, on every rank; the arguments are the same."""
    return run_evaluation(model, records, root, *args, **options).scores


def run_evaluation(
    model: ChangeCaptioner | nn.Module,
    records: Sequence[Record],
    root: str | Path,
    out: str | Path | None = None,
    settings: EvalSettings | None = None,
    *,
    questions: Mapping[str, str] | None = None,
    processor: ChangeVLMProcessor | None = None,
    name: str | None = None,
    data: str = "records",
) -> Evaluation:
    """Caption every pair once and score the captions. With several processes, every one calls it alike.

    The model is used where and as it is: no weight is moved or cast, and its modules are in the same mode
    (training or not) afterwards. A greedy evaluation draws no random numbers.

    Args:
        model: a captioner, or a model in training with its `processor` (also inside DistributedDataParallel, a
            DeepSpeed engine up to ZeRO-2, or peft).
        records: what to caption, each with references; a uid that comes several times counts once.
        root: folder the records' paths count from.
        out: folder for predictions.jsonl, metrics.json and report.html, the same for all processes; in it a
            broken-off run goes on. None writes nothing.
        settings: see there.
        questions: uid -> question, for those that are not asked `settings.question`.
        name: what the model is called in the files; the captioner's name by default.
        data: what the records are called in the files.

    Raises:
        DataError: records without references, two records of one uid, a folder that holds another run.
        ImageError: a pair that cannot be read, without `skip_errors`.
        MissingDependencyError: nothing to compute scores with, said before the first caption.
        ConfigError: weights that are sharded over the processes.
        RankError: another process failed, or is silent; it is named.
    """
    settings = settings or EvalSettings()
    net = _whole(model.model if isinstance(model, ChangeCaptioner) else model)
    distributed.on_main(lambda: _check(records, settings), "checking the records", settings.timeout)
    job = _Job(
        records=unique(records),
        root=Path(root),
        out=None if out is None else Path(out),
        settings=settings,
        questions=questions or {},
    )
    with _evaluating(net):
        captioner = model if isinstance(model, ChangeCaptioner) else _captioner(net, processor)
        how = settings.generation or captioner.generation
        run = _describe(captioner, name or captioner.name, job, how, data)
        _require_same(run, settings.timeout)
        return _evaluate(captioner, job, how, run)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What is to be done."""

    records: list[Record]
    root: Path
    out: Path | None
    settings: EvalSettings
    questions: Mapping[str, str]

    def asked(self, record: Record) -> str:
        return self.questions.get(record.uid, self.settings.question)


def _evaluate(captioner: ChangeCaptioner, job: _Job, how: Generation, run: dict[str, Any]) -> Evaluation:
    settings, records = job.settings, job.records
    started = time.monotonic()
    asked = {record.uid: job.asked(record) for record in records}
    tokens = {question: len(captioner.prompt_ids(question)) for question in set(asked.values())}
    lengths = {uid: tokens[question] for uid, question in asked.items()}
    batches = make_batches(records, settings.batch_size, lengths)
    with _Folder(job.out, run, settings) as folder:
        # A batch that was broken off is computed whole again, so that each pair keeps the company it had.
        todo = [batch for batch in batches if any(record.uid not in folder.done for record in batch)]
        speak = distributed.is_main() and not settings.quiet
        if speak and folder.done:
            print(f"{len(folder.done)} of {len(records)} pairs are there already", file=sys.stderr)
        progress = Progress(len(records), len(folder.done), say=speak)
        maps = settings.maps and job.out is not None and captioner.model.config.fusion is not None
        fresh: list[Line] = []
        skipped: dict[str, str] = {}
        with distributed.Team("captions", settings.timeout) as team:
            for answers in answer_batches(
                captioner,
                todo[distributed.rank() :: distributed.world_size()],
                job.root,
                how,
                questions=asked,
                workers=settings.workers or _workers(),
                skip_errors=settings.skip_errors,
                autocast=_AUTOCAST[settings.autocast],
                map_side=MAP_SIDE if maps else None,
            ):
                new = {uid: answer for uid, answer in answers.items() if uid not in folder.done}
                lines = [
                    folder.line(uid, answer) for uid, answer in new.items() if isinstance(answer, Answer)
                ]
                folder.append(lines)
                fresh += lines
                for uid, error in new.items():
                    if isinstance(error, ImageError):
                        skipped[uid] = str(error)
                        print(f"skipped {uid}: {error}", file=sys.stderr, flush=True)
                progress.tell(len(folder.done) + team.tell(len(fresh) + len(skipped)))
        shares = distributed.gather((fresh, skipped), "predictions", settings.timeout)
        merged: list[Line] = []  # stays on rank 0: the others get the scores alone

        def conclude() -> tuple[Scores, dict[str, str]]:
            answered = folder.done | {line["uid"]: line for lines, _ in shares for line in lines}
            broken = {uid: why for _, errors in shares for uid, why in errors.items()}
            merged.extend(_line(record, answered, broken) for record in records)
            folder.merge(merged)
            scores = _score(merged, records, settings)
            if job.out is not None:
                made = _made(captioner, settings, time.monotonic() - started)
                facts = {**run, **made, "skipped": broken}
                found = {"scores": scores.to_dict(), "run": facts}
                _write(job.out / METRICS, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
                if settings.report:
                    _report(job.out, merged, scores, job.root, facts)
            return scores, broken

        scores, broken = distributed.on_main(conclude, "scores", settings.timeout)
    return Evaluation(scores, broken, merged)


# --- what is evaluated ------------------------------------------------------------------------------


def plain_model(model: nn.Module) -> ChangeVLMForConditionalGeneration:
    """The model inside what training wraps around it.

    Raises:
        ConfigError: no model of ours.
    """
    while not isinstance(model, ChangeVLMForConditionalGeneration):
        unwrap = getattr(model, "get_base_model", None)  # peft
        inner = unwrap() if callable(unwrap) else getattr(model, "module", None)
        inner = inner or getattr(model, "_orig_mod", None)  # torch.compile
        if not isinstance(inner, nn.Module) or inner is model:
            raise ConfigError(
                f"{type(model).__name__} cannot be evaluated; give a ChangeCaptioner, or a "
                "ChangeVLMForConditionalGeneration and its processor"
            )
        model = inner
    return model


def _whole(model: nn.Module) -> ChangeVLMForConditionalGeneration:
    """`plain_model`, with all its weights on this process.

    Raises:
        ConfigError: no model of ours, or one that is sharded over the processes.
    """
    model = plain_model(model)
    for name, parameter in model.named_parameters():
        status = getattr(parameter, "ds_status", None)
        if hasattr(parameter, "to_local") or (status is not None and status.name != "AVAILABLE"):
            raise ConfigError(
                f"{name} is sharded over the processes (ZeRO-3 or FSDP); evaluate a saved checkpoint with "
                "python -m llava.eval, or inside llava.train.sharded.whole_weights"
            )
    return model


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, all modules are in evaluation mode; afterwards each is in its own again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _captioner(
    model: ChangeVLMForConditionalGeneration, processor: ChangeVLMProcessor | None
) -> ChangeCaptioner:
    if processor is None:
        raise ConfigError("a model needs its processor to be evaluated: evaluate(model, ..., processor=...)")
    return ChangeCaptioner(model, processor)


def _check(records: Sequence[Record], settings: EvalSettings) -> None:
    """Everything the scores need, before the first caption is made.

    Raises:
        DataError: no records, or some without usable references.
        MissingDependencyError: no pycocoevalcap.
    """
    if not records:
        raise DataError("there are no records to evaluate")
    if odd := [r.uid for r in records if not _encodable(r.uid)]:
        raise DataError(f"uid {odd[0]!a} is not whole text (half a surrogate pair); rename it")
    bare = [r.uid for r in records if not r.change_caption or not all(map(normalise, r.change_caption))]
    if bare:
        named = ", ".join(map(repr, bare[:5])) + (", ..." if len(bare) > 5 else "")
        raise DataError(
            f"{len(bare)} records have no references to score against, or empty ones: {named}. Captions without "
            "scores are what `llava caption --list` makes"
        )
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise MissingDependencyError(
            "caption scores need pycocoevalcap, and it is not installed: pip install 'llava[eval]'"
        )
    if not settings.meteor:
        return
    from llava.eval.meteor import find_jar
    from llava.java import require_java

    try:
        require_java("METEOR")
        find_jar()
    except MissingDependencyError as error:
        print(f"METEOR and Sm will be missing from the scores. {error}", file=sys.stderr, flush=True)


def _describe(captioner: ChangeCaptioner, name: str, job: _Job, how: Generation, data: str) -> dict[str, Any]:
    """What the predictions depend on: the sidecar of the folder's files, which must agree to go on."""
    pairs = [(r.uid, r.img1_path, r.img2_path, job.asked(r)) for r in job.records]
    asked = sorted({question for *_, question in pairs})
    return {
        "model": name,
        "weights": _fingerprint(captioner.model),
        "dtype": job.settings.autocast or str(captioner.model.dtype).removeprefix("torch."),
        "data": data,
        "root": str(job.root.absolute()),
        "pairs": len(pairs),
        "pairs_sha256": hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16],
        "question": asked[0] if len(asked) == 1 else f"{len(asked)} questions",
        **{key: value for key, value in vars(how).items() if key not in ("static_cache", "compile")},
    }


def _fingerprint(model: nn.Module) -> str:
    """A hash of every weight's name, shape, type and some of its values: training changes it, moving does not."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        if parameter.is_meta:  # kept on disk by accelerate
            continue
        values = parameter.detach().flatten()
        values = values[:: max(1, len(values) // 64)][:64].float().cpu()
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]


def _require_same(run: dict[str, Any], timeout: float) -> None:
    """All ranks must be about to do the same."""
    first = distributed.on_main(lambda: run, "the settings", timeout)
    other = [f"{key} {run[key]!r}, rank 0 {first[key]!r}" for key in run if run[key] != first[key]]
    if other:
        raise DataError(f"rank {distributed.rank()} would evaluate something else: {'; '.join(other)}")


def _workers() -> int:
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return min(8, max(2, (os.cpu_count() or 2) // local))


# --- what is written --------------------------------------------------------------------------------


class _Folder:
    """The predictions of one run on disk: those of earlier starts, this rank's own file, and the merged one.

    Without a folder nothing is kept.
    """

    def __init__(self, out: Path | None, run: dict[str, Any], settings: EvalSettings) -> None:
        self.out, self.run, self.settings = out, run, settings
        self.done: dict[str, Line] = {}
        """uid -> prediction of an earlier start; on ranks other than 0 the uids alone."""
        self._file: ResultFile | None = None

    def __enter__(self) -> "_Folder":
        if self.out is None:
            return self
        try:
            uids = distributed.on_main(self._open_main, "what is done already", self.settings.timeout)
            if not distributed.is_main():
                self.done = {uid: {} for uid in uids}
                self._file = self._open_own()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def line(self, uid: str, answer: Answer) -> Line:
        """What is kept of an answer; its change map goes into a file of its own."""
        line = {"uid": uid, "pred": answer.text} | {name: getattr(answer, name) for name in _NUMBERS}
        if answer.map is not None and self.out is not None:
            place = Path(MAPS) / f"{_file_name(uid)}.png"
            write_map(self.out / place, answer.map)
            line["map_path"] = place.as_posix()
        return line

    def append(self, lines: Sequence[Line]) -> None:
        """Put a batch's predictions on disk."""
        if self._file is not None:
            self._file.append(lines)

    def merge(self, lines: Sequence[Line]) -> None:
        """Write predictions.jsonl and remove what it was made of. On rank 0, when all ranks are ready."""
        if self.out is None:
            return
        merged = self.out / PREDICTIONS
        _write(_sidecar(merged), json.dumps(self.run, indent=1, ensure_ascii=False) + "\n")
        _write(merged, "".join(_json(line) + "\n" for line in lines))
        self._close()
        for part in self._parts():
            part.unlink()
            _sidecar(part).unlink(missing_ok=True)

    def _open_main(self) -> list[str]:
        """Take the folder, for as long as this process lives; returns the uids that are done."""
        assert self.out is not None
        if self.settings.overwrite:
            self._clear()
        merged = self.out / PREDICTIONS
        # First rank 0's own file: its lock keeps a second run out.
        self._file = ResultFile(self._part(0), self.run)
        self._learn(self._file)
        for path in [merged, *self._parts()]:
            if path.exists() and path != self._file.path:
                with ResultFile(path, self.run) as earlier:
                    self._learn(earlier)
        return list(self.done)

    def _learn(self, file: ResultFile) -> None:
        for uid, line in file.done.items():
            if "error" in line:
                continue  # the pair is tried again: its file may have been mended
            answer = {name: line[name] for name in ("uid", "pred", *_NUMBERS, "map_path") if name in line}
            known = self.done.setdefault(uid, answer)
            if known["pred"] != answer["pred"]:
                raise DataError(
                    f"{file.path}: uid {uid!r} has another prediction than in {self.out}; use --overwrite"
                )

    def _open_own(self) -> ResultFile:
        """This rank's file.

        Raises:
            DataError: another node's folder of the same name.
        """
        assert self.out is not None
        deadline = time.monotonic() + SEE_FOLDER
        while not self._part(0).exists():
            if time.monotonic() > deadline:
                raise DataError(
                    f"rank {distributed.rank()} does not see {self._part(0)}, which rank 0 has made: --out must be a "
                    "folder that all nodes share"
                )
            time.sleep(0.2)
        return ResultFile(self._part(distributed.rank()), self.run)

    def _part(self, rank: int) -> Path:
        assert self.out is not None
        return self.out / _PART.format(rank)

    def _parts(self) -> list[Path]:
        assert self.out is not None
        return sorted(self.out.glob(_PART.format("*")))

    def _clear(self) -> None:
        assert self.out is not None
        for path in [*self._parts(), self.out / PREDICTIONS]:
            path.unlink(missing_ok=True)
            _sidecar(path).unlink(missing_ok=True)
        for name in (METRICS, REPORT):
            (self.out / name).unlink(missing_ok=True)
        for path in (self.out / MAPS).glob("*.png"):
            path.unlink()

    def _close(self) -> None:
        if self._file is not None:
            self._file.__exit__(None, None, None)
            self._file = None


def _file_name(uid: str) -> str:
    """A uid as the name of a file, on any system."""
    name = quote(uid, safe=" ")
    return name if len(name) <= 150 else f"{name[:100]}-{hashlib.sha256(uid.encode()).hexdigest()[:16]}"


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.run.json")


def _line(record: Record, answered: Mapping[str, Line], broken: Mapping[str, str]) -> Line:
    """A line of predictions.jsonl: the answer in the midst of its record; `error` in place of an answer."""
    fields = record.to_dict()
    if record.uid in answered:
        answer = answered[record.uid]
        return {"uid": record.uid, "pred": answer["pred"], **fields, **answer}
    return {**fields, "error": broken[record.uid]}


def _score(lines: Sequence[Line], records: Sequence[Record], settings: EvalSettings) -> Scores:
    texts = {line["uid"]: line["pred"] for line in lines if "error" not in line}
    if not texts:
        raise DataError(f"none of the {len(records)} pairs could be read, so there is nothing to score")
    kept = [record for record in records if record.uid in texts]
    scores = score_texts(texts, kept, meteor=settings.meteor, baselines=settings.baselines)
    if left_out := len(records) - len(kept):
        note = f"{left_out} of {len(records)} pairs could not be read and are not scored"
        scores = replace(scores, notes=(*scores.notes, note))
    return scores


def _made(captioner: ChangeCaptioner, settings: EvalSettings, seconds: float) -> dict[str, Any]:
    """How the numbers came about; a run may go on with other values of these."""
    device = captioner.model.device
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "processes": distributed.world_size(),
        "batch_size": settings.batch_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {
            "llava": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _json(line: Line) -> str:
    """One line; escaped where a reference holds half a character, which no UTF-8 file can."""
    text = json.dumps(line, ensure_ascii=False)
    return text if text.isascii() or _encodable(text) else json.dumps(line)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def write_map(path: Path, drawn: np.ndarray) -> None:
    """A change map [H, W] in 0..1 as an 8-bit grey PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        Image.fromarray((drawn * 255).round().astype(np.uint8)).save(part, format="PNG")
        part.replace(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error})") from error


def _report(out: Path, lines: Sequence[Line], scores: Scores, root: Path, facts: Mapping[str, Any]) -> None:
    """report.html of this run."""
    from llava.eval.folder import facts_as_text
    from llava.eval.report import ReportRun, write_report

    maps = {line["uid"]: out / line["map_path"] for line in lines if "map_path" in line}

    def change_map(uid: str) -> Image.Image | None:
        if uid not in maps or not maps[uid].is_file():
            return None
        with Image.open(maps[uid]) as drawn:
            return drawn.convert("L")

    run = ReportRun(
        name=str(facts["model"]),
        lines=lines,
        scores=scores,
        facts=facts_as_text(facts),
        root=root,
        change_map=change_map if maps else None,
    )
    skipped: list[str] = []
    write_report(out / REPORT, [run], on_skip=lambda uid, why: skipped.append(f"{uid}: {why}"))
    for line in skipped:
        print(f"report without the pictures of {line}", file=sys.stderr)


def _write(path: Path, text: str) -> None:
    """All of it or nothing, on disk when this returns."""
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error})") from error
