"""Our models for lmms-eval: `--model llava_change`. How to run it: `llava.eval.lmms`."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms

from llava.captioner import TINY, ChangeCaptioner
from llava.errors import ConfigError
from llava.generation import Options


class LlavaChange(lmms):
    """A `ChangeCaptioner` that answers lmms-eval's requests, two images each: before, after.

    Args:
        pretrained: name, folder or hub id, as for `ChangeCaptioner.from_pretrained`.
        batch_size: pairs at a time.
        device: by default the card of this rank, else the CPU.
        max_batch_size: of lmms-eval's command line; the batch size is `batch_size`.
        model_kwargs: handed to `ChangeCaptioner.from_pretrained` (`dtype`, `attn_implementation`, ...).
    """

    def __init__(
        self,
        pretrained: str = TINY,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
        **model_kwargs: Any,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ConfigError(f"batch_size={batch_size!r}: llava_change needs a number, e.g. --batch_size 16")
        if device in (None, "cuda") and torch.cuda.is_available():
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        self.captioner = ChangeCaptioner.from_pretrained(pretrained, device=device, **model_kwargs)
        self.batch_size = int(batch_size)
        self.device = self.captioner.model.device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """One answer a request, in their order.

        Raises:
            ConfigError: a document has not two images.
        """
        groups: dict[str, list[int]] = {}  # a batch shares its settings
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        answers: dict[int, str] = {}
        with tqdm(total=len(requests), desc="llava_change", disable=self.rank != 0) as bar:
            for group in groups.values():
                for start in range(0, len(group), self.batch_size):
                    batch = group[start : start + self.batch_size]
                    answers |= zip(batch, self._answer([requests[number] for number in batch]), strict=True)
                    bar.update(len(batch))
        return [answers[number] for number in range(len(requests))]

    def _answer(self, requests: Sequence[Instance]) -> list[str]:
        settings = requests[0].args[1]
        said = self.captioner.caption_batch(
            [self._pair(request) for request in requests],
            self.batch_size,
            question=[request.args[0] for request in requests],
            **_options(settings),
        )
        return [_until(answer.text, settings.get("until")) for answer in said]

    def _pair(self, request: Instance) -> tuple[Any, Any]:
        _, _, doc_to_visual, number, task, split = request.args
        images = doc_to_visual(self.task_dict[task][split][number]) or []
        if len(images) != 2:
            raise ConfigError(
                f"task {task}, document {number} has {len(images)} images; llava_change compares two. Choose a "
                "task of pairs, or keep its pairs alone by `process_docs` in a task of your own"
            )
        return images[0], images[1]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not offered: pairs are described, not ranked."""
        raise NotImplementedError("llava_change writes text; choose tasks with output_type: generate_until")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not offered."""
        raise NotImplementedError("llava_change answers once; choose tasks with output_type: generate_until")


def _options(settings: dict[str, Any]) -> Options:
    """A task's generation_kwargs as ours. What we have no setting for (`image_aspect_ratio`, ...) is left out, as
    lmms-eval's own models do; so is what only sampling uses, where a task does not sample ("temperature: 0")."""
    drawn = bool(settings.get("do_sample")) and settings.get("temperature", 1.0) > 0
    names = ["max_new_tokens", "num_beams", *(["temperature", "top_p"] if drawn else [])]
    given = {name: settings[name] for name in names if settings.get(name) is not None}
    return Options(do_sample=drawn, **given)  # type: ignore[typeddict-item]


def _until(text: str, stops: str | Sequence[str] | None) -> str:
    """The text before the first of `stops`."""
    for stop in [stops] if isinstance(stops, str) else stops or []:
        text = text.split(stop)[0] if stop else text
    return text.strip()
