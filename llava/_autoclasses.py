"""Registers our classes with transformers' Auto classes, without importing transformers before the user does.

`AutoConfig`, `AutoModelForImageTextToText` and their kin must know `change_vlm` and the released model types once
`llava` is imported. Importing transformers' model code takes seconds, so registration waits until each Auto module
is imported by whoever needs it, and then runs right after it.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


def _configs(auto: Any) -> None:
    from llava.model.checkpoint import ReleaseBaselineConfig, ReleaseConfig
    from llava.model.configuration import ChangeVLMConfig

    for config in (ChangeVLMConfig, ReleaseConfig, ReleaseBaselineConfig):
        auto.AutoConfig.register(config.model_type, config, exist_ok=True)


def _models(auto: Any) -> None:
    from llava.model.change_vlm import ChangeVLMForConditionalGeneration, ChangeVLMModel
    from llava.model.configuration import ChangeVLMConfig

    auto.AutoModel.register(ChangeVLMConfig, ChangeVLMModel, exist_ok=True)
    for kind in (auto.AutoModelForImageTextToText, auto.AutoModelForMultimodalLM):
        kind.register(ChangeVLMConfig, ChangeVLMForConditionalGeneration, exist_ok=True)


def _image_processors(auto: Any) -> None:
    from llava.model.configuration import ChangeVLMConfig
    from llava.model.image_processing import ChangeImageProcessor

    auto.AutoImageProcessor.register(ChangeVLMConfig, slow_image_processor_class=ChangeImageProcessor, exist_ok=True)


def _processors(auto: Any) -> None:
    from llava.model.configuration import ChangeVLMConfig
    from llava.model.processing import ChangeVLMProcessor

    auto.AutoProcessor.register(ChangeVLMConfig, ChangeVLMProcessor, exist_ok=True)


_AUTO = "transformers.models.auto."
_HOOKS: dict[str, Callable[[Any], None]] = {
    _AUTO + "configuration_auto": _configs,
    _AUTO + "modeling_auto": _models,
    _AUTO + "image_processing_auto": _image_processors,
    _AUTO + "processing_auto": _processors,
}


class _Loader(importlib.abc.Loader):
    """The module's own loader, with a registration after it."""

    def __init__(self, loader: importlib.abc.Loader, register: Callable[[Any], None]) -> None:
        self.loader, self.register = loader, register

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.register(module)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds the Auto modules as everyone else would, and wraps their loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        register = _HOOKS.get(fullname)
        if register is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, register)
        return spec


def register_when_imported() -> None:
    """Register with what is imported already, and with the rest when it comes."""
    sys.meta_path.insert(0, _AfterImport())
    for name, register in _HOOKS.items():
        if name in sys.modules:
            register(sys.modules[name])
