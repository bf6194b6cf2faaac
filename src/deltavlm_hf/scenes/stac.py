"""The raster that a STAC item speaks of."""

import json
import os
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

_IMAGES = ("image/tiff", "image/vnd.stac.geotiff", "image/jp2", "image/png", "image/jpeg")


def locate(path: str | os.PathLike) -> str:
    """
    What GDAL is to open: of `item.json`, a [STAC](https://stacspec.org) item's file, the href of its asset `visual`,
    or of the only one that is an image; of `item.json#red` that of the asset `red`. Any other path as it is.

    Raises:
        ValueError: if the file is no STAC item, has no such asset, or the asset is not on this machine.
        OSError: if the file cannot be read.
    """
    name, _, key = os.fspath(path).partition("#")
    if not name.lower().endswith((".json", ".geojson")):
        return os.fspath(path)
    assets = _assets(Path(name))
    if not key:
        images = [each for each, asset in assets.items() if str(asset.get("type", "")).startswith(_IMAGES)]
        data = [each for each in images if "data" in (assets[each].get("roles") or ())] or images
        key = "visual" if "visual" in assets or len(data) != 1 else data[0]
    if key not in assets:
        raise ValueError(
            f"{name!r} has no asset {key!r}, but {', '.join(assets) or 'none at all'}: name one, as in "
            f"{Path(name).name}#{next(iter(assets), 'visual')}."
        )
    href = str(assets[key].get("href", ""))
    url = urlsplit(href)
    if url.scheme == "file":
        return url2pathname(url.path)
    if url.scheme and not os.path.isabs(href) and len(url.scheme) > 1:  # one letter is a drive
        raise ValueError(f"{name!r}: its asset {key!r} is at {href}, not on this machine: fetch it, give its path.")
    return str(Path(name).parent / unquote(href))


def _assets(path: Path) -> dict[str, dict]:
    try:
        item = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is no STAC item: it cannot be read as JSON ({error}).") from error
    assets = item.get("assets") if isinstance(item, dict) and "stac_version" in item else None
    if not isinstance(assets, dict) or not all(isinstance(asset, dict) for asset in assets.values()):
        raise ValueError(f"{str(path)!r} is no STAC item: expected `stac_version` and `assets`, or a raster.")
    return assets
