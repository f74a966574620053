"""`llava merge`: an adapter and its base as one plain model."""

import argparse
import shutil
import sys
from pathlib import Path

DESCRIPTION = """\
Merge an adapter (LoRA, DoRA, QLoRA) into its base and write a plain model: config, processor, safetensors. It
answers as the adapter on its base does, takes the base's room and time, and needs no peft.

The adapter's folder names its base in adapter_config.json (base_model_name_or_path); --base gives another
place, for instance after the base was moved. Merging is done in float32, on the CPU, and takes 4 bytes of
memory for each parameter of the base."""

EXAMPLES = """\
examples:
  llava merge runs/lora merged/
  llava caption before.png after.png --model merged/
  llava merge runs/lora merged/ --dtype float32           no rounding at all
  llava merge runs/lora merged/ --base /data/ccexpert-7b  the base lies elsewhere now

The adapter of a base that was held in 4 bits while training (kind qlora) is merged into those 4-bit values, as it
was trained, not into the base's own.

An adapter needs no merging to be used: llava caption --model runs/lora, llava eval --model runs/lora."""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `merge` to the command line."""
    parser = commands.add_parser(
        "merge",
        help="an adapter and its base as one plain model",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="the adapter's folder, or a hub id")
    parser.add_argument(
        "out", metavar="OUT", type=Path, help="folder to write; must not be there yet, or be empty"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="precision of what is written (default: the base's)",
    )
    parser.add_argument(
        "--base", metavar="MODEL", help="folder, hub id or name of the base (default: as the adapter says)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Merge `args.adapter` and write it to `args.out`."""
    from transformers.utils import logging

    from llava.captioner import load_processor, resolve_model
    from llava.errors import CheckpointError
    from llava.train.adapters import load_adapted

    logging.disable_progress_bar()
    out = args.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} is there already and not empty; give another folder")
    source = resolve_model(args.adapter)
    processor = load_processor(source)
    model = load_adapted(source, base=args.base, dtype=args.dtype)
    whole = out.resolve()
    part = whole.with_name(f"{whole.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        processor.save_pretrained(part)
        model.save_pretrained(part)
        part.replace(whole)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(out)
    print(f"use it: llava caption before.png after.png --model {out}", file=sys.stderr)
    return 0
