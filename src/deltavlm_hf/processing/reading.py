"""
The one reader of image files. Which formats are read, how many pixels and which layouts is decided here, from a file's
header, before anything is decoded; and so is what reading may raise: [`READING_ERRORS`].
"""

import base64
import errno
import io
import os
import re
import stat
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO
from urllib.parse import urlsplit
from urllib.request import url2pathname

import httpx
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile

from .gdal_reading import read_bands, size_of_bands

FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP", "JPEG2000", "PPM")
READING_ERRORS = (OSError, ValueError)

MAX_SCANS = 40  # of a JPEG; one that is sent in steps has about ten, and each costs a pass over all pixels
MAX_DOWNLOAD = 512 * 2**20  # bytes of an image behind a URL
MAX_SECONDS = 120  # that fetching one may take, 30 of them without a sign of life
_NEITHER = "neither PNG, JPEG, TIFF, WebP, GIF, BMP, JPEG 2000 nor PPM, or damaged at its beginning"

_LOST = "depth that was lost"  # in what Pillow keeps beside an image

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_JPEG2000 = (b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n")
_PPM = tuple(b"P" + kind for kind in (b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"f", b"F"))
_BEGINNINGS = (*_TIFF, *_JPEG2000, *_PPM, b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM")

_MARKER = re.compile(rb"\xff[^\0\xff\xd0-\xd7]")  # of a JPEG, within pixels and between them

# TIFF's tags, and what it calls numbers.
_SUBFILE, _WIDTH, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER = 254, 256, 258, 259, 262, 266
_STRIPS, _ORIENTATION, _SAMPLES, _PLANAR, _TILES, _EXTRA, _SAMPLE_FORMAT = 273, 274, 277, 284, 324, 338, 339
_NUMBERS = {1: "unsigned integers", 2: "signed integers", 3: "floats", 5: "complex integers", 6: "complex numbers"}
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _YCBCR = 0, 1, 2, 6


class Refused(ValueError):
    """An image that may be sound and is not taken all the same; the message has the way out."""


class Misread(Refused):
    """A file of a layout that Pillow reads wrongly or not at all."""


class Foreign(Misread):
    """One that GDAL, where rasterio is installed, reads right."""


def read_pixels(source: Any) -> Image.Image | np.ndarray:
    """
    Reads an image as [`read_image`] does; with rasterio installed also what Pillow does not read right, such as four
    bands of 16 bits: its red, green and blue, in their own depth.

    Returns:
        `PIL.Image.Image`, or of such a file an `np.ndarray` of shape `(H, W, 3)`.

    Args and Raises: as [`read_image`].
    """
    with _reading(source) as file:
        try:
            image = _open(file)
        except Foreign:
            if (bands := read_bands(file)) is None:
                raise
            return bands
        if _has_depth_to_lose(image) and (bands := read_bands(file)) is not None:
            return bands
        return _decode(image)


def read_image(source: Any) -> Image.Image:
    """
    Reads an image: header first, then pixels, turned upright by its EXIF orientation. Of several frames the first.
    With rasterio installed also what Pillow does not read right, if it has 8 bits.

    Args:
        source: a path (`str` or `os.PathLike`); bytes, or an open binary file, which stays open; what
            `datasets.Image(decode=False)` gives, `{"bytes": ..., "path": ...}`; a `file://`, `http://` or `https://`
            URL; `data:image/...` or base64 as transformers' `load_image` reads them.

    Returns:
        `PIL.Image.Image`: decoded, in its own mode.

    Raises:
        OSError: if it cannot be opened (`FileNotFoundError`, `IsADirectoryError`, `PermissionError`), or is in none of
            the formats that are read (`PIL.UnidentifiedImageError`).
        ValueError: if it is damaged, too large, no regular file, of a layout that Pillow misreads, or cannot be
            fetched. Nothing else is raised, whatever is in the file.
    """
    with _reading(source) as file:
        try:
            return _decode(_open(file))
        except Foreign:
            bands = read_bands(file)
            if bands is None or bands.dtype != np.uint8:
                raise
            return Image.fromarray(bands)


def _decode(image: Image.Image) -> Image.Image:
    if loses_depth(image):
        image.info[_LOST] = True
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    return image


def loses_depth(image: Image.Image) -> bool:
    """
    Whether the file has colours of 16 bits, of which Pillow gives the upper 8. Of an image that others opened and
    decoded nothing tells.
    """
    tiles = image.tile if isinstance(image, ImageFile) and not image.mode.startswith("I") else ()
    return _LOST in image.info or any(";16" in str(tile[3]) for tile in tiles)


def _has_depth_to_lose(image: Image.Image) -> bool:
    """Whether GDAL gives more of it, and the same else."""
    return loses_depth(image) and (not isinstance(image, TiffImageFile) or _is_plain(image.tag_v2))


def image_size(source: Any) -> tuple[int, int]:
    """
    Width and height of an image as its header has them. Nothing is decoded; what [`read_image`] would refuse by the
    header is refused here too.

    Args and Raises: as [`read_image`].
    """
    with _reading(source) as file:
        try:
            return _open(file).size
        except Foreign:
            if (size := size_of_bands(file)) is None:
                raise
            return size


def check_image(image: Image.Image) -> None:
    """
    Raises a ValueError for an image above Pillow's own bound, where Pillow itself warns up to twice the bound, for a
    JPEG that has not been decoded and would take a pass over all pixels many times, and for a TIFF of which Pillow
    takes too few bands or mixes them up.
    """
    pixels = image.width * image.height
    if Image.MAX_IMAGE_PIXELS is not None and pixels > Image.MAX_IMAGE_PIXELS:
        raise Refused(
            f"{image.width} x {image.height} pixels, at most {Image.MAX_IMAGE_PIXELS} in all are allowed "
            "(decompression bomb?); cut it into tiles, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        )
    file = image.fp if isinstance(image, JpegImageFile) else None  # none any more when it has been decoded
    if file is not None and _scans(file) > MAX_SCANS:
        raise Refused(f"a JPEG of more than {MAX_SCANS} scans; save it again as another file")
    if isinstance(image, TiffImageFile) and (fault := _misread(image, image.tag_v2)):
        kind = Foreign if _is_plain(image.tag_v2) else Misread
        raise kind(f"{_describe(image.tag_v2)}, {fault}; {_way_out(kind)}")


def open_file(path: str | os.PathLike) -> io.BufferedReader:
    """
    Opens a regular file: a pipe or a device would be waited for, perhaps for good.

    Raises:
        OSError: as `open`.
        ValueError: if it is neither a file nor a folder.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ValueError(f"{os.fspath(path)!r} is a pipe, a device or a socket, no file; pass what it holds as bytes")
    return open(path, "rb")  # given the path itself, Pillow 13 garbles uncompressed TIFFs with an orientation


@contextmanager
def _reading(source: Any) -> Iterator[BinaryIO]:
    """The file of an image. What Pillow and GDAL raise while it is read becomes ours."""
    path = source.get("path") if isinstance(source, Mapping) else None
    if isinstance(source, Mapping):
        source = _of_row(source)
    name = _name(source) if path is None else repr(path)[:200]
    said, way_out = f"cannot read {name} as an image", "replace the file or leave the pair out"
    if isinstance(source, str) and not os.path.exists(source):
        said, way_out = f"cannot load {name}", "check it, or pass a path"
        try:
            source = _from_text(source)
        except FileNotFoundError:
            raise
        except Exception as error:  # of the network, of a server, of base64, of the URL itself
            raise ValueError(f"{said} ({_reason(error)}); {way_out}") from error
    with _file(source) as file:
        try:
            yield file
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except UnidentifiedImageError as error:
            raise UnidentifiedImageError(f"{said} (cannot identify image file: {_NEITHER}); {way_out}") from error
        except Refused as error:
            raise ValueError(f"{said}: {error}") from error
        except BaseException as error:  # readers raise all kinds on damaged files; Rust's panics are no Exception
            raise ValueError(f"{said} ({_reason(error)}); {way_out}") from error


def why_unreadable(error: Exception) -> str:
    """What an image is that one of [`READING_ERRORS`] was raised for, without the names of files in it."""
    if isinstance(error.__cause__, Refused):
        return f"not taken: {str(error.__cause__).partition(';')[0]}"
    return f"no image that can be read, or damaged; {', '.join(FORMATS)} are taken"


def _reason(error: BaseException) -> str:
    """In one line."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _of_row(source: Mapping) -> Any:
    """What an undecoded image of `datasets` is in: its bytes or, without, the file at its path."""
    content, path = source.get("bytes"), source.get("path")
    if isinstance(content, (bytes, bytearray, memoryview)):
        return content
    if content is None and isinstance(path, (str, os.PathLike)):
        return path if "://" in str(path) else Path(path)
    given = ", ".join(f"{key!r}: {type(value).__name__}" for key, value in source.items())
    raise ValueError(
        f"expected an image as {{'bytes': bytes, 'path': str}}, of which one may be None, got {{{given}}}"
    )


def _name(source: Any) -> str:
    """What an image is called in messages."""
    if isinstance(source, (str, os.PathLike)):
        return repr(os.fspath(source)[:200])
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"{len(source)} bytes"
    if hasattr(source, "read"):
        return "an open file"
    raise ValueError(
        "expected a PIL image, numpy array, torch tensor, path, URL, bytes or open file, "
        f"got {type(source).__name__}; several pairs go as [(before, after), ...]"
    )


def _file(source: Any) -> BinaryIO:
    """A file of our own with the content of a path, bytes or an open file."""
    if isinstance(source, (str, os.PathLike)):
        return open_file(source)
    if hasattr(source, "read"):
        try:
            source.seek(0)
        except (AttributeError, OSError):  # a stream: it begins where it is
            pass
        source = source.read()
    if isinstance(source, str):
        raise ValueError("got a file that was opened as text; open it with mode 'rb'")
    return io.BytesIO(bytes(source))


def _from_text(text: str) -> Path | bytes:
    """What stands behind a text that is no path here: a URL, or an image as base64."""
    start = text[:8].lower()
    if start.startswith("file:"):
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost"):
            raise ValueError(f"it lies on {parts.netloc!r}, only files of this machine are read")
        return Path(url2pathname(parts.path))
    if start.startswith(("http://", "https://")):
        return _fetch(text)
    if start.startswith("data:"):
        return base64.decodebytes(text.partition(",")[2].encode())
    try:
        content = base64.decodebytes(text.encode())
    except ValueError:
        content = b""
    if not content.startswith(_BEGINNINGS):
        raise FileNotFoundError(errno.ENOENT, "no such file (nor base64 of an image)", text[:200])
    return content


def _fetch(url: str) -> bytes:
    """The content behind a URL, within bounds of size and time."""
    content = bytearray()
    end = time.monotonic() + MAX_SECONDS
    with httpx.stream("GET", url, timeout=30, follow_redirects=True) as response:
        response.raise_for_status()
        for piece in response.iter_bytes():
            content += piece
            if len(content) > MAX_DOWNLOAD or time.monotonic() > end:
                raise ValueError(f"more than {MAX_DOWNLOAD} bytes or {MAX_SECONDS} seconds")
    return bytes(content)


def _open(file: BinaryIO) -> Image.Image:
    """A file's image, undecoded; refused if its header tells that it is too large or would be misread."""
    if not file.read(1):
        raise ValueError("it is empty")
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise Refused(f"far too many pixels (decompression bomb?); cut it into tiles: {error}") from error
    except Exception as error:
        if found := _unreadable(file):
            kind, reason = found
            raise kind(f"{reason}, which Pillow cannot read; {_way_out(kind)}") from error
        raise
    check_image(image)
    if image.format == "JPEG2000" and image.mode in ("LA", "PA", "RGBA") and not _declares_alpha(file):
        bands = len(image.getbands())
        reason = f"a JPEG 2000 of {bands} bands, of which Pillow would take the last for alpha"
        raise Foreign(f"{reason}; {_way_out(Foreign)}")
    return image


def _scans(file: IO[bytes]) -> int:
    """How often a JPEG goes over its pixels. Its markers are followed as libjpeg does, to the end or a fault."""
    place = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(place)
    scans, at = 0, 2
    while marker := _MARKER.search(data, at):
        at = marker.end()
        if marker[0] in (b"\xff\xd8", b"\xff\xd9"):
            break
        if marker[0] != b"\xff\x01":  # the only one without content
            scans += marker[0] == b"\xff\xda"
            at += int.from_bytes(data[at : at + 2])
    return scans


def _way_out(kind: type[Misread]) -> str:
    install = "install rasterio to have it read, or " if kind is Foreign else ""
    return f"{install}read it with rasterio or tifffile and pass its red, green and blue as an array"


def _unreadable(file: BinaryIO) -> tuple[type[Misread], str] | None:
    """What a file is that Pillow does not open though it may be sound."""
    file.seek(0)
    head = file.read(16)
    if head.startswith(_JPEG2000):
        return Foreign, "a JPEG 2000 that is damaged, or of more than 4 bands"
    if head.startswith(b"MM\0+"):
        return Misread, "a BigTIFF of big-endian byte order"
    if not head.startswith(_TIFF):
        return None
    try:
        tags = ImageFileDirectory_v2(head if head.startswith(b"II+\0") else head[:8])
        file.seek(tags.next)
        tags.load(file)
        whole = _WIDTH in tags and (_STRIPS in tags or _TILES in tags)
        return (Foreign if _is_plain(tags) else Misread, _describe(tags)) if whole else None
    except Exception:  # the tags are damaged
        return None


def _is_plain(tags: ImageFileDirectory_v2) -> bool:
    """Whether a TIFF's numbers are to be taken as they stand, the more the brighter, which is what GDAL gives."""
    bits, count = tags.get(_BITS, (1,)), tags.get(_SAMPLES, 1)
    return (
        tags.get(_PHOTOMETRIC) in (_BLACK_IS_ZERO, _RGB)
        and tags.get(_ORIENTATION, 1) == tags.get(_FILL_ORDER, 1) == 1
        and not tags.get(_SUBFILE, 0) & 0b101
        and {*tags.get(_SAMPLE_FORMAT, (1,))} <= {1, 2, 3}
        and len(bits) == count
        and len({*bits}) == 1
    )


def _bands(tags: ImageFileDirectory_v2) -> int:
    return max(tags.get(_SAMPLES, 1), len(tags.get(_BITS, (1,))))


def _describe(tags: ImageFileDirectory_v2) -> str:
    numbers = _NUMBERS.get(tags.get(_SAMPLE_FORMAT, (1,))[0], "numbers of unknown kind")
    planar = ", band after band" if tags.get(_PLANAR, 1) == 2 else ""
    bands = _bands(tags)
    return (
        f"a TIFF of {bands} band{'s' * (bands != 1)} of {tags.get(_BITS, (1,))[0]}-bit {numbers}{planar}, "
        f"compression {tags.get(_COMPRESSION, 1)}"
    )


def _misread(image: Image.Image, tags: ImageFileDirectory_v2) -> str | None:
    """
    Why Pillow's picture of a TIFF is not what the file declares; None if it is. These were found by reading files of
    every layout with Pillow 11 to 13 (`tests/processing/test_tiffs.py`).
    """
    bands, given = _bands(tags), len(image.getbands())
    if bands > given:
        return f"of which Pillow would take {given}"
    raw = tags.get(_COMPRESSION, 1) == 1
    photometric = tags.get(_PHOTOMETRIC)
    bits = max(tags.get(_BITS, (1,)))
    if tags.get(_PLANAR, 1) == 2 and bands == 1 and raw and (bits != 8 or photometric != _BLACK_IS_ZERO):
        return "which Pillow misreads"
    if tags.get(_PLANAR, 1) == 2 and bands > 1:
        plain = photometric == _RGB and tags.get(_EXTRA, ()) in ((), (2,)) and bands == 3 + len(tags.get(_EXTRA, ()))
        if not plain or (raw and bits != 8) or tags.get(_FILL_ORDER, 1) != 1:
            return "which Pillow mixes up"
    if tags.prefix == b"MM" and not raw and image.mode in ("I", "F"):
        return "whose byte order Pillow mixes up"
    if image.mode == "L" and tags.get(_SAMPLE_FORMAT, (1,))[0] == 2:
        return "whose sign Pillow drops"
    if photometric == _WHITE_IS_ZERO and image.mode not in ("1", "L"):
        return "where more is darker, which Pillow takes for brighter"
    if photometric == _YCBCR and raw and given == 3:
        return "as YCbCr, which Pillow takes for RGB"
    if tags.get(_SUBFILE, 0) & 0b101:
        return "whose first image is a thumbnail or a mask"
    return None


def _declares_alpha(file: BinaryIO) -> bool:
    """Whether the header of a JPEG 2000 file says that one of its channels is opacity."""
    place = file.tell()
    file.seek(0)
    head = file.read(2**16).partition(b"jp2c")[0]
    file.seek(place)
    _, found, box = head.partition(b"cdef")
    if not found:
        return False
    (channels,) = struct.unpack_from(">H", box)
    kinds = struct.unpack_from(f">{3 * channels}H", box, 2)[1::3]
    return bool({1, 2} & set(kinds))
