"""METEOR 1.5: a client of the jar inside pycocoevalcap that can neither hang nor mix up two captions.

The jar reads one request a line on standard input and answers one line (`SCORE`: the match statistics of one
caption) or n + 1 lines (`EVAL`: the scores of n statistics and of all together). Whatever could break that
correspondence, a line break or "|||" inside a caption, is taken out before it is sent; an answer that is no
statistics is an error; every exchange has a time limit after which the process is killed; and the process
never outlives its owner.

The score of a set is a function of the sums of its captions' statistics (`corpus_meteor`), so any subset or
resample of them is scored without Java.
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

import numpy as np
import numpy.typing as npt

from llava.errors import DataError, LlavaError, MissingDependencyError
from llava.java import require_java

MAX_WORDS = 400
"""Words of a caption that are scored. The matcher's time grows with the product of both lengths; no reference
of a change corpus comes near this."""

MAX_KNOWN = 100_000
BATCH = 32
"""Requests sent before the first answer is read. Their answers (130 bytes each) fit the smallest pipe, so
neither side can wait for the other for ever."""

# What one caption's statistics are: lengths and function words of caption and reference; for each of the
# matchers (exact, stem, synonym, paraphrase) the matched content and function words of both; then chunks and
# the matched words of both.
NUM_STATISTICS = 23
LENGTHS, MATCHES, CHUNKS, MATCHED = slice(0, 4), slice(4, 20), 20, slice(21, 23)

# METEOR 1.5's parameters for English, those the jar takes by default (Denkowski and Lavie, 2014).
ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
MATCHER_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])

FIELD_MARK = "|||"
_BAR_RUN = re.compile(r"\|{2,}")


def printable(text: str) -> str:
    """The text as one line of printable characters, words one space apart.

    Tabs, line breaks of every script, zero-width and private characters and halves of surrogate pairs become
    spaces.
    """
    if not text.isascii() or not text.isprintable():
        # C*: control, format, surrogate, private, unassigned. Z*: separators, among them U+2028 and U+2029.
        text = "".join(" " if unicodedata.category(char)[0] in "CZ" else char for char in text)
    return " ".join(text.split())


def clean(text: str) -> str:
    """One caption as one harmless line: printable, no field marks, at most MAX_WORDS words.

    A caption of printable characters keeps all its words.
    """
    return " ".join(_BAR_RUN.sub(" ", printable(text)).split()[:MAX_WORDS])


def corpus_meteor(sums: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """METEOR of sets of captions, as a fraction of 1.

    sums: [..., 23], for each set the sum of what `Meteor.statistics` gives for its captions.
    """
    length, reference_length, function, reference_function = np.moveaxis(sums[..., LENGTHS], -1, 0)
    matches = sums[..., MATCHES].reshape(*sums.shape[:-1], 4, 4)  # [..., matcher, kind]
    content, reference_content, common, reference_common = np.moveaxis(
        np.einsum("...mk,m->...k", matches, MATCHER_WEIGHTS), -1, 0
    )

    def weighed(
        content: npt.NDArray[np.float64], function: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.float64]:
        return np.asarray(DELTA * content + (1 - DELTA) * function)

    with np.errstate(divide="ignore", invalid="ignore"):  # nothing said, or nothing matched: 0 below
        precision = weighed(content, common) / weighed(length - function, function)
        recall = weighed(reference_content, reference_common) / weighed(
            reference_length - reference_function, reference_function
        )
        mean = precision * recall / (ALPHA * precision + (1 - ALPHA) * recall)
        fragmentation = sums[..., CHUNKS] / (sums[..., MATCHED].sum(-1) / 2)
        scores = mean * (1 - GAMMA * fragmentation**BETA)
    return np.where(np.isnan(sums).any(-1), np.nan, np.nan_to_num(scores))


def require_meteor() -> tuple[Path, Path]:
    """Java and the jar, found within a second: to ask before hours are spent on captions to score.

    Raises MissingDependencyError, which says what to install.
    """
    return require_java("METEOR"), find_jar()


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

    def __init__(self, java: Path | None = None, timeout: float = 600.0) -> None:
        java, jar = (java, find_jar()) if java else require_meteor()
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
        with self._lock:
            lines = self._lines(predictions, references)
            (answers,) = self._exchange([f" {FIELD_MARK} ".join(["EVAL", *lines])], len(lines) + 1)
        *each, whole = map(float, answers)
        return whole, each

    def statistics(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> npt.NDArray[np.float64]:
        """What each caption adds to the set's score, for `corpus_meteor`; arguments as for `score`.

        Returns [n, 23]. A caption that equals a reference has no chunks: the jar leaves them out of its sums.
        """
        with self._lock:
            lines = self._lines(predictions, references)
        rows = np.array([line.split() for line in lines], dtype=np.float64)
        matched = rows[:, MATCHES].reshape(-1, 4, 4).sum(1)  # [n, kind]
        whole = (matched[:, 0] + matched[:, 2] == rows[:, 0]) & (matched[:, 1] + matched[:, 3] == rows[:, 1])
        rows[whole & (rows[:, CHUNKS] == 1), CHUNKS] = 0
        return rows

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

    def _lines(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[str]:
        """The jar's statistics of each caption; asked once, unchanged pairs repeat a question by the hundred."""
        if len(predictions) != len(references):
            raise DataError(
                f"METEOR got {len(predictions)} captions and {len(references)} lists of references"
            )
        if not predictions:
            raise DataError("METEOR got no captions to score")
        questions = [
            (clean(text), tuple(map(clean, group)))
            for text, group in zip(predictions, references, strict=True)
        ]
        for index, (_, group) in enumerate(questions):
            if not group or not all(group):
                raise DataError(
                    f"METEOR: the references of caption {index} are {references[index]!r}; none may be empty"
                )
        if len(self._known) > MAX_KNOWN:
            self._known.clear()
        new = [question for question in dict.fromkeys(questions) if question not in self._known]
        for start in range(0, len(new), BATCH):
            batch = new[start : start + BATCH]
            requests = [f" {FIELD_MARK} ".join(["SCORE", *group, text]) for text, group in batch]
            for question, request, (line,) in zip(batch, requests, self._exchange(requests, 1), strict=True):
                if not _is_statistics(line):
                    self.close()
                    raise LlavaError(f"METEOR answered {line[:120]!r} to {request[:120]!r}: no statistics")
                self._known[question] = line
        return [self._known[question] for question in questions]

    def _exchange(self, requests: Sequence[str], num_lines: int) -> list[list[str]]:
        """Send lines, read `num_lines` for each; a timer kills a late process, and with it a blocked write."""
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
        answers: list[list[bytes]] = []
        try:
            self._process.stdin.write("".join(f"{request}\n" for request in requests).encode())
            self._process.stdin.flush()
            for _ in requests:
                answers.append([self._process.stdout.readline() for _ in range(num_lines)])
                if not answers[-1][-1].endswith(b"\n"):
                    break
        except OSError:  # the process is gone: the pipe is broken
            answers.append([b""])
        except BaseException:  # interrupted half-way: the next answer would belong to this request
            self.close()
            raise
        finally:
            timer.cancel()
        if late.is_set() or not answers[-1][-1].endswith(b"\n"):
            self._process.wait()
            self._stderr.seek(0)
            words = self._stderr.read()[-500:].decode(errors="replace").strip()
            self.close()
            why = f"did not answer within {self.timeout:g} s" if late.is_set() else "ended on its own"
            raise LlavaError(
                f"METEOR {why}, at request {requests[len(answers) - 1][:120]!r}"
                + (f"; it said: {words}" if words else "")
            )
        return [[line.decode(errors="replace").strip() for line in lines] for lines in answers]


def _is_statistics(line: str) -> bool:
    try:
        return len([float(field) for field in line.split()]) == NUM_STATISTICS
    except ValueError:
        return False


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
