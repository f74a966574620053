"""`llava synth`: pairs of the synthetic world as files, or a contact sheet of them."""

import argparse
import os
import sys
from pathlib import Path

DESCRIPTION = """\
Draw pairs of the synthetic world: places seen from above at two dates, half of them changed (or --change-rate), each
with five captions and the whole truth. The same seed gives the same pixels on every machine.

The layouts tasks and changechat draw another world: roads and buildings appear, nothing else is a change (plants and
water may come and go), and each pair is asked about in six ways: caption, changed or not, how many, where on a 3 x 3
grid, four open questions, a dialogue of three rounds. All answers but the captions come from the mask."""

EXAMPLES = """\
examples:
  llava synth --preview sheet.png                          look at twelve pairs
  llava synth data/ --train 4000 --val 500 --test 500      records and images, as `llava train` reads them
  llava synth cc/ --train 1000 --test 100 --layout levir-cc       images/SPLIT/{A,B} and LevirCCcaptions.json
  llava synth cd/ --train 1000 --layout levir-cd --size 512       SPLIT/{A,B,label}, masks 0 / 255
  llava synth mci/ --train 1000 --layout levir-mci                LEVIR-CC's layout, and road / building masks
  llava synth tasks/ --train 4000 --test 500 --layout tasks       records of six tasks, as `llava train` reads them
  llava synth chat/ --train 1000 --test 100 --layout changechat   the same as ChangeChat-105k's eight files
  llava synth --preview sheet.png --layout tasks                  look at them, with masks and answers

An interrupted export goes on by the same command. Splits share no scene."""

LAYOUTS = ("records", "levir-cc", "levir-cd", "levir-mci", "tasks", "changechat")


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `synth` to the command line."""
    parser = commands.add_parser(
        "synth",
        help="draw pairs of the synthetic world, with captions and masks",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", nargs="?", type=Path, metavar="OUT", help="folder to write to")
    for split in ("train", "val", "test"):
        parser.add_argument(f"--{split}", type=int, default=0, metavar="N", help=f"{split} pairs (default 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the world (default 0)")
    parser.add_argument("--size", type=int, default=256, help="side of the images in pixels (default 256)")
    parser.add_argument(
        "--change-rate", type=float, default=0.5, metavar="R", help="share of changed pairs (default 0.5)"
    )
    parser.add_argument(
        "--layout", choices=LAYOUTS, default="records", help="what to write (default records)"
    )
    parser.add_argument(
        "--buildings-only",
        action="store_true",
        help="levir-cd: mark changes of buildings alone, as LEVIR-CD does",
    )
    parser.add_argument("--workers", type=int, metavar="W", help="processes (default: the cores, at most 8)")
    parser.add_argument("--preview", type=Path, metavar="PNG", help="draw a contact sheet instead")
    parser.add_argument("--count", type=int, default=12, help="pairs on the contact sheet (default 12)")
    parser.add_argument("--start", type=int, default=0, help="first pair on the contact sheet (default 0)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the export or the contact sheet; returns the exit status."""
    from llava.errors import ConfigError

    if args.preview:
        if args.out is not None or args.count < 1:
            raise ConfigError("--preview draws one picture of at least one pair (--count); leave OUT away")
        return _preview(args)
    if args.out is None:
        raise ConfigError("say where to write: llava synth OUT --train N, or --preview sheet.png")
    if args.buildings_only and args.layout != "levir-cd":
        raise ConfigError(f"--buildings-only goes with --layout levir-cd, not {args.layout}")
    return _export(args)


def _preview(args: argparse.Namespace) -> int:
    from llava.errors import DataError
    from llava.synth import World
    from llava.synth.preview import contact_sheet
    from llava.synth.world import Changes

    changes: Changes = "built" if args.layout in ("tasks", "changechat") else "any"
    world = World(seed=args.seed, size=args.size, changes=changes, change_rate=args.change_rate)
    sheet = contact_sheet(world, args.count, start=args.start)
    part = args.preview.with_name(f"{args.preview.name}.part")
    try:
        args.preview.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(part, format="PNG")
        part.replace(args.preview)
    except OSError as error:
        raise DataError(f"{args.preview} cannot be written ({error})") from error
    print(args.preview, file=sys.stderr)
    return 0


def _export(args: argparse.Namespace) -> int:
    from llava.synth import export

    counts = {split: getattr(args, split) for split in ("train", "val", "test")}
    workers = args.workers if args.workers is not None else min(os.cpu_count() or 1, 8)
    how = export.Drawing(seed=args.seed, size=args.size, workers=workers, change_rate=args.change_rate)
    if args.layout == "levir-cd":
        export.export_levir_cd(counts, args.out, buildings_only=args.buildings_only, **how)
    else:
        writers = {
            "records": export.export_records,
            "levir-cc": export.export_levir_cc,
            "levir-mci": export.export_levir_mci,
            "tasks": export.export_tasks,
            "changechat": export.export_changechat,
        }
        writers[args.layout](counts, args.out, **how)
    print(
        f"{args.out}: {', '.join(f'{count} {split}' for split, count in counts.items() if count)}",
        file=sys.stderr,
    )
    return 0
