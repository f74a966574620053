"""How text becomes the words that are scored: as the CCExpert release does, or by the PTB tokenizer of COCO."""

import importlib.util
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from llava.errors import LlavaError, MissingDependencyError
from llava.eval.meteor import printable
from llava.java import require_java
from llava.registry import pick
from llava.tasks.caption import normalise

Treatment = Callable[[Sequence[str]], list[str]]
"""From texts to texts whose words stand one space apart."""

PTB_JAR = "stanford-corenlp-3.4.1.jar"
PUNCTUATION = frozenset(
    ("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";")
)
"""What COCO's caption evaluation leaves out, by the same spelling: the tokenizer has made brackets lower case
by then, so they stay there, and here."""


class PtbTokenizer:
    """The PTB tokenizer of COCO's caption evaluation, through Java: lower case, punctuation left out.

    Each text is tokenized once; new ones of a call share one run of Java, which ends with it.
    timeout: seconds for one run.
    Raises MissingDependencyError without Java or the jar, LlavaError when the run fails or is too late.
    """

    def __init__(self, java: Path | None = None, timeout: float = 600.0) -> None:
        self.java = java or require_java("the PTB tokenizer")
        self.jar = _find_jar()
        self.timeout = timeout
        self._known: dict[str, str] = {"": ""}

    def __call__(self, texts: Sequence[str]) -> list[str]:
        lines = [printable(text) for text in texts]
        # Sorted: the tokenizer looks beyond the end of a line, so the order must not depend on the input's.
        if new := sorted(set(lines) - self._known.keys()):
            self._known |= dict(zip(new, self._run(new), strict=True))
        return [self._known[line] for line in lines]

    def _run(self, lines: Sequence[str]) -> list[str]:
        options = ["-Xmx1G", "-XX:+UseSerialGC", "-Dfile.encoding=UTF-8", "-cp", str(self.jar)]
        command = [
            str(self.java),
            *options,
            "edu.stanford.nlp.process.PTBTokenizer",
            "-preserveLines",
            "-lowerCase",
        ]
        try:
            done = subprocess.run(  # kills and collects the process when it is late
                command,
                input="".join(f"{line}\n" for line in lines).encode(),
                capture_output=True,
                timeout=self.timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise LlavaError(f"the PTB tokenizer did not end within {self.timeout:g} s") from None
        found = done.stdout.decode(errors="replace").split("\n")[:-1]
        if done.returncode or len(found) != len(lines):
            raise LlavaError(
                f"the PTB tokenizer gave {len(found)} lines for {len(lines)} (exit status {done.returncode}); "
                f"it said: {done.stderr[-300:].decode(errors='replace').strip()}"
            )
        return [" ".join(word for word in line.split() if word not in PUNCTUATION) for line in found]


def _find_jar() -> Path:
    spec = importlib.util.find_spec("pycocoevalcap")
    roots = [Path(root) for root in (spec.submodule_search_locations or ())] if spec else []
    for root in roots:
        if (jar := root / "tokenizer" / PTB_JAR).is_file():
            return jar
    raise MissingDependencyError(
        f"the PTB tokenizer needs {PTB_JAR} of pycocoevalcap. Install the extra: pip install 'llava[eval]'"
    )


def _release() -> Treatment:
    return lambda texts: [normalise(text) for text in texts]


TOKENIZERS: Mapping[str, Callable[[], Treatment]] = {"release": _release, "ptb": PtbTokenizer}


def load_treatment(name: str) -> Treatment:
    """The treatment called `name`: "release" (lower case, no ".", split at spaces) or "ptb".

    Raises ConfigError for another name, MissingDependencyError where its parts are not installed.
    """
    return pick(TOKENIZERS, name, what="tokenizer")()
