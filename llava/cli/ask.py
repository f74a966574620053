"""`llava ask`: one question about one pair, or one of the six tasks."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.cli.model_options import add_model_options, load_captioner

if TYPE_CHECKING:
    from llava.captioner import Answer

DESCRIPTION = """\
Ask one question about two images of one place, the earlier one first. The answer goes to standard output.

With --task the question and the way it is answered are the task's, and what the answer means is worked out:
changed or not, how many roads and buildings, in which cells of a 3x3 grid."""

EXAMPLES = """\
examples:
  llava ask before.png after.png "How many buildings were built?"
  llava ask before.png after.png --task binary                 the task's own question
  llava ask before.png after.png --task count --json           with "parsed": {"roads": 1, "buildings": 4}
  llava ask before.png after.png --task dialog                 three questions, each in the light of those before
  llava ask before.png after.png "Where?" --history talk.json  after the rounds of an earlier dialogue

tasks: caption, binary (changed or not), count, loc (where on a 3x3 grid), open, dialog (three rounds).
--history takes what /save of `llava chat` wrote, or a JSON list of [question, answer]."""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `ask` to the command line."""
    parser = commands.add_parser(
        "ask",
        help="ask one question, or one of the six tasks, about a pair",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("before", metavar="BEFORE", help="earlier image")
    parser.add_argument("after", metavar="AFTER", help="later image")
    parser.add_argument(
        "question",
        nargs="?",
        metavar="QUESTION",
        help="in words (default: that of --task, or what the model answers with a caption)",
    )
    parser.add_argument("--task", metavar="T", help="caption, binary, count, loc, open or dialog")
    parser.add_argument("--history", metavar="JSON", type=Path, help="rounds that came before the question")
    parser.add_argument("--json", action="store_true", help="print the answer with its numbers as JSON")
    parser.add_argument(
        "--num-beams", type=int, metavar="N", help="beams; 1 is greedy (default: the task's, else 1)"
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="R",
        help="above 1: words of the answer come less likely again (default: 1)",
    )
    add_model_options(parser, max_new_tokens=None, said="the task's, else 128")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Answer one question, or the three of a dialogue."""
    from llava.data.dialogue import read_dialogue
    from llava.registry import pick
    from llava.tasks.definitions import TASKS

    if args.task is not None:
        pick(TASKS, args.task, what="task")  # before anything is loaded
    history = read_dialogue(args.history).rounds if args.history is not None else ()
    named = ("num_beams", "max_new_tokens", "repetition_penalty")
    how = {name: value for name in named if (value := getattr(args, name)) is not None}
    captioner = load_captioner(args, **({"max_new_tokens": 128} | how))
    chat = captioner.chat(args.before, args.after, history)
    if args.task is None:
        chat.ask(args.question)
        rounds, meant = chat.history, {}
    else:
        found = chat.ask_task(args.task, args.question, **how)
        rounds, meant = found.rounds, {"parsed": found.parsed, "valid": found.valid}
    if args.json:
        rows = [_row(args, question, answer) for question, answer in rounds]
        rows[-1] |= meant
        json.dump(rows[0] if len(rows) == 1 else rows, sys.stdout, indent=1)
        print()
    else:
        for question, answer in rounds:
            print(f"> {question}\n{answer.text}" if len(rounds) > 1 else answer.text)
    return 0


def _row(args: argparse.Namespace, question: str, answer: "Answer") -> dict[str, Any]:
    row = {"img1_path": args.before, "img2_path": args.after, "question": question}
    return {**row, **({} if args.task is None else {"task": args.task}), **answer.to_dict()}
