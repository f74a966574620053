"""`python -m llava.train`: fine-tune by a YAML file, also under torchrun or accelerate."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.errors import LlavaError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one training; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.train",
        description="Fine-tune a model on pairs with captions.",
        epilog="example: python -m llava.train --config scripts/configs/tiny.yaml output_dir=runs/mine seed=1",
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file, see llava/train/config.py")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields that replace the file's")
    args = parser.parse_args(argv)
    from llava.train.config import TrainConfig
    from llava.train.trainer import train

    try:
        train(TrainConfig.from_yaml(args.config, args.overrides))
    except LlavaError as error:
        print(f"llava.train: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
