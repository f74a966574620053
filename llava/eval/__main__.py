"""`python -m llava.eval`: captions for a set of pairs, and their scores."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.errors import LlavaError


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate one model on one set; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval",
        description="Caption every pair of a set (greedy) and score the captions.",
        epilog="example: python -m llava.eval --model tiny --data runs/quickstart/data/test.jsonl --out runs/tiny",
    )
    parser.add_argument("--model", default="tiny", help="name, folder or hub id (default: %(default)s)")
    parser.add_argument("--data", type=Path, required=True, help="records: JSON list or JSON Lines")
    parser.add_argument(
        "--root", type=Path, help="what the records' paths are relative to (default: their folder)"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for predictions.jsonl and metrics.json"
    )
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="default: %(default)s")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N pairs")
    parser.add_argument("--device", help="default: the first CUDA device, else the CPU")
    parser.add_argument(
        "--shuffle-images", action="store_true", help="give every pair another pair's images, as a control"
    )
    args = parser.parse_args(argv)
    from llava.captioner import ChangeCaptioner
    from llava.data.record import read_records
    from llava.eval.generate import predict, score_answers, shuffle_pairs

    try:
        records = read_records(args.data)[: args.limit]
        shown = shuffle_pairs(records) if args.shuffle_images else records
        captioner = ChangeCaptioner.from_pretrained(args.model, device=args.device)
        answers = predict(captioner, shown, args.root or args.data.parent, batch_size=args.batch_size)
        scores = score_answers(answers, records)
    except LlavaError as error:
        print(f"llava.eval: {error}", file=sys.stderr)
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    lines = [
        {"uid": r.uid, "pred": answers[r.uid].text, "change_caption": list(r.change_caption)}
        | answers[r.uid].to_dict()
        for r in records
    ]
    for name, text in (
        ("predictions.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)),
        ("metrics.json", json.dumps(scores.to_dict(), indent=1)),
    ):
        part = args.out / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(args.out / name)
    print(scores.table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
