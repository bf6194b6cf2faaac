"""`deltavlm scan`."""

import argparse
import sys
from pathlib import Path

from .arguments import (
    FAILED,
    add_command,
    add_engine,
    add_llm_url,
    add_model,
    add_workers,
    generate_kwargs,
    load,
    positive_integer,
)


def add(subparsers) -> None:
    command = add_command(
        subparsers,
        "scan",
        run,
        "Scan two georeferenced rasters of any size, tile by tile, and write a map of what changed. A scan that was "
        "stopped goes on.",
    )
    add_argument = command.add_argument
    add_argument("before", metavar="BEFORE", help="raster of the first date: whatever GDAL opens, or item.json#asset")
    add_argument("after", metavar="AFTER", help="raster of the second date, in any reference system and resolution")
    add_argument(
        "--output",
        type=Path,
        default=Path("scan.gpkg"),
        metavar="FILE",
        help=".gpkg, .parquet or .geojson (default: %(default)s)",
    )
    add_argument("--heat", type=Path, metavar="TIF", help="how far the dates differ, as a cloud-optimised GeoTIFF")
    add_argument("--preview", type=Path, metavar="PNG", help="a picture of the scene with what was found")
    add_argument("--html", type=Path, metavar="HTML", help="a page with a swipe between the dates and the layers")
    add_argument(
        "--questions",
        nargs="+",
        metavar="QUESTION",
        help="questions, or names of tasks: caption, binary, count, grid, dialogue (default: binary count grid)",
    )
    add_argument("--resolution", type=float, metavar="M", help="metres per pixel (default: the model's, or BEFORE's)")
    add_argument("--bands", type=int, nargs=3, metavar="N", help="red, green and blue (default: as the files say)")
    add_argument(
        "--stretch",
        nargs="+",
        metavar=("LOW", "HIGH"),
        help="what is black and white at both dates, or `none` (default: percentiles 2 and 98 of both dates together; "
        "8 bits stay as they are)",
    )
    add_argument("--match-histograms", action="store_true", help="bring AFTER's values to BEFORE's distribution")
    add_argument(
        "--overlap", type=float, metavar="SHARE", help="of a tile (default: 0.25, of a model without masks 0)"
    )
    add_argument(
        "--min-valid",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="of a tile that must be known at both dates, else it is unknown (default: %(default)s)",
    )
    add_argument("--aoi", type=Path, metavar="FILE", help="areas: only tiles that touch one (GeoJSON, ...)")
    add_argument("--limit", type=positive_integer, metavar="N", help="only the first N tiles")
    add_argument("--dry-run", action="store_true", help="say what it would take, write nothing")
    add_argument("--batch-size", type=positive_integer, default=32, metavar="N", help="default: %(default)s")
    add_workers(command)
    add_engine(command)
    add_llm_url(command)
    add_model(command)


def run(args: argparse.Namespace) -> int:
    from ..inference.engines import choose_engine
    from ..scenes.run import Outputs, describe_scene, estimate, scan_to_files
    from ..scenes.scanning import open_scene

    outputs = Outputs(args.output, args.heat, args.preview, args.html)
    stretch = _stretch(args.stretch)
    engine, device = choose_engine(args.engine, args.model, args.device, args.ray_address, args.actors, args.llm_url)
    if args.heat or args.dry_run:  # this process asks the model itself
        device = args.device
    model, processor = load(args.model, device, args.llm_url)
    scene = open_scene(
        model,
        processor,
        args.before,
        args.after,
        resolution=args.resolution,
        overlap=args.overlap,
        bands=args.bands,
        stretch=stretch,
        match_histograms=args.match_histograms,
        min_valid=args.min_valid,
        aoi=args.aoi,
    )
    _say([*describe_scene(scene), *(f"warning: {each}" for each in scene.warnings())])
    options = {"questions": args.questions, "limit": args.limit, "batch_size": args.batch_size}
    options |= {"num_workers": args.workers, **generate_kwargs(args)}
    if args.dry_run:
        print("\n".join(estimate(model, processor, scene, **options)))
        return 0
    done = scan_to_files(model, processor, scene, outputs, engine=engine, **options)
    print("\n".join(done.lines))
    _say(map(str, done.files))
    if done.failed:
        _say([f"{done.failed} tiles failed; their reasons are in the layer `tiles`, and the next run asks them again"])
    return FAILED if done.failed else 0


def _say(lines) -> None:
    print("\n".join(f"deltavlm: {line}" for line in lines), file=sys.stderr)


def _stretch(words: list[str] | None) -> str | list[float] | None:
    if words is None or words == ["none"]:
        return None if words is None else "none"
    try:
        return [float(word) for word in words]
    except ValueError:
        raise ValueError(f"--stretch {' '.join(words)}: expected two numbers, or `none`.") from None
