"""What may go wrong while a run is on: a signal to leave, a loss that is no number, a disk that is full."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llava.errors import LlavaError


class TrainError(LlavaError, RuntimeError):
    """Training cannot go on; the message says why and what to do."""


class Interrupted(LlavaError):  # noqa: N818 (no error: what was asked for was done)
    """A signal ended the run, after a checkpoint was written.

    status: what a shell expects of a process that the signal ended.
    """

    def __init__(self, number: int, folder: Path, step: int) -> None:
        super().__init__(
            f"{signal.Signals(number).name} received: step {step} is saved in {folder}; the same command goes on"
        )
        self.status = 128 + number


def _spread() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def anywhere(flag: int, device: torch.device) -> int:
    """The largest flag of all processes."""
    if not _spread():
        return flag
    value = torch.tensor(flag, device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


@contextmanager
def denormals_as_zero() -> Iterator[None]:
    """Inside, CPU arithmetic of this thread, and of threads that it starts, takes numbers below 1e-38 for 0.

    Adam's memory of a word that is long unseen decays into that range and stays there, where an x86 core makes an
    update ten times slower: benchmarks/denormals.py.
    """
    before = bool((torch.full((), 1e-39) * 0.5).item() == 0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


class Signals:
    """Inside, SIGTERM and the first Ctrl-C are noted in `received`, to be obeyed between two steps.

    A second Ctrl-C interrupts at once.
    """

    _NUMBERS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        try:
            self._before = {number: signal.signal(number, self._note) for number in self._NUMBERS}
        except ValueError:  # not the main thread, as in a notebook's: signals are not ours there
            self._before = {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


def alone(then: Callable[[int], None] | None, worker: int) -> None:
    """Begin a worker of a data loader in a process group of its own, and go on with its other beginning.

    Ctrl-C, and a launcher that passes SIGTERM on, signal the whole group. A worker that dies of it takes the run along,
    which was about to save what it has learned. Workers end with the run: they watch it.
    """
    if os.name == "posix":
        os.setpgid(0, 0)
    if then is not None:
        then(worker)


def require_finite(loss: Tensor, uids: Sequence[str]) -> None:
    """Stop all processes where the loss of one is no number.

    Raises:
        TrainError: on every process, naming the batch.
    """
    bad = int(not torch.isfinite(loss.detach()).all())
    if not anywhere(bad, loss.device):
        return
    named: list[list[str] | None] = [list(uids) if bad else None]
    if _spread():
        named = [None] * dist.get_world_size()
        dist.all_gather_object(named, list(uids) if bad else None)
    told = "; ".join(
        f"rank {rank}: {', '.join(map(repr, names))}" if _spread() else ", ".join(map(repr, names))
        for rank, names in enumerate(named)
        if names is not None
    )
    raise TrainError(
        f"the loss is {loss.item() if bad else 'not finite on another process'} for the batch of uids {told}. No "
        "checkpoint was written since; look at these pairs, or lower the learning rate, and start again"
    )


def require_room(folder: Path, needed: int) -> None:
    """Stop before a checkpoint that the disk cannot take, while the old one is whole.

    Raises:
        TrainError: less than `needed` bytes are free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise TrainError(
            f"a checkpoint needs about {needed / 1e9:.2f} GB, and {folder} has {free / 1e9:.2f} GB free. Nothing was "
            "written or removed; make room, and start the same command again: it goes on from the last checkpoint"
        )


def sync(path: Path) -> None:
    """Make sure that a folder's or file's name is on disk, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
