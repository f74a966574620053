"""SPICE (Anderson et al., 2016): F-scores of scene graphs, by the Java program inside pycocoevalcap.

That program needs Stanford CoreNLP 3.6.0 and its models (about 400 MB), which no package brings; the error says
where they belong. Run as a whole with a time limit, in a folder of its own, without the cache beside the package.
"""

import importlib.util
import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from llava.errors import DataError, LlavaError, MissingDependencyError
from llava.eval.meteor import clean
from llava.java import require_java

CORENLP = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")

# Its serializer looks into classes that Java 9 and later close; Java 8 does not know the option.
OPEN = [
    "-XX:+IgnoreUnrecognizedVMOptions",
    *(
        f"--add-opens=java.base/java.{name}=ALL-UNNAMED"
        for name in ("lang", "util", "math", "text", "net", "io", "util.concurrent")
    ),
]


class Spice:
    """SPICE as a measure: `Spice()(captions, references)` gives each caption's F-score as a fraction of 1.

    timeout: seconds for a whole set; parsing takes about 0.05 s a sentence and a minute of loading.
    Raises MissingDependencyError without Java, the jar or CoreNLP; LlavaError when the run fails or is late.
    """

    def __init__(self, java: Path | None = None, timeout: float = 3600.0) -> None:
        self.jar = _find_jar()
        self.java = java or require_java("SPICE")
        self.timeout = timeout

    def __call__(self, captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        tasks = [
            # The parser fails at nothing at all; a lone dash is a caption without a scene.
            {"image_id": number, "test": clean(text) or "-", "refs": [clean(line) for line in group]}
            for number, (text, group) in enumerate(zip(captions, references, strict=True))
        ]
        if not tasks:
            raise DataError("SPICE got no captions to score")
        with tempfile.TemporaryDirectory() as folder:
            asked, told = Path(folder, "asked.json"), Path(folder, "told.json")
            asked.write_text(json.dumps(tasks), encoding="ascii")  # escaped: safe under any locale
            command = [str(self.java), *OPEN, "-Xmx8G", "-jar", str(self.jar), str(asked)]
            command += ["-out", str(told), "-subset", "-silent"]
            try:
                done = subprocess.run(
                    command,
                    cwd=self.jar.parent,
                    capture_output=True,
                    stdin=subprocess.DEVNULL,
                    timeout=self.timeout,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                raise LlavaError(f"SPICE did not end within {self.timeout:g} s") from None
            words = done.stderr[-500:].decode(errors="replace").strip()
            if done.returncode or not told.is_file():
                raise LlavaError(f"SPICE failed (exit status {done.returncode}); it said: {words}")
            try:
                found = {
                    entry["image_id"]: entry["scores"]["All"]["f"] for entry in json.loads(told.read_bytes())
                }
                # A caption and references without any scene have no F-score: nothing was said of nothing.
                return [float(found[task["image_id"]] or 0.0) for task in tasks]
            except (ValueError, KeyError, TypeError) as error:
                raise LlavaError(
                    f"SPICE wrote no scores for all captions ({error!r}); it said: {words}"
                ) from error


def _find_jar() -> Path:
    spec = importlib.util.find_spec("pycocoevalcap")
    roots = [Path(root) for root in (spec.submodule_search_locations or ())] if spec else []
    for root in roots:
        if (jar := root / "spice" / "spice-1.0.jar").is_file():
            absent = [name for name in CORENLP if not (jar.parent / "lib" / name).is_file()]
            if absent:
                raise MissingDependencyError(
                    f"SPICE needs {' and '.join(absent)} in {jar.parent / 'lib'}, and no package brings them. "
                    "With a network: `python -m pycocoevalcap.spice.get_stanford_models` (about 400 MB); without: "
                    "put them there by hand, from stanford-corenlp-full-2015-12-09.zip"
                )
            return jar
    raise MissingDependencyError(
        "SPICE needs spice-1.0.jar of pycocoevalcap. Install the extra: pip install 'llava[eval]'"
    )
