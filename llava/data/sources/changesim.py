"""ChangeSim: pairs and masks of `Query_Seq_{Train,Test}/Warehouse_N/Seq_N/{t0/rgb,rgb,change_segmentation}/N.png`.

`t0/rgb` is the mapped place (before), `rgb` the visit (after), `change_segmentation` a coloured map, black where
nothing changed. ChangeSim publishes no captions: these records have none, and serve masks. Captions for it come with
CC-Foundation (`cc-foundation`). The split is the word behind `Query_Seq_` in the folder's name. Compared with the
authors' loader (SAMMiCA/ChangeSim, `script/dataloader.py`).
"""

from collections.abc import Iterator
from pathlib import Path

from llava.data.record import Record
from llava.data.sources.base import Item, Options, Source, inside
from llava.errors import DataError

SPLITS = {"Query_Seq_Train": "train", "Query_Seq_Test": "test"}


def read(source: Path, options: Options) -> Iterator[Item]:
    """Items of a `Query_Seq_...` folder, or of the one that holds both; paths count from the latter."""
    candidates = [source] if source.name in SPLITS else [source / name for name in SPLITS]
    folders = [folder for folder in candidates if folder.is_dir()]
    if not folders:
        raise DataError(f"{source}: is no {' or '.join(SPLITS)} and holds none")
    found = False
    for folder in folders:
        for image in sorted(folder.glob("Warehouse_*/Seq_*/rgb/*.png")):
            found = True
            sequence = image.parents[1]
            where = f"{folder.name}/{sequence.parent.name}/{sequence.name}"
            before, mask = sequence / "t0/rgb" / image.name, sequence / "change_segmentation" / image.name
            if not before.is_file() or not mask.is_file():
                absent = mask if before.is_file() else before
                options.faults.found(f"{image}: there is no {absent} beside it; unpack the archive again")
                continue
            record = Record(
                uid=f"changesim/{where}/{image.stem}",
                img1_path=inside(f"{where}/t0/rgb/{image.name}", options),
                img2_path=inside(f"{where}/rgb/{image.name}", options),
                mask_path=inside(f"{where}/change_segmentation/{image.name}", options),
            )
            yield Item(record, SPLITS[folder.name])
    if not found:
        raise DataError(f"{source} holds no Warehouse_*/Seq_*/rgb/*.png; was the archive unpacked?")


SOURCE = Source(
    read=read,
    about="ChangeSim, warehouses, pairs and masks without captions",
    takes="a folder Query_Seq_Train or Query_Seq_Test, or the one that holds them",
)
