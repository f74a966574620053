"""Dubai-CC: `description_jsontr_te_val/{Train,Validation,Test}_*.json` and `imgs_tiles/RGB/{500_2000,500_2010}/NAME`.

The three files are in LEVIR-CC's form; a file's split is the word before the first "_" of its name, as in the
published preprocessing (ShizhenChang/Chg2Cap, `preprocess_data.py`), with which the layout was compared; the files
themselves were not at hand. `filename` has its ending (`11x37.tif`). 2000 is before, 2010 after.
"""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from llava.data.sources.base import Entry, Item, Options, Source
from llava.data.sources.karpathy import Places, read_karpathy
from llava.errors import DataError

FOLDER = "description_jsontr_te_val"
SPLITS = {"Train": "train", "Validation": "val", "Test": "test"}


def read(source: Path, options: Options) -> Iterator[Item]:
    """Items of the data set's folder (the one that holds `imgs_tiles`), or of one of its JSON files."""
    if not source.is_dir():
        return _read_file(source, options)
    files = sorted((source / FOLDER).glob("*.json"))
    if not files:
        raise DataError(
            f"{source} holds no {FOLDER}/*.json; give the folder that does (datasetDubaiCCPublic)"
        )
    return chain.from_iterable(_read_file(file, options) for file in files)


def _read_file(file: Path, options: Options) -> Iterator[Item]:
    word = file.name.partition("_")[0]
    if word not in SPLITS:
        raise DataError(f"{file}: the name begins with none of {', '.join(SPLITS)}, which tell the split")
    return read_karpathy(file, options, "dubai-cc", _places, split=SPLITS[word])


def _places(entry: Entry) -> Places:
    file = entry.name("filename")
    return Places(f"imgs_tiles/RGB/500_2000/{file}", f"imgs_tiles/RGB/500_2010/{file}")


SOURCE = Source(
    read=read,
    about="Dubai-CC, 30 m, 500 pairs",
    takes="the folder datasetDubaiCCPublic, or one of its JSON files",
)
