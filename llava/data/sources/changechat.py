"""ChangeChat-105k: its caption test file, and the conversations of all others.

    {"image_A": "test/A/NAME", "image_B": "test/B/NAME", "captions": ["...", 5 of them], "changeflag": 0}
    {"id": 0, "image": ["train/A/NAME", "train/B/NAME"], "changeflag": 0, "conversations": [...]}       LLaVA's form

Which of the two an entry is, is told by its fields. Paths count from LEVIR-CC's folder `images`, which comes without
them (`--images LEVIR-CC/images`). The training file mixes captions with other questions, and no entry says which it is:
name the caption question (`--caption-question`), and its answers become captions, five a pair; the other conversations
stay conversations. The forms are as the project's description of the published files has them (hub data set
hlwu/changechat-105k), and as the authors' loader reads them (hanlinwu/DeltaVLM); the files were not at hand.
"""

from collections.abc import Iterator
from pathlib import Path

from llava.data.record import Record
from llava.data.sources.base import Entry, Item, Options, Source, each
from llava.data.sources.json_stream import entries
from llava.data.sources.llava_form import from_entry


def read(source: Path, options: Options) -> Iterator[Item]:
    """Items of one file; captions of one pair are put together, and come after the conversations."""

    def make(entry: Entry) -> Item:
        uid = f"changechat/{source.stem}_{entry.number:06d}"
        if "captions" in entry.fields:
            return _captions(entry, uid)
        if "conversations" in entry.fields:
            return from_entry(entry, uid)
        raise entry.fault("has neither 'captions' nor 'conversations'; is it a ChangeChat file?")

    together: dict[tuple[str, str], Item] = {}
    for item in each(entries(source), make, options):
        pair = (item.record.img1_path, item.record.img2_path)
        if item.record.conversation:
            yield item
        elif pair in together:
            together[pair] = Item(_joined(together[pair].record, item.record))
        else:
            together[pair] = item
    yield from together.values()


def _captions(entry: Entry, uid: str) -> Item:
    return Item(
        Record(
            uid=uid,
            img1_path=entry.path("image_A"),
            img2_path=entry.path("image_B"),
            change_caption=entry.captions("captions"),
            change_flag=entry.flag("changeflag"),
        )
    )


def _joined(first: Record, more: Record) -> Record:
    return Record(
        uid=first.uid,
        img1_path=first.img1_path,
        img2_path=first.img2_path,
        change_caption=first.change_caption + more.change_caption,
        change_flag=first.change_flag if first.change_flag is not None else more.change_flag,
    )


SOURCE = Source(
    read=read,
    about="ChangeChat-105k, captions and conversations on LEVIR-CC's pairs",
    takes="one of its JSON files",
    options=("strip", "caption_question"),
)
