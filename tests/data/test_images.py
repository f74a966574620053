"""Every kind of image a user brings becomes RGB, and everything else an ImageError that names it."""

import functools
import http.server
import io
import struct
import sys
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, features

from llava.data import geotiff
from llava.data import images as module
from llava.data.geotiff import Frame, write_geotiff
from llava.data.images import load_image, load_mask, load_pair, load_placed_pair
from llava.errors import DataError, ImageError, MissingDependencyError

REAL = Path(__file__).parents[2].parent / "shared" / "real"
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (12, 17, 3), dtype=np.uint8)
SMOOTH = np.stack(np.meshgrid(np.arange(64), np.arange(48)), -1).astype(np.uint8)
SMOOTH = np.dstack([SMOOTH * 3, SMOOTH.sum(-1, dtype=np.uint8)])  # [48, 64, 3], compresses like a photograph


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def interlaced_rgba_png(rgba: np.ndarray) -> bytes:
    """An Adam7 PNG, which Pillow reads but does not write."""
    height, width, _ = rgba.shape
    passes = [
        (0, 0, 8, 8),
        (0, 4, 8, 8),
        (4, 0, 8, 4),
        (0, 2, 4, 4),
        (2, 0, 4, 2),
        (0, 1, 2, 2),
        (1, 0, 2, 1),
    ]
    rows = b""
    for top, left, step_y, step_x in passes:
        part = rgba[top::step_y, left::step_x]
        if part.size:
            rows += b"".join(b"\0" + row.tobytes() for row in part)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 1)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def same(image: Image.Image, pixels: np.ndarray) -> bool:
    assert image.mode == "RGB"
    return np.array_equal(np.asarray(image), pixels)


class TestModes:
    @pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
    def test_rgb_is_kept(self, kind, tmp_path):
        path = tmp_path / f"a.{kind.lower()}"
        Image.fromarray(RGB).save(path)
        assert (
            same(load_image(path), RGB)
            and same(load_image(str(path)), RGB)
            and same(load_image(path.read_bytes()), RGB)
        )

    @pytest.mark.parametrize(
        "mode", ["1", "L", "LA", "P", "RGBA", "PA", "CMYK", "YCbCr", "HSV", "LAB", "RGBa"]
    )
    def test_convertible_modes(self, mode):
        steps = {"PA": ["P", "PA"], "RGBa": ["RGBA", "RGBa"]}
        made = functools.reduce(Image.Image.convert, steps.get(mode, [mode]), Image.fromarray(RGB))
        assert made.mode == mode
        assert same(load_image(made), np.asarray(made.convert("RGB")))

    def test_premultiplied_grey(self):
        assert same(load_image(Image.new("LA", (2, 1), (80, 255)).convert("La")), np.full((1, 2, 3), 80))

    def test_transparency_is_dropped_not_blended(self):
        alpha = RNG.integers(0, 256, (12, 17, 1), dtype=np.uint8)
        assert same(load_image(encoded(Image.fromarray(np.dstack([RGB, alpha])))), RGB)

    def test_palette_with_transparency_gives_no_warning(self):
        palette = Image.fromarray(RGB).quantize(16)
        data = encoded(palette, transparency=bytes(range(0, 160, 10)))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert same(load_image(data), np.asarray(palette.convert("RGB")))

    @pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "F"])
    def test_deep_grey_is_stretched_between_percentiles(self, mode):
        values = np.linspace(1000, 3000, 200 * 50).reshape(200, 50)
        dtype = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4", "F": "<f4"}[mode]
        image = Image.frombytes(mode, (50, 200), values.astype(dtype).tobytes())
        low, high = np.percentile(values.astype(dtype), (2, 98))
        expected = ((values.astype(dtype) - low) / (high - low) * 255).clip(0, 255).round()
        shown = np.asarray(load_image(image)).astype(int)
        assert np.abs(shown - expected[..., None]).max() <= 1
        assert np.asarray(load_image(image, stretch=(0, 100)))[[0, -1], [0, -1], 0].tolist() == [0, 255]

    def test_sixteen_bit_png_and_tiff_files_agree(self):
        image = Image.fromarray((RGB[..., 0].astype(np.uint16) + 700) * 9)
        assert load_image(encoded(image)).tobytes() == load_image(encoded(image, "TIFF")).tobytes()

    def test_not_a_number_is_black_and_left_out_of_the_stretch(self):
        values = np.linspace(5, 6, 100, dtype=np.float32).reshape(10, 10)
        holed = values.copy()
        holed[0, :5] = [np.nan, np.inf, -np.inf, np.nan, np.nan]
        shown = np.asarray(load_image(Image.fromarray(holed), stretch=(0, 100)))
        assert (shown[0, :5] == 0).all() and shown[-1, -1, 0] == 255 and 0 < shown[5, 0, 0] < 255
        with pytest.raises(ImageError, match="every pixel is nodata"):
            load_image(Image.fromarray(np.full((3, 3), np.nan, np.float32)))

    def test_a_constant_deep_image_is_a_picture(self):
        assert load_image(np.full((4, 5), 900, np.uint16)).getextrema() == ((0, 0),) * 3

    @pytest.mark.parametrize("turn", range(1, 9))
    def test_exif_orientation_is_applied(self, turn):
        exif = Image.Exif()
        exif[0x0112] = turn
        ways = [None, 0, 3, 1, 5, 4, 6, 2]  # what a viewer does, as Image.Transpose values
        image = Image.fromarray(RGB)
        expected = image if ways[turn - 1] is None else image.transpose(Image.Transpose(ways[turn - 1]))
        assert same(load_image(encoded(image, exif=exif)), np.asarray(expected))

    def test_animation_gives_its_first_frame(self):
        frames = [Image.fromarray(np.full((6, 7, 3), level, np.uint8)) for level in (40, 200)]
        for kind in ("GIF", "PNG", "TIFF"):
            data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
            assert same(load_image(data), np.asarray(frames[0])), kind

    def test_interlaced_rgba(self):
        rgba = RNG.integers(0, 256, (38, 77, 4), dtype=np.uint8)
        assert same(load_image(interlaced_rgba_png(rgba)), rgba[..., :3])

    def test_eps_is_not_run(self):
        with pytest.raises(ImageError, match="EPS"):
            load_image(encoded(Image.fromarray(RGB), "EPS"))


class TestArrays:
    @pytest.mark.parametrize(
        ("array", "pixels"),
        [
            (RGB, RGB),
            (RGB[..., 0], RGB[..., :1].repeat(3, -1)),
            (RGB[..., :1], RGB[..., :1].repeat(3, -1)),
            (np.dstack([RGB, RGB[..., 0]]), RGB),
            (RGB.transpose(2, 0, 1), RGB),
            (RGB / 255.0, RGB),
            ((RGB / 255).astype(np.float16), RGB),
            (RGB[..., 0] > 99, np.where(RGB[..., :1] > 99, 255, 0).repeat(3, -1)),
            (RGB[::-1, ::2], RGB[::-1, ::2]),
        ],
        ids=["hwc", "hw", "hw1", "hw4", "chw", "float64", "float16", "bool", "strided"],
    )  # fmt: skip
    def test_layouts_and_types(self, array, pixels):
        assert same(load_image(array), pixels)

    def test_the_callers_array_is_not_touched(self):
        array = RGB.copy()
        load_image(array).putpixel((0, 0), (1, 2, 3))
        assert np.array_equal(array, RGB)

    @pytest.mark.parametrize(
        ("array", "said"),
        [
            (RGB[:3], "channel-first or channel-last"),
            (np.zeros((5, 6, 2), np.uint8), r"\(5, 6, 2\)"),
            (np.zeros((2, 5, 6, 3), np.uint8), r"\(2, 5, 6, 3\)"),
            (np.zeros((0, 6, 3), np.uint8), "no pixels"),
            (np.zeros((5, 6), np.int64), "int64"),
            (np.zeros((5, 6), np.complex64), "complex64"),
            (RGB.astype(np.float32), r"0\.\.1.*divide by 255"),
            (np.full((5, 6), np.nan), "not a number"),
        ],
    )
    def test_unclear_arrays_are_refused(self, array, said):
        with pytest.raises(ImageError, match=said):
            load_image(array)

    def test_tensors_are_channel_first(self):
        tensor = torch.from_numpy(RGB).permute(2, 0, 1)
        for given_ in (tensor, tensor / 255, (tensor / 255).requires_grad_(), (tensor / 255).double()):
            assert same(load_image(given_), RGB)
        assert same(load_image(tensor[:, :, :3]), RGB[:, :3]) and same(load_image(tensor[:, :3]), RGB[:3])
        assert same(load_image(tensor[0]), RGB[..., :1].repeat(3, -1))
        assert load_image(torch.rand(3, 4, 5).bfloat16()).size == (5, 4)
        with pytest.raises(ImageError, match=r"\(12, 17, 3\)"):
            load_image(torch.from_numpy(RGB))

    def test_other_things_are_refused(self):
        for thing in (None, 7, [RGB]):
            with pytest.raises(ImageError, match=type(thing).__name__):
                load_image(thing)


class TestDamage:
    FILES = {  # noqa: RUF012
        "png": encoded(Image.fromarray(SMOOTH)),
        "interlaced": interlaced_rgba_png(np.dstack([SMOOTH, SMOOTH[..., 0]])),
        "jpeg": encoded(Image.fromarray(SMOOTH), "JPEG"),
        "progressive": encoded(Image.fromarray(SMOOTH), "JPEG", progressive=True),
        "bmp": encoded(Image.fromarray(SMOOTH), "BMP"),
        "gif": encoded(Image.fromarray(SMOOTH), "GIF"),
        "tiff": encoded(Image.fromarray(SMOOTH), "TIFF"),
    }

    @pytest.mark.parametrize("users_switch", [False, True])
    @pytest.mark.parametrize("kind", [kind for kind in FILES if kind not in ("gif", "tiff")])
    def test_cut_short_anywhere(self, kind, users_switch, monkeypatch, tmp_path):
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", users_switch)
        data = self.FILES[kind]
        path = tmp_path / f"cut.{kind}"
        for length in {
            1,
            2,
            8,
            30,
            len(data) // 4,
            len(data) // 2,
            len(data) * 9 // 10,
            *range(len(data) - 20, len(data)),
        }:
            path.write_bytes(data[:length])
            with pytest.raises(ImageError, match=f"cut.{kind}"):
                load_image(path)
        path.write_bytes(data)
        assert load_image(path).size == (64, 48)
        assert users_switch == ImageFile.LOAD_TRUNCATED_IMAGES

    @pytest.mark.parametrize("kind", ["gif", "tiff"])
    def test_cut_in_half(self, kind):
        with pytest.raises(ImageError, match="cut short"):
            load_image(self.FILES[kind][: len(self.FILES[kind]) // 2])

    def test_a_lazily_opened_image_is_decoded_strictly(self, monkeypatch):
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
        half = Image.open(io.BytesIO(self.FILES["png"][: len(self.FILES["png"]) // 2]))
        with pytest.raises(ImageError, match=r"PngImageFile.*cut short"):
            load_image(half)

    def test_threads_leave_the_switch_as_the_user_had_it(self, monkeypatch):
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
        half = self.FILES["png"][: len(self.FILES["png"]) // 2]
        refused = []

        def work() -> None:
            for _ in range(50):
                try:
                    load_image(half)
                except ImageError:
                    refused.append(1)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(refused) == 200 and ImageFile.LOAD_TRUNCATED_IMAGES is True

    def test_every_flipped_byte_of_png_pixels_is_seen(self):
        data = bytearray(self.FILES["png"])
        start = data.index(b"IDAT") + 4
        for at in range(start, data.index(b"IEND") - 8, 7):
            damaged = data.copy()
            damaged[at] ^= 0x10
            with pytest.raises(ImageError, match="damaged"):
                load_image(bytes(damaged))

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(
        head=st.sampled_from(
            [b"", *FILES.values(), b"II*\0", b"MM\0*", b"RIFF\0\0\0\0WEBP", b"%!PS-Adobe", b"P6 9 9 255\n"]
        ),
        cut=st.floats(0, 1),
        at=st.floats(0, 1),
        noise=st.binary(max_size=64),
    )
    def test_any_bytes_give_an_image_or_an_image_error(self, head, cut, at, noise):
        kept = head[: int(cut * len(head))]
        place = int(at * len(kept))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assert (
                    load_image(kept[:place] + noise + kept[place + len(noise) :], max_pixels=10**6).mode
                    == "RGB"
                )
            except ImageError as error:
                assert "the given" in str(error)


class TestFiles:
    def test_what_is_no_image_file(self, tmp_path):
        (tmp_path / "empty.png").touch()
        (tmp_path / "notes.png").write_text("not a picture")
        (tmp_path / "lfs.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        (tmp_path / "page.png").write_text("<!DOCTYPE html><html></html>")
        for name, said in [
            ("empty.png", "0 bytes"),
            ("notes.png", "notes.png: is not an image"),
            ("lfs.png", "git lfs pull"),
            ("page.png", "web page"),
            ("nots.png", "did you mean notes.png"),
            ("away/a.png", "as is its folder"),
            ("", "is a folder"),
            ("a\0b", "cannot be opened"),
            ("x" * 5000, "cannot be opened"),
        ]:
            with pytest.raises(ImageError, match=said):
                load_image(tmp_path / name)

    def test_bombs_are_refused_from_the_header(self, tmp_path, monkeypatch):
        def header(width: int, height: int) -> bytes:
            kind = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
            return (
                b"\x89PNG\r\n\x1a\n"
                + struct.pack(">I", 13)
                + kind
                + struct.pack(">I", zlib.crc32(kind))
                + b"\0\0\0\1IDAT"
            )

        (tmp_path / "bomb.png").write_bytes(header(60_000, 60_000))
        with pytest.raises(ImageError, match=r"bomb.png.*max_pixels"):
            load_image(tmp_path / "bomb.png")
        (tmp_path / "big.png").write_bytes(header(10, 11))
        with pytest.raises(ImageError, match="10 x 11 pixels are more than max_pixels=100"):
            load_image(tmp_path / "big.png", max_pixels=100)
        with pytest.raises(ImageError, match="more than max_pixels=100"):
            load_image(RGB, max_pixels=100)

    def test_a_raised_limit_is_enough(self, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
        data = encoded(Image.fromarray(RGB))
        with pytest.raises(ImageError, match="max_pixels of load_image"):
            load_image(data, max_pixels=100)
        assert load_image(data, max_pixels=1000).size == (17, 12) and Image.MAX_IMAGE_PIXELS == 50

    def test_addresses(self, tmp_path, monkeypatch):
        (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(RGB)))

        class Quiet(http.server.SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/away":
                    self.send_response(302)
                    self.send_header("Location", (tmp_path / "a.png").as_uri())
                    self.end_headers()
                else:
                    super().do_GET()

            def log_message(self, *args) -> None:
                pass

        for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(proxy, raising=False)
        with http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path)
        ) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            root = f"http://127.0.0.1:{server.server_port}"
            assert same(load_image(f"{root}/a.png", allow_url=True), RGB)
            for path, said in [("b.png", "404"), ("away", "cannot be fetched")]:
                with pytest.raises(ImageError, match=said):
                    load_image(f"{root}/{path}", allow_url=True)
            monkeypatch.setattr(module, "MAX_URL_BYTES", 100)
            with pytest.raises(ImageError, match="larger than"):
                load_image(f"{root}/a.png", allow_url=True)
            with pytest.raises(ImageError, match="pass allow_url=True"):
                load_image(f"{root}/a.png")
            server.shutdown()
        with pytest.raises(ImageError, match="only http and https"):
            load_image((tmp_path / "a.png").as_uri(), allow_url=True)


class TestPairs:
    def test_sizes_may_differ_and_shapes_warn(self):
        a, b = np.zeros((384, 768), np.uint8), np.zeros((383, 768), np.uint8)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            first, second = load_pair(a, b)
        assert (first.size, second.size) == ((768, 384), (768, 383))
        with pytest.warns(UserWarning, match="768 x 384 and 384 x 768"):
            load_pair(a, a.T)

    def test_two_deep_dates_share_one_stretch(self):
        ramp = np.linspace(1000, 2000, 5000).reshape(50, 100).astype(np.uint16)
        before, after = load_pair(ramp, ramp + 1000, stretch=(0, 100))
        assert before.getextrema()[0] == (0, 128) and after.getextrema()[0] == (128, 255)
        with pytest.warns(UserWarning, match="stretched by itself"):
            load_pair(ramp, np.zeros((50, 100), np.uint8))

    def test_a_stretch_must_be_percentiles(self):
        with pytest.raises(ImageError, match="percentiles"):
            load_image(np.zeros((4, 5), np.uint16), stretch=(98, 2))

    @pytest.mark.skipif(not REAL.is_dir(), reason="real pairs are not here")
    def test_real_pairs(self):
        befores = sorted(REAL.glob("*/A/*.png"))
        assert befores
        for before in befores:
            first, second = load_pair(before, before.parents[1] / "B" / before.name)
            assert first.mode == second.mode == "RGB" and np.asarray(first).std() > 5
        rgba = Image.open(REAL / "levir/A/test_113_0256.png")
        assert same(load_image(rgba.filename), np.asarray(rgba)[..., :3])


class TestGeoTiff:
    @pytest.fixture
    def write(self, tmp_path):
        rasterio = pytest.importorskip("rasterio")
        from rasterio.transform import from_origin

        def write(
            name, values, west=500_000.0, north=4_000_000.0, step=10.0, crs="EPSG:32650", **options
        ) -> Path:
            path = tmp_path / name
            count, height, width = values.shape
            place = {"crs": crs, "transform": from_origin(west, north, step, step)} if crs else {}
            profile = dict(
                driver="GTiff",
                count=count,
                height=height,
                width=width,
                dtype=values.dtype,
                **place,
                **options,
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with rasterio.open(path, "w", **profile) as target:
                    target.write(values)
            return path

        return write

    def test_bands_are_chosen(self, write):
        values = RNG.integers(0, 256, (6, 20, 30), dtype=np.uint8)
        path = write("six.tif", values)
        assert same(load_image(path), values[:3].transpose(1, 2, 0))
        assert same(load_image(path.read_bytes()), values[:3].transpose(1, 2, 0))
        assert same(load_image(path, bands=[4, 1, 6]), values[[3, 0, 5]].transpose(1, 2, 0))
        assert same(load_image(path, bands=[2]), values[[1, 1, 1]].transpose(1, 2, 0))
        for bands in ([0, 1, 2], [1, 2], [5, 6, 7]):
            with pytest.raises(ImageError, match="bands 1 to 6"):
                load_image(path, bands=bands)
        with pytest.raises(ImageError, match="needs a TIFF"):
            load_image(encoded(Image.fromarray(RGB)), bands=[1])
        with pytest.raises(ImageError, match="more than max_pixels=500"):
            load_image(path, max_pixels=500)

    def test_plain_georeferenced_rgb_reads_alike_with_and_without_rasterio(self, write, monkeypatch):
        values = RNG.integers(0, 256, (3, 20, 30), dtype=np.uint8)
        path = write("rgb.tif", values, photometric="RGB")
        assert same(load_image(path), values.transpose(1, 2, 0))
        monkeypatch.setitem(sys.modules, "rasterio", None)
        monkeypatch.setattr(module, "has_rasterio", lambda: False)
        with pytest.warns(UserWarning, match=r"rgb.tif.*llava\[geo\]"):
            assert same(load_image(path), values.transpose(1, 2, 0))

    @pytest.mark.parametrize("options", [{}, {"crs": None}], ids=["placed", "unplaced"])
    def test_deep_colour_needs_rasterio(self, write, monkeypatch, options):
        values = RNG.integers(100, 4000, (3, 20, 30), dtype=np.uint16)
        path = write("deep.tif", values, photometric="RGB", **options)
        shown = np.asarray(load_image(path)).astype(float)
        low, high = np.percentile(values, (2, 98), axis=(1, 2))
        expected = ((values.transpose(1, 2, 0) - low) / (high - low) * 255).clip(0, 255)
        assert np.abs(shown - expected).max() <= 1
        monkeypatch.setitem(sys.modules, "rasterio", None)
        with pytest.raises(MissingDependencyError, match=r'deep.tif.*pip install "llava\[geo\]"'):
            load_image(path)

    def test_nodata_is_black_and_left_out_of_the_stretch(self, write):
        values = np.linspace(1000, 2000, 600).reshape(1, 20, 30).astype(np.int16)
        values[0, :2] = -9999
        shown = np.asarray(load_image(write("holes.tif", values, nodata=-9999), stretch=(0, 100)))
        assert (shown[:2] == 0).all() and shown[2].max() < 15 and shown[-1, -1].tolist() == [255] * 3

    def test_a_colour_table_is_applied(self, write):
        rasterio = pytest.importorskip("rasterio")
        values = RNG.integers(0, 3, (1, 8, 9), dtype=np.uint8)
        table = {0: (10, 20, 30, 255), 1: (40, 50, 60, 255), 2: (70, 80, 90, 255)}
        path = write("classes.tif", values)
        with rasterio.open(path, "r+") as file:
            file.write_colormap(1, table)
        assert same(load_image(path), np.array([table[i][:3] for i in range(3)], np.uint8)[values[0]])

    def test_the_second_date_is_laid_on_the_first(self, write):
        scene = RNG.integers(1, 256, (3, 60, 60), dtype=np.uint8)
        before = write("before.tif", scene[:, 10:50, 10:50], west=500_100, north=3_999_900)
        whole = write("whole.tif", scene)
        first, second = load_pair(before, whole)
        assert first.size == second.size == (40, 40) and first.tobytes() == second.tobytes()
        coarse = write("coarse.tif", scene[:, ::2, ::2], step=20.0)
        assert load_pair(before, coarse)[1].size == (40, 40)

    def test_other_coordinate_systems_meet(self, write):
        warp = pytest.importorskip("rasterio.warp")
        ramp = np.broadcast_to(np.arange(1, 101, dtype=np.uint8)[None, :, None] * 2, (3, 100, 100))
        before = write("utm.tif", np.ascontiguousarray(ramp))
        west, south, east, north = warp.transform_bounds(
            "EPSG:32650", "EPSG:4326", 500_000, 3_999_000, 501_000, 4_000_000
        )
        step = (north - south) / 100
        columns = int((east - west) / step) + 1
        after = np.ascontiguousarray(np.broadcast_to(ramp[:, :, :1], (3, 100, columns)))
        first, second = load_pair(
            before, write("degrees.tif", after, west=west, north=north, step=step, crs="EPSG:4326")
        )
        inner = (slice(5, -5), slice(5, -5))
        difference = np.asarray(first)[inner].astype(int) - np.asarray(second)[inner].astype(int)
        assert first.size == second.size and np.abs(difference).max() <= 6

    @pytest.mark.parametrize("kind", ["uint8", "uint16", "int16", "int32", "uint32", "float32", "float64"])
    def test_what_one_date_lacks_is_black_in_both(self, write, kind):
        scene = RNG.integers(1, 256, (3, 40, 40)).astype(kind)
        before = write("whole.tif", scene)
        with pytest.warns(UserWarning, match=r"half.tif covers 50% of .*whole.tif"):
            first, second = load_pair(before, write("half.tif", scene[:, :20]))
        assert first.tobytes() == second.tobytes() and np.asarray(first)[20:].max() == 0

    @pytest.mark.parametrize("kind", ["uint8", "uint16", "int16", "float32"])
    @pytest.mark.parametrize("colours", [2, 3])
    def test_an_alpha_band_is_a_mask_and_no_colour(self, write, kind, colours):
        rasterio = pytest.importorskip("rasterio")
        scene = RNG.integers(1, 256, (colours + 1, 40, 40)).astype(kind)
        scene[-1, :20], scene[-1, 20:] = 0, 255
        path = write("alpha.tif", scene)
        with rasterio.open(path, "r+") as file:
            file.colorinterp = [*file.colorinterp[:-1], rasterio.enums.ColorInterp.alpha]
        shown = np.asarray(load_image(path, stretch=(0, 100)))
        assert (shown[:20] == 0).all() and shown[20:].std() > 50
        assert (shown[..., 0] == shown[..., 1]).all() == (colours == 2)

    def test_control_points_place_an_image(self, write):
        rasterio = pytest.importorskip("rasterio")
        scene = RNG.integers(1, 256, (1, 40, 40)).astype(np.float32)

        def placed(name: str, west: float) -> Path:
            path = write(name, scene, crs=None)
            points = [
                rasterio.control.GroundControlPoint(row, column, west + column / 100, 50 - row / 100)
                for row in (0, 40)
                for column in (0, 40)
            ]
            with rasterio.open(path, "r+") as file:
                file.gcps = (points, rasterio.crs.CRS.from_epsg(4326))
            return path

        first, second = load_pair(placed("a.tif", 10.0), placed("b.tif", 10.0))
        assert first.tobytes() == second.tobytes() and np.asarray(first).std() > 50
        with pytest.warns(UserWarning, match=r"covers 50% of"):
            first, second = load_pair(placed("a.tif", 10.0), placed("c.tif", 10.2))
        assert not np.asarray(first)[2:-2, :18].any() and np.asarray(second)[2:-2, 22:-2].std() > 50
        with pytest.raises(ImageError, match=r"do not meet.* in EPSG:4326"):
            load_pair(placed("a.tif", 10.0), placed("d.tif", 15.0))

    def test_scale_and_offset_give_one_unit(self, write):
        rasterio = pytest.importorskip("rasterio")
        numbers = RNG.integers(1000, 5000, (1, 40, 40)).astype(np.uint16)
        path = write("numbers.tif", numbers)
        with rasterio.open(path, "r+") as file:
            file.scales, file.offsets = [1e-4], [-0.1]
        first, second = load_pair(write("reflectance.tif", numbers.astype(np.float32) * 1e-4 - 0.1), path)
        assert np.abs(np.asarray(first).astype(int) - np.asarray(second)).max() <= 1
        assert np.asarray(first).std() > 50

    def test_rows_may_run_from_south_to_north(self, write):
        rasterio = pytest.importorskip("rasterio")
        scene = RNG.integers(1, 256, (3, 40, 40), dtype=np.uint8)
        path = write("south.tif", scene[:, ::-1])
        with rasterio.open(path, "r+") as file:
            file.transform = rasterio.Affine(10, 0, 500_000, 0, 10, 3_999_600)
        first, second = load_pair(write("north.tif", scene), path)
        assert first.tobytes() == second.tobytes()

    def test_a_map_lies_where_its_pair_lies(self, write, tmp_path):
        rasterio = pytest.importorskip("rasterio")
        scene = RNG.integers(1, 256, (3, 40, 30), dtype=np.uint8)
        before = write("whole.tif", scene)
        with pytest.warns(UserWarning, match="covers 50%"):
            *_, frame = load_placed_pair(before, write("half.tif", scene[:, :20]))
        values = RNG.random((40, 30), dtype=np.float32)
        write_geotiff(tmp_path / "map.tif", values, frame)
        with rasterio.open(before) as source, rasterio.open(tmp_path / "map.tif") as drawn:
            assert (drawn.crs, drawn.transform, drawn.shape) == (source.crs, source.transform, (40, 30))
            assert drawn.count == 1 and np.array_equal(drawn.read(1)[:20], values[:20])
            assert np.isnan(drawn.read(1)[20:]).all() and not drawn.read_masks(1)[20:].any()
        with pytest.raises(DataError, match="map is 30 x 41 pixels, its pair 30 x 40"):
            write_geotiff(tmp_path / "other.tif", np.zeros((41, 30), np.float32), frame)
        write_geotiff(tmp_path / "plain.tif", values, Frame())
        assert np.array_equal(np.asarray(Image.open(tmp_path / "plain.tif")), values)
        assert not list(tmp_path.glob("*.part")) and not (tmp_path / "other.tif").exists()

    def test_where_one_date_alone_is_placed_the_pair_lies_there_if_pixels_agree(self, write):
        scene = RNG.integers(1, 256, (3, 40, 30), dtype=np.uint8)
        placed, plain, small = (
            write("placed.tif", scene),
            Image.new("RGB", (30, 40)),
            Image.new("RGB", (15, 20)),
        )
        grid = load_placed_pair(placed, placed)[2].grid
        with pytest.warns(UserWarning, match="only .*placed.tif is georeferenced"):
            assert load_placed_pair(placed, plain)[2].grid == load_placed_pair(plain, placed)[2].grid == grid
            assert load_placed_pair(placed, small)[2].grid is None
            assert load_placed_pair(small, placed)[2].grid == grid
        assert load_placed_pair(plain, plain)[2] == Frame(None, None)

    def test_footprints_that_do_not_meet(self, write):
        scene = RNG.integers(1, 256, (3, 40, 40), dtype=np.uint8)
        here, there = write("here.tif", scene), write("there.tif", scene, west=600_000)
        with pytest.raises(ImageError, match="do not meet") as caught:
            load_pair(here, there)
        for part in (
            "here.tif covers 500000 to 500400 east",
            "there.tif covers 600000 to 600400",
            "EPSG:32650",
        ):
            assert part in str(caught.value)

    def test_deep_dates_share_a_stretch_and_a_grid(self, write):
        ramp = np.linspace(1000, 2000, 1600).reshape(1, 40, 40).astype(np.uint16)
        first, second = load_pair(write("a.tif", ramp), write("b.tif", ramp + 1000), stretch=(0, 100))
        assert first.getextrema()[0] == (0, 128) and second.getextrema()[0] == (128, 255)

    def test_one_place_alone_warns(self, write):
        scene = RNG.integers(1, 256, (3, 40, 40), dtype=np.uint8)
        with pytest.warns(UserWarning, match=r"only .*placed.tif is georeferenced"):
            load_pair(write("placed.tif", scene), scene)

    def test_damaged_files_are_named(self, write, tmp_path):
        data = write(
            "whole.tif", RNG.integers(0, 256, (6, 64, 64), dtype=np.uint16), compress="deflate"
        ).read_bytes()
        for length in (300, len(data) // 2):
            (tmp_path / "cut.tif").write_bytes(data[:length])
            with pytest.raises(ImageError, match="cut"):
                load_image(tmp_path / "cut.tif")

    def test_large_rasters_are_sampled_for_the_stretch(self, monkeypatch):
        monkeypatch.setattr(geotiff, "MAX_SAMPLES", 400)
        values = RNG.integers(0, 5000, (200, 200, 1)).astype(np.uint16)
        sampled = geotiff.stretch_limits([geotiff.Raster("a", values)], (2, 98))
        np.testing.assert_allclose(sampled[:, 0], np.percentile(values, (2, 98)), atol=250)


@pytest.mark.skipif(not features.check("webp"), reason="this Pillow has no WebP")
def test_webp_cut_short():
    data = encoded(Image.fromarray(SMOOTH), "WEBP")
    assert load_image(data).size == (64, 48)
    with pytest.raises(ImageError):
        load_image(data[: len(data) // 2])


# --- masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32, np.float32])
def test_a_mask_keeps_its_levels(kind: type, tmp_path: Path) -> None:
    levels = np.zeros((40, 30))
    levels[0], levels[1, :9] = 128, 255  # few: a stretch would take roads for white
    Image.fromarray(levels.astype(kind)).save(tmp_path / "mask.tif")
    picture = load_mask(tmp_path / "mask.tif")
    read = np.asarray(picture.convert("L") if picture.mode == "RGB" else picture)
    assert np.array_equal(read, levels)


def test_in_a_mask_nodata_is_a_level_like_any_other(tmp_path: Path) -> None:
    """gdal_rasterize -a_nodata 0: of an unchanged pair every pixel is nodata."""
    for level in (0, 255):
        mask = Image.fromarray(np.full((8, 8), level, np.uint8))
        mask.save(tmp_path / "mask.tif", tiffinfo={42113: str(level)})
        assert set(np.unique(np.asarray(load_mask(tmp_path / "mask.tif")))) == {level}
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "mask.tif")
    with pytest.raises(ImageError, match=r"mask\.tif: holds 0\.5, which is no level of a mask"):
        load_mask(tmp_path / "mask.tif")
