"""Image files that are broken, each in its way, and files that are meant to harm."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from tiffs import tiff

RGB = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_head(width: int, height: int, *chunks: bytes) -> bytes:
    """A PNG that says how large it is, and holds nothing."""
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + b"".join(chunks)
    )


PNG = encoded(Image.fromarray(RGB), "PNG")


def text_bomb() -> bytes:
    """A megabyte of text in a kilobyte, a hundred times."""
    packed = b"Comment\0\0" + zlib.compress(bytes(2**20))
    return png_head(8, 8, *[chunk(b"zTXt", packed)] * 100, PNG[33:])


def in_steps(scans: int) -> bytes:
    """A JPEG whose last scan is sent again and again."""
    data = encoded(NOISE, "JPEG", progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * scans + data[-2:]


WHOLE_ALL_THE_SAME = ("PNG with a broken chunk", "PNG with broken EXIF")  # their pixels are
COMPRESSION_123 = b"\x03\x01\x03\0\x01\0\0\0\x7b\0"
BROKEN = {
    "empty": b"",
    "text": b"no image",
    "PNG, cut": encoded(NOISE, "PNG")[:2000],
    "PNG with a broken chunk": encoded(NOISE, "PNG").replace(b"IEND", b"\0\0\0\0"),
    "PNG without pixels": png_head(8, 8, chunk(b"IEND", b"")),
    "PNG of no width": png_head(0, 8, chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b"")),
    "PNG with megabytes of text": text_bomb(),
    "PNG with a bomb for its profile": png_head(
        8, 8, chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(2**26))), PNG[33:]
    ),
    "PNG with broken EXIF": png_head(8, 6, chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff"), PNG[33:]),
    "JPEG, cut": encoded(NOISE, "JPEG")[:900],
    "JPEG, head alone": encoded(NOISE, "JPEG")[:200],
    "TIFF, cut": encoded(NOISE, "TIFF")[:600],
    "TIFF, head alone": b"II*\0\x08\0\0\0",
    "TIFF, that points to itself": b"II*\0\x08\0\0\0\x01\0\x00\x01\x04\0\x01\0\0\0\x08\0\0\0\x08\0\0\0",
    "TIFF of an unknown compression": encoded(NOISE, "TIFF").replace(
        b"\x03\x01\x03\0\x01\0\0\0\x01\0", COMPRESSION_123
    ),
    "WebP, cut": encoded(NOISE, "WEBP")[:700],
    "GIF, cut": encoded(NOISE, "GIF")[:900],
    "BMP, cut": encoded(NOISE, "BMP")[:900],
    "BMP of other bits": encoded(NOISE, "BMP").replace(b"\x01\0\x18\0", b"\x01\0\x19\0"),
    "JPEG 2000, cut": encoded(NOISE, "JPEG2000")[:150],
    "PPM, cut": encoded(NOISE, "PPM")[:900],
    "PPM without numbers": b"P6\nmany pixels",
    "PPM of no size": b"P6\n0 0\n255\n",
}


BOMB = png_head(100_000, 100_000, chunk(b"IDAT", b""), chunk(b"IEND", b""))

REFUSED = {  # by every reader of this package
    **{name: data for name, data in BROKEN.items() if name not in WHOLE_ALL_THE_SAME},
    "bomb": BOMB,
    "JPEG of many scans": in_steps(100),
    "PostScript": encoded(NOISE, "EPS"),
    "four bands of which 0 is white": tiff(
        np.zeros((4, 8, 8), np.uint8), planar=True, compression="deflate", photometric=0
    ),
}


def write_refused(folder: Path) -> list[str]:
    """Files with all of these, and a pipe, all named as if they were PNG. Their names."""
    names = []
    for number, data in enumerate(REFUSED.values()):
        names.append(f"refused_{number:02}.png")
        (folder / names[-1]).write_bytes(data)
    os.mkfifo(folder / "refused_pipe.png")
    return [*names, "refused_pipe.png"]
