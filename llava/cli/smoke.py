"""`llava smoke`: does all of it work here? Six tasks, from drawn pairs to scores and a page, in under a minute."""

import argparse
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.cli.model_options import add_model_options, load_captioner
from llava.errors import ConfigError

if TYPE_CHECKING:
    from llava.captioner import ChangeCaptioner

SMALL = "deltavlm-tiny"
SHORT = 16
"""Tokens of an answer that means nothing."""
EPILOG = """\
steps: 1. draw pairs of roads and buildings   2. make or load a model   3. ask all six tasks   4. score, write a page

examples:
  llava smoke                             a small untrained DeltaVLM, on the CPU, without network
  llava smoke --model deltavlm --pairs 4  a model of your own, on your GPU
  llava smoke --out runs/smoke            keep the pairs, predictions.jsonl, metrics.json and report.html

An untrained model's scores mean nothing; that there are some is the point."""


def add_parser(commands: Any) -> None:
    """Describe the command to argparse."""
    parser = commands.add_parser(
        "smoke",
        help="try all six tasks on a few drawn pairs: does it work here?",
        description="Draws pairs, asks a model all six kinds of question about them, and scores what it says.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pairs", type=int, default=2, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of pairs and weights (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep everything there (default: nothing is)")
    said = f"{SMALL}, new and untrained, on the CPU"
    length = f"the tasks' own; {SHORT} untrained"
    add_model_options(parser, max_new_tokens=None, said=length, model=SMALL, model_said=said)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """All four steps; returns the exit status."""
    if args.pairs < 1:
        raise ConfigError(f"--pairs {args.pairs} must be at least 1")
    with tempfile.TemporaryDirectory() if args.out is None else nullcontext(str(args.out)) as place:
        return _run(args, Path(place))


def _run(args: argparse.Namespace, out: Path) -> int:
    from llava.data.record import read_records
    from llava.errors import MissingDependencyError
    from llava.eval.meteor import find_jar
    from llava.eval.run import EvalSettings, run_evaluation
    from llava.java import find_java
    from llava.synth.export import export_tasks
    from llava.tasks.definitions import TASK_NAMES

    data = export_tasks({"test": args.pairs}, out / "data", seed=args.seed)
    records = read_records(data / "test.jsonl")
    small = args.model == SMALL
    captioner = (
        _untrained(data / "test.jsonl", args)
        if small
        else load_captioner(args, max_new_tokens=args.max_new_tokens or 128)
    )
    length = args.max_new_tokens or (SHORT if small else None)
    try:
        meteor = find_java() is not None and bool(find_jar())
    except MissingDependencyError:
        meteor = False
    if not meteor:
        print("note: METEOR and Sm are left out, which need Java and pycocoevalcap", file=sys.stderr)
    settings = EvalSettings(
        batch_size=args.pairs,
        options={} if length is None else {"max_new_tokens": length},
        meteor=meteor,
        overwrite=True,
    )
    found = run_evaluation(captioner, records, data, out / "eval", settings, data="drawn pairs")
    for task in TASK_NAMES:
        line = next(line for line in found.lines if line["task"] == task)
        print(f"{task:8} {line['question'] or captioner.caption_question}\n{'':8} -> {line['pred']}")
    print("  ".join(f"{name} {value:.2f}" for name, value in found.scored.figures().items()))
    kept = "" if args.out is None else f"; all scores: {out / 'eval' / 'report.html'}"
    told = f"{len(found.lines)} answers of {captioner.name} about {args.pairs} pairs, all tasks scored"
    print(f"{told}{kept}", file=sys.stderr)
    return 0


def _untrained(records: Path, args: argparse.Namespace) -> "ChangeCaptioner":
    """The preset with new weights, and a vocabulary of the records' words."""
    import torch

    from llava.captioner import ChangeCaptioner
    from llava.train.config import TrainConfig
    from llava.train.start import load_start

    torch.manual_seed(args.seed)
    start = TrainConfig.from_dict({"model": {"preset": SMALL}, "data": records, "output_dir": records.parent})
    model, processor = load_start(start, torch.float32)
    model.to(torch.device(args.device or "cpu"))  # type: ignore[arg-type]
    return ChangeCaptioner(model, processor, name=f"{SMALL}, untrained")
