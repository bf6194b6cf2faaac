"""The one reader of image files: what it takes, what it refuses by the header, and that it raises nothing else."""

import base64
import errno
import io
import os
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import numpy as np
import pytest
from broken_images import BROKEN, NOISE, PNG, RGB, WHOLE_ALL_THE_SAME, chunk, encoded, in_steps, png_head
from PIL import EpsImagePlugin, Image, PngImagePlugin

from deltavlm_hf.processing import reading
from deltavlm_hf.processing.image_processing_deltavlm import DeltaVLMImageProcessor
from deltavlm_hf.processing.reading import READING_ERRORS, check_image, image_size, read_image

PROCESSOR = DeltaVLMImageProcessor(size={"height": 16, "width": 16})


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "an image, 50 %.png"
    path.write_bytes(PNG)
    return path


@pytest.fixture
def server():
    """Serves what a test puts into `content`, on this machine alone."""

    class Handler(BaseHTTPRequestHandler):
        content: dict[str, bytes] = {}

        def do_GET(self):
            if self.path == "/elsewhere":
                self.send_response(302)
                self.send_header("Location", "/image")
            else:
                self.send_response(200 if self.path in self.content else 404)
            self.end_headers()
            self.wfile.write(self.content.get(self.path, b""))

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.content, server.url = Handler.content, f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    server.server_close()


# What it takes


def test_every_form_of_a_file_is_read(path, server):
    server.content["/image"] = PNG
    rows = datasets.Dataset.from_dict({"image": [str(path)]}).cast_column("image", datasets.Image(decode=False))
    text = base64.b64encode(PNG).decode()
    sources = [
        str(path),
        path,
        PNG,
        bytearray(PNG),
        memoryview(PNG),
        io.BytesIO(PNG),
        {"bytes": PNG, "path": None},
        {"bytes": PNG, "path": "gone.png"},
        {"bytes": None, "path": str(path)},
        {"bytes": PNG},
        {"path": str(path)},
        rows[0]["image"],
        path.as_uri(),
        path.as_uri().replace("file://", "file://localhost"),
        f"file:{urllib.parse.quote(str(path))}",
        {"path": path.as_uri()},
        f"{server.url}/image",
        f"{server.url}/elsewhere",
        text,
        f"{text[:60]}\n{text[60:]}",
        f"data:image/png;base64,{text}",
    ]
    expected = PROCESSOR((RGB, RGB), return_tensors="pt")["pixel_values"]
    for source in sources:
        assert np.array_equal(read_image(source), RGB), source
        assert image_size(source) == (8, 6)
        assert PROCESSOR((source, source), return_tensors="pt")["pixel_values"].equal(expected), source
    assert PROCESSOR([(source, RGB) for source in sources], return_tensors="pt")["pixel_values"].shape[0] == len(
        sources
    )


def test_open_files_stay_open(path):
    with path.open("rb") as file:
        for _ in range(2):
            assert read_image(file).size == image_size(file) == (8, 6)
        assert not file.closed


def test_a_stream_is_read():
    reading_end, writing_end = os.pipe()
    with open(writing_end, "wb") as file:
        file.write(PNG)
    with open(reading_end, "rb") as stream:
        assert np.array_equal(read_image(stream), RGB)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP", "JPEG2000", "PPM"])
def test_the_formats_that_are_read(tmp_path, kind):
    path = tmp_path / "image.of-another-ending"
    path.write_bytes(encoded(NOISE, kind))
    assert read_image(path).size == image_size(path) == (64, 64)
    assert np.array_equal(read_image(path), Image.open(path))


def test_a_jpeg_goes_over_its_pixels_so_often_only():
    """A megabyte of scans would take a minute; what looks like scans behind the end is not read."""
    data = in_steps(20)
    whole = read_image(data + b"\xff\xda\0\x02" * 1000)
    assert np.array_equal(whole, read_image(data))
    for few in (data, in_steps(30), encoded(NOISE, "JPEG", progressive=True, exif=b"Exif\0\0" + b"\xff\xda" * 500)):
        assert image_size(few) == read_image(few).size == (64, 64)
    for many in (in_steps(40), in_steps(5000), in_steps(100)[:-1000]):
        for read in (read_image, image_size, lambda data: check_image(Image.open(io.BytesIO(data)))):
            with pytest.raises(ValueError, match="a JPEG of more than 40 scans; save it again as another file"):
                read(many)


def test_16_bits_are_the_same_in_every_form(tmp_path):
    """`load_image` of transformers cuts them off at 255."""
    levels = np.arange(48, dtype=np.uint16).reshape(6, 8) * 1285
    data = encoded(Image.fromarray(levels), "PNG")
    expected = PROCESSOR((levels, levels), return_tensors="pt")["pixel_values"]
    for source in (data, base64.b64encode(data).decode()):
        assert PROCESSOR((source, source), return_tensors="pt")["pixel_values"].equal(expected)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_images_are_upright(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = read_image(encoded(NOISE.crop((0, 0, 64, 32)), kind, exif=exif))
    assert image.size == (32, 64) and image.getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "TIFF"])
def test_of_several_frames_the_first(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    image = read_image(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert image.convert("RGB").getpixel((3, 3))[0] > 250


# What it refuses


def test_postscript_never_reaches_ghostscript(tmp_path, monkeypatch):
    """Pillow would run `gs`, if there is one, for a file that begins so, whatever its ending."""
    marker = tmp_path / "ran"
    gs = tmp_path / "gs"
    gs.write_text(f"#!/bin/sh\ntouch {marker}\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # nobody has looked for it yet
    path = tmp_path / "image.png"
    path.write_bytes(encoded(NOISE, "EPS"))
    for read in (read_image, image_size, lambda path: PROCESSOR((path, RGB))):
        with pytest.raises(READING_ERRORS, match="neither PNG, JPEG, TIFF"):
            read(path)
    assert not marker.exists()
    with pytest.raises(OSError):
        Image.open(path).load()
    assert marker.exists()  # so that the trap works


@pytest.mark.parametrize("kind", ["EPS", "PDF", "TGA", "PCX", "ICO", "SGI", "DDS", "IM"])
def test_other_formats_are_refused_by_name(tmp_path, kind):
    path = tmp_path / "image.png"
    path.write_bytes(encoded(NOISE, kind))
    said = "^pair 1, after image: cannot read '.*image.png' as an image .*neither PNG, JPEG, .* nor PPM"
    with pytest.raises(ValueError, match=said):
        PROCESSOR((RGB, path))
    with pytest.raises(READING_ERRORS, match="neither PNG"):
        image_size(path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(100_000, 100_000), (13_400, 13_400), (2**31 - 1, 1), (2**31 - 1, 2**31 - 1)])
def test_the_header_is_looked_at_before_anything_is_decoded(tmp_path, size):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_head(*size, chunk(b"IDAT", b"nothing that could be decoded"), chunk(b"IEND", b"")))
    for read in (read_image, image_size, lambda path: PROCESSOR((path, RGB))):
        with pytest.raises(ValueError, match="pixels.*bomb"):
            read(path)


@pytest.mark.parametrize("times", [1.5, 3])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_bound_holds_for_every_form(path, server, monkeypatch, times):
    server.content["/image"] = PNG
    text = base64.b64encode(PNG).decode()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(48 / times))
    sources = (path, PNG, io.BytesIO(PNG), {"bytes": PNG}, path.as_uri(), f"{server.url}/image", text)
    for source in (*sources, f"data:image/png;base64,{text}"):
        for read in (read_image, image_size):
            with pytest.raises(ValueError, match="pixels.*bomb"):
                read(source)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_raise_what_is_listed_and_nothing_else(tmp_path, name):
    data = BROKEN[name]
    path = tmp_path / "broken.png"
    path.write_bytes(data)
    for source in (path, {"bytes": data, "path": str(path)}):
        for read in (read_image, image_size):
            try:
                read(source)
            except READING_ERRORS as error:
                assert str(error).startswith("cannot read ") and name not in WHOLE_ALL_THE_SAME
            else:
                assert read is image_size or name in WHOLE_ALL_THE_SAME
    if name not in WHOLE_ALL_THE_SAME:
        with pytest.raises(ValueError, match="^pair 1, before image: "):
            PROCESSOR((path, RGB))


def test_readers_that_panic_are_told_too(path, monkeypatch):
    """Rust's panics are a BaseException that no `except Exception` sees; Ctrl-C must not be swallowed with them."""

    class PanicException(BaseException):
        pass

    for error, expected in ((PanicException("out of bounds"), ValueError), (KeyboardInterrupt(), KeyboardInterrupt)):

        def load(self, error=error):
            raise error

        monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
        with pytest.raises(expected):
            read_image(path)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for a writer
    for special in (tmp_path / "pipe.png", Path("/dev/zero")):
        with pytest.raises(ValueError, match="^pair 1, before image: .* is a pipe, a device or a socket"):
            PROCESSOR((special, RGB))
        with pytest.raises(ValueError, match="pass what it holds as bytes"):
            image_size(str(special))
    with pytest.raises(IsADirectoryError):
        read_image(tmp_path)
    (tmp_path / "around.png").symlink_to(tmp_path / "around.png")
    with pytest.raises(OSError) as told:
        read_image(tmp_path / "around.png")
    assert told.value.errno == errno.ELOOP


NO_SOURCES = {
    "a missing path": ("absent.png", FileNotFoundError, "absent.png"),
    "a long text": ("x" * 10_000, FileNotFoundError, "no such file"),
    "a path with a zero": ("a\0b.png", FileNotFoundError, "no such file"),
    "surrogates": ("\ud800.png", FileNotFoundError, "no such file"),
    "a missing URL of a file": ("file:///absent/a%20b.png", FileNotFoundError, "/absent/a b.png"),
    "a file of another machine": ("file://elsewhere/a.png", ValueError, "'elsewhere', only files of this machine"),
    "a scheme of others": ("s3://bucket/a.png", FileNotFoundError, "no such file"),
    "no URL": ("http://[", ValueError, "cannot load 'http://\\['"),
    "base64 of no image": ("data:image/png;base64,AAAA", OSError, "cannot load 'data:image.*check it"),
    "base64 that is none": ("data:image/png;base64,A", ValueError, "cannot load 'data:image"),
    "a dict of others": (
        {"before": b"", "after": b""},
        ValueError,
        r"as {'bytes': bytes, 'path': str}.* got {'before': bytes, 'after': bytes}",
    ),
    "an empty dict": ({}, ValueError, "'bytes': bytes, 'path': str.* got {}"),
    "neither": ({"bytes": None, "path": None}, ValueError, "got {'bytes': NoneType, 'path': NoneType}"),
    "numbers in a dict": ({"bytes": [1, 2], "path": 3}, ValueError, "got {'bytes': list, 'path': int}"),
    "a missing path in a dict": ({"bytes": None, "path": "absent.png"}, FileNotFoundError, "absent.png"),
    "a file of text": (io.StringIO("text"), ValueError, "opened as text; open it with mode 'rb'"),
    "a number": (3, ValueError, "got int"),
    "a list of numbers": ([[0, 1], [1, 0]], ValueError, "got list"),
    "nothing": (None, ValueError, "got NoneType"),
}


@pytest.mark.parametrize(("source", "kind", "message"), NO_SOURCES.values(), ids=NO_SOURCES)
def test_what_is_no_source(source, kind, message):
    for read in (read_image, image_size):
        with pytest.raises(kind, match=message):
            read(source)


def test_what_the_net_gives_is_told(server, monkeypatch):
    with pytest.raises(ValueError, match=r"^pair 1, before image: cannot load 'http://127.0.0.1:\d+/gone' .*404"):
        PROCESSOR((f"{server.url}/gone", RGB))
    server.content["/text"] = b"<html>"
    with pytest.raises(ValueError, match="cannot load 'http.*neither PNG"):
        PROCESSOR((f"{server.url}/text", RGB))
    server.content["/large"] = PNG
    monkeypatch.setattr(reading, "MAX_DOWNLOAD", 10)
    with pytest.raises(ValueError, match="cannot load 'http.*more than 10 bytes or"):
        read_image(f"{server.url}/large")
    monkeypatch.setattr(reading, "MAX_DOWNLOAD", 10_000)
    monkeypatch.setattr(reading, "MAX_SECONDS", -1)
    with pytest.raises(ValueError, match="or -1 seconds"):
        read_image(f"{server.url}/large")
    with pytest.raises(ValueError, match="cannot load 'http.*check it, or pass a path"):
        read_image("http://127.0.0.1:9/image")
