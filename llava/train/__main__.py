"""`python -m llava.train`: one training run, also under torchrun, deepspeed or SLURM; `llava train` is the same."""

import argparse
import os
import sys
from collections.abc import Sequence

from llava.cli import train as command
from llava.errors import LlavaError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one training; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.train",
        description=command.DESCRIPTION,
        epilog=command.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_options(parser)
    rank = f" rank {os.environ['RANK']}:" if int(os.environ.get("WORLD_SIZE") or 1) > 1 else ""
    try:
        args = parser.parse_args(command.as_settings(list(sys.argv[1:] if argv is None else argv)))
        return command.run(args)
    except LlavaError as error:
        print(f"llava.train:{rank} {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            f"llava.train:{rank} interrupted; the same command goes on from the last checkpoint",
            file=sys.stderr,
        )
        return 130


if __name__ == "__main__":
    sys.exit(main())
