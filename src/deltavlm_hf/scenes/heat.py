"""How far the dates differ, as a raster: a cloud-optimised GeoTIFF on date 1's grid."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
import rasterio.shutil
import torch
from rasterio.enums import Resampling
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window
from tqdm.auto import tqdm

from ..files import placing
from ..inference.asking import pair_pixels
from ..inference.stream import read_ahead
from ..modeling import DeltaVLMForConditionalGeneration
from ..modeling.vision_backbone import resize
from ..processing import DeltaVLMImageProcessor, DeltaVLMProcessor
from .grid import read_grid
from .raster import gdal, open_raster
from .scene import Scene, TooLittleGround

logger = logging.getLogger(__name__)

_CREATION = {"compress": "deflate", "predictor": 3, "bigtiff": "if_safer"}


def write_heat(
    path: str | os.PathLike,
    model: DeltaVLMForConditionalGeneration,
    processor: DeltaVLMProcessor,
    scene: Scene,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    num_workers: int = 1,
) -> None:
    """
    Writes how far the dates differ: of a model with masks the probability of the likeliest class, of others the
    distance of the dates' pair features (the change map of [`~DeltaVLMModel.explain`]), which has no unit. Tiles are
    encoded once more for it.

    Args:
        path (`str` or `Path`): of the file, written whole or not at all; what is unknown, cannot be read or was not
            asked for is NaN.
        model ([`DeltaVLMForConditionalGeneration`]): on any device.
        processor ([`DeltaVLMProcessor`]): the model's.
        scene ([`Scene`]): its tiles are taken.
        limit (`int`, *optional*): only the first so many tiles.
        batch_size, num_workers (`int`, *optional*): see [`answer_tiles`].
    """
    path, chosen = Path(path), scene.chosen[:limit]
    with gdal(), placing(path) as new:
        drawn = new.with_name(f"{new.stem}.tiles.tif")
        try:
            _draw(drawn, model, processor, scene, chosen, batch_size, num_workers)
            _optimise(drawn, new, scene)
        finally:
            drawn.unlink(missing_ok=True)


def _draw(
    path: Path,
    model: DeltaVLMForConditionalGeneration,
    processor: DeltaVLMProcessor,
    scene: Scene,
    chosen: Sequence[int],
    batch_size: int,
    num_workers: int,
) -> None:
    """The cores of all tiles, on the scene's own grid."""
    grid = scene.grid
    profile = {"driver": "GTiff", "count": 1, "dtype": "float32", "nodata": np.nan, "tiled": True}
    place = {"crs": grid.crs, "transform": grid.transform, "width": grid.width, "height": grid.height}
    read = read_ahead(_Reader(scene, processor.image_processor), chosen, num_workers, ahead=2 * batch_size)
    with rasterio.open(path, "w", **profile, **place, **_CREATION, sparse_ok=True) as file:
        waiting: list[tuple[int, np.ndarray, np.ndarray]] = []
        for index, found in zip(chosen, tqdm(read, desc="heat", total=len(chosen), unit="tile"), strict=True):
            if not isinstance(found, Exception):
                waiting.append((index, *found))
            elif not isinstance(found, TooLittleGround):
                logger.warning("%s has no heat: %s", scene.tiling[index].name, found)
            if len(waiting) == batch_size:
                _write(file, model, scene, waiting)
                waiting = []
        _write(file, model, scene, waiting)


def _write(file, model, scene: Scene, waiting: list[tuple[int, np.ndarray, np.ndarray]]) -> None:
    if not waiting:
        return
    heat = measure(model, torch.from_numpy(np.concatenate([pixels for _, pixels, _ in waiting])), scene.size)
    for (index, _, known), each in zip(waiting, heat.cpu().numpy(), strict=True):
        tile = scene.tiling[index]
        left, top, right, bottom = tile.core
        core = np.where(known, each, np.nan)[tile.core_within]
        file.write(core, 1, window=Window(left, top, right - left, bottom - top))


def measure(model: DeltaVLMForConditionalGeneration, pixel_values: torch.Tensor, size: int) -> torch.Tensor:
    """
    How far the dates of pairs differ.

    Args:
        model ([`DeltaVLMForConditionalGeneration`]): on any device.
        pixel_values (`torch.Tensor` of shape `(B, 2, 3, H, W)`): before and after.
        size (`int`): side of what is returned.

    Returns:
        `torch.Tensor` of shape `(B, size, size)`, float32.
    """
    pixel_values = pixel_values.to(model.device, model.dtype)
    if model.config.mask_classes:
        heat = model.segment(pixel_values=pixel_values).amax(1, keepdim=True)  # (B, K, H, W) -> (B, 1, H, W)
    else:
        with torch.inference_mode():
            before, after = model.encode_pair(pixel_values).float().chunk(2, dim=1)  # (B, N, D) each
        distance = (after - before)[:, model.config.num_prefix_tokens :].norm(dim=-1)
        heat = distance.unflatten(1, model.config.grid(*pixel_values.shape[-2:])).unsqueeze(1)  # (B, 1, h, w)
    return resize(heat, (size, size)).squeeze(1)


def _optimise(drawn: Path, path: Path, scene: Scene) -> None:
    """Onto date 1's own grid, with overviews."""
    with open_raster(scene.before.path) as first:
        grid = read_grid(first, None)
        own = {"crs": first.crs, "width": first.width, "height": first.height}
    with rasterio.open(drawn) as file:
        options = {"driver": "COG", "overview_resampling": "average", **_CREATION}
        if grid.transform == scene.grid.transform:
            rasterio.shutil.copy(file, path, **options)
        else:
            with WarpedVRT(file, transform=grid.transform, resampling=Resampling.bilinear, **own) as warped:
                rasterio.shutil.copy(warped, path, **options)


@dataclass(frozen=True)
class _Reader:
    scene: Scene
    image_processor: DeltaVLMImageProcessor

    def __call__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        before, after, known = self.scene.read_tile(index)
        return pair_pixels(self.image_processor, (before, after)), known
