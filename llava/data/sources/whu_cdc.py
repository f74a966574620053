"""WHU-CDC: `whuCCcaptions.json` and `images/{train,val,test}/{A,B,label}/NAME.png`, in LEVIR-CC's form.

The caption file was compared with a published copy; the folders with two public loaders. Labels are 0 and 1 (or
255) for changed buildings.
"""

from collections.abc import Iterator
from pathlib import Path

from llava.data.sources.base import Item, Options, Source, first_file
from llava.data.sources.karpathy import in_split_folders_with_label, read_karpathy

FILE = "whuCCcaptions.json"


def read(source: Path, options: Options) -> Iterator[Item]:
    """Items of the data set's folder, or of its caption file; image and label paths count from the folder."""
    return read_karpathy(first_file(source, [FILE]), options, "whu-cdc", in_split_folders_with_label)


SOURCE = Source(read=read, about="WHU-CDC, 0.075 m, 5 captions a pair", takes=f"its folder, or {FILE}")
