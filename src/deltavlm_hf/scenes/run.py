"""A scan from end to end: asked, written to files, summed up."""

import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from ..inference.processes import keeping
from ..modeling import DeltaVLMForConditionalGeneration
from ..processing import DeltaVLMProcessor
from .heat import write_heat
from .layers import WORDS, Layers, check_output, write_layers
from .page import write_page
from .picture import draw_scene
from .raster import CACHE, WARP_MEMORY
from .scanning import answer_tiles
from .scene import Scene

_RASTERS, _PICTURES, _PAGES = (".tif", ".tiff"), (".png", ".jpg", ".jpeg"), (".html", ".htm")
_TIMED = 4  # tiles that an estimate of time rests on


@dataclass(frozen=True)
class Outputs:
    """
    Where a scan goes.

    Attributes:
        layers (`Path`): `.gpkg`, `.parquet` or `.geojson`, see [`write_layers`].
        heat (`Path`, *optional*): how far the dates differ, `.tif`, see [`write_heat`].
        preview (`Path`, *optional*): a picture, `.png` or `.jpg`, see [`draw_scene`].
        html (`Path`, *optional*): a page, `.html`, see [`write_page`].

    Raises:
        ValueError: for another suffix.
    """

    layers: Path
    heat: Path | None = None
    preview: Path | None = None
    html: Path | None = None

    def __post_init__(self):
        check_output(self.layers)
        for path, suffixes in ((self.heat, _RASTERS), (self.preview, _PICTURES), (self.html, _PAGES)):
            if path is not None and path.suffix.lower() not in suffixes:
                raise ValueError(f"{str(path)!r}: expected a name that ends with {' or '.join(suffixes)}.")

    @property
    def files(self) -> list[Path]:
        """All that are wanted."""
        return [path for path in (self.layers, self.heat, self.preview, self.html) if path is not None]


@dataclass
class Scanned:
    """
    What came of a scan.

    Attributes:
        files (`list[Path]`): what was written.
        lines (`list[str]`): the sum of it, to be read.
        failed (`int`): tiles that could not be read or answered.
    """

    files: list[Path]
    lines: list[str]
    failed: int


def scan_to_files(
    model: DeltaVLMForConditionalGeneration,
    processor: DeltaVLMProcessor,
    scene: Scene,
    outputs: Outputs,
    *,
    limit: int | None = None,
    num_workers: int = 1,
    **options,
) -> Scanned:
    """
    Asks about all tiles of a scene and writes what came of it. What is answered is kept in `OUTPUT.journal`, so that a
    scan that was killed goes on. That folder goes when all is written, or stays while tiles have failed, which the
    next run asks again.

    Args: see [`answer_tiles`] and [`Outputs`].

    Raises:
        ValueError: if an argument cannot be, or the journal is of another scan.
        BlockingIOError: if another run writes the same file.
    """
    inputs = [raster.path for raster in scene.rasters if os.path.exists(raster.path)]
    for path in outputs.files:
        if path.exists() and any(map(path.samefile, inputs)):
            raise ValueError(f"{str(path)!r} is a raster of the scene itself: choose another name.")
    with keeping(outputs.layers) as folder:
        journal = folder / "tiles.jsonl"
        answers = answer_tiles(
            model, processor, scene, journal=journal, limit=limit, num_workers=num_workers, **options
        )
        total = len(scene.chosen[:limit])
        found = sorted(tqdm(answers, "tiles", total, unit="tile"), key=lambda answer: answer.tile.index)
        layers = Layers(found)
        files = write_layers(outputs.layers, layers)
        if outputs.heat is not None:
            write_heat(outputs.heat, model, processor, scene, limit=limit, num_workers=num_workers)
        if outputs.preview is not None:
            draw_scene(outputs.preview, scene, found)
        if outputs.html is not None:
            write_page(outputs.html, scene, found)
        failed = sum(answer.failed for answer in found)
        if not failed:
            journal.unlink()
    files += outputs.files[1:]
    return Scanned(files, sum_up(layers), failed)


def sum_up(layers: Layers) -> list[str]:
    """What was found, in a few lines."""
    tiles, areas, said = Counter[str](), Counter[str](), Counter[str]()
    classes = layers.source.classes
    columns = [each.count_column for each in classes]
    for row in layers.tiles():
        tiles[row["changed"]] += 1
        areas[row["changed"]] += row["area_m2"]
        said.update({name: row[name] for name in columns if row[name] is not None})
    names = dict(zip(WORDS.values(), ("changed", "unchanged", "unknown"), strict=True))
    lines = [
        f"{tiles[what]} of {tiles.total()} tiles {name} ({areas[what] / 1e4:,.2f} ha)" for what, name in names.items()
    ]
    if layers.source.kinds:
        numbers, found = Counter[str](), Counter[str]()
        for row in layers.objects():
            numbers[row["kind"]] += 1
            found[row["kind"]] += row["area_m2"]
        lines += [f"{kind}: {numbers[kind]} objects, {found[kind]:,.0f} m²" for kind in layers.source.kinds]
    elif said:
        numbered = [f"{each.plural}: {said[each.count_column]}" for each in classes]
        lines.append(f"{', '.join(numbered)}, as answers number them")
        if layers.source.facts["tiles_overlap"]:
            lines[-1] += "; what lies where tiles overlap is counted in each of them"
    return lines


def describe_scene(scene: Scene) -> list[str]:
    """On which grid, in what stretch and in how many tiles a scene is read."""
    across, down = scene.grid.metres()
    facts = scene.facts()
    return [
        f"grid: {scene.grid.width} x {scene.grid.height} pixels of {across:.3g} x {down:.3g} m",
        f"bands: {facts['bands'][0]} and {facts['bands'][1]}, stretch: {facts['stretch']}"
        + ", histograms matched" * facts["match_histograms"],
        f"tiles: {len(scene.chosen)} of {len(scene)}, {scene.size} pixels wide",
    ]


def estimate(
    model: DeltaVLMForConditionalGeneration,
    processor: DeltaVLMProcessor,
    scene: Scene,
    *,
    limit: int | None = None,
    batch_size: int = 32,
    num_workers: int = 1,
    **options,
) -> list[str]:
    """
    What a scan would take: memory by arithmetic, time from a few tiles, which are asked about one after another.

    Args: see [`answer_tiles`].
    """
    tiles = scene.chosen[:limit]
    tried = [tiles[number] for number in np.linspace(0, len(tiles) - 1, min(_TIMED, len(tiles))).astype(int).tolist()]
    chosen, scene.chosen = scene.chosen, tried
    try:
        start = time.perf_counter()
        asked = list(answer_tiles(model, processor, scene, batch_size=1, num_workers=0, **options))
        seconds = (time.perf_counter() - start) / len(asked)
    finally:
        scene.chosen = chosen
    weights = sum(each.numel() * each.element_size() for each in model.parameters())
    pair = 2 * 3 * scene.size**2 * 4
    reading = (num_workers + 1) * (CACHE + WARP_MEMORY * 2**20) + 3 * batch_size * pair
    return [
        f"memory, by arithmetic: {weights / 2**20:,.0f} MiB of weights and {reading / 2**20:,.0f} MiB for reading, "
        "beside what Python, its packages and the model's activations take; the scene's size does not matter",
        f"time, from {len(asked)} tiles one by one: {len(tiles) * seconds / 60:,.1f} minutes for {len(tiles)} tiles "
        f"({seconds:.2f} s each); batches and reading ahead make it less",
    ]
