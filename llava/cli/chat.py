"""`llava chat`: ask about one pair, on a terminal or from a pipe."""

import argparse
import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llava.cli.model_options import add_model_options, load_captioner
from llava.errors import ConfigError, LlavaError

if TYPE_CHECKING:
    from llava.captioner import ChangeChat

DESCRIPTION = """\
Ask about one pair of images. The pair is read once; answers appear word by word, and each question is
understood in the light of those before it."""

EXAMPLES = """\
examples:
  llava chat before.png after.png
  llava chat before.tif after.tif --model ccexpert-0.5b
  llava chat --load talk.json                       go on with a dialogue, its pair and its rounds
  printf 'What changed?\\nWhere is it?\\n' | llava chat before.png after.png     one question a line, one
  answer a line

in the conversation:
  /history     the questions and answers so far
  /reset       forget them
  /save FILE   keep them, with the paths of the pair, as JSON: for --load, `llava ask --history`, or training
  /quit        leave (Ctrl-D does too)
  Ctrl-C       break off the answer under way

From a pipe only the answers go to standard output, each on one line."""

COMMANDS = "/history /reset /save FILE /quit"


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `chat` to the command line."""
    parser = commands.add_parser(
        "chat",
        help="ask questions about one pair",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("before", nargs="?", metavar="BEFORE", help="earlier image")
    parser.add_argument("after", nargs="?", metavar="AFTER", help="later image")
    parser.add_argument(
        "--load",
        metavar="FILE",
        type=Path,
        help="go on with a saved dialogue; its pair too, unless BEFORE and AFTER are given",
    )
    add_model_options(parser, max_new_tokens=512)
    parser.set_defaults(run=run)


@dataclass
class _Talk:
    """A conversation, and what it is about."""

    chat: "ChangeChat"
    before: str
    after: str

    def save(self, file: str) -> None:
        """Keep it in a file.

        Raises:
            LlavaError: no file is named, nothing was said, or it cannot be written.
        """
        from llava.data.dialogue import Dialogue, write_dialogue

        if not file:
            raise ConfigError("/save needs a file: /save talk.json")
        write_dialogue(Path(file), Dialogue(self.before, self.after, self.chat.rounds))


def run(args: argparse.Namespace) -> int:
    """Hold a conversation until the input ends."""
    before, after, rounds = _begin(args)
    captioner = load_captioner(args)
    talk = _Talk(captioner.chat(before, after, rounds), before, after)
    if not sys.stdin.isatty():
        return _from_pipe(talk)
    with contextlib.suppress(ImportError):  # line editing and history at the prompt, where Python has it
        import readline  # noqa: F401
    print("Ask about the two images; /help lists commands, Ctrl-D leaves.", file=sys.stderr)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print("\n(/quit or Ctrl-D leaves)")
            continue
        if line == "/quit":
            return 0
        if line:
            try:
                _respond(talk, line)
            except KeyboardInterrupt:
                print("\n(broken off; this question is not remembered)")
            except LlavaError as error:  # a conversation grown too long, say: it can go on after /reset
                print(error, file=sys.stderr)


def _begin(args: argparse.Namespace) -> tuple[str, str, tuple[tuple[str, str], ...]]:
    """The pair, and the rounds that the conversation goes on from.

    Raises:
        LlavaError: one image without the other, or no pair at all.
    """
    from llava.data.dialogue import Dialogue, read_dialogue

    held = Dialogue(None, None) if args.load is None else read_dialogue(args.load)
    before, after = (args.before, args.after) if args.before is not None else (held.before, held.after)
    if before is None or after is None:
        raise ConfigError("give two images, BEFORE and AFTER, or --load FILE with a dialogue that names them")
    return before, after, held.rounds


def _respond(talk: _Talk, line: str) -> None:
    """Answer one line of a conversation on a terminal."""
    command, _, rest = line.partition(" ")
    if line == "/reset":
        talk.chat.reset()
        print("(forgotten)")
    elif line == "/history":
        for question, answer in talk.chat.rounds:
            print(f"> {question}\n{answer}")
    elif command == "/save":
        talk.save(rest.strip())
        print(f"(saved in {rest.strip()})")
    elif line.startswith("/"):
        print(f"{'' if line == '/help' else f'unknown command {line}; '}commands: {COMMANDS}")
    else:
        for piece in talk.chat.stream(line):
            print(piece, end="", flush=True)
        print()


def _from_pipe(talk: _Talk) -> int:
    """Answer every line of standard input with one line."""
    for number, raw in enumerate(sys.stdin, 1):
        line = raw.strip()
        command, _, rest = line.partition(" ")
        if line == "/quit":
            break
        if line == "/reset":
            talk.chat.reset()
        elif line == "/history":
            for question, answer in talk.chat.rounds:
                print(f"> {question}\n{_one_line(answer)}", flush=True)
        elif command == "/save":
            talk.save(rest.strip())
        elif line.startswith("/"):
            raise ConfigError(f"line {number}: unknown command {line}; known: {COMMANDS}")
        elif line:
            print(_one_line(talk.chat.ask(line).text), flush=True)
    return 0


def _one_line(text: str) -> str:
    return " ".join(text.split())
