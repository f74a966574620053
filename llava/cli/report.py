"""`llava report`: one page to judge a run by, or two runs side by side."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.errors import DataError

if TYPE_CHECKING:
    from llava.eval.compare import Comparison
    from llava.eval.predictions import Task

DESCRIPTION = """\
Write one HTML file with the scores of a run and every pair: before and after with a wipe between them, change
map, true mask, references and prediction. Filter, sort and search it in any browser; it opens from disk and asks
nobody for anything. With a second run both are shown side by side."""

EXAMPLES = """\
examples:
  llava report runs/tiny                              what `llava eval --out runs/tiny` left -> runs/tiny/report.html
  llava report runs/tiny runs/longer --out both.html  same pairs: both captions, differences, what B mends and breaks
  llava report runs/tiny --images link                photographs stay where they are; a file of a few MB
  llava report predictions.jsonl --root data          a file of predictions with paths, scored on the way

size: a pair of 256-pixel images takes 30 to 45 kB. Of more pairs than --pairs those with pictures are chosen over
all scores, half of them with a wrong change decision; the texts of all pairs are always in the file.

exit status: 0 done, 1 a fault, 3 done but pictures of some pairs could not be read (--skip-errors)."""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `report` to the command line."""
    parser = commands.add_parser(
        "report",
        help="write a page of scores and pairs, for one run or two",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run_a", metavar="DIR", type=Path, help="folder of an evaluation, or a file of predictions"
    )
    parser.add_argument("run_b", metavar="DIR2", type=Path, nargs="?", help="a second run on the same pairs")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, help="the page (default: report.html in the last folder)"
    )
    parser.add_argument("--title", default="What changed?", help="default: %(default)s")
    parser.add_argument(
        "--names", nargs="+", metavar="NAME", help="what the runs are called (default: their models)"
    )
    parser.add_argument(
        "--root",
        metavar="DIR",
        type=Path,
        help="folder image paths count from (default: that of the evaluation)",
    )
    parser.add_argument(
        "--references", metavar="FILE", type=Path, help="references (default: those in the predictions)"
    )
    parser.add_argument("--no-meteor", action="store_true", help="leave METEOR and Sm of the pairs out")
    pictures = parser.add_argument_group("pictures")
    pictures.add_argument(
        "--images",
        choices=("embed", "link"),
        default="embed",
        help="inside the file, or by paths relative to it (default: %(default)s)",
    )
    pictures.add_argument(
        "--pairs",
        type=int,
        default=2000,
        metavar="N",
        help="pairs with pictures; 0: none (default: %(default)s)",
    )
    pictures.add_argument(
        "--side",
        type=int,
        metavar="PIXELS",
        help="longer side when embedded (default: 512 up to 500 pairs, else 256)",
    )
    pictures.add_argument(
        "--quality", type=int, default=78, metavar="Q", help="of the JPEGs (default: %(default)s)"
    )
    pictures.add_argument(
        "--skip-errors", action="store_true", help="go on without pictures that cannot be read"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the page; returns the exit status."""
    from llava.eval.folder import read_run
    from llava.eval.predictions import read_references
    from llava.eval.report import write_report

    paths = [path for path in (args.run_a, args.run_b) if path is not None]
    names = args.names or _names(paths)
    if len(names) != len(paths):
        raise DataError(f"--names gives {len(names)} names for {len(paths)} runs")
    references = read_references(args.references) if args.references else None
    options: dict[str, Any] = {"root": args.root, "references": references, "meteor": not args.no_meteor}
    read = [read_run(path, name=name, **options) for path, name in zip(paths, names, strict=True)]
    skipped: list[str] = []

    def skip(uid: str, reason: str) -> None:
        skipped.append(uid)
        print(f"skipped the pictures of {uid}: {reason}", file=sys.stderr)

    last = paths[-1] if paths[-1].is_dir() else paths[-1].parent
    out = write_report(
        args.out or last / "report.html",
        [run for run, _ in read],
        title=args.title,
        images=args.images,
        max_image_pairs=args.pairs,
        image_side=args.side,
        quality=args.quality,
        on_skip=skip if args.skip_errors else None,
        comparison=_compare(read[0][1], read[1][1], args) if len(read) == 2 else None,
    )
    print(f"{out}: {len(read[0][0].lines)} pairs, {out.stat().st_size / 1e6:.1f} MB")
    return 3 if skipped else 0


def _names(paths: list[Path]) -> list[str | None]:
    """One run is called by its model; two by their folders, or whole paths where those are alike."""
    if len(paths) == 1:
        return [None]
    short = [path.absolute().name if path.is_dir() else path.stem for path in paths]
    return list(short) if short[0] != short[1] else [str(path) for path in paths]


def _compare(first: "Task", second: "Task", args: argparse.Namespace) -> "Comparison | None":
    """Whether the difference means anything; None for runs that `write_report` will refuse."""
    from llava.eval.compare import compare

    if first.references != second.references or not first.references:
        return None
    systems = {"A": first.predictions, "B": second.predictions}
    return compare(systems, first.references, first.changed, meteor=not args.no_meteor)
