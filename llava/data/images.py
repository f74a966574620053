"""Images in: whatever a user holds (file, PIL image, array, tensor, GeoTIFF) becomes an RGB picture.

A picture is never guessed: a truncated or damaged file, an array of unclear layout or a decompression bomb is
refused by name (`ImageError`), with what to do. What is done to each kind of image:

- grey, palette, CMYK, YCbCr, LAB, 1-bit: converted to RGB; transparency is dropped, the colour under it kept
  (the reference's `.convert("RGB")`); colour profiles are not applied;
- turned by its EXIF or XMP orientation: set upright; animated: the first frame;
- 16-bit, 32-bit or float grey, uint16 arrays, GeoTIFFs of more than 8 bits: per band, the 2nd percentile
  becomes black and the 98th white (`stretch`), over both dates together in `load_pair`; nodata and
  not-a-number become black. A 16-bit colour PNG comes, with a warning, as its high bytes, which is all that
  Pillow gives;
- TIFF with a georeference, more than 4 bands or more than 8 bits in colour: by rasterio, see
  `llava.data.geotiff`; in `load_pair` the second date is laid on the first one's grid.
"""

from __future__ import annotations

import difflib
import http.client
import io
import os
import re
import sys
import threading
import urllib.request
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from llava.data.geotiff import Frame, Raster, has_rasterio, read_geotiff, stretch_limits, to_8bit
from llava.errors import ImageError

if TYPE_CHECKING:
    import torch

    ImageSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | np.ndarray | torch.Tensor
else:
    ImageSource: TypeAlias = Any

MAX_PIXELS = 178_956_970
"""Largest image read by default, in pixels: Pillow's own default (as RGB it takes 0.7 GB in memory)."""

STRETCH = (2.0, 98.0)
"""Percentiles shown as black and as white for images of more than 8 bits."""

URL_TIMEOUT = 30.0
"""Seconds without an answer after which a download is given up."""

MAX_URL_BYTES = 256 * 2**20
"""Largest file fetched from a URL."""

ASPECT_TOLERANCE = 1.05
"""Ratio of the two aspect ratios above which `load_pair` warns."""

_DEEP_MODES = ("I", "F")  # Pillow's 16- and 32-bit grey modes start so
_CHANNELS = (1, 3, 4)
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_TIFF_BITS, _TIFF_SAMPLES, _TIFF_GEO_KEYS, _TIFF_NODATA = 258, 277, 34735, 42113


def load_image(
    source: ImageSource,
    *,
    allow_url: bool = False,
    max_pixels: int = MAX_PIXELS,
    stretch: tuple[float, float] = STRETCH,
    bands: Sequence[int] | None = None,
) -> Image.Image:
    """Turn `source` into an RGB picture.

    Args:
        source: a path to any file Pillow reads or a GeoTIFF; the bytes of such a file; a PIL image; a numpy
            array [H, W] or [H, W, 1 | 3 | 4] of uint8, uint16, bool, or float in 0..1; a torch tensor
            [1 | 3 | 4, H, W] of the same types. An http(s) address if `allow_url`.
        allow_url: fetch addresses (at most `MAX_URL_BYTES`, `URL_TIMEOUT` seconds without an answer). Leave
            it off where strangers choose the address: the request is made from this machine.
        max_pixels: refuse more, as soon as the header shows it; nothing is decoded.
        stretch: percentiles that become black and white in images of more than 8 bits.
        bands: for TIFFs, by rasterio: the bands to show as red, green, blue, counted from 1; by default those
            marked so in the file, else the first three.

    Returns:
        An RGB `PIL.Image`, fully decoded (the same object, if `source` is one already).

    Raises:
        ImageError: `source` is not a usable image; the message names it.
        MissingDependencyError: a TIFF that needs rasterio, which is not installed.
    """
    return _to_picture(_read(source, allow_url, max_pixels, bands, None), stretch)


def load_pair(
    before: ImageSource,
    after: ImageSource,
    *,
    allow_url: bool = False,
    max_pixels: int = MAX_PIXELS,
    stretch: tuple[float, float] = STRETCH,
    bands: Sequence[int] | None = None,
) -> tuple[Image.Image, Image.Image]:
    """Turn two dates of one place into two RGB pictures; arguments and errors as in `load_image`.

    Images of more than 8 bits share one stretch. Two georeferenced images come out on the grid of `before`;
    what only one of them covers is black in both. Other pairs may differ in size. Warns (`UserWarning`) when
    the aspect ratios differ by more than 5 %, when only one image is georeferenced or deep, and when `after`
    covers less than 90 % of `before`.

    Raises:
        ImageError: also when the footprints of two georeferenced images do not meet; the message has both.
    """
    return _load_pair(before, after, allow_url, max_pixels, stretch, bands)[:2]


def load_placed_pair(
    before: ImageSource,
    after: ImageSource,
    *,
    allow_url: bool = False,
    max_pixels: int = MAX_PIXELS,
    stretch: tuple[float, float] = STRETCH,
    bands: Sequence[int] | None = None,
) -> tuple[Image.Image, Image.Image, Frame]:
    """As `load_pair`, with where the pixels of `after`, and so of a map of the pair, lie on the ground."""
    return _load_pair(before, after, allow_url, max_pixels, stretch, bands)


def _load_pair(
    before: ImageSource,
    after: ImageSource,
    allow_url: bool,
    max_pixels: int,
    stretch: tuple[float, float],
    bands: Sequence[int] | None,
) -> tuple[Image.Image, Image.Image, Frame]:
    """What both public functions do; warnings name their caller."""
    first = _read(before, allow_url, max_pixels, bands, None)
    second = _read(after, allow_url, max_pixels, bands, first if isinstance(first, Raster) else None)
    rasters = [image for image in (first, second) if isinstance(image, Raster)]
    placed = [raster for raster in rasters if raster.grid is not None]
    if len(placed) == 1:
        warnings.warn(
            f"only {placed[0].name} is georeferenced: the pair is compared pixel by pixel, as it lies",
            stacklevel=3,
        )
    deep = [raster for raster in rasters if raster.deep]
    if len(deep) == 2 and deep[0].values.shape[-1] == deep[1].values.shape[-1]:
        limits = stretch_limits(deep, _checked(stretch))
        pictures = (_from_8bit(to_8bit(deep[0], limits)), _from_8bit(to_8bit(deep[1], limits)))
    else:
        if deep:
            warnings.warn(
                f"the two dates differ in kind: {deep[0].name} is stretched by itself",
                stacklevel=3,
            )
        pictures = (_to_picture(first, stretch), _to_picture(second, stretch))
    ratios = [picture.width / picture.height for picture in pictures]
    if max(ratios) / min(ratios) > ASPECT_TOLERANCE:
        sizes = " and ".join(f"{picture.width} x {picture.height}" for picture in pictures)
        warnings.warn(f"the two dates differ in shape ({sizes} pixels): is it one place?", stacklevel=3)
    return *pictures, _frame(first, second)


def _frame(before: Image.Image | Raster, after: Image.Image | Raster) -> Frame:
    """The frame of a map of `after`'s size; what is known of `before` alone holds where its size is the same."""

    def size(image: Image.Image | Raster) -> tuple[int, ...]:  # (H, W)
        return image.values.shape[:2] if isinstance(image, Raster) else (image.height, image.width)

    known = [image for image in (before, after) if isinstance(image, Raster) and size(image) == size(after)]
    grids = [raster.grid for raster in known if raster.grid is not None]
    valid = [raster.valid for raster in known if raster.valid is not None]
    return Frame(grids[0] if grids else None, np.logical_and.reduce(valid) if valid else None)


def load_mask(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The levels of a mask as they were drawn: nothing is stretched, and nodata is a level like any other.

    Returns:
        RGB, as `load_image` gives it, for a picture of 8 bits; mode "I" for one of more.

    Raises:
        ImageError: no usable image, or one whose values are no whole numbers.
    """
    with _open_file(Path(path)) as file:
        found = _read_file(file, str(path), max_pixels, None, None, as_drawn=True)
    if isinstance(found, Image.Image):
        return found
    values = found.values
    if values.shape[-1] != 1:
        raise ImageError(f"{path}: has {values.shape[-1]} bands of {values.dtype}; a mask has one, or 8 bits")
    if values.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            odd = values[~(np.isfinite(values) & (values == np.floor(values)))]
        if len(odd):
            raise ImageError(
                f"{path}: holds {odd[0]:g}, which is no level of a mask; write whole numbers, 0 where nothing changed"
            )
    return Image.fromarray(np.ascontiguousarray(values[..., 0].astype(np.int32)))


def _to_picture(image: Image.Image | Raster, stretch: tuple[float, float]) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    return _from_8bit(to_8bit(image, stretch_limits([image], _checked(stretch)) if image.deep else None))


def _checked(stretch: tuple[float, float]) -> tuple[float, float]:
    low, high = stretch
    if not 0 <= low < high <= 100:
        raise ImageError(f"stretch={stretch} must be two percentiles, 0 <= low < high <= 100, e.g. {STRETCH}")
    return low, high


def _from_8bit(pixels: np.ndarray) -> Image.Image:
    """A picture from uint8 [H, W, 3]."""
    return Image.fromarray(np.ascontiguousarray(pixels))


def _read(
    source: ImageSource, allow_url: bool, max_pixels: int, bands: Sequence[int] | None, onto: Raster | None
) -> Image.Image | Raster:
    """An RGB picture, or a raster that still needs its stretch or lies on a grid."""
    if isinstance(source, Image.Image):
        name = f"the given {type(source).__name__}"
        _check_size(source.size, name, max_pixels)
        with _decoding(name):
            return _upright_rgb(source, name)
    if isinstance(source, np.ndarray):
        return _from_array(source, "the given array", max_pixels)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(source, torch.Tensor):
        return _from_tensor(source, max_pixels)
    if isinstance(source, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", source):
        return _read_file(io.BytesIO(_fetch(source, allow_url)), source, max_pixels, bands, onto)
    if isinstance(source, bytes):
        return _read_file(io.BytesIO(source), f"the given {len(source)} bytes", max_pixels, bands, onto)
    if not isinstance(source, str | os.PathLike):
        raise ImageError(
            f"a {type(source).__name__} is no image; give a path, a PIL image, a numpy array or a tensor"
        )
    with _open_file(Path(source)) as file:
        return _read_file(file, str(source), max_pixels, bands, onto)


def _open_file(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError as error:
        if not path.parent.is_dir():
            raise ImageError(f"{path}: not found, as is its folder; check the path") from error
        beside = [entry.name for entry in path.parent.iterdir()] if os.access(path.parent, os.R_OK) else []
        near = difflib.get_close_matches(path.name, beside)
        hint = f"; did you mean {', '.join(near)}?" if near else "; check the path"
        raise ImageError(f"{path}: not found{hint}") from error
    except IsADirectoryError as error:
        raise ImageError(f"{path}: is a folder; give the path of one image in it") from error
    except (OSError, ValueError) as error:  # no permission, name too long, null byte in the name
        raise ImageError(f"{path}: cannot be opened ({error}); check path and permissions") from error


def _read_file(
    file: BinaryIO,
    name: str,
    max_pixels: int,
    bands: Sequence[int] | None,
    onto: Raster | None,
    *,
    as_drawn: bool = False,
) -> Image.Image | Raster:
    """Decode one open file, by Pillow or (see `_needs_rasterio`) by rasterio; `as_drawn` by Pillow where it can."""
    try:
        head = file.read(256)
        file.seek(0)
    except OSError as error:
        raise ImageError(f"{name}: cannot be read ({error}); check the disk or copy it again") from error
    if not head:
        raise ImageError(f"{name}: is empty (0 bytes); copy or download it again")
    if head.startswith(b"version https://git-lfs"):
        raise ImageError(f"{name}: is a Git LFS pointer, not the image; run `git lfs pull`")
    if re.match(rb"\s*<(!doctype html|html)", head, re.IGNORECASE):
        raise ImageError(f"{name}: is a web page, not an image; download it again, by its direct link")
    is_tiff = head.startswith(_TIFF_MAGIC)
    if bands is not None and not is_tiff:
        raise ImageError(f"{name}: bands={list(bands)} needs a TIFF; leave bands out for other images")
    picture = None
    try:
        with _decoding(name):
            image = _open_header(file, max_pixels)
            _check_size(image.size, name, max_pixels)
            if not is_tiff or as_drawn or (bands is None and not _needs_rasterio(image)):
                picture = _upright_rgb(image, name)
    except ImageError as error:
        # A TIFF of a layout that Pillow does not know (five bands, 64 bits) may still be rasterio's.
        if not (is_tiff and isinstance(error.__cause__, UnidentifiedImageError)):
            raise
    if picture is None:
        source = file.getvalue() if isinstance(file, io.BytesIO) else name
        return read_geotiff(source, name, bands=bands, max_pixels=max_pixels, onto=onto)
    if head.startswith(_PNG_MAGIC):
        _check_png(file, name)
    if not as_drawn and has_deep_colours(head):
        warnings.warn(
            f"{name}: of its 16-bit colours only the high bytes are read, which may be all but black; save it as TIFF",
            stacklevel=2,
        )
    if is_tiff and not as_drawn and _TIFF_GEO_KEYS in getattr(image, "tag_v2", ()):
        warnings.warn(
            f'{name}: its georeference is ignored without rasterio; to use it: pip install "llava[geo]"',
            stacklevel=2,
        )
    return picture


def _needs_rasterio(image: Image.Image) -> bool:
    """Whether Pillow would lose something of this TIFF: its place, bands, nodata, colours beyond 8 bits."""
    tags = getattr(image, "tag_v2", {})
    samples, bits = tags.get(_TIFF_SAMPLES, 1), max(tags.get(_TIFF_BITS, (1,)))
    if samples > 4 or (samples > 1 and bits > 8) or (_TIFF_NODATA in tags and bits > 8):
        return True
    return has_rasterio() and (_TIFF_GEO_KEYS in tags or _TIFF_NODATA in tags)


_bomb_lock = threading.Lock()


def _open_header(file: BinaryIO, max_pixels: int) -> Image.Image:
    """Open an image without decoding it; Pillow's own limit gives way to a `max_pixels` above it."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is None or max_pixels <= 2 * limit:
        return Image.open(file)
    with _bomb_lock:
        Image.MAX_IMAGE_PIXELS = None
        try:
            return Image.open(file)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width * height == 0:
        raise ImageError(f"{name}: has no pixels ({width} x {height})")
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: {width} x {height} pixels are more than max_pixels={max_pixels}; make it smaller, or "
            "cut it into tiles (in Python, max_pixels of load_image and load_pair takes more)"
        )


_truncated_lock = threading.Lock()
_strict_readers = 0
_users_choice = False


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Decode strictly: no flat colour for missing data, every failure an `ImageError` about `name`.

    `LOAD_TRUNCATED_IMAGES` is one switch for the process, which other libraries turn on. It is off while any
    thread is in here, and back as it was when the last one leaves.
    """
    global _strict_readers, _users_choice
    with _truncated_lock:
        if _strict_readers == 0:
            _users_choice, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        _strict_readers += 1
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: is not an image of a known format") from error
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{name}: refused ({error}); cut it into tiles (in Python, max_pixels of load_image and load_pair "
            "takes more)"
        ) from error
    except Exception as error:  # Pillow's decoders raise nearly every built-in error on damaged data
        detail = str(error) or type(error).__name__
        raise ImageError(f"{name}: is damaged or cut short ({detail}); copy or download it again") from error
    finally:
        with _truncated_lock:
            _strict_readers -= 1
            if _strict_readers == 0:
                ImageFile.LOAD_TRUNCATED_IMAGES = _users_choice


def _upright_rgb(image: Image.Image, name: str) -> Image.Image | Raster:
    """Decode a Pillow image, turn it upright, and bring it to RGB (a raster, if it has more than 8 bits)."""
    if image.format == "EPS":
        raise ImageError(f"{name}: EPS is a program that would have to be run; export it as PNG")
    image.load()
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode.startswith(_DEEP_MODES):
        return Raster(name, np.asarray(image)[..., None])
    if image.mode == "La":
        image = image.convert("LA")  # Pillow knows no other way from premultiplied grey
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # straight to RGB gives the same colours, and a warning from Pillow
    return image.convert("RGB")


def has_deep_colours(head: bytes) -> bool:
    """Whether a file that begins so is a PNG of 16-bit RGB or RGBA, which Pillow calls RGB."""
    return head.startswith(_PNG_MAGIC) and head[24:25] == b"\x10" and head[25:26] in (b"\x02", b"\x06")


def _check_png(file: BinaryIO, name: str) -> None:
    """Refuse a PNG with a wrong checksum or no end: for pixel data, Pillow looks at neither."""
    file.seek(len(_PNG_MAGIC))
    while True:
        start = file.read(8)
        size, kind = int.from_bytes(start[:4], "big"), start[4:]
        data = file.read(size)
        check = file.read(4)
        if len(start) < 8 or len(data) < size or len(check) < 4:
            raise ImageError(f"{name}: is cut short (no end mark of a PNG); copy or download it again")
        if kind == b"IEND":
            return
        critical = not kind[0] & 0x20
        if critical and zlib.crc32(data, zlib.crc32(kind)) != int.from_bytes(check, "big"):
            raise ImageError(f"{name}: is damaged (checksum of a {kind!r} part); copy or download it again")


def _from_array(array: np.ndarray, name: str, max_pixels: int) -> Image.Image | Raster:
    """A picture from [H, W] or [H, W, 1 | 3 | 4], or from a [1 | 3 | 4, H, W] that can be nothing else."""
    shape = tuple(array.shape)
    if array.ndim == 2:
        return _from_pixels(array[..., None], name, max_pixels)
    if array.ndim != 3 or not {shape[0], shape[2]} & set(_CHANNELS):
        raise ImageError(f"{name}: has shape {shape}; an image is [H, W] or [H, W, 1 | 3 | 4]")
    if shape[2] not in _CHANNELS:
        return _from_pixels(array.transpose(1, 2, 0), name, max_pixels)
    if shape[0] in _CHANNELS:
        raise ImageError(
            f"{name}: shape {shape} can be read channel-first or channel-last; give a PIL image "
            "(Image.fromarray takes channel-last), or a torch tensor for channel-first"
        )
    return _from_pixels(array, name, max_pixels)


def _from_tensor(tensor: torch.Tensor, max_pixels: int) -> Image.Image | Raster:
    """A picture from [1 | 3 | 4, H, W] or [H, W]: tensors are channel-first, nothing has to be guessed."""
    name = "the given tensor"
    if tensor.ndim == 2:
        tensor = tensor[None]
    if tensor.ndim != 3 or tensor.shape[0] not in _CHANNELS:
        raise ImageError(
            f"{name}: has shape {tuple(tensor.shape)}; an image is [3, H, W], [1, H, W] or [H, W]"
        )
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        tensor = tensor.float()  # numpy has no bfloat16
    return _from_pixels(tensor.permute(1, 2, 0).numpy(), name, max_pixels)


def _from_pixels(pixels: np.ndarray, name: str, max_pixels: int) -> Image.Image | Raster:
    """A picture from [H, W, 1 | 3 | 4] (a raster, for uint16)."""
    _check_size((pixels.shape[1], pixels.shape[0]), name, max_pixels)
    pixels = pixels[..., : 1 if pixels.shape[2] == 1 else 3]
    if pixels.dtype == np.uint16:
        return Raster(name, pixels)
    return _from_8bit(to_8bit(Raster(name, _bytes_of(pixels, name)), None))


def _bytes_of(array: np.ndarray, name: str) -> np.ndarray:
    """The values of an array as uint8."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind != "f":
        raise ImageError(
            f"{name}: values of type {array.dtype} have no agreed range; convert to uint8, uint16, bool, or "
            "float in 0..1"
        )
    low, high = float(array.min()), float(array.max())
    if not (low >= -1e-6 and high <= 1 + 1e-6):
        raise ImageError(
            f"{name}: float values must lie in 0..1, these span {low:g}..{high:g}; scale them (divide by 255 "
            "if they are 8-bit levels) and replace what is not a number"
        )
    return (array.astype(np.float32) * 255).clip(0, 255).round().astype(np.uint8)


def _fetch(url: str, allow_url: bool) -> bytes:
    """The bytes behind an http(s) address."""
    scheme = url.partition("://")[0].lower()
    if scheme not in ("http", "https"):
        raise ImageError(f"{url}: only http and https are fetched, not {scheme}; download the file first")
    if not allow_url:
        raise ImageError(f"{url}: pass allow_url=True to fetch an address, or download the file first")
    # Only these handlers: a redirect must not lead to a local file or an FTP server.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "llava"})
        with opener.open(request, timeout=URL_TIMEOUT) as answer:
            data: bytes = answer.read(MAX_URL_BYTES + 1)
            expected = answer.headers.get("Content-Length", "")
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError is an OSError
        raise ImageError(f"{url}: cannot be fetched ({error}); check the address and the network") from error
    if len(data) > MAX_URL_BYTES:
        raise ImageError(f"{url}: is larger than {MAX_URL_BYTES >> 20} MiB; download the file first")
    if expected.isdecimal() and len(data) < int(expected):
        raise ImageError(f"{url}: the download stopped at {len(data)} of {expected} bytes; try again")
    return data
