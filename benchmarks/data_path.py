"""How many samples a CPU second gives: files and captions to batches, beside a plain implementation in the same run.

    OMP_NUM_THREADS=1 python benchmarks/data_path.py --json benchmarks/results/data_path.json

A sample is one caption of a pair: two 256 px PNGs to [2, 3, 384, 384], the conversation to ids and labels, by a
tokenizer of 151,646 entries. "Ours" is `PairDataset` and `BranchCollator`: five captions of a pair are one item.
"Plain" does what the published code does: an item a caption, both files read for each, a copy of the tokenizer for
each, the conversation tokenised message by message. Both give the same ids, labels and pixels; the run stops if they do
not. Every caption of the first epoch is new to our cache; the second epoch finds all of them.

Figures are by the CPU time of the processes, so that other work on the machine does not count, and are medians over
rounds in which the two take turns. With workers, wall time is given too; it does depend on that work.
"""

import argparse
import copy
import datetime
import json
import os
import platform
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from images import aerial_like
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer

from llava.data.collate import BranchCollator
from llava.data.conversation import IGNORE, PAIR_INTRODUCTION, QUESTION
from llava.data.dataset import PairDataset
from llava.data.record import Record
from llava.data.sampler import EpochSampler
from llava.model.image_processing import ChangeImageProcessor
from llava.model.processing import ChangeVLMProcessor
from llava.train.tokenizer import train_tokenizer

SIZE, TOKENS = 384, 729
VOCABULARY = 151_646
_TEXT = (
    "a an the some many several two three large small new old green bare houses house villas buildings road roads "
    "trees forest grass field lake pool parking lot scene is are was were built removed replaced appears along on in "
    "of to at top bottom left right corner middle side both sides next near by with and same as before nothing"
)
WORDS = _TEXT.split()


def captions(count: int, seed: int) -> list[str]:
    """Different sentences of about 11 words."""
    generator = random.Random(seed)
    return [
        f"{' '.join(generator.choices(WORDS, k=generator.randint(7, 13)))} {number} ."
        for number in range(count)
    ]


def large_tokenizer() -> Qwen2Tokenizer:
    """Qwen2's kind and number of entries: words of captions, and entries that nothing uses."""
    learned = json.loads(
        train_tokenizer(captions(2000, 1) + [PAIR_INTRODUCTION + QUESTION] * 99, 2000)._tokenizer.to_str()
    )
    vocabulary = {token: i for token, i in learned["model"]["vocab"].items() if not token.startswith("<|")}
    merges = [tuple(pair) for pair in learned["model"]["merges"]]
    generator, parts = random.Random(0), list(vocabulary)
    while len(vocabulary) < VOCABULARY - 3:
        left, right = generator.choice(parts), generator.choice(parts)
        if left + right not in vocabulary:
            vocabulary[left + right] = len(vocabulary)
            merges.append((left, right))
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary, merges=merges, unk_token=None, pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    assert len(tokenizer) == VOCABULARY
    return tokenizer


def pairs(folder: Path, count: int) -> list[Record]:
    """Pairs of files with five captions each."""
    told = captions(5 * count, 2)
    for i in range(2 * count):
        aerial_like(folder / f"{i}.png", 256, i)
    return [
        Record(
            uid=str(i),
            img1_path=f"{2 * i}.png",
            img2_path=f"{2 * i + 1}.png",
            change_caption=tuple(told[5 * i : 5 * i + 5]),
        )
        for i in range(count)
    ]


# --- the plain implementation ---------------------------------------------------------------------------

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
)


def plain_image(path: Path) -> Tensor:
    """One file to [3, S, S], an array and a step at a time."""
    with Image.open(path) as file:
        pixels = np.array(file.convert("RGB"))  # [H, W, 3]
    resized = np.array(Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    scaled = (resized.astype(np.float64) * (1 / 255)).astype(np.float32)
    normal = (scaled - np.array([0.5] * 3, np.float32)) / np.array([0.5] * 3, np.float32)
    return torch.tensor(normal.transpose(2, 0, 1))


def plain_sample(record: Record, caption: str, root: Path, shared: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A caption of a pair: ids and labels with one place an image, and both images."""
    tokenizer = copy.deepcopy(shared)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    image = tokenizer.convert_tokens_to_ids("<image>")
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": PAIR_INTRODUCTION + QUESTION},
        {"role": "assistant", "content": caption},
    ]
    ids: list[int] = []
    labels: list[int] = []
    for message in messages:
        piece = tokenizer.apply_chat_template([message], return_dict=False)
        learned = message["role"] == "assistant"
        ids += piece
        # behind <|im_start|>, the role and a newline, and before the last newline
        labels += [IGNORE] * 3 + piece[3:-1] + [IGNORE] if learned else [IGNORE] * len(piece)
    pixels = torch.stack([plain_image(path) for path in record.paths(root)])
    ids = [-200 if token == image else token for token in ids]
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "pixel_values": pixels}


def plain_batch(samples: Sequence[dict[str, Any]], pad: int) -> dict[str, Tensor]:
    """Samples to a padded batch."""
    ids = torch.nn.utils.rnn.pad_sequence(
        [s["input_ids"] for s in samples], batch_first=True, padding_value=pad
    )
    labels = torch.nn.utils.rnn.pad_sequence(
        [s["labels"] for s in samples], batch_first=True, padding_value=IGNORE
    )
    pixels = torch.stack([s["pixel_values"] for s in samples])
    return {"input_ids": ids, "labels": labels, "attention_mask": ids.ne(pad), "pixel_values": pixels}


def require_same(data: PairDataset, root: Path, tokenizer: PreTrainedTokenizerBase) -> float:
    """Compare both ways on one pair; the largest difference of pixel values."""
    record, sample = data.records[0], data[0]
    image, difference = data.processor.image_token_id, 0.0
    for caption, (answer, learned) in zip(record.change_caption, sample.answers, strict=True):
        plain = plain_sample(record, caption, root, tokenizer)
        ids = [*sample.prompt, *answer]
        short = [ids[i] for i in range(len(ids)) if not (ids[i] == image and i and ids[i - 1] == image)]
        assert [-200 if token == image else token for token in short] == plain["input_ids"].tolist()
        assert learned == plain["labels"].tolist()[-len(learned) :]
        difference = max(difference, float((plain["pixel_values"] - sample.pixel_values).abs().max()))
    assert difference < 1e-5
    return difference


# --- the figures ----------------------------------------------------------------------------------------


def cpu_seconds() -> float:
    """Of this process and of all that it has waited for."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def with_workers(data: PairDataset, collate: BranchCollator, workers: int, passes: int) -> dict[str, float]:
    """`passes` times all pairs through a loader."""
    sampler = EpochSampler(len(data))
    start, wall = cpu_seconds(), time.perf_counter()
    loader = DataLoader(
        data, 8, sampler=sampler, num_workers=workers, persistent_workers=workers > 0, collate_fn=collate
    )
    for epoch in range(passes):
        sampler.set_epoch(epoch)
        for batch in loader:
            batch["pixel_values"][0, 0, 0, 0, 0].item()
    wall = time.perf_counter() - wall
    del loader  # ends the workers, whose time counts from then on
    pairs_read = passes * len(data)
    return {
        "pairs_per_cpu_second": round(pairs_read / (cpu_seconds() - start), 1),
        "pairs_per_second": round(pairs_read / wall, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=64, help="pairs of files (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of both (default %(default)s)")
    parser.add_argument(
        "--plain-samples", type=int, default=4, help="plain samples a round (default %(default)s)"
    )
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument(
        "--passes", type=int, default=6, help="epochs through the workers (default %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    load = [os.getloadavg()[0]]

    tokenizer = large_tokenizer()
    shared = copy.deepcopy(tokenizer)  # ours adds <image> to its own
    image_processor = ChangeImageProcessor(size=SIZE, mean=[0.5] * 3, std=[0.5] * 3)
    processor = ChangeVLMProcessor(image_processor, tokenizer, image_seq_length=TOKENS)
    collate = BranchCollator(tokenizer.pad_token_id)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        records = pairs(root, args.pairs)
        ours: dict[str, list[float]] = {"first epoch": [], "second epoch": []}
        plain = []
        difference = require_same(PairDataset(records, root, processor), root, shared)
        for number in range(args.rounds):
            data = PairDataset(records, root, processor)  # with an empty cache of captions
            for epoch in ours:
                start = time.process_time()
                for first in range(0, len(data), 8):
                    collate([data[i] for i in range(first, min(first + 8, len(data)))])
                ours[epoch].append(5 * len(data) / (time.process_time() - start))
            told = [(record, caption) for record in records for caption in record.change_caption]
            some = told[number * args.plain_samples :][: args.plain_samples]
            start = time.process_time()
            plain_batch([plain_sample(*one, root, shared) for one in some], tokenizer.pad_token_id)
            plain.append(len(some) / (time.process_time() - start))
        split = where_time_goes(data)
        workers = {str(n): with_workers(data, collate, n, args.passes) for n in args.workers}
        kilobytes = sum(file.stat().st_size for file in root.iterdir()) / 2000 / args.pairs
    load.append(os.getloadavg()[0])

    rate, plain_rate = (statistics.median(values) for values in (ours["first epoch"], plain))
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, one thread, torch {torch.__version__}",
        "load": f"{min(load):.1f} to {max(load):.1f}",
        "command": "OMP_NUM_THREADS=1 python benchmarks/data_path.py --json benchmarks/results/data_path.json",
        "pair": f"2 PNGs of 256 px, {kilobytes:.0f} kB each, to {SIZE} px; 5 captions; {VOCABULARY} entries",
        "samples_per_cpu_second": {
            "ours": round(rate, 1),
            "ours, captions seen before": round(statistics.median(ours["second epoch"]), 1),
            "plain": round(plain_rate, 2),
        },
        "times_plain": round(rate / plain_rate, 1),
        "pairs_per_cpu_second": round(rate / 5, 1),
        "by_round": {
            "ours": [round(value, 1) for value in ours["first epoch"]],
            "plain": [round(value, 2) for value in plain],
        },
        "milliseconds_a_pair": split,
        "workers": workers,
        "largest_difference_of_pixel_values": difference,
    }
    print(json.dumps(result, indent=1))
    if args.json:
        part = args.json.with_name(args.json.name + ".part")
        part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        part.replace(args.json)


def where_time_goes(data: PairDataset) -> dict[str, float]:
    """CPU milliseconds of each step of a pair, the best of several."""
    from llava.data.images import load_pair

    prepare, record = data.processor.image_processor, data.records[0]
    pictures = load_pair(*record.paths(data.root))
    views = [prepare.fit(picture) for picture in pictures]
    sample, collate = data[0], BranchCollator(0)

    def tokenise() -> None:
        data.encoder._captions._held.clear()
        for caption in record.change_caption:
            data.encoder.caption(caption)

    steps = {
        "decode": lambda: load_pair(*record.paths(data.root)),
        "resize": lambda: [prepare.fit(picture) for picture in pictures],
        "normalise": lambda: prepare.normalise(views),
        "tokenise": tokenise,
        "collate": lambda: collate([sample] * 8),
    }
    found = {}
    for name, step in steps.items():
        best = float("inf")
        for _ in range(20):
            start = time.process_time()
            step()
            best = min(best, time.process_time() - start)
        found[name] = round(best * 1e3 / (8 if name == "collate" else 1), 3)
    return found


if __name__ == "__main__":
    main()
