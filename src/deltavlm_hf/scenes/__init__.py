"""Georeferenced scenes: two rasters in, a map of answers out. Needs the extra `[geo]`."""

from ..extras import missing
from ..lazy import lazy_names

_MODULES = {
    "FoundObject": "answers",
    "Grid": "grid",
    "Scene": "scene",
    "TileAnswer": "answers",
    "scan": "scanning",
    "to_geodataframe": "layers",
}

__all__ = list(_MODULES)

try:
    import geopandas  # noqa: F401
    import rasterio  # noqa: F401
    import skimage  # noqa: F401
except ImportError as error:
    raise missing("Scenes need more packages", "geo") from error

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
