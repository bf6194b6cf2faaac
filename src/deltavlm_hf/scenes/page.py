"""A scene as a page: both dates under a slider, what was found as layers. One file, which fetches nothing."""

import base64
import io
import os
from collections.abc import Sequence
from html import escape

import shapely
from PIL import Image

from ..files import writing
from .answers import TileAnswer
from .layers import TOLD
from .picture import Finding, findings, scale_bar, show_dates
from .scene import Scene

_MOST = 2000  # pixels of the longer side

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 1rem; color: #222 }}
#scene {{ position: relative; max-width: {width}px; aspect-ratio: {width} / {height}; background: #222 }}
#scene img, #scene svg {{ position: absolute; inset: 0; width: 100%; height: 100% }}
#cells, #objects {{ pointer-events: none }}
#before {{ clip-path: inset(0 50% 0 0) }}
#swipe {{ width: 100%; max-width: {width}px; display: block; margin: .5rem 0 }}
label {{ margin-right: 1rem; white-space: nowrap }}
.key {{ display: inline-block; width: 1em; height: 1em; border: 1px solid #222; vertical-align: -2px }}
.bar {{ height: 5px; background: #222 }}
table {{ border-collapse: collapse; margin-top: 1rem }}
td {{ padding: .1rem .8rem .1rem 0; vertical-align: top }}
</style></head><body>
<h1>{title}</h1>
<div id="scene"><img src="{after}" alt="{after_name}"><img id="before" src="{before}" alt="{before_name}">
<svg viewBox="0 0 {columns} {rows}" preserveAspectRatio="none">
"""
_TAIL = """</svg></div>
<input id="swipe" type="range" min="0" max="100" value="50" aria-label="left {before_name}, right {after_name}">
<div>{toggles}</div><div>{legend}</div>
<div style="max-width: {width}px"><div class="bar" style="width: {bar:.2f}%"></div>{bar_name}</div>
<table>{facts}</table>
<script>
const swipe = document.getElementById("swipe"), before = document.getElementById("before");
swipe.oninput = () => {{ before.style.clipPath = "inset(0 " + (100 - swipe.value) + "% 0 0)" }};
for (const box of document.querySelectorAll("[data-layer]"))
  box.onchange = () => {{ document.getElementById(box.dataset.layer).style.display = box.checked ? "" : "none" }};
</script></body></html>
"""


def write_page(path: str | os.PathLike, scene: Scene, answers: Sequence[TileAnswer]) -> None:
    """
    Writes a page with a swipe between the dates, layers to turn on and off, and each tile's answers under the pointer.

    Args:
        path (`str` or `Path`): of the file, written whole or not at all.
        scene ([`Scene`]): what was scanned.
        answers (`Sequence[TileAnswer]`): what came of it.
    """
    before, after, scale = show_dates(scene, _MOST)
    facts = answers[0].source.facts
    pixels, bar_name = scale_bar(scene, scale, before.width)
    drawn: dict[str, list[Finding]] = {}
    for found in findings(answers):
        drawn.setdefault(found.layer, []).append(found)
    legend = {found.label: found.colour for layer in drawn.values() for found in layer}
    with writing(path) as file:
        names = {"before_name": escape(facts["before"]), "after_name": escape(facts["after"])}
        file.write(
            _HEAD.format(
                title=escape(f"{facts['before']} → {facts['after']}"),
                width=before.width,
                height=before.height,
                columns=scene.grid.width,
                rows=scene.grid.height,
                before=_embed(before),
                after=_embed(after),
                **names,
            )
        )
        for layer, found_there in drawn.items():
            file.write(f'<g id="{layer}">\n')
            file.writelines(map(_draw, found_there))
            file.write("</g>\n")
        file.write(
            _TAIL.format(
                toggles="".join(
                    f'<label><input type="checkbox" data-layer="{layer}" checked> {layer}</label>' for layer in drawn
                ),
                legend="".join(
                    f'<label><span class="key" style="background: rgb{colour}"></span> {escape(label)}</label>'
                    for label, colour in legend.items()
                ),
                width=before.width,
                bar=100 * pixels / before.width,
                bar_name=bar_name,
                facts="".join(f"<tr><td>{name}</td><td>{escape(str(facts[name]))}</td></tr>" for name in TOLD),
                **names,
            )
        )


def _embed(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _draw(found: Finding) -> str:
    outline = "".join(
        "M" + "L".join(f"{column:g} {row:g}" for column, row in ring.coords[:-1]) + "Z"
        for part in shapely.get_parts(found.shape)
        for ring in (part.exterior, *part.interiors)
    )
    return (
        f'<path d="{outline}" fill="rgb{found.colour}" fill-opacity="{found.cover / 255:.2f}" fill-rule="evenodd" '
        f'stroke="rgb{found.colour}" vector-effect="non-scaling-stroke"><title>{escape(found.text)}</title></path>\n'
    )
