"""LEVIR-MCI: LEVIR-CC's pairs and captions, and `images/SPLIT/label/NAME.png` (0 none, 128 road, 255 building).

Layout compared with the published loader (Chen-Yang-Liu/Change-Agent, `Multi_change/data/LEVIR_MCI.py`). The grey
levels of the labels are kept in the file; a record's mask says only where they are not 0.
"""

from collections.abc import Iterator
from pathlib import Path

from llava.data.sources.base import Item, Options, Source, first_file
from llava.data.sources.karpathy import in_split_folders_with_label, read_karpathy
from llava.data.sources.levir_cc import FILE


def read(source: Path, options: Options) -> Iterator[Item]:
    """Items of the data set's folder, or of its caption file; image and label paths count from the folder."""
    return read_karpathy(first_file(source, [FILE]), options, "levir-mci", in_split_folders_with_label)


SOURCE = Source(
    read=read,
    about="LEVIR-MCI, LEVIR-CC with masks of changed roads and buildings",
    takes=f"its folder, or {FILE}",
)
