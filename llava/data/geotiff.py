"""Deep and georeferenced rasters: read a GeoTIFF, lay it on another's grid, stretch it to 8 bits; write a map.

Legend: H, W image height and width; C bands. `Raster` and the stretch need numpy alone; reading and writing a
GeoTIFF need rasterio (the extra `geo`), which is imported only then.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava.data.whole_file import write_whole
from llava.errors import DataError, ImageError, LlavaError, MissingDependencyError

MAX_SAMPLES = 4_000_000
"""Pixels of one image that decide its stretch; a larger image is sampled on a regular grid."""

MIN_SHARED = 0.9
"""Share of the first date's grid that the second must cover before `laid_on` stops warning."""


@dataclass(frozen=True)
class Grid:
    """Where the pixels of a raster lie: coordinate system, affine transform, size in pixels."""

    crs: Any
    transform: Any
    width: int
    height: int

    def matches(self, other: Grid) -> bool:
        """Whether both grids have the same pixels in the same places (to a thousandth of a pixel)."""
        if (self.crs, self.width, self.height) != (other.crs, other.width, other.height):
            return False
        own, others = np.array(self.transform)[:6], np.array(other.transform)[:6]
        corners = np.array([[0, 0, 1, 0, 0, 1], [self.width, self.height, 1, self.width, self.height, 1]])
        shifts = (
            np.abs((own - others) * corners).reshape(2, 2, 3).sum(axis=-1)
        )  # [corner, axis], ground units
        return bool(shifts.max() <= 1e-3 * np.abs(own[:2]).sum())


@dataclass(frozen=True)
class Frame:
    """Where the pixels of a pair lie on the ground, and which of them both dates have measured."""

    grid: Grid | None = None
    """None: the images do not say."""
    valid: np.ndarray | None = None
    """[H, W] bool; None: all."""


@dataclass
class Raster:
    """Pixels that still have to become an 8-bit RGB picture."""

    name: str
    values: np.ndarray
    """[H, W, C] with C = 1 or 3, in the source's own type."""
    valid: np.ndarray | None = None
    """[H, W] bool, False where nothing was measured (nodata, outside the footprint); None: all valid."""
    grid: Grid | None = None

    def __post_init__(self) -> None:
        if self.values.dtype.kind == "f":
            finite = np.isfinite(self.values).all(axis=-1)
            if not finite.all():
                self.valid = finite if self.valid is None else self.valid & finite
        if self.valid is not None and not self.valid.any():
            raise ImageError(f"{self.name}: every pixel is nodata or not a number; check its nodata value")

    @property
    def deep(self) -> bool:
        """Whether a stretch is needed: anything but 8-bit values."""
        return self.values.dtype != np.uint8

    def samples(self) -> np.ndarray:
        """Valid pixels [n, C] on a regular grid of at most about `MAX_SAMPLES`."""
        height, width, _ = self.values.shape
        step = max(1, int(np.ceil(np.sqrt(height * width / MAX_SAMPLES))))
        values = self.values[::step, ::step]
        if self.valid is None:
            return values.reshape(-1, values.shape[-1])
        chosen = values[self.valid[::step, ::step]]
        return chosen if len(chosen) else self.values[self.valid]


def stretch_limits(rasters: Sequence[Raster], percentiles: tuple[float, float]) -> np.ndarray:
    """The values shown as black and as white, [2, C]: percentiles of the valid pixels of all `rasters`.

    One pair of limits for both dates keeps equal ground equally bright; limits of its own for each would
    turn a brighter exposure into no difference and a few clouds into a difference everywhere.
    """
    pooled = np.concatenate([raster.samples() for raster in rasters])  # [n, C]
    limits = np.percentile(pooled, percentiles, axis=0).astype(np.float64)
    flat = limits[0] >= limits[1]  # e.g. a mask that is zero but for a few pixels
    limits[:, flat] = np.stack([pooled.min(axis=0), pooled.max(axis=0)])[:, flat]
    return limits


def to_8bit(raster: Raster, limits: np.ndarray | None) -> np.ndarray:
    """The raster as uint8 [H, W, 3]: `limits` [2, C] become 0 and 255, with clipping; invalid is 0."""
    if limits is None:
        shown = raster.values.copy()
    else:
        shown = np.empty(raster.values.shape, np.uint8)
        for band, (low, high) in enumerate(limits.T):  # band by band: a float copy of one, not of all
            level = (raster.values[..., band].astype(np.float64) - low) * (255.0 / max(high - low, 1e-300))
            shown[..., band] = np.nan_to_num(level, nan=0.0).clip(0.0, 255.0).round()
    if raster.valid is not None:
        shown[~raster.valid] = 0
    return np.repeat(shown, 3, axis=-1) if shown.shape[-1] == 1 else shown


def has_rasterio() -> bool:
    """Whether the extra `geo` is installed (nothing is imported)."""
    return importlib.util.find_spec("rasterio") is not None


def write_geotiff(path: Path, values: np.ndarray, frame: Frame) -> None:
    """Write a map of a pair, such as its change map, for a GIS: one band of float32, deflated.

    Args:
        path: the file; it is written whole or not at all.
        values: [H, W].
        frame: of the same pair, see `llava.data.images.load_placed_pair`. Where it is not valid the map is its nodata
            value, not a number; without a grid the file is a plain TIFF.

    Raises:
        MissingDependencyError: rasterio is not installed.
        DataError: it cannot be written, or the map is not of the frame's size.
    """
    try:
        import rasterio
        from rasterio.io import MemoryFile
    except ImportError as error:
        raise MissingDependencyError(
            f'{path}: a GeoTIFF needs rasterio to be written; install it with: pip install "llava[geo]"'
        ) from error
    grid, height, width = frame.grid, *values.shape
    sizes = [(grid.height, grid.width)] if grid is not None else []
    sizes += [frame.valid.shape] if frame.valid is not None else []
    if any(size != (height, width) for size in sizes):
        raise DataError(
            f"{path}: the map is {width} x {height} pixels, its pair {sizes[0][1]} x {sizes[0][0]}"
        )
    band = values.astype(np.float32)
    if frame.valid is not None:
        band[~frame.valid] = np.nan
    place = {} if grid is None else {"crs": grid.crs, "transform": grid.transform}
    with MemoryFile() as memory, warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with memory.open(
            driver="GTiff",
            height=height,
            width=width,
            count=1,
            dtype="float32",
            nodata=np.nan,
            tiled=True,
            compress="deflate",
            predictor=3,  # of floating-point numbers
            bigtiff="if_safer",
            **place,
        ) as dataset:
            dataset.write(band, 1)
            dataset.set_band_description(1, "change")
        write_whole(path, memory.read())


def read_geotiff(
    source: str | os.PathLike[str] | bytes,
    name: str,
    *,
    bands: Sequence[int] | None = None,
    max_pixels: int,
    onto: Raster | None = None,
) -> Raster:
    """Read three bands (or one) of a TIFF, laid on the grid of `onto` where both are georeferenced.

    Args:
        source: a local file, or the bytes of one.
        name: what messages call it.
        bands: numbers of the bands to show as red, green, blue, counted from 1 (one number: grey). Without
            it, the bands the file itself marks as red, green and blue; else the first three; the first if
            there are fewer.
        max_pixels: refuse more, seen from the header.
        onto: the other date. Where it has a grid and this file a coordinate system, the pixels are warped
            (bilinear; nearest for a colour table) to that grid, and what is valid in only one date is
            dropped from both (`onto.valid` is updated): an edge of the data must not pass for a change.

    Raises:
        MissingDependencyError: rasterio is not installed.
        ImageError: unreadable or too large, bands it does not have, footprints that do not meet.
    """
    try:
        import rasterio
        from rasterio.io import MemoryFile
    except ImportError as error:
        raise MissingDependencyError(
            f'{name}: this TIFF needs rasterio to be read; install it with: pip install "llava[geo]"'
        ) from error
    try:
        with ExitStack() as stack, warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            if isinstance(source, bytes):
                dataset = stack.enter_context(stack.enter_context(MemoryFile(source)).open(driver="GTiff"))
            else:
                # An absolute path, so that no name is taken for one of GDAL's or rasterio's remote schemes.
                dataset = stack.enter_context(rasterio.open(Path(source).resolve(), driver="GTiff"))
            placed = (
                stack.enter_context(_by_control_points(dataset)) if _has_control_points(dataset) else dataset
            )
            return _read_open(placed, name, bands, max_pixels, onto)
    except LlavaError:
        raise
    except Exception as error:  # damaged files raise many kinds, some of them private to rasterio
        raise ImageError(f"{name}: this TIFF cannot be read ({error}); copy or download it again") from error


def _read_open(
    dataset: Any, name: str, bands: Sequence[int] | None, max_pixels: int, onto: Raster | None
) -> Raster:
    """Read an open rasterio dataset; see `read_geotiff`."""
    from rasterio.enums import ColorInterp, Resampling

    grid = _grid(dataset)
    target = onto.grid if onto is not None and grid is not None else None
    for size in (dataset, target):
        if size is not None and size.width * size.height > max_pixels:
            raise ImageError(
                f"{name}: {size.width} x {size.height} pixels are more than max_pixels={max_pixels}; "
                "cut the scene into tiles (in Python, max_pixels of load_image and load_pair takes more)"
            )
    chosen = _choose_bands(dataset, name, bands)
    kinds = {np.dtype(dataset.dtypes[band - 1]) for band in chosen}
    if any(kind.kind not in "uif" for kind in kinds):
        types = ", ".join(sorted(map(str, kinds)))
        raise ImageError(f"{name}: bands of type {types} are no picture; export them as real numbers")
    table = None
    if len(chosen) == 1 and dataset.colorinterp[chosen[0] - 1] == ColorInterp.palette:
        table = dataset.colormap(chosen[0])
    if target is None or (grid is not None and grid.matches(target)):
        values, valid = dataset.read(chosen), _measured(dataset, chosen)
    else:
        assert onto is not None and grid is not None
        _check_footprints(grid, name, target, onto.name)
        values, valid = _warp(dataset, chosen, target, Resampling.nearest if table else Resampling.bilinear)
    values = np.ascontiguousarray(values.transpose(1, 2, 0))  # [H, W, C]
    if table is not None:
        lookup = np.zeros((max(table) + 1, 3), np.uint8)
        lookup[list(table)] = [colour[:3] for colour in table.values()]
        values = lookup[values[..., 0]]
    elif values.dtype != np.uint8:
        values = _in_units(dataset, chosen, values)
    raster = Raster(name, values, None if valid.all() else valid, grid=target or grid)
    if onto is not None and target is not None:
        _share_validity(onto, raster)
    return raster


def _has_control_points(dataset: Any) -> bool:
    """Whether a file says where it lies by ground control points alone, as radar scenes do."""
    points, crs = dataset.gcps
    return dataset.crs is None and crs is not None and bool(points)


def _by_control_points(dataset: Any) -> Any:
    """The same bands on a grid of the control points' own coordinate system: an open dataset."""
    from rasterio.enums import ColorInterp, Resampling
    from rasterio.vrt import WarpedVRT

    crs = dataset.gcps[1]
    table = ColorInterp.palette in dataset.colorinterp
    return WarpedVRT(
        dataset,
        src_crs=crs,
        crs=crs,
        resampling=Resampling.nearest if table else Resampling.bilinear,
        add_alpha=_lacks_mask(dataset),
    )


def _in_units(dataset: Any, bands: list[int], values: np.ndarray) -> np.ndarray:
    """Values [H, W, C] by the scale and the offset that the file names, such as 0.0001 of reflectances."""
    scale = np.array([dataset.scales[band - 1] for band in bands])
    offset = np.array([dataset.offsets[band - 1] for band in bands])
    if (scale == 1).all() and (offset == 0).all():
        return values
    kind = np.float64 if values.dtype.itemsize > 4 else np.float32
    return values * scale.astype(kind) + offset.astype(kind)


def _measured(dataset: Any, bands: list[int]) -> np.ndarray:
    """[H, W] bool: where any of the bands holds a value; one band at its nodata value is a dark pixel."""
    from rasterio.enums import ColorInterp, MaskFlags

    marks = list(dataset.colorinterp)
    unmasked = all(dataset.mask_flag_enums[band - 1] == [MaskFlags.all_valid] for band in bands)
    if unmasked and ColorInterp.alpha in marks:  # GDAL makes masks of alpha bands of uint8 and uint16 alone
        return np.asarray(dataset.read(marks.index(ColorInterp.alpha) + 1) > 0)
    return np.asarray(dataset.read_masks(bands).any(axis=0))


def _grid(dataset: Any) -> Grid | None:
    """The grid of a dataset, or None where the file does not say where it lies."""
    if dataset.crs is None or dataset.transform.is_identity or dataset.transform.is_degenerate:
        return None
    return Grid(dataset.crs, dataset.transform, dataset.width, dataset.height)


def _choose_bands(dataset: Any, name: str, bands: Sequence[int] | None) -> list[int]:
    from rasterio.enums import ColorInterp

    if bands is not None:
        if len(bands) not in (1, 3) or not all(1 <= band <= dataset.count for band in bands):
            raise ImageError(f"{name}: bands={list(bands)} must be 1 or 3 of its bands 1 to {dataset.count}")
        return list(bands)
    marks = list(dataset.colorinterp)
    colours = [ColorInterp.red, ColorInterp.green, ColorInterp.blue]
    if all(colour in marks for colour in colours):
        return [marks.index(colour) + 1 for colour in colours]
    seen = [band for band, mark in enumerate(marks, 1) if mark != ColorInterp.alpha]
    return seen[:3] if len(seen) >= 3 else seen[:1] or [1]


def _warp(dataset: Any, bands: list[int], target: Grid, resampling: Any) -> tuple[np.ndarray, np.ndarray]:
    """Values [C, H, W] of `bands` on the target grid, and where they are measured [H, W]."""
    from rasterio.vrt import WarpedVRT

    with WarpedVRT(
        dataset,
        crs=target.crs,
        transform=target.transform,
        width=target.width,
        height=target.height,
        resampling=resampling,
        add_alpha=_lacks_mask(dataset),
    ) as warped:
        return warped.read(bands), _measured(warped, bands)


def _lacks_mask(dataset: Any) -> bool:
    """Whether a warp needs an alpha band: without it or nodata GDAL takes what lies outside for measured zeros."""
    from rasterio.enums import ColorInterp

    return dataset.nodata is None and ColorInterp.alpha not in dataset.colorinterp


def _check_footprints(grid: Grid, name: str, target: Grid, target_name: str) -> None:
    from rasterio.transform import array_bounds
    from rasterio.warp import transform_bounds

    own, there = (
        (
            min(left, right),
            min(bottom, top),
            max(left, right),
            max(bottom, top),
        )  # rows may run from south to north
        for left, bottom, right, top in (array_bounds(g.height, g.width, g.transform) for g in (grid, target))
    )
    moved = own if grid.crs == target.crs else transform_bounds(grid.crs, target.crs, *own)
    left, bottom = np.maximum(moved[:2], there[:2])
    right, top = np.minimum(moved[2:], there[2:])
    if not (left < right and bottom < top):  # also when a bound is infinite or not a number
        raise ImageError(
            f"the footprints do not meet: {target_name} covers {_box(there, target.crs)}, {name} covers "
            f"{_box(moved, target.crs)}"
            + ("" if grid.crs == target.crs else f" ({_box(own, grid.crs)})")
            + "; give two images of one place"
        )


def _box(bounds: Sequence[float], crs: Any) -> str:
    left, bottom, right, top = (f"{value:.10g}" for value in bounds)
    return f"{left} to {right} east, {bottom} to {top} north in {crs.to_string()}"


def _share_validity(before: Raster, after: Raster) -> None:
    """Drop from both dates what only one of them has measured; both lie on the same grid."""
    both = np.ones(after.values.shape[:2], bool)
    for valid in (before.valid, after.valid):
        if valid is not None:
            both &= valid
    own = both.size if before.valid is None else int(before.valid.sum())
    share = both.sum() / own
    if share == 0:
        raise ImageError(
            f"{before.name} and {after.name} have no valid pixel in common, though their footprints meet; "
            "give two images of one place"
        )
    if share < MIN_SHARED:
        warnings.warn(
            f"{after.name} covers {share:.0%} of {before.name}; the rest is black in both", stacklevel=2
        )
    before.valid = after.valid = None if both.all() else both
