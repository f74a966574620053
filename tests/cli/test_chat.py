"""`llava chat`: on a terminal and from a pipe."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llava.captioner import ChangeCaptioner
from llava.cli import main
from llava.cli.chat import _respond
from llava.data.record import read_records
from tests.model.delta_vlm import tiny as delta
from tests.tiny import random_pair, tiny_model


@pytest.fixture(scope="module", params=["change", "delta"])
def words(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command for a random model of each family, and a pair of noise."""
    folder = tmp_path_factory.mktemp("chat")
    model, processor = tiny_model() if request.param == "change" else delta.tiny_model()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    paths = [str(folder / f"{name}.png") for name in ("before", "after")]
    for path, image in zip(paths, random_pair(0), strict=True):
        image.save(path)
    return ["chat", *paths, "--model", str(folder), "--max-new-tokens", "8", "--device", "cpu"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def type_lines(monkeypatch: pytest.MonkeyPatch, lines: list[str | type[BaseException]]) -> None:
    """A person at the prompt; an exception class is a key such as Ctrl-C."""
    typed: Iterator[str | type[BaseException]] = iter([*lines, EOFError])

    def answer(prompt: str = "") -> str:
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", answer)


def expected(words: list[str], questions: list[str]) -> list[str]:
    captioner = ChangeCaptioner.from_pretrained(words[4], device="cpu")
    chat = captioner.chat(words[1], words[2])
    return [chat.ask(question, max_new_tokens=8).text for question in questions]


def test_from_a_pipe_each_line_is_answered_by_one_line(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys, "stdin", io.StringIO("why\n\nwhere\n/reset\nwhy\n/history\n/quit\nnever asked\n")
    )
    assert main(words) == 0
    first, second = (" ".join(text.split()) for text in expected(words, ["why", "where"]))
    assert capsys.readouterr().out.split("\n") == [first, second, first, "> why", first, ""]


def test_an_unknown_command_in_a_pipe_is_an_error(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n/copy\n"))
    assert main(words) == 1
    assert "line 2: unknown command /copy" in capsys.readouterr().err


def test_on_a_terminal(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_lines(monkeypatch, ["why", KeyboardInterrupt, "where", "/help", "/history", "/reset", "/history"])
    assert main(words) == 0
    out = capsys.readouterr().out
    first, second = expected(words, ["why", "where"])
    assert out.count(first) == 2 and out.count(second) == 2  # streamed once, listed once
    assert (
        out.index("(/quit or Ctrl-D leaves)")
        < out.index("commands: /history /reset /save FILE /quit")
        < out.index("(forgotten)")
    )


def test_ctrl_c_breaks_off_the_answer_and_not_the_program(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted = []

    def respond(chat: object, line: str) -> None:
        if line == "first":
            interrupted.append(line)
            raise KeyboardInterrupt
        _respond(chat, line)  # type: ignore[arg-type]

    monkeypatch.setattr("llava.cli.chat._respond", respond)
    type_lines(monkeypatch, ["first", "why"])
    assert main(words) == 0
    out = capsys.readouterr().out
    assert interrupted and "broken off" in out and expected(words, ["why"])[0] in out


def test_a_saved_dialogue_is_gone_on_with(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "talks" / "one.json"
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"why\nwhere\n/save {file}\n"))
    assert main(words) == 0
    (record,) = read_records(file)  # a record like any other: it can be learned from
    assert (record.img1_path, record.img2_path) == (words[1], words[2])
    said = expected(words, ["why", "where", "who"])
    assert record.conversation == (("why", said[0]), ("where", said[1]))
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.StringIO("/history\nwho\n"))
    assert main(["chat", "--load", str(file), *words[3:]]) == 0
    lines = capsys.readouterr().out.split("\n")
    assert lines == ["> why", " ".join(said[0].split()), "> where", " ".join(said[1].split()),
                     " ".join(said[2].split()), ""]  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "told"), [("/save\n", "needs a file"), ("/save x.json\n", "nothing was said")], ids=str
)
def test_what_cannot_be_saved_is_said(
    words: list[str],
    lines: str,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert main(words) == 1
    assert told in capsys.readouterr().err


def test_a_conversation_needs_a_pair(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", *words[3:]]) == 1
    assert "--load FILE" in capsys.readouterr().err
    rounds = tmp_path / "rounds.json"
    rounds.write_text('[["why", "so"]]')
    assert main(["chat", "--load", str(rounds), *words[3:]]) == 1
    assert "names them" in capsys.readouterr().err
