"""`llava caption`: what changed, for one pair, two folders or a list of pairs."""

import argparse
import io
import json
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.cli.model_options import add_model_options, load_captioner
from llava.errors import ConfigError, DataError, ImageError, LlavaError, MissingDependencyError

if TYPE_CHECKING:
    from PIL import Image

    from llava.captioner import Answer, ChangeCaptioner, PairPixels
    from llava.data.geotiff import Frame
    from llava.data.pairs import Pair
    from llava.data.results import ResultFile

MAP_SUFFIXES = (".png", ".tif", ".tiff")
"""What --save-map writes: a picture, or numbers."""

DESCRIPTION = """\
Say in words what changed between two images of one place, the earlier one first.

One pair: the caption alone goes to standard output. Two folders, or a list: one JSON object a pair is
appended to the --out file. Such a run may be stopped, or killed, at any moment: the same command goes on
where it was."""

EXAMPLES = """\
examples:
  llava caption before.png after.png
  llava caption before.tif after.tif --model ccexpert-0.5b --json
  llava caption before.png after.png --question "How many buildings were built?"
  llava caption before.png after.png --save-map where.png      the after image, coloured where it changed
  llava caption before.tif after.tif --save-map where.tif      the same in numbers, for QGIS
  llava caption before/ after/ --out captions.jsonl            files of the same name (or name without suffix)
  llava caption --list pairs.csv --root data/ --out captions.jsonl --batch-size 32 --skip-errors

lists (--list): pairs.txt or .csv with two paths a line, tab or comma between, and a uid behind them if you
like; pairs.jsonl with {"img1_path", "img2_path", "uid"} a line. Paths count from --root, or from the
list's folder.

a line of --out: uid, img1_path, img2_path, pred, changed (null for a question of your own), confidence
(geometric mean of the tokens' probabilities), log_probability, seconds, model. With --skip-errors a pair
that cannot be read gets uid, the paths and error; remove such lines to try them again. OUT.run.json says
what made the file: with another model or question it is refused.

exit status: 0 done, 1 a fault (what is done stays), 3 done but some pairs were skipped (--skip-errors)."""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `caption` to the command line."""
    parser = commands.add_parser(
        "caption",
        help="say what changed between two images",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("before", nargs="?", metavar="BEFORE", help="earlier image, or a folder of them")
    parser.add_argument("after", nargs="?", metavar="AFTER", help="later image, or a folder of them")
    parser.add_argument("--question", help="ask this instead (default: the question for a caption)")
    one = parser.add_argument_group("one pair")
    one.add_argument("--json", action="store_true", help="print the answer with its numbers as JSON")
    one.add_argument(
        "--save-map",
        metavar="FILE",
        type=Path,
        help="write where it changed: .png, the after image with the change coloured; .tif, numbers from 0 to 1 with "
        "the pair's georeference",
    )
    many = parser.add_argument_group("many pairs")
    many.add_argument("--out", metavar="JSONL", type=Path, help="where the results go; needed for many pairs")
    many.add_argument("--list", metavar="FILE", type=Path, help="pairs from a list instead of two folders")
    many.add_argument("--root", metavar="DIR", type=Path, help="folder the list's paths count from")
    many.add_argument("--batch-size", type=int, default=8, metavar="N", help="pairs at once (default: 8)")
    many.add_argument(
        "--skip-errors", action="store_true", help="record pairs that cannot be read, and go on"
    )
    many.add_argument("--overwrite", action="store_true", help="begin --out anew")
    add_model_options(parser, max_new_tokens=128)
    parser.add_argument(
        "--num-beams", type=int, default=1, metavar="N", help="beams; 1 is greedy (default: 1)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Caption one pair or many."""
    with warnings.catch_warnings():
        warnings.showwarning = _say_warning
        return _dispatch(args)


def _dispatch(args: argparse.Namespace) -> int:
    if args.root is not None and args.list is None:
        raise ConfigError("--root is the folder that a list's paths count from; it goes with --list FILE")
    if args.list is not None:
        if args.before is not None:
            raise ConfigError("give two images, two folders or --list FILE, not several of them")
        return _many(args)
    if args.before is None or args.after is None:
        raise ConfigError("give two images or two folders, BEFORE and AFTER, or --list FILE")
    if Path(args.before).is_dir() or Path(args.after).is_dir():
        return _many(args)
    return _one(args)


def _say_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning as a line for a person, without the source line that gave it."""
    print(f"warning: {message}", file=sys.stderr)


# --- one pair -------------------------------------------------------------------------------------


def _one(args: argparse.Namespace) -> int:
    from llava.data.images import load_placed_pair

    if args.out is not None:
        raise ConfigError("--out is for two folders or --list; for one pair use --json, or > FILE")
    if args.save_map is not None:
        _check_map(args.save_map)
    before, after, frame = load_placed_pair(args.before, args.after, allow_url=args.allow_url)
    captioner = load_captioner(args, num_beams=args.num_beams)
    answer = captioner.ask(before, after, args.question, return_map=args.save_map is not None)
    if args.json:
        print(json.dumps({"img1_path": args.before, "img2_path": args.after, **answer.to_dict()}, indent=1))
    else:
        print(answer.text)
    if args.save_map is not None:  # last: what the model said is not lost to a full disk
        sys.stdout.flush()
        _save_map(after, frame, answer, args.save_map)
    return 0


def _check_map(path: Path) -> None:
    """Refuse a map that could not be written before the model is read."""
    from llava.data.geotiff import has_rasterio

    if not path.absolute().parent.is_dir():
        raise DataError(f"--save-map {path}: there is no folder {path.absolute().parent}")
    if path.suffix.lower() not in MAP_SUFFIXES:
        raise ConfigError(
            f"--save-map {path}: end it in .png for a picture, or in .tif for numbers on the map"
        )
    if path.suffix.lower() != ".png" and not has_rasterio():
        raise MissingDependencyError(
            f'--save-map {path}: a GeoTIFF needs rasterio; install it with: pip install "llava[geo]"'
        )


def _save_map(after: "Image.Image", frame: "Frame", answer: "Answer", path: Path) -> None:
    from llava.data.geotiff import write_geotiff
    from llava.data.whole_file import write_whole
    from llava.model.change_map import overlay

    assert answer.map is not None
    if path.suffix.lower() == ".png":
        picture = io.BytesIO()
        overlay(after, answer.map).save(picture, format="PNG")
        write_whole(path, picture.getvalue())
        return
    if frame.grid is None:
        print(f"{path}: has no georeference, since the images have none", file=sys.stderr)
    write_geotiff(path, answer.map, frame)


# --- many pairs -----------------------------------------------------------------------------------


def _many(args: argparse.Namespace) -> int:
    from llava.data.pairs import match_folders, read_pairs
    from llava.data.results import ResultFile

    if args.out is None:
        raise ConfigError("many pairs need --out FILE.jsonl for their results")
    if args.save_map is not None or args.json:
        raise ConfigError("--json and --save-map are for one pair; --out holds JSON anyway")
    if args.batch_size < 1:
        raise ConfigError(f"--batch-size {args.batch_size} must be at least 1")
    if args.list is not None:
        pairs = read_pairs(args.list, args.root)
    else:
        pairs, alone = match_folders(Path(args.before), Path(args.after))
        for path in alone:
            print(f"no partner: {path}", file=sys.stderr)
        print(f"{len(pairs)} pairs, {len(alone)} images without a partner", file=sys.stderr)
    settings = {
        "model": args.model,
        "dtype": args.dtype,
        "question": args.question,
        "max_new_tokens": args.max_new_tokens,
        "num_beams": args.num_beams,
        "root": _root(args),
    }
    captioner = None
    if args.overwrite:  # before anything is lost: it may not load
        captioner = load_captioner(args, num_beams=args.num_beams)
    with ResultFile(args.out, settings, later=("weights", "processor"), overwrite=args.overwrite) as results:
        todo = [pair for pair in pairs if not _is_done(pair, results)]
        if len(todo) < len(pairs):
            print(
                f"{len(pairs) - len(todo)} of {len(pairs)} pairs are in {args.out} already", file=sys.stderr
            )
        if todo:
            captioner = captioner or load_captioner(args, num_beams=args.num_beams)
            for name, value in captioner.fingerprints().items():
                results.tell(name, value)
            _caption_all(captioner, todo, results, args)
        broken = sum("error" in results.done[pair.uid] for pair in pairs)
    print(f"{len(pairs) - broken} captions in {args.out}, {broken} pairs skipped", file=sys.stderr)
    return 3 if broken else 0


def _root(args: argparse.Namespace) -> str | None:
    """The folder that the pairs' paths count from; None where they stand by themselves."""
    if args.list is not None:
        return str(Path(args.root or args.list.parent).absolute())
    both = (Path(args.before), Path(args.after))
    return None if all(path.is_absolute() for path in both) else str(Path.cwd())


def _is_done(pair: "Pair", results: "ResultFile") -> bool:
    """Whether a result is there; one of other images under the same uid is an error."""
    record = results.done.get(pair.uid)
    if record is None:
        return False
    held = (record.get("img1_path"), record.get("img2_path"))
    if held != (pair.before, pair.after):
        raise DataError(
            f"{results.path} has a result for uid {pair.uid!r} of other images ({held[0]}, {held[1]}); "
            "give another --out"
        )
    return True


def _caption_all(
    captioner: "ChangeCaptioner", pairs: "Sequence[Pair]", results: "ResultFile", args: argparse.Namespace
) -> None:
    """Work through `pairs` batch by batch; results are on disk batch by batch."""
    progress = Progress(len(pairs))
    good: list[tuple[Pair, PairPixels]] = []
    bad: list[dict[str, Any]] = []
    failure: ImageError | None = None
    for pair, loaded in _read_ahead(captioner, pairs, ahead=args.batch_size):
        if not isinstance(loaded, ImageError):
            good.append((pair, loaded))
        elif args.skip_errors:
            progress.say(f"skipped {pair.uid}: {loaded}")
            bad.append(
                {"uid": pair.uid, "img1_path": pair.before, "img2_path": pair.after, "error": str(loaded)}
            )
        else:
            failure = loaded
            break
        if len(good) == args.batch_size:
            results.append([*bad, *_records(captioner, good, args)])
            progress.add(len(good) + len(bad))
            good, bad = [], []
    results.append([*bad, *_records(captioner, good, args)])
    progress.add(len(good) + len(bad), last=True)
    if failure is not None:
        raise ImageError(
            f"pair {pair.uid}: {failure} (--skip-errors goes on without such pairs)"
        ) from failure


def _read_ahead(
    captioner: "ChangeCaptioner", pairs: "Sequence[Pair]", ahead: int
) -> "Iterator[tuple[Pair, PairPixels | ImageError]]":
    """Pairs in order as the model sees them, or why it cannot; files are read while the model works.

    Whole pictures, which may be large, are not kept.
    """

    def load(pair: "Pair") -> "PairPixels | ImageError":
        try:
            return captioner.read(*pair.files)
        except ImageError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        waiting: deque[tuple[Pair, Future[PairPixels | ImageError]]] = deque()
        try:
            for pair in pairs:
                waiting.append((pair, pool.submit(load, pair)))
                if len(waiting) > ahead:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def _records(
    captioner: "ChangeCaptioner", batch: "Sequence[tuple[Pair, PairPixels]]", args: argparse.Namespace
) -> list[dict[str, Any]]:
    import torch

    if not batch:
        return []
    try:
        answers = captioner.answer_batch([pixels for _, pixels in batch], args.question)
    except torch.OutOfMemoryError as error:
        raise LlavaError(
            f"out of memory at --batch-size {args.batch_size}; the same command with a smaller one goes on"
        ) from error
    return [
        {
            "uid": pair.uid,
            "img1_path": pair.before,
            "img2_path": pair.after,
            "pred": answer.text,
            "changed": answer.changed,
            "confidence": answer.confidence,
            "log_probability": answer.log_probability,
            "seconds": answer.seconds,
            "model": answer.model,
        }
        for (pair, _), answer in zip(batch, answers, strict=True)
    ]


class Progress:
    """How far, how fast, how long still: one line on standard error, rewritten on a terminal.

    Args:
        total: things to do.
        every: seconds between two lines where standard error is a file.
    """

    def __init__(self, total: int, every: float = 30.0) -> None:
        self.total, self.done = total, 0
        self.terminal = sys.stderr.isatty()
        self.every = 0.2 if self.terminal else every
        self.started = self.shown = time.monotonic()

    def add(self, count: int, *, last: bool = False) -> None:
        """`count` more are done."""
        self.done += count
        now = time.monotonic()
        if now - self.shown < self.every and not last:
            return
        self.shown = now
        rate = self.done / max(now - self.started, 1e-9)
        left = (self.total - self.done) / rate if rate else 0.0
        line = f"{self.done}/{self.total} pairs, {rate:.2f} pairs/s, {_clock(left)} left"
        end = "\n" if last or not self.terminal else ""
        print(f"\r\033[K{line}" if self.terminal else line, end=end, file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line that stays, above the progress."""
        print(f"\r\033[K{text}" if self.terminal else text, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
