"""TIFF files written by hand, in layouts that Pillow cannot write: band after band, many bands, any byte order."""

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

COMPRESSIONS = {"raw": 1, "lzw": 5, "jpeg": 7, "deflate": 8, "packbits": 32773, "lerc": 34887}
_FORMATS = {"u": 1, "i": 2, "f": 3, "c": 6}


def tiff(
    bands: np.ndarray,
    *,
    planar: bool = False,
    compression: str = "raw",
    photometric: int | None = None,
    extra: Sequence[int] | None = None,
    order: str = "<",
    big: bool = False,
    tiles: int | None = None,
    tags: dict[int, Sequence[int] | None] | None = None,
) -> bytes:
    """
    Args:
        bands: `(bands, H, W)` of any dtype.
        planar: band after band, not pixel after pixel.
        photometric: by default 2 (RGB) for three or four bands, else 1 (the more the brighter).
        extra: of bands beyond those; by default 0 (unspecified) for each of them.
        tiles: their side, in place of one strip.
        tags: more of them, or others; None leaves one out.
    """
    count, height, width = bands.shape
    photometric = (2 if count in (3, 4) else 1) if photometric is None else photometric
    extra = [0] * (count - (3 if photometric in (2, 6) else 1)) if extra is None else extra
    stored = bands.astype(bands.dtype.newbyteorder(order))
    pieces = []
    for part in stored[:, None] if planar else [stored]:
        for top in range(0, height, tiles or height):
            for left in range(0, width, tiles or width):
                piece = part[:, top : top + (tiles or height), left : left + (tiles or width)]
                if tiles:
                    piece = np.pad(piece, ((0, 0), (0, tiles - piece.shape[1]), (0, tiles - piece.shape[2])))
                pieces.append(_compress(np.moveaxis(piece, 0, -1), compression))
    sizes = [len(piece) for piece in pieces]
    start = 16 if big else 8
    offsets = [start + sum(sizes[:number]) for number in range(len(sizes))]
    content = {
        256: [width],
        257: [height],
        258: [bands.dtype.itemsize * 8] * count,
        259: [COMPRESSIONS[compression]],
        262: [photometric],
        277: [count],
        284: [2 if planar else 1],
        339: [_FORMATS[bands.dtype.kind]] * count,
        **({338: list(extra)} if extra else {}),
        **(
            {322: [tiles], 323: [tiles], 324: offsets, 325: sizes}
            if tiles
            else {273: offsets, 278: [height], 279: sizes}
        ),
        **(tags or {}),
    }
    return _file(b"".join(pieces), {tag: values for tag, values in content.items() if values is not None}, order, big)


def _compress(piece: np.ndarray, compression: str) -> bytes:
    """A strip or tile, `(H, W, bands)`."""
    data = piece.tobytes()
    match compression:
        case "raw" | "lerc":  # LERC, which Pillow does not know, is not looked into
            return data
        case "deflate":
            return zlib.compress(data)
        case "packbits":
            runs = (data[start : start + 128] for start in range(0, len(data), 128))
            return b"".join(bytes([len(run) - 1]) + run for run in runs)
        case "lzw":  # literals alone, with a new table before codes grow to ten bits
            codes = [code for start in range(0, len(data), 200) for code in (256, *data[start : start + 200])]
            bits = "".join(f"{code:09b}" for code in (*codes, 257))
            return int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")
        case "jpeg":
            buffer = io.BytesIO()
            Image.fromarray(piece[..., 0] if piece.shape[-1] == 1 else piece).save(buffer, "JPEG", quality=100)
            return buffer.getvalue()
    raise ValueError(compression)


def _file(data: bytes, tags: dict[int, Sequence[int]], order: str, big: bool) -> bytes:
    """One directory, behind the data; all values are 32-bit integers."""
    mark = b"II" if order == "<" else b"MM"
    word, room = ("Q", 8) if big else ("I", 4)
    base = 16 if big else 8
    place = base + len(data) + len(data) % 2
    head = mark + (struct.pack(f"{order}HHHQ", 43, 8, 0, place) if big else struct.pack(f"{order}HI", 42, place))
    entries, beyond = b"", b""
    behind = place + (8 if big else 2) + len(tags) * (20 if big else 12) + room
    for tag, values in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(values)}I", *values)
        if len(packed) > room:
            where = behind + len(beyond)
            beyond += packed
            packed = struct.pack(order + word, where)
        entries += struct.pack(f"{order}HH{word}", tag, 4, len(values)) + packed.ljust(room, b"\0")
    directory = struct.pack(order + ("Q" if big else "H"), len(tags)) + entries + bytes(room)
    return head + data + bytes(len(data) % 2) + directory + beyond
