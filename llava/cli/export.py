"""`llava export`: write a model in another layout, with its tokenizer."""

import argparse
from pathlib import Path

DESCRIPTION = """\
Write a model to a new folder: in this package's layout (config, processor, safetensors, chat template), or
in the layout of the CCExpert and LLaVA-OneVision releases, which their own code reads. A DeltaVLM's released
layout is one file of what was trained, checkpoint_best.pth; in this package's layout it is written with the
weights of its base models, whole."""

EXAMPLES = """\
examples:
  llava export runs/mine exported/ --layout release      for tools that know the released checkpoints
  llava export ccexpert-0.5b exported/                   a released checkpoint in this package's layout
  llava export runs/mine exported/ --dtype bfloat16      half the size"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `export` to the command line."""
    parser = commands.add_parser(
        "export",
        help="write a model in another layout",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a folder, a hub id or a name of `llava download --list`"
    )
    parser.add_argument(
        "folder", metavar="FOLDER", type=Path, help="where to write; must not hold a model yet"
    )
    parser.add_argument("--layout", choices=("ours", "release"), default="ours", help="default: ours")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="change the precision (default: as it is)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load `args.model` and write it to `args.folder`."""
    from transformers.utils import logging

    from llava.captioner import load_model, load_processor, resolve_model
    from llava.data.whole_file import whole_folder
    from llava.errors import CheckpointError
    from llava.model.checkpoint import export_release
    from llava.model.delta_vlm.checkpoint import is_delta_vlm

    logging.disable_progress_bar()
    source = resolve_model(args.model)
    if args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())):
        raise CheckpointError(f"{args.folder} is there already and not empty; give another folder")
    if is_delta_vlm(source):
        return _export_delta_vlm(source, args)
    processor = load_processor(source)
    model = load_model(source, dtype=args.dtype or "auto")
    with whole_folder(args.folder) as part:
        if args.layout == "release":
            processor.tokenizer.save_pretrained(part)
            export_release(model, part)
        else:
            processor.save_pretrained(part)
            model.save_pretrained(part)
    print(args.folder)
    return 0


def _export_delta_vlm(source: str, args: argparse.Namespace) -> int:
    from llava.data.whole_file import whole_folder
    from llava.model.delta_vlm.conversion import export_release
    from llava.model.delta_vlm.modeling import DeltaVLMForConditionalGeneration
    from llava.model.delta_vlm.processing import DeltaVLMProcessor

    processor = DeltaVLMProcessor.from_pretrained(source)
    model = DeltaVLMForConditionalGeneration.from_pretrained(source, dtype=args.dtype or "auto")
    if args.layout == "release":
        file = args.folder / "checkpoint_best.pth"
        print(export_release(model, file, caption_question=processor.caption_question))
        return 0
    with whole_folder(args.folder) as part:
        processor.save_pretrained(part)
        model.save_pretrained(part, whole=True)
    print(args.folder)
    return 0
