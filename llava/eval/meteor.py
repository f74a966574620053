"""METEOR 1.5: a client of the jar inside pycocoevalcap that can neither hang nor mix up two captions.

The jar reads one request a line on standard input and answers one line (`SCORE`: the match statistics of one
caption) or n + 1 lines (`EVAL`: the scores of n statistics and of all together). Whatever could break that
correspondence, a line break or "|||" inside a caption, is taken out before it is sent; every exchange has
a time limit after which the process is killed; and the process never outlives its owner.
"""

import importlib.util
import os
import re
import subprocess
import tempfile
import threading
import unicodedata
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from llava.errors import DataError, LlavaError, MissingDependencyError
from llava.java import require_java

MAX_WORDS = 400
"""Words of a caption that are scored. The matcher's time grows with the product of both lengths; no reference
of a change corpus comes near this."""

MAX_KNOWN = 100_000
FIELD_MARK = "|||"
_BAR_RUN = re.compile(r"\|{2,}")


def clean(text: str) -> str:
    """One caption as one harmless line: no field marks, no control characters, at most MAX_WORDS words.

    Tabs, line breaks of every script, zero-width and private characters and halves of surrogate pairs become
    spaces. A caption of printable characters keeps all its words.
    """
    if not text.isascii() or not text.isprintable():
        # C*: control, format, surrogate, private, unassigned. Z*: separators, among them U+2028 and U+2029.
        text = "".join(" " if unicodedata.category(char)[0] in "CZ" else char for char in text)
    return " ".join(_BAR_RUN.sub(" ", text).split()[:MAX_WORDS])


def find_jar() -> Path:
    """The jar inside the installed pycocoevalcap, found without importing any of it."""
    spec = importlib.util.find_spec("pycocoevalcap")
    roots = [Path(root) for root in (spec.submodule_search_locations or ())] if spec else []
    for root in roots:
        jar = root / "meteor" / "meteor-1.5.jar"
        if jar.is_file():
            return jar
    where = f"not found in {', '.join(map(str, roots))}" if roots else "pycocoevalcap is not installed"
    raise MissingDependencyError(
        f"METEOR needs meteor-1.5.jar: {where}. Install the extra: pip install 'llava[eval]'"
    )


class Meteor:
    """One METEOR process: `with Meteor() as meteor: mean, each = meteor.score(captions, references)`.

    timeout: seconds for one exchange; the first one includes loading the paraphrase table (2 to 10 s).
    Raises MissingDependencyError without Java or the jar, LlavaError when the process dies or is too late.
    Safe to share between threads; after a failure it stays closed.
    """

    def __init__(self, java: Path | None = None, timeout: float = 120.0) -> None:
        java = java or require_java("METEOR")
        jar = find_jar()
        # UTF-8 and English whatever the machine's locale is: accents would be lost, 0.5 could be written 0,5.
        # The serial collector halves the memory.
        flags = [
            "-Xmx2G",
            "-XX:+UseSerialGC",
            "-Dfile.encoding=UTF-8",
            "-Duser.language=en",
            "-Duser.country=US",
        ]
        command = [str(java), *flags, "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
        self.timeout = timeout
        self._lock = threading.Lock()
        # A file, not a pipe: nobody reads it while the process runs, and a full pipe would stop it.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            command, cwd=jar.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr
        )
        self._finalizer = weakref.finalize(self, _reap, self._process, self._stderr, os.getpid())
        self._known: dict[tuple[str, tuple[str, ...]], str] = {}

    def score(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> tuple[float, list[float]]:
        """METEOR of the whole set and of each caption, as fractions of 1.

        predictions: n captions; an empty one scores 0. references: n lists of at least one sentence.
        """
        if len(predictions) != len(references):
            raise DataError(
                f"METEOR got {len(predictions)} captions and {len(references)} lists of references"
            )
        if not predictions:
            raise DataError("METEOR got no captions to score")
        sentences = [tuple(map(clean, group)) for group in references]
        for index, group in enumerate(sentences):
            if not group or not all(group):
                raise DataError(
                    f"METEOR: the references of caption {index} are {references[index]!r}; none may be empty"
                )
        with self._lock:
            statistics = [
                self._statistics(clean(text), group)
                for text, group in zip(predictions, sentences, strict=True)
            ]
            lines = self._exchange(f" {FIELD_MARK} ".join(["EVAL", *statistics]), len(statistics) + 1)
        *each, whole = map(float, lines)
        return whole, each

    def close(self) -> None:
        """End the process and wait for it; calling it again does nothing."""
        self._finalizer()

    @property
    def closed(self) -> bool:
        return not self._finalizer.alive

    def __enter__(self) -> "Meteor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _statistics(self, text: str, references: tuple[str, ...]) -> str:
        """Asked once: unchanged pairs repeat one question hundreds of times."""
        key = (text, references)
        if key not in self._known:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known[key] = self._exchange(f" {FIELD_MARK} ".join(["SCORE", *references, text]), 1)[0]
        return self._known[key]

    def _exchange(self, request: str, num_lines: int) -> list[str]:
        """Send one line, read some; a timer kills a late process, and with it a blocked write or read."""
        if self.closed:
            raise LlavaError("METEOR is closed; make a new Meteor()")
        assert self._process.stdin is not None and self._process.stdout is not None
        late = threading.Event()

        def stop() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(self.timeout, stop)
        timer.daemon = True
        timer.start()
        try:
            self._process.stdin.write(request.encode() + b"\n")
            self._process.stdin.flush()
            lines = [self._process.stdout.readline() for _ in range(num_lines)]
        except OSError:  # the process is gone: the pipe is broken
            lines = [b""]
        except BaseException:  # interrupted half-way: the next answer would belong to this request
            self.close()
            raise
        finally:
            timer.cancel()
        if late.is_set() or not all(line.endswith(b"\n") for line in lines):
            self._process.wait()
            self._stderr.seek(0)
            words = self._stderr.read()[-500:].decode(errors="replace").strip()
            self.close()
            why = f"did not answer within {self.timeout:g} s" if late.is_set() else "ended on its own"
            raise LlavaError(
                f"METEOR {why}, at request {request[:120]!r}" + (f"; it said: {words}" if words else "")
            )
        return [line.decode().strip() for line in lines]


def _reap(process: subprocess.Popen[bytes], stderr: IO[bytes], owner: int) -> None:
    """Kill and collect the process; a forked copy of the owner must leave it alone."""
    if os.getpid() != owner:
        return
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, stderr):
        try:
            if stream is not None:
                stream.close()
        except OSError:  # what a broken pipe still had to flush is of no use any more
            continue


_shared: tuple[int, Meteor] | None = None


def shared_meteor() -> Meteor:
    """The one METEOR of this process, started at the first call, reaped at exit, replaced if dead."""
    global _shared
    if _shared is None or _shared[0] != os.getpid() or _shared[1].closed:
        _shared = (os.getpid(), Meteor())
    return _shared[1]
