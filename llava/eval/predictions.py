"""Anybody's captions and references, from the files in which the field keeps them, checked line by line.

Predictions: JSON Lines or a JSON list of objects, COCO's results among them, or one JSON object uid -> caption.
References: the same with references in place of captions (our records, a predictions file), LEVIR-CC's captions
JSON, COCO's annotations. All UTF-8, gzip or not. A fault is a DataError with file, line and field.
"""

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal

from llava.errors import DataError
from llava.eval.metrics import mostly_changed, some

UID_FIELDS = ("uid", "image_id", "id", "filename")
CAPTION_FIELDS = ("pred", "prediction", "caption", "answer")
REFERENCE_FIELDS = ("change_caption", "references", "captions")
FLAG_FIELDS = ("change_flag", "changeflag")
"""Names under which a field is looked for, the first that is there counts."""

MAX_FILE = 1 << 30
"""Bytes of a file, unpacked."""
MAX_LINE = 16 << 20
"""Bytes of a line of JSON Lines."""
MAX_TEXT = 1_000_000
"""Characters of a caption: a hundred books are no caption."""

IMAGE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".jp2"))

Missing = Literal["error", "empty", "skip"]
Unknown = Literal["error", "skip"]


@dataclass(frozen=True)
class Predictions:
    """What one file says, each uid once."""

    path: Path
    captions: dict[str, str]
    """uid -> its first caption."""
    repeats: tuple[tuple[str, str], ...] = ()
    """(uid, caption) of the captions that came again, in the file's order."""
    failed: tuple[str, ...] = ()
    """uids that stand in the file without a caption, with the reason in a field `error`."""
    references: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Those inside the file."""
    flags: dict[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class References:
    """What is true of the pairs of one file."""

    path: Path
    sentences: dict[str, tuple[str, ...]]
    flags: dict[str, bool] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    """uid -> image file, where uids are numbers (COCO)."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """Captions and references of the same uids: the arguments of `llava.eval.metrics.score`."""

    predictions: dict[str, str]
    references: dict[str, tuple[str, ...]]
    changed: dict[str, bool]
    repeats: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    num_left_out: int = 0
    """Pairs that have no caption and are skipped for it."""
    own_uids: Mapping[str, str] = field(default_factory=dict)
    """uid -> the one that the predictions' file has for it."""


def read_predictions(path: Path) -> Predictions:
    """The captions of a file, or of the predictions.jsonl in a folder.

    Raises DataError: file, line and field of the first fault; references of one uid that differ.
    """
    path = path / "predictions.jsonl" if path.is_dir() else path
    captions: dict[str, str] = {}
    repeats: list[tuple[str, str]] = []
    failed: dict[str, None] = {}
    truth = _Truth()
    for place, entry in _entries(path, _as_predictions):
        uid = _uid(entry, place)
        truth.add(uid, _references(entry, place), _flag(entry, place), place)
        if _first(entry, CAPTION_FIELDS) is None and isinstance(entry.get("error"), str):
            failed[uid] = None
            continue
        text = _caption(entry, place)
        if uid in captions:
            repeats.append((uid, text))
        else:
            captions[uid] = text
    if not captions and not failed:
        raise DataError(f"{path} holds no predictions")
    unanswered = tuple(uid for uid in failed if uid not in captions)
    return Predictions(path, captions, tuple(repeats), unanswered, truth.sentences, truth.flags)


def read_answers(path: Path, *, truth: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file of predictions, or of the predictions.jsonl in a folder, each with its place, unchecked.

    truth: the file is one of references. Raises DataError where there is no such file, or no list of objects in it.
    """
    path = path / "predictions.jsonl" if path.is_dir() else path
    yield from _entries(path, _as_references if truth else _as_predictions)


def read_references(path: Path, split: str | None = None) -> References:
    """The references of a file, of one split where it has splits.

    split: its name; None takes "test" if there is one, "all" takes every pair.
    Raises DataError: file, line and field of the first fault; a split that the file lacks.
    """
    path = path / "predictions.jsonl" if path.is_dir() else path
    truth, splits, names = _Truth(), Counter[str](), {}
    found = list(_entries(path, _as_references))
    for place, entry in found:
        if (name := entry.get("split")) is not None:
            splits[
                _text(entry, "split", place) if isinstance(name, str) else _wrong("split", name, place)
            ] += 1
    notes = []
    wanted = split
    if split not in (None, "all") and split not in splits:
        known = ", ".join(f"{name} ({number})" for name, number in splits.items()) or "none"
        raise DataError(f"{path} has no split {split!r}; splits: {known}")
    if split is None and len(splits) > 1:
        if "test" not in splits:
            raise DataError(
                f"{path} has the splits {', '.join(splits)}; choose with --split NAME, or --split all"
            )
        wanted = "test"
        notes.append(f"references are those of the split 'test' of {path.name} (--split chooses)")
    for place, entry in found:
        if wanted in (None, "all") or entry.get("split") in (None, wanted):
            uid = _uid(entry, place)
            truth.add(uid, _references(entry, place), _flag(entry, place), place)
            if isinstance(name := entry.get("file_name"), str):
                names[uid] = name
    if not truth.sentences:
        raise DataError(
            f"{path} holds no references; looked for the fields {', '.join(REFERENCE_FIELDS)}, for LEVIR-CC's "
            "images[].sentences[] and for COCO's annotations[]"
        )
    return References(path, truth.sentences, truth.flags, names, tuple(notes))


def join(
    predictions: Predictions,
    references: References | None = None,
    *,
    missing: Missing = "error",
    unknown: Unknown = "error",
    pass_failed: bool = False,
) -> Task:
    """One caption for each pair with references; uids are the references'.

    references: of another file, which then count alone; else those inside the predictions' file. uids match as
    they are, or by the name of the image file ("levir-cc/test_000004" and "test_000004.png").
    missing: what a pair without a caption is: an error, an empty caption, or left out. unknown: what a caption
    without references is: an error, or left out. pass_failed: what the file itself says could not be read is left out.
    Raises DataError, naming the uids.
    """
    notes: list[str] = []
    if references is None:
        if not predictions.references:
            raise DataError(
                f"{predictions.path} has no references inside ({', '.join(REFERENCE_FIELDS)}); give them with "
                "--references FILE"
            )
        references = References(predictions.path, predictions.references, predictions.flags)
    notes += references.notes
    renamed, how = _match([*predictions.captions, *predictions.failed], references)
    if how:
        notes.append(how)
    captions = {renamed[uid]: text for uid, text in predictions.captions.items() if uid in renamed}
    strangers = [uid for uid in (*predictions.captions, *predictions.failed) if uid not in renamed]
    if strangers:
        if unknown == "error":
            raise DataError(
                f"{predictions.path}: {len(strangers)} uids have no references in {references.path}: "
                f"{some(strangers)}. There the uids are: {some(references.sentences)}. Give another --references, "
                "another --split, or --unknown skip"
            )
        notes.append(f"{len(strangers)} captions without references are left out: {some(strangers)}")
    absent = [uid for uid in references.sentences if uid not in captions]
    failed = {renamed[uid] for uid in predictions.failed if uid in renamed}
    if absent:
        if not captions or (missing == "error" and not (pass_failed and failed.issuperset(absent))):
            raise DataError(
                f"{predictions.path}: {len(absent)} of {len(references.sentences)} pairs of {references.path} have no "
                f"prediction: {some(absent)}. Complete the file, or --missing empty (they count as no answer) or "
                "--missing skip (the score is then of fewer pairs)"
            )
        done = "count as empty captions" if missing == "empty" else "are left out"
        notes.append(f"{len(absent)} pairs without a prediction {done}: {some(absent)}")
        if missing == "empty":
            captions |= dict.fromkeys(absent, "")
    sentences = {uid: references.sentences[uid] for uid in captions}
    stated = {uid: mostly_changed(texts) for uid, texts in sentences.items()}
    changed = {uid: references.flags.get(uid, stated[uid]) for uid in captions}
    if odd := [uid for uid in captions if changed[uid] != stated[uid]]:
        notes.append(
            f"{len(odd)} pairs count as their change flag says, against most of their references: {some(odd)}"
        )
    return Task(
        predictions=captions,
        references=sentences,
        changed=changed,
        repeats=tuple((renamed[uid], text) for uid, text in predictions.repeats if uid in renamed),
        notes=tuple(notes),
        num_left_out=0 if missing == "empty" else len(absent),
        own_uids={name: uid for uid, name in renamed.items()},
    )


# --- the same pair under two names -----------------------------------------------------------------


def _stem(name: str) -> str:
    path = PurePosixPath(name.replace("\\", "/"))
    return path.stem if path.suffix.lower() in IMAGE_SUFFIXES else path.name


def _match(uids: Sequence[str], references: References) -> tuple[dict[str, str], str]:
    """uid of a prediction -> uid of its references, and a note where they are not the same."""
    known = references.sentences
    ways: list[dict[str, str]] = [{uid: uid for uid in uids if uid in known}]
    for names in ({uid: uid for uid in known}, references.names):
        by_stem: dict[str, str] = {}
        shared = set()
        for uid in known:
            stem = _stem(names.get(uid, uid))
            if by_stem.setdefault(stem, uid) != uid:
                shared.add(stem)
        ways.append(
            {uid: by_stem[stem] for uid in uids if (stem := _stem(uid)) in by_stem and stem not in shared}
        )
    best = max(ways, key=len)  # the first of equals: uids as they are
    if best is ways[0]:
        return best, ""
    twice = [uid for uid, number in Counter(best.values()).items() if number > 1]
    if twice:
        both = [uid for uid in best if best[uid] == twice[0]]
        raise DataError(f"{both[0]!r} and {both[1]!r} are two uids of predictions for one pair, {twice[0]!r}")
    example = next(iter(best))
    return best, f"uids are matched by the image's name: {example!r} is {best[example]!r}"


# --- entries and their fields ----------------------------------------------------------------------

Entry = dict[str, Any]


class _Truth:
    """References and flags by uid; what comes again must be the same."""

    def __init__(self) -> None:
        self.sentences: dict[str, tuple[str, ...]] = {}
        self.flags: dict[str, bool] = {}
        self._places: dict[str, str] = {}

    def add(self, uid: str, sentences: tuple[str, ...], flag: bool | None, place: str) -> None:
        if sentences and self.sentences.setdefault(uid, sentences) != sentences:
            raise DataError(f"{place}: uid {uid!r} has other references than before, at {self._places[uid]}")
        if flag is not None and self.flags.setdefault(uid, flag) != flag:
            raise DataError(
                f"{place}: uid {uid!r} has another change flag than before, at {self._places[uid]}"
            )
        self._places.setdefault(uid, place)


def _first(entry: Entry, names: Iterable[str]) -> str | None:
    return next((name for name in names if name in entry), None)


def _wrong(name: str, value: object, place: str, expected: str = "a string") -> str:
    shown = repr(value) if len(repr(value)) < 60 else f"{repr(value)[:60]}..."
    raise DataError(f"{place}: field {name!r} is {shown}, expected {expected}")


def _text(entry: Entry, name: str, place: str) -> str:
    value = entry[name]
    if not isinstance(value, str):
        return _wrong(name, value, place)
    if len(value) > MAX_TEXT:
        raise DataError(
            f"{place}: field {name!r} has {len(value)} characters, more than the {MAX_TEXT} of a caption"
        )
    return value


def _uid(entry: Entry, place: str) -> str:
    name = _first(entry, UID_FIELDS)
    if name is None:
        raise DataError(
            f"{place}: has no uid; looked for the fields {', '.join(UID_FIELDS)}, found {some(entry) or 'none'}"
        )
    value = entry[name]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        return _wrong(name, value, place, "a non-empty string or a whole number")
    return value


def _caption(entry: Entry, place: str) -> str:
    name = _first(entry, CAPTION_FIELDS)
    if name is None:
        raise DataError(
            f"{place}: has no caption; looked for the fields {', '.join(CAPTION_FIELDS)}, found {some(entry)}"
        )
    if isinstance(entry[name], list) and len(entry[name]) == 1:  # as COCO's own programs pass captions around
        return _text({name: entry[name][0]}, name, place)
    if entry[name] is None:
        return _wrong(name, None, place, 'a string; "" stands for no answer')
    return _text(entry, name, place)


def _references(entry: Entry, place: str) -> tuple[str, ...]:
    """The sentences of an entry; none where it has no such field."""
    name = _first(entry, ("sentences", *REFERENCE_FIELDS))
    if name is None:
        return ()
    given = [entry[name]] if isinstance(entry[name], str) else entry[name]
    if not isinstance(given, list):
        _wrong(name, given, place, "a list of sentences")
    return tuple(_sentence(value, f"{name}[{i}]", place) for i, value in enumerate(given))


def _sentence(value: object, name: str, place: str) -> str:
    """One reference: a string, or LEVIR-CC's {"raw": ..., "tokens": [...]}."""
    if isinstance(value, dict) and "raw" in value:
        value, name = value["raw"], f"{name}.raw"
    elif isinstance(value, dict) and "tokens" in value:
        words, name = value["tokens"], f"{name}.tokens"
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            return _wrong(name, words, place, "a list of strings")
        value = " ".join(words)
    text = _text({name: value}, name, place)
    return text if text.strip() else _wrong(name, text, place, "a sentence; remove it from the data")


def _flag(entry: Entry, place: str) -> bool | None:
    name = _first(entry, FLAG_FIELDS)
    if name is None or entry[name] is None:
        return None
    if isinstance(entry[name], (bool, int)) and entry[name] in (0, 1):
        return bool(entry[name])
    _wrong(name, entry[name], place, "0, 1, true, false or null")
    return None


# --- files ----------------------------------------------------------------------------------------


def _entries(
    path: Path, whole: Callable[[Path, Entry], Iterator[tuple[str, Any]]]
) -> Iterator[tuple[str, Entry]]:
    """Objects with their places; `whole` takes a file that is one object apart."""
    content = _load(path)
    for place, value in whole(path, content) if isinstance(content, dict) else content:
        if not isinstance(value, dict):
            raise DataError(f"{place}: is {type(value).__name__}, expected a JSON object")
        yield place, value


def _as_predictions(path: Path, content: Entry) -> Iterator[tuple[str, Any]]:
    if "images" in content or "annotations" in content:
        raise DataError(f"{path} looks like references (images, annotations); give it with --references")
    if _first(content, UID_FIELDS) is not None:
        yield f"{path}, line 1", content
        return
    for uid, text in content.items():
        yield f"{path}, key {uid!r}", {"uid": uid, "pred": text}


def _as_references(path: Path, content: Entry) -> Iterator[tuple[str, Any]]:
    if _first(content, UID_FIELDS) is not None:
        yield f"{path}, line 1", content
    elif "annotations" in content:
        yield from _coco(path, content)
    elif "images" in content:
        for number, image in enumerate(_list(content, "images", path)):
            yield f"{path}, images[{number}]", image
    else:
        for uid, texts in content.items():
            yield f"{path}, key {uid!r}", {"uid": uid, "references": texts}


def _coco(path: Path, content: Entry) -> Iterator[tuple[str, Any]]:
    """COCO's annotations, one caption each, gathered by image."""
    images: dict[str, Entry] = {}
    for number, image in enumerate(_list(content, "images", path) if "images" in content else ()):
        place = f"{path}, images[{number}]"
        if not isinstance(image, dict) or "id" not in image:
            raise DataError(f"{place}: is no object with an id")
        images[_uid({"id": image["id"]}, place)] = image
    gathered: dict[str, list[Any]] = {}
    for number, note in enumerate(_list(content, "annotations", path)):
        place = f"{path}, annotations[{number}]"
        if not isinstance(note, dict) or "image_id" not in note or "caption" not in note:
            raise DataError(f"{place}: is no object with image_id and caption")
        uid = _uid({"image_id": note["image_id"]}, place)
        gathered.setdefault(uid, []).append(_sentence(note["caption"], "caption", place))
    for uid, texts in gathered.items():
        image = images.get(uid, {})
        kept = {name: image[name] for name in ("file_name", "split", *FLAG_FIELDS) if name in image}
        yield f"{path}, image {uid}", {"uid": uid, "references": texts, **kept}


def _list(content: Entry, name: str, path: Path) -> list[Any]:
    if not isinstance(content[name], list):
        _wrong(name, content[name], str(path), "a list")
    return list(content[name])


def _load(path: Path) -> Entry | list[tuple[str, Any]]:
    """A file that is one JSON object, or the values of a list or of JSON Lines with their places."""
    try:
        with _open(path) as file:
            return _parse(file, path)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: is damaged or cut off gzip ({error})") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _open(path: Path) -> BinaryIO:
    file = path.open("rb")
    try:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
    except BaseException:
        file.close()
        raise
    if not packed:
        return file
    file.close()
    return gzip.open(path, "rb")  # type: ignore[return-value]


def _parse(file: BinaryIO, path: Path) -> Entry | list[tuple[str, Any]]:
    number, first = 0, b""
    while not first.strip(b" \t\r\n\xef\xbb\xbf"):
        first = file.readline(MAX_FILE + 1)
        number += 1
        if not first:
            raise DataError(f"{path} is empty")
    first = first.removeprefix(b"\xef\xbb\xbf")
    if len(first) > MAX_FILE:
        raise DataError(f"{path}: is larger than {MAX_FILE >> 20} MiB")
    second = file.readline(MAX_LINE + 1)
    whole = first.lstrip().startswith(b"[") or (
        # An object over several lines: neither of the first two is JSON by itself.
        second and not _is_json(first) and not _is_json(second)
    )
    if not whole:
        return _lines(file, path, number, first, second)
    rest = file.read(MAX_FILE + 1 - len(first))
    data = first + second + rest
    if len(data) > MAX_FILE:
        raise DataError(f"{path}: is larger than {MAX_FILE >> 20} MiB")
    value = _decode(data, path, number)
    if isinstance(value, list):
        return [(f"{path}, entry {i}", entry) for i, entry in enumerate(value)]
    if not isinstance(value, dict):
        raise DataError(f"{path}: is {type(value).__name__}, expected a list or an object")
    return value


def _lines(
    file: BinaryIO, path: Path, number: int, line: bytes, following: bytes
) -> Entry | list[tuple[str, Any]]:
    values: list[tuple[str, Any]] = []
    size = 0
    while line:
        size += len(line)
        if values and len(line) > MAX_LINE:
            raise DataError(f"{path}, line {number}: is longer than {MAX_LINE >> 20} MiB")
        if size > MAX_FILE:
            raise DataError(f"{path}: is larger than {MAX_FILE >> 20} MiB")
        if line.strip():
            values.append((f"{path}, line {number}", _decode(line.rstrip(), path, number)))
        line, following = following, file.readline(MAX_LINE + 1)
        number += 1
    if len(values) == 1 and isinstance(values[0][1], dict):
        return values[0][1]
    return values


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _decode(data: bytes, path: Path, number: int) -> Any:
    """One JSON value; `number` is the line on which it begins."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = number + data.count(b"\n", 0, error.start)
        raise DataError(
            f"{path}, line {line}: is not UTF-8 (byte {data[error.start]:#04x}); save the file as UTF-8"
        ) from None
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _object(pairs, path, number))
    except json.JSONDecodeError as error:
        line = number + error.lineno - 1
        raise DataError(f"{path}, line {line}: no JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise DataError(f"{path}, line {number}: is nested too deeply") from None
    except DataError:
        raise
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"{path}, line {number}: no JSON that can be read: {error}") from None


def _object(pairs: list[tuple[str, Any]], path: Path, number: int) -> Entry:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise DataError(f"{path}, line {number}: field {twice!r} comes twice in one object; keep one")
    return fields


def same_references(tasks: Mapping[str, Task]) -> None:
    """Raises DataError where two of the tasks, by name, have other references or flags for one pair."""
    (name, first), *others = tasks.items()
    for other, task in others:
        for uid in first.references.keys() & task.references.keys():
            same = first.references[uid] == task.references[uid]
            if not same or first.changed[uid] != task.changed[uid]:
                what = "change flags" if same else "references"
                raise DataError(
                    f"{name} and {other} have other {what} for uid {uid!r}; give those to use with --references"
                )
