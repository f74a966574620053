"""LEVIR-CC: `LevirCCcaptions.json` and `images/{train,val,test}/{A,B}/NAME.png`.

Layout compared with a copy of the published caption file and with the published loaders (Chen-Yang-Liu/RSICC, Chg2Cap).
"""

from collections.abc import Iterator
from pathlib import Path

from llava.data.sources.base import Item, Options, Source, first_file
from llava.data.sources.karpathy import in_split_folders, read_karpathy

FILE = "LevirCCcaptions.json"


def read(source: Path, options: Options) -> Iterator[Item]:
    """Items of the data set's folder, or of its caption file; image paths count from the folder."""
    return read_karpathy(first_file(source, [FILE]), options, "levir-cc", in_split_folders)


SOURCE = Source(
    read=read, about="LEVIR-CC, buildings and roads, 5 captions a pair", takes=f"its folder, or {FILE}"
)
