"""Small corpora in the exact published layouts, made here, with the items that the readers must find in them."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.data.record import Record
from llava.data.sources import Item


@dataclass(frozen=True)
class Corpus:
    """A corpus of some files."""

    name: str
    """Of `SOURCES`."""
    files: dict[str, Any]
    """Path -> JSON value; or None for an empty file (an image that only has to be there)."""
    items: list[Item]
    source: str = "."
    """What is given to the reader, from the folder on."""
    options: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """Make the files; returns SOURCE."""
        for name, value in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("" if value is None else json.dumps(value), encoding="utf-8")
        return folder / self.source

    @property
    def lists(self) -> list[str]:
        """The files that hold something."""
        return [name for name, value in self.files.items() if value is not None]


def _item(
    uid: str,
    before: str,
    after: str,
    captions: tuple[str, ...] = (),
    flag: bool | None = None,
    split: str | None = None,
    mask: str | None = None,
    conversation: tuple[tuple[str, str], ...] = (),
    task: str | None = None,
    asked: str | None = None,
) -> Item:
    return Item(
        Record(
            uid=uid,
            img1_path=before,
            img2_path=after,
            change_caption=captions,
            change_flag=flag,
            mask_path=mask,
            conversation=conversation,
            task=task,
        ),
        split,
        asked,
    )


SAME = ("there is no difference", "the scene is the same as before")
ROAD = ("a road , with trees , appears", "some trees are gone")


def _entry(split: str, name: str, number: int, captions: tuple[str, ...], flag: int) -> dict[str, Any]:
    """One entry of LEVIR-CC's caption file, as published."""
    return {
        "filepath": split,
        "filename": name,
        "imgid": number,
        "sentences": [
            {"tokens": text.split(), "raw": f" {text} .", "imgid": number, "sentid": 2 * number + k}
            for k, text in enumerate(captions)
        ],
        "split": split,
        "changeflag": flag,
        "sentids": [2 * number, 2 * number + 1],
    }


def _levir(name: str, file: str, masks: bool) -> Corpus:
    entries = [_entry("train", "train_000005.png", 0, ROAD, 1), _entry("test", "test_000001.png", 1, SAME, 0)]
    items = []
    for split, stem, captions, flag in (
        ("train", "train_000005", ROAD, True),
        ("test", "test_000001", SAME, False),
    ):
        folder = f"images/{split}"
        mask = f"{folder}/label/{stem}.png" if masks else None
        paths = f"{folder}/A/{stem}.png", f"{folder}/B/{stem}.png"
        items.append(_item(f"{name}/{stem}", *paths, captions, flag, split, mask))
    return Corpus(name, {file: {"images": entries, "dataset": "LEVIR-CC"}}, items)


def _second() -> Corpus:
    entries = [
        _entry("val", "00017.png", 0, ROAD, 1),
        _entry("val", "00017_random_augment_blur.png", 1, ROAD, 1),
    ]
    items = [
        _item(f"second-cc/{n}", f"val/rgb/A/{n}.png", f"val/rgb/B/{n}.png", ROAD, True, "val")
        for n in ("00017", "00017_random_augment_blur")
    ]
    return Corpus("second-cc", {"SECOND-CC-AUG.json": {"images": entries}}, items)


def _dubai() -> Corpus:
    def file(name: str, text: str) -> dict[str, Any]:
        return {"images": [{"filename": name, "sentences": [{"raw": text}, {"raw": f"{text} ."}]}]}

    folder = "description_jsontr_te_val"
    files = {
        f"{folder}/Train_300.json": file("11x37.tif", "new roads"),
        f"{folder}/Validation_50.json": file("2x4.tif", "an island appeared"),
        f"{folder}/Test_150.json": file("8x1.tif", "nothing has changed"),
    }
    items = [
        _item(
            f"dubai-cc/{n}",
            f"imgs_tiles/RGB/500_2000/{n}.tif",
            f"imgs_tiles/RGB/500_2010/{n}.tif",
            (text, text),
            split=split,
        )
        for n, text, split in (
            ("8x1", "nothing has changed", "test"),
            ("11x37", "new roads", "train"),
            ("2x4", "an island appeared", "val"),
        )
    ]
    return Corpus("dubai-cc", files, items)


def _sysu() -> Corpus:
    entry = {
        "id": 16000, "width": 256, "height": 256, "file_name": "sysu_test_00000.png", "folder_name": "test",
        "license": 0, "flickr_url": "", "coco_url": "", "date_captured": 0, "ischange": 1,
        "captions": ["Some new containers appeared on the bottom left of the image."],
        "attribute": {"num_regions": 1, "region_properties": [{"area": 13471.0, "box": [0, 74, 100, 255]}]},
    }  # fmt: skip
    document = {"licenses": [{"name": "", "id": 0, "url": ""}], "info": {"year": ""}, "images": [entry]}
    item = _item(
        "sysu-cd/sysu_test_00000",
        "test/A/sysu_test_00000.png",
        "test/B/sysu_test_00000.png",
        tuple(entry["captions"]),
        True,
        "test",
        "test/label/sysu_test_00000.png",
    )
    file = "sysu_test_captions.json"
    return Corpus("sysu-cd", {file: document}, [item], file)


def _clevr() -> Corpus:
    changed = {
        "CLEVR_default_000000.png": ["the red ball moved", "a ball moved"],
        "CLEVR_default_000002.png": ["a cube"],
    }
    same = {
        "CLEVR_default_000000.png": ["no change was made"],
        "CLEVR_default_000002.png": ["there is no change"],
    }
    items = [
        _item(
            f"clevr-change/{number}_{kind}",
            f"images/CLEVR_default_{number}.png",
            f"{folder}/CLEVR_{word}_{number}.png",
            tuple(captions),
            kind == "change",
            split,
        )
        for kind, folder, word, table in (
            ("change", "sc_images", "semantic", changed),
            ("no_change", "nsc_images", "nonsemantic", same),
        )
        for (number, split), captions in zip(
            (("000000", "train"), ("000002", "test")), table.values(), strict=True
        )
    ]
    files = {
        "change_captions.json": changed,
        "no_change_captions.json": same,
        "splits.json": {"train": [0], "val": [1], "test": [2]},
    }
    return Corpus("clevr-change", files, items)


def _spot() -> Corpus:
    files = {
        "annotations/train.json": [
            {"img_id": "42", "sentences": ["a car has appeared", "a man is missing"]},
            {"img_id": "7", "sentences": ["more people"]},
            {"img_id": "42", "sentences": ["there is a new car"]},
        ],
        "annotations/test.json": [{"img_id": "42", "sentences": ["no people"]}],
    }
    items = [
        _item(
            f"spot-the-diff/{split}_{n}",
            f"resized_images/{n}.png",
            f"resized_images/{n}_2.png",
            texts,
            split=split,
        )
        for split, n, texts in (
            ("train", "42", ("a car has appeared", "a man is missing", "there is a new car")),
            ("train", "7", ("more people",)),
            ("test", "42", ("no people",)),
        )
    ]
    return Corpus("spot-the-diff", files, items)


def _edit() -> Corpus:
    def entry(uid: str, sents: list[str]) -> dict[str, Any]:
        return {"img0": f"{uid}.jpg", "img1": f"{uid}_new.png", "sents": sents, "uid": uid}

    files = {
        "train.json": [entry("Reddit_1", ["make it brighter"])],
        "valid.json": [entry("Reddit_2", ["Remove the leash", "erase the lease", "remove the leash"])],
    }
    items = [
        _item(
            f"image-editing-request/{n}",
            f"pictures/{n}.jpg",
            f"pictures/{n}_new.png",
            tuple(texts),
            split=split,
        )
        for split, n, texts in (
            ("train", "Reddit_1", ["make it brighter"]),
            ("val", "Reddit_2", files["valid.json"][0]["sents"]),
        )
    ]
    return Corpus("image-editing-request", files, items, options={"images": "pictures"})


def _stvchrono() -> Corpus:
    def entry(before: str, after: str, text: str) -> dict[str, Any]:
        return {"city": "adelaide", "images_IDs": [before, after], "change_caption": text}

    file = "stvchrono_v1_continual-change-captioning_image-pair.json"
    document = {
        "train": [entry("a-1", "_b", "B is darker than A . "), entry("a-1", "_b", "A is brighter than B . ")],
        "test": [entry("c", "d", "A is cloudy , B is sunny . ")],
    }
    items = [
        _item(
            "stvchrono/a-1__b",
            "panoramas/a-1.jpg",
            "panoramas/_b.jpg",
            ("B is darker than A .", "A is brighter than B ."),
            split="train",
        ),
        _item(
            "stvchrono/c_d",
            "panoramas/c.jpg",
            "panoramas/d.jpg",
            ("A is cloudy , B is sunny .",),
            split="test",
        ),
    ]
    return Corpus("stvchrono", {file: document}, items, options={"images": "panoramas"})


def _changesim() -> Corpus:
    files: dict[str, Any] = {}
    items = []
    for folder, place, split in (
        ("Query_Seq_Train", "Warehouse_0/Seq_1", "train"),
        ("Query_Seq_Test", "Warehouse_6/Seq_0", "test"),
    ):
        base = f"{folder}/{place}"
        before, after, mask = (f"{base}/{kind}/12.png" for kind in ("t0/rgb", "rgb", "change_segmentation"))
        files |= {before: None, after: None, mask: None}
        items.append(_item(f"changesim/{base}/12", before, after, split=split, mask=mask))
    return Corpus("changesim", files, items)


ASK = "Please briefly describe the changes in these two images."


def _changechat_train() -> Corpus:
    def entry(number: int, *turns: str) -> dict[str, Any]:
        spoken = [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(turns)]
        images = ["train/A/train_000001.png", "train/B/train_000001.png"]
        return {"id": number, "image": images, "changeflag": 1, "conversations": spoken}

    pair = "images/train/A/train_000001.png", "images/train/B/train_000001.png"
    document = [
        entry(0, f"<image> <image> {ASK}", "a road appears"),
        entry(1, "<image> <image> Has it changed?", "Yes", "What?", "A road."),
        entry(2, f"<image> <image> {ASK}", "there is a road"),
    ]
    items = [
        _item(
            "changechat/changechat_105k_train_000001",
            *pair,
            flag=True,
            conversation=(("Has it changed?", "Yes"), ("What?", "A road.")),
            task="dialog",
        ),
        _item(
            "changechat/changechat_105k_train_000000",
            *pair,
            ("a road appears", "there is a road"),
            True,
            task="caption",
            asked=ASK,
        ),
    ]
    file = "changechat_105k_train.json"
    return Corpus(
        "changechat", {file: document}, items, file, {"images": "images", "caption_question": ASK.upper()}
    )


def _changechat_test() -> Corpus:
    entry = {
        "image_A": "test/A/test_000004.png",
        "image_B": "test/B/test_000004.png",
        "captions": ["a", "b", "c", "d", "e"],
        "changeflag": 0,
    }
    file = "changechat_105k_test.json"
    item = _item(
        "changechat/changechat_105k_test_000000",
        "test/A/test_000004.png",
        "test/B/test_000004.png",
        ("a", "b", "c", "d", "e"),
        False,
        task="caption",
    )
    return Corpus("changechat", {file: [entry]}, [item], file)


def _change_imti() -> Corpus:
    def entry(*turns: str) -> dict[str, Any]:
        spoken = [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(turns)]
        return {"conversations": spoken, "images": [f"/disk/mci/images/train/{k}/train_1.png" for k in "AB"]}

    both = "these two images:<image> and <image>"
    dialogue = (f"Any changes in {both}?", "Yes", "How many roads?", "2", "Buildings?", "0", "Describe.", "x")
    roads = (f"Tell where the roads have changed in {both},if no change say so.", "top left corner,left")
    files = {
        "caption.json": [entry("Please describe the changes in <image> and <image>", "a road appears")],
        "binary_class.json": [entry(f"Is there any change in {both}. Please answer yes or no.", "No")],
        "count_road.json": [entry(f"How many roads changed in {both}?", "3")],
        "count_build.json": [entry(f"How many buildings changed in {both}?", "No change")],
        "loc_road.json": [entry(*roads)],
        "loc_build.json": [entry(f"Where did buildings change in {both}?", "center,lower")],
        "mul.json": [entry(*dialogue)],
    }
    pair = "mci/images/train/A/train_1.png", "mci/images/train/B/train_1.png"
    where = "Tell where the roads have changed in these two images,if no change say so."
    four = (
        ("Any changes in these two images?", "Yes"),
        ("How many roads?", "2"),
        ("Buildings?", "0"),
        ("Describe.", "x"),
    )

    def _open(name: str, asked: str, answer: str) -> Item:
        return _item(f"change-imti/{name}_000000", *pair, conversation=((asked, answer),), task="open")

    no = (("Is there any change in these two images. Please answer yes or no.", "No"),)
    items = [
        _item("change-imti/caption_000000", *pair, ("a road appears",), task="caption"),
        _item("change-imti/binary_class_000000", *pair, conversation=no, task="binary"),
        _open("count_road", "How many roads changed in these two images?", "3"),
        _open("count_build", "How many buildings changed in these two images?", "No change"),
        _item(
            "change-imti/loc_road_000000", *pair, conversation=((where, "top left corner,left"),), task="open"
        ),
        _open("loc_build", "Where did buildings change in these two images?", "center,lower"),
        _item("change-imti/mul_000000", *pair, conversation=four),
    ]
    return Corpus("change-imti", files, items, options={"strip": "/disk/mci", "images": "mci"})


def _foundation() -> Corpus:
    def entry(number: int, **more: Any) -> dict[str, Any]:
        paths = {"img1_path": f"/disk/cc/A/{number}.png", "img2_path": f"/disk/cc/B/{number}.png"}
        return {"change_flag": 1, **paths, "change_caption": ["x", "y"], **more}

    file = "LevirCCcaptions_train_universal.json"
    stem = file.removesuffix(".json")
    items = [
        _item(uid, f"cc/A/{n}.png", f"cc/B/{n}.png", ("x", "y"), True)
        for n, uid in enumerate(("one", f"cc-foundation/{stem}_000001", f"cc-foundation/{stem}_000009"))
    ]
    document = [entry(0, uid="one"), entry(1), entry(2, uid=9)]
    return Corpus("cc-foundation", {file: document}, items, file, {"strip": "/disk/cc", "images": "cc"})


def _llava() -> Corpus:
    prompt = "This is the Image1 <image>. This is the second Image2 <image>.\nWhat difference?"
    document = [
        {
            "id": "x",
            "image": ["a.png", "b.png"],
            "conversations": [
                {"from": "system", "value": "You are helpful."},
                {"from": "human", "value": prompt},
                {"from": "gpt", "value": " None. "},
            ],
        }
    ]
    item = _item("llava/pairs_000000", "a.png", "b.png", conversation=(("What difference?", "None."),))
    return Corpus("llava", {"pairs.json": document}, [item], "pairs.json")


def _sharegpt() -> Corpus:
    turns = [{"from": "human", "value": "<image><image>How many?"}, {"from": "gpt", "value": "Two."}]
    document = [{"conversations": turns, "images": ["a.png", "b.png"], "changeflag": 1, "task": "open"}]
    rounds = (("How many?", "Two."),)
    item = _item("llava/s_000000", "a.png", "b.png", flag=True, conversation=rounds, task="open")
    return Corpus("llava", {"s.json": document}, [item], "s.json")


def _messages() -> Corpus:
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "How many?"}]
    document = [
        {
            "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "Two."}],
            "images": ["a.png", "b.png"],
        }
        for content in ("<image><image>How many?", parts, "How many?")
    ]
    items = [
        _item(f"messages/m_{n:06d}", "a.png", "b.png", conversation=(("How many?", "Two."),))
        for n in range(3)
    ]
    return Corpus("messages", {"m.json": document}, items, "m.json")


_MAKERS: dict[str, Callable[[], Corpus]] = {
    "levir-cc": lambda: _levir("levir-cc", "LevirCCcaptions.json", masks=False),
    "levir-mci": lambda: _levir("levir-mci", "LevirCCcaptions.json", masks=True),
    "whu-cdc": lambda: _levir("whu-cdc", "whuCCcaptions.json", masks=True),
    "second-cc": _second,
    "dubai-cc": _dubai,
    "sysu-cd": _sysu,
    "clevr-change": _clevr,
    "spot-the-diff": _spot,
    "image-editing-request": _edit,
    "stvchrono": _stvchrono,
    "changesim": _changesim,
    "changechat": _changechat_train,
    "changechat-captions": _changechat_test,
    "change-imti": _change_imti,
    "cc-foundation": _foundation,
    "llava": _llava,
    "sharegpt": _sharegpt,
    "messages": _messages,
}
CORPORA = {name: make() for name, make in _MAKERS.items()}
"""One for every source; ChangeChat has two forms, and so has the one of conversations."""
