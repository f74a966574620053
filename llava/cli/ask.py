"""`llava ask`: one question about one pair, or one of the six tasks."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.cli.model_options import add_model_options, load_captioner
from llava.errors import ConfigError

if TYPE_CHECKING:
    from llava.captioner import Answer
    from llava.tasks.definitions import Task

DESCRIPTION = """\
Ask one question about two images of one place, the earlier one first. The answer goes to standard output.

With --task the question and the way it is answered are the task's, and what the answer means is worked out:
changed or not, how many roads and buildings, in which cells of a 3x3 grid."""

EXAMPLES = """\
examples:
  llava ask before.png after.png "How many buildings were built?"
  llava ask before.png after.png --task binary                 the task's own question
  llava ask before.png after.png --task count --json           with "parsed": {"roads": 1, "buildings": 4, ...}
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
    parser.add_argument("question", nargs="?", metavar="QUESTION", help="in words (default: that of --task)")
    parser.add_argument("--task", metavar="T", help="caption, binary, count, loc, open or dialog")
    parser.add_argument("--history", metavar="JSON", type=Path, help="rounds that came before the question")
    parser.add_argument("--json", action="store_true", help="print the answer with its numbers as JSON")
    parser.add_argument(
        "--num-beams", type=int, metavar="N", help="beams; 1 is greedy (default: the task's, else 1)"
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
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

    task = None if args.task is None else pick(TASKS, args.task, what="task")
    if args.question is None and task is None:
        raise ConfigError("give a QUESTION, or --task with one of its own")
    questions = [args.question] if args.question is not None else list(task.rounds if task else ())
    history = read_dialogue(args.history).rounds if args.history is not None else ()
    how = {
        "num_beams": args.num_beams or (task.generation.num_beams if task else 1),
        "max_new_tokens": args.max_new_tokens or (task.generation.max_new_tokens if task else 128),
        "repetition_penalty": args.repetition_penalty,
    }
    captioner = load_captioner(args, **how)
    chat = captioner.chat(args.before, args.after, history)
    told = [(question, chat.ask(question)) for question in questions]
    if args.json:
        rows = [_row(args, task, question, answer) for question, answer in told]
        json.dump(rows[0] if len(rows) == 1 else rows, sys.stdout, indent=1)
        print()
    else:
        for question, answer in told:
            print(f"> {question}\n{answer.text}" if len(told) > 1 else answer.text)
    return 0


def _row(args: argparse.Namespace, task: "Task | None", question: str, answer: "Answer") -> dict[str, Any]:
    row = {"img1_path": args.before, "img2_path": args.after, "question": question}
    if task is not None:
        row["task"] = task.name
    return {**row, **answer.to_dict(), **({} if task is None else {"parsed": parsed(task.name, answer.text)})}


def parsed(task: str, text: str) -> Any:
    """What an answer to a task says, ready for JSON; None where there is nothing to work out, or nothing was said."""
    from llava.tasks.answers import parse_binary, parse_counts, parse_places

    if task == "binary":
        return parse_binary(text)
    if task == "count":
        return asdict(parse_counts(text))
    if task == "loc":
        places = asdict(parse_places(text))
        return {name: sorted(v) if isinstance(v, frozenset) else v for name, v in places.items()}
    return None
