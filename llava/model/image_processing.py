"""Pictures to pixel values: the image processor of the change models, and of LLaVA's single-image bases.

Legend: N images, T views of one image, S side in pixels. Resizing is Pillow's, on 8-bit values, as in the
models' own training; the rest is one multiplication and one subtraction into the output. No torchvision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NoReturn, TypedDict, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from llava.data.images import ImageSource, load_image
from llava.errors import ConfigError
from llava.model.anyres import Size, anyres_token_count, default_pinpoints, select_resolution

Aspect = Literal["square", "pad", "anyres"]
_FILTERS = {choice.name.lower(): choice for choice in Image.Resampling}
_FIELDS = ("size", "mean", "std", "resample", "aspect", "grid_pinpoints", "max_tiles")


class ChangeImageProcessorKwargs(TypedDict, total=False):
    """The fields of `ChangeImageProcessor`, for the library's processors."""

    size: int
    mean: list[float]
    std: list[float]
    resample: str
    aspect: Aspect
    grid_pinpoints: list[list[int]] | None
    max_tiles: int


class ChangeImageProcessor(BaseImageProcessor):
    """Bring images to the size, range and layout a vision tower was trained on.

    Args:
        size: side S of the encoder's input in pixels.
        mean, std: per channel, on values in 0..1.
        resample: a Pillow filter: nearest, box, bilinear, hamming, bicubic or lanczos.
        aspect: "square" resizes to S x S whatever the shape (CCExpert, SigLIP); "pad" first makes the image
            square on the mean colour (LLaVA-1.5); "anyres" is "pad" in `preprocess` and, for one image alone,
            offers `tiles`: the whole image and a grid of tiles (LLaVA-OneVision).
        grid_pinpoints: candidate resolutions [height, width] in pixels for "anyres"; None: all grids from
            1 x 1 to 6 x 6 tiles.
        max_tiles: 9 in "anyres_max_9": how many tiles' worth of tokens an image may give.

    Raises:
        ConfigError: a field that cannot work, or an unknown one.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 (the library's own declaration)
    valid_kwargs = ChangeImageProcessorKwargs  # type: ignore[assignment]

    def __init__(
        self,
        size: int = 384,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        resample: str = "bicubic",
        aspect: Aspect = "square",
        grid_pinpoints: Sequence[Sequence[int]] | None = None,
        max_tiles: int = 9,
        **extra: Any,
    ) -> None:
        for written_by_the_library in ("image_processor_type", "processor_class"):
            extra.pop(written_by_the_library, None)
        if extra:
            _refuse(f"unknown fields {sorted(extra)}; known: {', '.join(_FIELDS)}")
        super().__init__()
        if not isinstance(size, int) or size < 1:
            _refuse(f"size={size!r} must be a number of pixels")
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            _refuse(f"mean={mean} and std={std} must be three numbers each, std above 0")
        if resample not in _FILTERS:
            _refuse(f"unknown resample {resample!r}; known: {', '.join(_FILTERS)}")
        if aspect not in get_args(Aspect):
            _refuse(f"unknown aspect {aspect!r}; known: {', '.join(get_args(Aspect))}")
        if grid_pinpoints is not None and not grid_pinpoints:
            _refuse("grid_pinpoints is empty; leave it out for all grids up to 6 x 6")
        for point in grid_pinpoints or ():
            if len(point) != 2 or min(point) < size or point[0] % size or point[1] % size:
                _refuse(
                    f"grid_pinpoints entry {list(point)} is no [height, width] in multiples of size={size}"
                )
        if max_tiles < 1:
            _refuse(f"max_tiles={max_tiles} must be at least 1")
        self.size = size
        self.mean = [float(value) for value in mean]
        self.std = [float(value) for value in std]
        self.resample = resample
        self.aspect = aspect
        self.grid_pinpoints = None if grid_pinpoints is None else [list(point) for point in grid_pinpoints]
        self.max_tiles = max_tiles

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build from what `to_dict` gave; fields in `kwargs` win, the rest is returned if asked for."""
        wants_rest = kwargs.pop("return_unused_kwargs", False)
        fields = {name: kwargs.pop(name) for name in _FIELDS if name in kwargs}
        processor = cls(**{**image_processor_dict, **fields})
        return (processor, kwargs) if wants_rest else processor

    def to_dict(self) -> dict[str, Any]:
        """The fields, as saved in preprocessor_config.json."""
        fields = {name: getattr(self, name) for name in _FIELDS}
        return {**fields, "image_processor_type": type(self).__name__}

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Read paths among the images (of any nesting) by `llava.data.images`, which fetches no addresses."""
        if isinstance(image_url_or_urls, list | tuple):
            return [self.fetch_images(image) for image in image_url_or_urls]
        return load_image(image_url_or_urls)

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:
        """Turn images into model inputs.

        Args:
            images: one image or a list (of lists) of them, each as `llava.data.images.load_image` takes it;
                arrays [N, H, W, C] and tensors [N, C, H, W] count as lists. The order is kept.
            return_tensors: "pt" (default) or "np".

        Returns:
            `pixel_values` [N, 3, S, S] float32.

        Raises:
            ImageError: one of them is no usable image.
            ConfigError: another keyword: fields are set on the processor, so that what is saved is what ran.
        """
        if kwargs:
            _refuse(f"set {', '.join(sorted(kwargs))} on it, not in a call")
        views = [self.fit(load_image(image)) for image in _flatten(images)]
        if not views:
            _refuse("no images were given")
        values = self.normalise(views)
        data = {"pixel_values": values.numpy() if return_tensors == "np" else values}
        return BatchFeature(data=data, tensor_type=return_tensors)

    def tiles(self, image: Image.Image) -> Tensor:
        """The views of one RGB image for "anyres", [T, 3, S, S]: the whole, then its tiles by rows.

        The image is resized into the best-fitting grid (`select_resolution`), keeping its shape, and centred
        on black.
        """
        height, width = select_resolution((image.height, image.width), self._candidates())
        scale_x, scale_y = width / image.width, height / image.height
        if scale_x < scale_y:
            fitted = (width, min(math.ceil(image.height * scale_x), height))
        else:
            fitted = (min(math.ceil(image.width * scale_y), width), height)
        canvas = Image.new("RGB", (width, height))  # black
        resized = image.resize(fitted, _FILTERS[self.resample])
        canvas.paste(resized, ((width - fitted[0]) // 2, (height - fitted[1]) // 2))
        views = [image.resize((self.size, self.size), _FILTERS[self.resample])]
        for top in range(0, height, self.size):
            for left in range(0, width, self.size):
                views.append(canvas.crop((left, top, left + self.size, top + self.size)))
        return self.normalise(views)

    def token_count(self, size: Size, tokens: int) -> int:
        """Tokens that one image of (height, width) gives, alone, if the encoder makes `tokens` of a view."""
        if self.aspect != "anyres":
            return tokens
        return anyres_token_count(size, self.size, tokens, self.max_tiles, self._candidates())

    def _candidates(self) -> list[Size]:
        if self.grid_pinpoints is None:
            return default_pinpoints(self.size)
        return [(height, width) for height, width in self.grid_pinpoints]

    def fit(self, image: Image.Image) -> Image.Image:
        """One RGB image as S x S, by the chosen aspect."""
        if self.aspect != "square" and image.width != image.height:
            longest = max(image.size)
            colour = tuple(int(value * 255) for value in self.mean)
            canvas = Image.new("RGB", (longest, longest), colour)
            canvas.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
            image = canvas
        return image.resize((self.size, self.size), _FILTERS[self.resample])

    def normalise(self, views: list[Image.Image]) -> Tensor:
        """Pixel values [len(views), 3, S, S] = (levels / 255 - mean) / std, in float32.

        Plane by plane: Pillow splits bands quickly, and a plane lies in order in both source and target.
        """
        scale = [np.float32(1 / (255 * std)) for std in self.std]
        shift = [np.float32(mean / std) for mean, std in zip(self.mean, self.std, strict=True)]
        values = np.empty((len(views), 3, self.size, self.size), np.float32)
        for view, planes in zip(views, values, strict=True):
            for channel, band in enumerate(view.split()):
                np.multiply(np.asarray(band), scale[channel], out=planes[channel])
                planes[channel] -= shift[channel]
        return torch.from_numpy(values)


def _refuse(reason: str) -> NoReturn:
    raise ConfigError(f"image processor: {reason}")


def _flatten(images: Any) -> Iterator[ImageSource]:
    """The single images of a nest of lists and of stacked arrays."""
    if isinstance(images, list | tuple) or getattr(images, "ndim", 0) >= 4:
        for image in images:
            yield from _flatten(image)
    else:
        yield images
