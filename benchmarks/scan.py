"""
What a scan costs against the size of the scene: time, peak memory, and what a kill costs.

    python benchmarks/scan.py --output docs/benchmarks                    # scan.json and scan.md; an hour on two cores
    python benchmarks/scan.py --sides 2000 4000 --folder /tmp/scenes      # smaller ones, kept
    python benchmarks/scan.py --only reading                              # of one scene: the share of reading

Scenes are generated ones laid side by side: 16 bits, four bands, tiled, half a metre per pixel, with a strip of
nodata; date 2 is in another UTM zone and resolution. Each is scanned by `deltavlm scan` in a process of its own, is
killed when half of its tiles are answered, and goes on. Memory is the resident set of each process, sampled every
tenth of a second; processor time, which other work beside it disturbs least, is that of all processes together.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import geopandas
import numpy as np
import psutil
import rasterio
import rasterio.shutil
from affine import Affine
from rasterio.enums import Resampling
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

from deltavlm_hf.data.scenes import generate_scene
from deltavlm_hf.inference.loading import load_model
from deltavlm_hf.scenes.scanning import answer_tiles, open_scene

CORNER = Affine(0.5, 0, 735_000, 0, -0.5, 5_000_000)  # in zone 33, west of where zone 34 begins
KINDS, PATCH, STRIP = 60, 96, 500  # different scenes, pixels of each, columns of nodata


def make(folder: Path, side: int) -> tuple[Path, Path]:
    """Both dates of a scene, written window by window."""
    paths = folder / f"before_{side}.tif", folder / f"after_{side}.tif"
    if all(path.exists() for path in paths):
        return paths
    scenes, order = [generate_scene(seed) for seed in range(KINDS)], np.random.default_rng(side)
    same = folder / f"same_{side}.tif"
    profile = {"driver": "GTiff", "width": side, "height": side, "count": 4, "dtype": "uint16", "nodata": 0}
    profile |= {"tiled": True, "compress": "deflate", "crs": "EPSG:32633", "transform": CORNER, "bigtiff": "if_safer"}
    with rasterio.open(paths[0], "w", **profile) as before, rasterio.open(same, "w", **profile) as after:
        for top in range(0, side, PATCH):
            row = [scenes[number] for number in order.integers(0, KINDS, -(-side // PATCH))]
            height = min(PATCH, side - top)
            for file, date in ((before, "before"), (after, "after")):
                line = np.concatenate([getattr(scene, date) for scene in row], axis=1)[:height, :side]
                values = 300 + 10 * line.astype(np.uint16)
                if date == "before":
                    values[:, :STRIP] = 0
                bands = np.concatenate([values, values[..., :1]], axis=2).transpose(2, 0, 1)
                file.write(bands, window=Window(0, top, side, height))
    with rasterio.open(same) as file:
        with WarpedVRT(file, crs="EPSG:32634", resampling=Resampling.cubic, warp_mem_limit=64) as warped:
            rasterio.shutil.copy(warped, paths[1], driver="GTiff", tiled=True, compress="deflate", bigtiff="if_safer")
    same.unlink()
    return paths


def watch(process: subprocess.Popen, journal: Path, stop_at: int | None) -> dict:
    """Follows a scan to its end, or kills it when so many tiles are answered; its peak memory in MiB."""
    start, peaks, answered, spent = time.perf_counter(), {"main": 0, "reading": 0}, 0, {}
    while process.poll() is None:
        try:
            main = psutil.Process(process.pid)
            peaks["main"] = max(peaks["main"], main.memory_info().rss)
            peaks["reading"] = max([peaks["reading"], *(each.memory_info().rss for each in main.children())])
            for each in (main, *main.children()):
                spent[each.pid] = sum(each.cpu_times()[:2])
        except psutil.NoSuchProcess:
            pass
        answered = journal.read_bytes().count(b"\n") - 1 if journal.exists() else answered
        if stop_at is not None and answered >= stop_at:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.1)
    memory = {f"{name}_mib": round(peak / 2**20) for name, peak in peaks.items()}
    seconds = {"seconds": round(time.perf_counter() - start, 1), "cpu_seconds": round(sum(spent.values()), 1)}
    return {**seconds, **memory, "answered": answered}


def measure(folder: Path, side: int, model: str, workers: int) -> dict:
    paths = make(folder, side)
    output = folder / f"scan_{side}.gpkg"
    output.unlink(missing_ok=True)
    command = [sys.executable, "-m", "deltavlm_hf", "scan", *map(str, paths), "--model", model]
    command += ["--output", str(output), "--workers", str(workers)]
    journal = output.with_name(f"{output.name}.journal") / "tiles.jsonl"
    scene = open_scene(*load_model(model), *paths)
    half = len(scene.chosen) // 2
    runs = [
        watch(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), journal, stop_at)
        for stop_at in (half, None)
    ]
    tiles = geopandas.read_file(output, layer="tiles")
    assert len(tiles) == len(scene.chosen) and tiles.is_valid.all()
    seconds = sum(run["seconds"] for run in runs)
    return {
        "side": side,
        "tiles": len(tiles),
        "changed": tiles.changed.value_counts().to_dict(),
        "seconds": round(seconds, 1),
        "milliseconds_per_tile": round(1000 * seconds / len(tiles), 1),
        "cpu_milliseconds_per_tile": round(1000 * sum(run["cpu_seconds"] for run in runs) / len(tiles), 1),
        "peak_mib": max(run["main_mib"] for run in runs),
        "peak_reading_mib": max(run["reading_mib"] for run in runs),
        "killed_at": runs[0]["answered"],
        "runs": runs,
    }


def reading(folder: Path, side: int, model: str) -> dict:
    """How long tiles take to be read, and to be read and answered, in one process."""
    paths = make(folder, side)
    loaded = load_model(model)
    scene = open_scene(*loaded, *paths)
    chosen = [index for index in scene.chosen if scene.tiling[index].left > STRIP][:64]
    start = time.perf_counter()
    for index in chosen:
        scene[index]
    read = time.perf_counter() - start
    scene.chosen = chosen
    start = time.perf_counter()
    list(answer_tiles(*loaded, scene, num_workers=0))
    both = time.perf_counter() - start
    per_tile = {name: round(1000 * each / len(chosen), 2) for name, each in (("read_ms", read), ("all_ms", both))}
    return {"side": side, **per_tile, "share_of_reading": round(read / both, 3)}


def report(figures: dict) -> str:
    """The figures as a page; times are relative to the smallest scene's."""
    sizes, read = figures["sizes"], figures["reading"]
    spent = [each["cpu_milliseconds_per_tile"] * each["tiles"] for each in sizes]
    rows = [
        f"| {each['side']} x {each['side']} | {each['tiles']} | {each['tiles'] / sizes[0]['tiles']:.2f} "
        f"| {time / spent[0]:.2f} | {each['peak_mib']} | {each['peak_reading_mib']} | {each['killed_at']} |"
        for each, time in zip(sizes, spent, strict=True)
    ]
    return f"""# What a scan costs against the size of the scene

`python benchmarks/scan.py --output docs/benchmarks`: {figures["model"]} model, {figures["cores"]} CPU cores, scenes
of 16 bits and four bands at half a metre, the dates in two UTM zones. Each scan was killed when half of its tiles were
answered, and went on; its layers were opened by geopandas and are valid.

| scene, pixels | tiles | tiles, relative | processor time, relative | peak memory, MiB | peak of the process that \
reads, MiB | answered when killed |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}

Of the time that a tile takes in one process, {100 * read["share_of_reading"]:.0f} % is reading and warping.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[3000, 6000, 12000], help="of scenes, in pixels")
    parser.add_argument("--folder", type=Path, default=Path("scenes"), help="where they go and stay")
    parser.add_argument("--model", default="small")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", choices=("sizes", "reading"))
    parser.add_argument("--output", type=Path, help="folder for scan.json and scan.md")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    figures: dict = {"cores": os.cpu_count(), "model": args.model}
    if args.only != "reading":
        figures["sizes"] = [measure(args.folder, side, args.model, args.workers) for side in args.sides]
    if args.only != "sizes":
        figures["reading"] = reading(args.folder, args.sides[0], args.model)
    print(json.dumps(figures, indent=2))
    if args.output:
        (args.output / "scan.json").write_text(json.dumps(figures, indent=2) + "\n")
        (args.output / "scan.md").write_text(report(figures))


if __name__ == "__main__":
    main()
