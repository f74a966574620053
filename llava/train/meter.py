"""What a step costs: tokens and pairs a second, use of the device, memory, the share of supervised tokens."""

import sys
import time
from typing import Any

import torch
from torch import Tensor

from llava.train.flops import StepFlops, peak_flops


class Meter:
    """Counts what passes through the model between two lines of the log.

    Args:
        flops: of the run's model; MFU is of the model's own operations, without what checkpointing does again.
        device: where it computes.
        bf16: whether it computes in bfloat16.
    """

    def __init__(self, flops: StepFlops, device: torch.device, bf16: bool) -> None:
        self.flops, self.device = flops, device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self.peak = peak_flops(name, torch.bfloat16 if bf16 else torch.float32)
        self._reset()

    def _reset(self) -> None:
        self._since = time.perf_counter()
        self._pairs = self._tokens = 0
        self._work = 0.0
        self._supervised: Tensor | None = None

    def restart(self) -> None:
        """Leave out of the count what happened since the last line, such as an evaluation."""
        self._reset()

    def count(self, inputs: dict[str, Any]) -> None:
        """Take in a batch on its way to the model."""
        ids: Tensor = inputs["input_ids"]  # [B, T]
        supervised = inputs["labels"].ne(-100).sum()
        self._supervised = supervised if self._supervised is None else self._supervised + supervised
        pixels = inputs.get("pixel_values")
        images = 0 if pixels is None else len(pixels) * (pixels.shape[1] if pixels.dim() == 5 else 1)
        self._pairs += len(ids) if pixels is None else len(pixels)
        self._tokens += ids.numel()
        asked = inputs.get("qformer_input_ids")
        more = {} if asked is None else {"asked": len(asked), "reading": asked.shape[1]}
        sizes = {"images": images, "positions": ids.shape[1], "batch": len(ids)}
        self._work += sum(self.flops.of(**sizes, **more).values())

    def read(self, processes: int = 1) -> dict[str, float]:
        """The rates since the last reading, of so many processes like this one; waits for the device."""
        rows = 0 if self._supervised is None else int(self._supervised.item())
        self._work += self.flops.of(images=0, positions=0, rows=rows)["head"]
        seconds = time.perf_counter() - self._since
        found = {
            "pairs_per_second": processes * self._pairs / seconds,
            "tokens_per_second": processes * self._tokens / seconds,
            "supervised_share": rows / max(1, self._tokens),
            "memory_gb": self._memory() / 1e9,
        }
        if self.peak is not None:
            found["mfu"] = self._work / seconds / self.peak
        self._reset()
        return {name: float(f"{value:.4g}") for name, value in found.items()}

    def _memory(self) -> float:
        """Peak bytes: of the device's allocations, or of the process on a CPU."""
        if self.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self.device))
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
