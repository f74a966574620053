"""The `llava` command: one file per sub-command, each with `add_parser` and `run`."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from llava.errors import LlavaError

COMMANDS = (
    "caption",
    "ask",
    "chat",
    "quickstart",
    "smoke",
    "synth",
    "data",
    "train",
    "eval",
    "score",
    "report",
    "card",
    "download",
    "import",
    "export",
    "merge",
    "info",
)
"""In the order a newcomer needs them. `import` lives in `import_.py`: the bare word is Python's."""

EPILOG = """\
first steps:
  llava caption before.png after.png          what changed, by the small model that ships with the package
  llava caption before/ after/ --out out.jsonl    every pair of two folders, resumable
  llava chat before.png after.png             ask about one pair
  llava train --config scripts/configs/deltavlm.yaml   train, fine-tune, in stages, on one or many devices
  llava eval --data test.jsonl --out runs/a       caption a set and score it; `llava score` for anybody's captions
  llava download --list                       larger models, their results and licences

exit status: 0 done, 1 a fault in the input or the set-up (said in one line), 2 wrong usage,
3 finished but some pairs were skipped (--skip-errors), 130 interrupted."""


def build_parser(names: Sequence[str] = COMMANDS) -> argparse.ArgumentParser:
    """The parser with the sub-commands of `names`; modules of the others are not imported."""
    from llava import __version__

    parser = argparse.ArgumentParser(
        prog="llava",
        description="What changed between two images of one place, in words.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"llava {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in names:
        module = importlib.import_module(f"llava.cli.{'import_' if name == 'import' else name}")
        module.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (see `llava --help`)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    named = [word for word in arguments[:1] if word in COMMANDS]
    try:
        if named == ["train"]:  # takes any field of its config as an option
            from llava.cli.train import as_settings

            arguments = as_settings(arguments)
        args = build_parser(named or COMMANDS).parse_args(arguments)
        return int(args.run(args))
    except LlavaError as error:
        print(f"llava {arguments[0]}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"llava {arguments[0]}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (head, less) went away: not our fault, and not worth a traceback
        sys.stderr.close()
        return 1
    except OSError as error:  # a disk that is full, a folder that may not be written
        print(f"llava {arguments[0]}: {error}", file=sys.stderr)
        return 1
