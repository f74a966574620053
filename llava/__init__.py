"""Change understanding for bi-temporal images, in words.

The public names load on first use, so that `import llava` stays fast; transformers' Auto classes know our models
as soon as both packages are imported, in either order.
"""

import importlib
from typing import TYPE_CHECKING, Any

from llava import _autoclasses

if TYPE_CHECKING:
    from llava.captioner import Answer, ChangeCaptioner, ChangeChat
    from llava.model.change_vlm import ChangeVLMForConditionalGeneration
    from llava.model.configuration import ChangeVLMConfig
    from llava.model.delta_vlm.configuration import DeltaVLMConfig
    from llava.model.delta_vlm.modeling import DeltaVLMForConditionalGeneration
    from llava.model.delta_vlm.processing import DeltaVLMProcessor
    from llava.model.image_processing import ChangeImageProcessor
    from llava.model.processing import ChangeVLMProcessor

__version__ = "0.1.0"

_HOMES = {
    "Answer": "llava.captioner",
    "ChangeCaptioner": "llava.captioner",
    "ChangeChat": "llava.captioner",
    "ChangeImageProcessor": "llava.model.image_processing",
    "ChangeVLMConfig": "llava.model.configuration",
    "ChangeVLMForConditionalGeneration": "llava.model.change_vlm",
    "ChangeVLMProcessor": "llava.model.processing",
    "DeltaVLMConfig": "llava.model.delta_vlm.configuration",
    "DeltaVLMForConditionalGeneration": "llava.model.delta_vlm.modeling",
    "DeltaVLMProcessor": "llava.model.delta_vlm.processing",
}

__all__ = [
    "Answer",
    "ChangeCaptioner",
    "ChangeChat",
    "ChangeImageProcessor",
    "ChangeVLMConfig",
    "ChangeVLMForConditionalGeneration",
    "ChangeVLMProcessor",
    "DeltaVLMConfig",
    "DeltaVLMForConditionalGeneration",
    "DeltaVLMProcessor",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llava' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


_autoclasses.prepare()
