"""Georeferenced rasters, made of generated scenes that lie side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from affine import Affine
from rasterio.enums import Resampling
from rasterio.warp import calculate_default_transform, reproject

from deltavlm_hf.data.scenes import ScenePair, generate_scene

UTM_33, UTM_34 = "EPSG:32633", "EPSG:32634"
CORNER = Affine(0.5, 0, 735_000, 0, -0.5, 5_000_000)  # of pixels of half a metre, just west of where zone 34 begins


def lay_out(seeds: Sequence[int], columns: int, size: int = 96) -> tuple[np.ndarray, np.ndarray, list[ScenePair]]:
    """Scenes row by row: before and after `(H, W, 3)`, and the scenes."""
    scenes = [generate_scene(seed, size) for seed in seeds]
    rows = [scenes[start : start + columns] for start in range(0, len(scenes), columns)]
    before, after = (
        np.concatenate([np.concatenate([getattr(scene, date) for scene in row], axis=1) for row in rows])
        for date in ("before", "after")
    )
    return before, after, scenes


def as_reflectance(image: np.ndarray, low: int = 300, high: int = 2850) -> np.ndarray:
    """8 bits to four bands of 16 bits that fill a part of the range, as a satellite's do; the last is infrared."""
    values = (low + image.astype(np.float64) * (high - low) / 255).round().astype(np.uint16)
    return np.concatenate([values, values.mean(2, keepdims=True).astype(np.uint16)], axis=2)


def write_raster(
    path: Path, image: np.ndarray, transform: Affine = CORNER, crs: str | None = UTM_33, **options
) -> Path:
    """`(H, W, bands)` as a tiled GeoTIFF."""
    height, width, bands = image.shape
    profile: dict[str, Any] = {"driver": "GTiff", "tiled": True, "blockxsize": 64, "blockysize": 64}
    profile |= {"width": width, "height": height, "count": bands, "dtype": image.dtype} | options
    with rasterio.open(path, "w", crs=crs, transform=transform, **profile) as file:
        file.write(image.transpose(2, 0, 1))
    return path


def rewarp(source: Path, target: Path, crs: str = UTM_34, resolution: float = 0.3) -> Path:
    """The same ground in another system and resolution; around it nothing is known (0)."""
    with rasterio.open(source) as file:
        transform, width, height = calculate_default_transform(
            file.crs, crs, file.width, file.height, *file.bounds, resolution=resolution
        )
        warped = np.zeros((file.count, height, width), file.dtypes[0])
        for band in range(file.count):
            reproject(
                rasterio.band(file, band + 1),
                warped[band],
                dst_transform=transform,
                dst_crs=crs,
                resampling=Resampling.cubic,
            )
    return write_raster(target, warped.transpose(1, 2, 0), transform, crs, nodata=0)
