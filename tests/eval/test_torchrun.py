"""The command under torchrun: a rank that is killed in the middle ends the run, which says which one it was."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from llava.eval.__main__ import main
from tests.tiny import random_image, tiny_model

ROOT = Path(__file__).parents[2]
PAIRS = 6

SLOW_SECOND_RANK = """
import os, pathlib, sys, time
import llava.eval.run as run
from llava.eval.__main__ import main

rank, out = int(os.environ["RANK"]), pathlib.Path(sys.argv[1])
plain = run.ask_batches

def slowly(*args, **options):
    for number, made in enumerate(plain(*args, **options)):
        if rank and number:
            time.sleep(100)
        yield made

run.ask_batches = slowly
(out / f"pid{rank}").write_text(str(os.getpid()))
sys.exit(main(sys.argv[2:]))
"""


def test_a_killed_rank_is_named_and_one_process_completes_the_run(tmp_path: Path) -> None:
    model, processor = tiny_model()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    rows = []
    for i in range(PAIRS):
        random_image(i).save(tmp_path / f"{i}.png")
        row = {"uid": f"u{i}", "img1_path": f"{i}.png", "img2_path": "0.png", "change_caption": ["a road"]}
        rows.append(json.dumps(row))
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    (tmp_path / "worker.py").write_text(SLOW_SECOND_RANK)
    out = tmp_path / "out"
    options = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data.jsonl"), "--out", str(out)]
    options += ["--batch-size", "1", "--max-new-tokens", "4", "--device", "cpu", "--no-meteor", "--no-report"]

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(
        [*command, str(tmp_path / "worker.py"), str(tmp_path), *options],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        part = out / "predictions.rank1.jsonl"
        deadline = time.monotonic() + 120
        while not (part.is_file() and part.stat().st_size) and running.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(int((tmp_path / "pid1").read_text()), signal.SIGKILL)
        _, errors = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode != 0
    assert re.search(r"rank\s*: 1 ", errors) and "SIGKILL" in errors
    kept = [json.loads(line)["uid"] for path in sorted(out.glob("*.jsonl")) for line in path.open()]
    assert len(set(kept)) == len(kept) < PAIRS

    assert main(options) == 0
    lines = [json.loads(line) for line in (out / "predictions.jsonl").open()]
    assert [line["uid"] for line in lines] == [f"u{i}" for i in range(PAIRS)]
    assert not list(out.glob("predictions.rank*"))
