"""`llava chat`: ask about one pair, on a terminal or from a pipe."""

import argparse
import contextlib
import sys
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
  printf 'What changed?\\nWhere is it?\\n' | llava chat before.png after.png     one question a line, one
  answer a line

in the conversation:
  /history   the questions and answers so far
  /reset     forget them
  /quit      leave (Ctrl-D does too)
  Ctrl-C     break off the answer under way

From a pipe only the answers go to standard output, each on one line."""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `chat` to the command line."""
    parser = commands.add_parser(
        "chat",
        help="ask questions about one pair",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("before", metavar="BEFORE", help="earlier image")
    parser.add_argument("after", metavar="AFTER", help="later image")
    add_model_options(parser, max_new_tokens=512)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Hold a conversation until the input ends."""
    captioner = load_captioner(args)
    chat = captioner.chat(args.before, args.after)
    if not sys.stdin.isatty():
        return _from_pipe(chat)
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
                _respond(chat, line)
            except KeyboardInterrupt:
                print("\n(broken off; this question is not remembered)")
            except LlavaError as error:  # a conversation grown too long, say: it can go on after /reset
                print(error, file=sys.stderr)


def _respond(chat: "ChangeChat", line: str) -> None:
    """Answer one line of a conversation on a terminal."""
    if line == "/reset":
        chat.reset()
        print("(forgotten)")
    elif line == "/history":
        for question, answer in chat.history:
            print(f"> {question}\n{answer.text}")
    elif line.startswith("/"):
        print(f"{'' if line == '/help' else f'unknown command {line}; '}commands: /history /reset /quit")
    else:
        for piece in chat.stream(line):
            print(piece, end="", flush=True)
        print()


def _from_pipe(chat: "ChangeChat") -> int:
    """Answer every line of standard input with one line."""
    for number, raw in enumerate(sys.stdin, 1):
        line = raw.strip()
        if line == "/quit":
            break
        if line == "/reset":
            chat.reset()
        elif line == "/history":
            for question, answer in chat.history:
                print(f"> {question}\n{_one_line(answer.text)}", flush=True)
        elif line.startswith("/"):
            raise ConfigError(f"line {number}: unknown command {line}; known: /history /reset /quit")
        elif line:
            print(_one_line(chat.ask(line).text), flush=True)
    return 0


def _one_line(text: str) -> str:
    return " ".join(text.split())
