"""SECOND-CC: `SECOND-CC-AUG.json` in LEVIR-CC's form and `{train,val,test}/rgb/{A,B}/NAME.png`.

`SPLIT/sem/{A,B}` are class maps of either date, not masks of change: they are left alone. The list holds augmented
views beside the pairs themselves (`..._random_augment...` in their names), which stay records of their own: choose with
a mixture. A few sentences are empty (see `--skip-faults`). The annotation file itself was not at hand: its form is as
the authors' readme and three public loaders have it, not compared with the file.
"""

from collections.abc import Iterator
from pathlib import Path

from llava.data.sources.base import Entry, Item, Options, Source, first_file
from llava.data.sources.karpathy import Places, read_karpathy

FILE = "SECOND-CC-AUG.json"


def read(source: Path, options: Options) -> Iterator[Item]:
    """Items of the data set's folder, or of its caption file; image paths count from the folder."""
    return read_karpathy(first_file(source, [FILE]), options, "second-cc", _places)


def _places(entry: Entry) -> Places:
    folder, file = entry.name("filepath"), entry.name("filename")
    return Places(f"{folder}/rgb/A/{file}", f"{folder}/rgb/B/{file}")


SOURCE = Source(read=read, about="SECOND-CC, six kinds of land cover", takes=f"its folder, or {FILE}")
