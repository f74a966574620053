"""Several processes, one run: who this one is, where it computes, and all collectives outside training.

Only small things travel here: settings, uids, predictions, scores. They go through the key-value store that
every launcher sets up (torchrun, deepspeed, or any that exports RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), not
through a backend: so the same code serves CPUs, cards, and a training run whatever its backend, waiting is done
in short steps, and a rank that is late can be named. On one process everything answers at once.
"""

import contextlib
import json
import os
import pickle
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from llava.errors import ConfigError, LlavaError

if TYPE_CHECKING:
    from torch.distributed import Store  # some builds of torch are without

T = TypeVar("T")

TIMEOUT = 1800.0
"""Seconds without a sign of progress after which a rank is given up."""

_CHUNK = 1 << 20
"""Bytes a value in the store may have: torch's server refuses more than 8 MiB."""

_ENV = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class RankError(LlavaError, RuntimeError):
    """Another process of this run failed, is silent or cannot be reached; the message says which.

    told: another rank speaks of it already.
    """

    def __init__(self, message: str, *, told: bool = False) -> None:
        super().__init__(message)
        self.told = told


@dataclass
class _Session:
    """This process among the others."""

    store: "Store"
    rank: int
    size: int
    group: Any = None
    """The training run's default process group, where the session leans on one."""
    steps: int = 0
    """Collectives so far: the same number on every rank, so it names the next one's keys."""
    failed: bool = field(default=False, repr=False)

    def step(self) -> str:
        self.steps += 1
        return str(self.steps)

    def ask(self, method: str, *args: Any) -> Any:
        """One request to the store.

        Raises:
            RankError: nobody answers.
        """
        try:
            return getattr(self.store, method)(*args)
        except RuntimeError as error:
            raise RankError(
                f"rank {self.rank} lost contact with the other processes: the launcher on the first node, or "
                f"rank 0, has ended or hangs ({str(error).splitlines()[0]})"
            ) from error

    def put(self, key: str, item: Any) -> None:
        content = pickle.dumps(item)
        chunks = [content[i : i + _CHUNK] for i in range(0, len(content), _CHUNK)]
        for number, chunk in enumerate(chunks):
            self.ask("set", f"{key}/{number}", chunk)
        self.ask("set", key, str(len(chunks)))  # last: who sees it finds all chunks

    def take(self, key: str) -> Any:
        chunks = [self.ask("get", f"{key}/{number}") for number in range(int(self.ask("get", key)))]
        return pickle.loads(b"".join(chunks))

    def drop(self, key: str) -> None:
        for number in range(int(self.ask("get", key))):
            self.ask("delete_key", f"{key}/{number}")
        self.ask("delete_key", key)

    def wait(self, keys: Mapping[int, str], what: str, timeout: float) -> None:
        """Until the key of every rank in `keys` is there."""
        deadline = time.monotonic() + timeout
        pause = 0.002
        while missing := [rank for rank, key in keys.items() if not self.ask("check", [key])]:
            self.check_failure()
            if time.monotonic() > deadline:
                raise self.fail(
                    RankError(
                        f"{self.names(missing)} did not reach {what!r} within {timeout:g} s, and may hang"
                    )
                )
            time.sleep(pause)
            pause = min(1.5 * pause, 0.5)

    def fail(self, error: BaseException) -> BaseException:
        """Tell the others why this rank stops; returns the error. The first to fail is the one that is heard."""
        text = str(error) if isinstance(error, LlavaError) else f"{type(error).__name__} {error}".strip()
        heard = None if isinstance(error, RankError) else self.rank
        with contextlib.suppress(RankError):  # nobody is left to be told; the error itself is what counts
            if not self.failed and not self.ask("check", ["failure"]):
                self.ask("set", "failure", json.dumps([heard, text]))
        self.failed = True
        return error

    def check_failure(self) -> None:
        """Raise what another rank stopped for."""
        if not self.ask("check", ["failure"]):
            return
        rank, text = json.loads(self.ask("get", "failure"))
        self.failed = True
        raise RankError(text if rank is None else f"{self.names([rank])} failed: {text}", told=True)

    def introduce(self) -> None:
        self.ask("set", f"who/{self.rank}", f"{socket.gethostname()}, process {os.getpid()}")

    def names(self, ranks: Sequence[int]) -> str:
        """ "rank 1 (node7, process 4711), rank 3 (never seen)"."""
        who = {
            rank: self.ask("get", f"who/{rank}").decode()
            if self.ask("check", [f"who/{rank}"])
            else "never seen"
            for rank in ranks
        }
        return ", ".join(f"rank {rank} ({text})" for rank, text in who.items())


_session: _Session | None = None


def _current() -> _Session | None:
    """The session of `launched`, or one on the process group of a training run; None on one process."""
    global _session
    training = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if _session is not None and (_session.group is None or (training and _session.group is dist.group.WORLD)):
        return _session
    _session = None
    if training:
        from torch.distributed import distributed_c10d

        store = dist.PrefixStore("llava", distributed_c10d._get_default_store())
        _session = _Session(store, dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
        _session.introduce()
    return _session


@contextlib.contextmanager
def launched(timeout: float = TIMEOUT) -> Iterator[None]:
    """Inside, the processes that a launcher started know each other; alone, or in training, nothing happens.

    An error that leaves the block is told to the others, who stop with a `RankError`.

    Raises:
        ConfigError: a launcher that says how many processes there are, and not which one this is.
        RankError: the first process cannot be reached.
    """
    global _session
    if int(os.environ.get("WORLD_SIZE") or 1) == 1 or _current() is not None:
        yield
        return
    if missing := [name for name in _ENV if not os.environ.get(name)]:
        raise ConfigError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} says that several processes run, but {', '.join(missing)} "
            "is not set; start them with torchrun, or unset WORLD_SIZE for one process"
        )
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).splitlines()[0]
        raise RankError(
            f"rank {os.environ['RANK']} cannot reach the first process at {place}: {reason}"
        ) from error
    session = _session = _Session(dist.PrefixStore("llava", store), rank, size)
    patience = 2.0
    try:
        session.introduce()
        yield
        patience = 60.0
    except BaseException as error:
        session.fail(error)
        if isinstance(error, RankError) and error.told:
            time.sleep(1.0)  # the rank at fault ends first, and is the one that the launcher reports
        raise
    finally:
        _session = None
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            _leave(session, patience)


def _leave(session: _Session, patience: float) -> None:
    """Rank 0 goes last: without torchrun the store lives in its process, and the others may still read from it."""
    try:
        gone = session.ask("add", "gone", 1)
        deadline = time.monotonic() + patience
        while session.rank == 0 and gone < session.size and time.monotonic() < deadline:
            time.sleep(0.02)
            gone = session.ask("add", "gone", 0)
    except RankError:  # then the store is gone already, and so is whoever could be told
        return


def disband(timeout: float = TIMEOUT) -> None:
    """The last act of the processes of a training run: wait for one another, and end their process group.

    One that ends while its group's threads still run may abort at exit, and its launcher then stops the others, of
    which rank 0 may still be writing the model. On one process nothing happens.

    Raises:
        RankError: another process does not come to its end.
    """
    global _session
    session = _current()
    if session is None or session.group is None:
        return
    gather(None, "the end of the run", timeout)
    on_main(lambda: None, "the end of the run", timeout)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        _leave(session, 60.0)
    _session = None
    dist.destroy_process_group()


def rank() -> int:
    """This process's number, 0 on one process."""
    session = _current()
    return session.rank if session else 0


def world_size() -> int:
    """Number of processes of this run."""
    session = _current()
    return session.size if session else 1


def is_main() -> bool:
    """Whether this is rank 0, the one that speaks and writes."""
    return rank() == 0


def device(wanted: str | None = None) -> str:
    """Where this process computes: of several processes each takes the card of its LOCAL_RANK.

    Args:
        wanted: "cpu", "cuda", ...; by default "cuda" where there is one. An index ("cuda:1") is taken as it is.

    Raises:
        ConfigError: more processes on this machine than visible cards.
    """
    wanted = wanted or ("cuda" if torch.cuda.is_available() else "cpu")
    if wanted != "cuda" or world_size() == 1:
        return wanted
    local = int(os.environ.get("LOCAL_RANK") or 0)
    cards = torch.cuda.device_count()
    if local >= cards:
        raise ConfigError(
            f"rank {rank()} is process {local} of its machine, where {cards} CUDA devices are visible: start "
            f"--nproc_per_node {cards}, or let processes share a card with --device cuda:0"
        )
    return f"cuda:{local}"


def on_main(make: Callable[[], T], what: str, timeout: float = TIMEOUT) -> T:
    """What rank 0 makes, on every rank.

    Args:
        make: called on rank 0 only; its result must be picklable.
        what: a name for messages.
        timeout: seconds the others wait for it.

    Raises:
        RankError: on the other ranks, when rank 0 failed or takes too long.
    """
    session = _current()
    if session is None:
        return make()
    key = session.step()
    if session.rank:
        session.wait({0: key}, what, timeout)
        value: T = session.take(key)
        if session.ask("add", f"{key}/read", 1) == session.size - 1:
            session.drop(key)
            session.ask("delete_key", f"{key}/read")
        return value
    try:
        value = make()
    except BaseException as error:
        session.fail(error)
        raise
    session.put(key, value)
    return value


def main_first(make: Callable[[], T], what: str, timeout: float = TIMEOUT) -> T:
    """What every rank makes for itself, the others when rank 0 is done: a fault common to all is said once."""
    session = _current()
    if session is None:
        return make()
    made: list[T] = []
    on_main(lambda: made.append(make()), what, timeout)
    return made[0] if made else make()


def gather(item: T, what: str, timeout: float = TIMEOUT) -> list[T]:
    """Every rank's item, by rank, on rank 0; nothing on the others.

    Raises:
        RankError: on rank 0, when a rank does not give its item in time; it is named.
    """
    session = _current()
    if session is None:
        return [item]
    key = session.step()
    if session.rank:
        session.put(f"{key}/{session.rank}/item", item)
        return []
    keys = {rank: f"{key}/{rank}/item" for rank in range(1, session.size)}
    session.wait(keys, what, timeout)
    items = [item, *(session.take(keys[rank]) for rank in keys)]
    for name in keys.values():
        session.drop(name)
    return items


class Team:
    """Ranks that work side by side, each on its share: `with Team("captions") as team: ... team.tell(done)`.

    The block ends when every rank has reached its end. Meanwhile the first rank that fails, or gives no sign of
    progress for `timeout` seconds, ends it on all ranks with a `RankError` that names it.
    """

    def __init__(self, what: str, timeout: float = TIMEOUT) -> None:
        self.what, self.timeout = what, timeout
        self._session = _current()
        self._signs = 0
        self._done = 0

    def __enter__(self) -> "Team":
        if self._session is not None:
            self._key = self._session.step()
            now = time.monotonic()
            others = [rank for rank in range(self._session.size) if rank != self._session.rank]
            self._seen = dict.fromkeys(others, ("", now))
            self._say("works")
        return self

    def tell(self, done: int) -> int:
        """Say that `done` things of this rank's share are done; returns how many are done on all ranks.

        Raises:
            RankError: another rank failed, or has been silent for too long.
        """
        self._done = done
        if self._session is None:
            return done
        self._say("works")
        return self._look()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is None:
            return
        if error is not None:
            self._session.fail(error)
            return
        self._say("ended")
        pause = 0.005
        while not all(sign.startswith("ended") for sign, _ in self._seen.values()):
            time.sleep(pause)
            pause = min(1.5 * pause, 0.5)
            self._look()

    def _say(self, state: str) -> None:
        assert self._session is not None
        self._signs += 1  # so that every sign differs from the one before
        self._session.ask("set", f"{self._key}/{self._session.rank}", f"{state} {self._done} {self._signs}")

    def _look(self) -> int:
        """Read the others' signs; returns the sum of what is done."""
        session = self._session
        assert session is not None
        session.check_failure()
        there = [
            rank for rank in self._seen if self._seen[rank][0] or session.ask("check", [self._name(rank)])
        ]
        signs = session.ask("multi_get", [self._name(rank) for rank in there]) if there else []
        now = time.monotonic()
        for rank, sign in zip(there, signs, strict=True):
            if sign.decode() != self._seen[rank][0]:
                self._seen[rank] = (sign.decode(), now)
        silent = [
            rank
            for rank, (sign, since) in self._seen.items()
            if not sign.startswith("ended") and now - since > self.timeout
        ]
        if silent:
            error = RankError(
                f"{session.names(silent)} made no progress with {self.what!r} for {self.timeout:g} s, and may hang"
            )
            raise session.fail(error)
        return self._done + sum(int(sign.split()[1]) for sign, _ in self._seen.values() if sign)

    def _name(self, rank: int) -> str:
        return f"{self._key}/{rank}"
