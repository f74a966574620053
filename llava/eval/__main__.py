"""`python -m llava.eval`: captions for a set of pairs, and their scores; `llava eval` is the same command."""

import argparse
import sys
from collections.abc import Sequence

from llava.cli import eval as command
from llava.errors import LlavaError


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate one model on one set; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval",
        description=command.DESCRIPTION,
        epilog=command.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_options(parser)
    args = parser.parse_args(argv)
    try:
        return command.run(args)
    except LlavaError as error:
        print(f"llava.eval: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("llava.eval: interrupted; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
