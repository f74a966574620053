"""Makes transformers' Auto classes know our models, without importing anything before the user needs it.

`AutoConfig`, `AutoModelForImageTextToText`, `AutoProcessor` and `pipeline` must find `change_vlm` and the released
model types once `llava` is imported, and `import llava` must stay fast. Importing our model code needs most of
transformers, which is not there yet when `llava` is imported first, and half there while transformers imports itself.
So the first call of `AutoConfig.from_pretrained` or `AutoProcessor.from_pretrained`, through which all Auto classes go,
imports our classes (each module registers its own) and puts the original method back.
"""

import functools
import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_ENTRIES = {
    "transformers.models.auto.configuration_auto": "AutoConfig",
    "transformers.models.auto.processing_auto": "AutoProcessor",
}


def _register_on_first_call(module: Any, class_name: str) -> None:
    auto = getattr(module, class_name)
    original = auto.__dict__["from_pretrained"]

    @functools.wraps(original.__func__)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        auto.from_pretrained = original
        for part in ("change_vlm", "processing", "delta_vlm.modeling", "delta_vlm.processing"):
            importlib.import_module(f"llava.model.{part}")
        return original.__get__(None, cls)(*args, **kwargs)

    auto.from_pretrained = classmethod(from_pretrained)


class _Loader(importlib.abc.Loader):
    """A module's own loader, with the preparation after it."""

    def __init__(self, loader: importlib.abc.Loader, class_name: str) -> None:
        self.loader, self.class_name = loader, class_name

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register_on_first_call(module, self.class_name)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the two Auto modules as everyone else would, and wraps their loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _ENTRIES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, _ENTRIES[fullname])
        return spec


def prepare() -> None:
    """Arrange for registration, whether transformers is imported already or later."""
    sys.meta_path.insert(0, _Finder())
    for name, class_name in _ENTRIES.items():
        if name in sys.modules:
            _register_on_first_call(sys.modules[name], class_name)
