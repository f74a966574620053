"""Collectives: plain answers alone, right ones between real processes, and a lost rank is named."""

import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from llava import distributed
from llava.errors import ConfigError

ROOT = Path(__file__).parents[1]


def start(size: int, code: str, **env: str) -> list["subprocess.Popen[str]"]:
    """The same code as so many processes, as a launcher starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    head = "import os, sys, time\nfrom llava import distributed\nfrom llava.distributed import *\n"
    head += "R = int(os.environ['RANK'])\n"
    return [
        subprocess.Popen(
            [sys.executable, "-c", head + textwrap.dedent(code)],
            cwd=ROOT,
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                **env,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def finish(processes: list["subprocess.Popen[str]"]) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of each."""
    try:
        return [(*reversed(p.communicate(timeout=60)), p.returncode)[::-1] for p in processes]  # type: ignore[misc]
    finally:
        for process in processes:
            process.kill()


def test_alone_everything_answers_at_once() -> None:
    with distributed.launched(), distributed.Team("x") as team:
        assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
        assert distributed.on_main(lambda: 5, "x") == 5
        assert distributed.main_first(lambda: 6, "x") == 6
        assert distributed.gather("item", "x") == ["item"]
        assert team.tell(3) == 3
    assert distributed.device("cpu") == "cpu"


def test_a_launcher_that_says_too_little_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with (
        pytest.raises(ConfigError, match=r"RANK.* is not set; start them with torchrun"),
        distributed.launched(),
    ):
        pass


def test_each_process_takes_its_own_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    monkeypatch.setattr(distributed, "rank", lambda: 6)
    monkeypatch.setattr(distributed.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(distributed.torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert distributed.device() == distributed.device("cuda") == "cuda:2"
    assert distributed.device("cuda:0") == "cuda:0" and distributed.device("cpu") == "cpu"
    monkeypatch.setattr(distributed.torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="process 2 of its machine, where 2 CUDA devices are visible"):
        distributed.device()


def test_items_of_any_size_reach_their_rank_in_order() -> None:
    code = """
    with launched(20):
        big = on_main(lambda: "x" * 3_000_000, "big")      # more than one chunk
        assert len(big) == 3_000_000
        items = [(r, "y" * 2_000_000 * r) for r in range(3)]
        assert gather(items[R], "items") == (items if R == 0 else [])
        order = main_first(lambda: time.monotonic(), "one after the other")
        times = gather(order, "times")
        assert R or times[0] == min(times)
        with Team("work") as team:
            for done in range(1, R + 3):
                total = team.tell(done)
        print(total)
    """
    results = finish(start(3, code))
    assert [status for status, *_ in results] == [0, 0, 0], results
    assert all(int(out) <= 9 for _, out, _ in results)


def test_an_error_on_one_rank_ends_all_and_names_it() -> None:
    code = """
    from llava.errors import DataError
    with launched(20), Team("work") as team:
        for done in range(1000):
            team.tell(done)
            if R == 1 and done == 3:
                raise DataError("pair u7 is broken")
            time.sleep(0.01)
    """
    first, second = finish(start(2, code))
    assert first[0] == second[0] == 1
    assert "RankError: rank 1 (" in first[2] and "failed: pair u7 is broken" in first[2]
    assert "DataError: pair u7 is broken" in second[2] and "RankError" not in second[2]


def test_a_silent_rank_is_named() -> None:
    code = """
    with launched(20), Team("work", timeout=1.0) as team:
        team.tell(1)
        if R == 2:
            print("hangs", flush=True)
            time.sleep(100)
    """
    processes = start(3, code)
    started = time.monotonic()
    others = finish(processes[:2])
    assert time.monotonic() - started < 30
    processes[2].kill()
    processes[2].communicate()
    for status, _, errors in others:
        assert status == 1
        assert (
            f"process {processes[2].pid}) made no progress with 'work' for 1 s" in errors
            and "rank 2 (" in errors
        )


def test_a_rank_that_never_comes_is_named() -> None:
    code = """
    with launched(20):
        if R == 1:
            time.sleep(100)
        gather(R, "the answers", timeout=1.0)
    """
    processes = start(2, code)
    ((status, _, errors),) = finish(processes[:1])
    processes[1].kill()
    processes[1].communicate()
    assert status == 1 and "rank 1 (" in errors and "did not reach 'the answers' within 1 s" in errors


def test_a_training_runs_group_is_used_where_there_is_one() -> None:
    code = """
    import torch.distributed as dist
    dist.init_process_group("gloo")
    with launched():
        assert world_size() == 2 and rank() == R
        assert gather(R, "ranks") == ([0, 1] if R == 0 else [])
    assert on_main(lambda: "after", "x") == "after"
    dist.barrier()
    dist.destroy_process_group()
    assert world_size() == 1
    """
    results = finish(start(2, code))
    assert [status for status, *_ in results] == [0, 0], results
