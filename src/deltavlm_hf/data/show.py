"""A contact sheet of records: both dates, what changed, questions and answers, in one HTML file."""

import base64
import html
import io
from collections.abc import Iterable
from pathlib import Path
from string import Template

import datasets
import numpy as np
from PIL import Image

from ..files import write_text
from ..processing.reading import READING_ERRORS, read_image
from .changechat import find_classes, load_changechat
from .classes import ROADS_AND_BUILDINGS, Classes
from .generated import load_generated
from .masks import class_colours
from .questions import TASKS
from .rows import as_seen, first_rows, turns_of, undecoded
from .rules import load_mask

COLOURS = {"road": (255, 200, 0), "building": (255, 0, 60)}  # of other classes see [`class_colours`]
SIDE = 256  # pixels an image is shown with, at most

_PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>$title</title>
<style>
body { font: 15px/1.4 system-ui, sans-serif; margin: 1.5rem; color: #222; background: #f5f5f5 }
article { background: #fff; border-radius: 6px; padding: 1rem; margin-bottom: 1rem; box-shadow: 0 1px 3px #0003 }
h2 { font-size: 1rem; margin: 0 0 .5rem }
.images { display: flex; flex-wrap: wrap; gap: .75rem; margin-bottom: .5rem }
figure { margin: 0 }
figcaption { font-size: .8rem; color: #666 }
img { display: block; width: ${side}px; max-width: 100%; image-rendering: pixelated }
dt { font-weight: 600; margin-top: .4rem }
dd { margin: 0 0 0 1rem; color: #0b5394 }
.unchanged { color: #666 } .changed { color: #b00020 }
$colours
</style>
<h1>$title</h1>
$articles
</html>
""")


def choose_rows(
    source: str | Path | None,
    images: str | Path | None = None,
    *,
    split: str = "train",
    task: str | None = None,
    number: int = 24,
    seed: int = 0,
    revision: str | None = None,
) -> tuple[datasets.Dataset | datasets.IterableDataset, str, Classes]:
    """
    Rows for a contact sheet, with masks, a title, and the classes of masks.

    Args:
        source (`str` or `Path`, *optional*): see [`load_changechat`]; without, scenes are generated.
        images (`str` or `Path`, *optional*), split (`str`, *optional*), revision (`str`, *optional*): of `source`.
        task (`str`, *optional*): rows of this task only.
        number (`int`, *optional*, defaults to 24): how many rows, at most.
        seed (`int`, *optional*, defaults to 0): chooses them; of generated scenes, that of the first one.
    """
    tasks = (task,) if task else TASKS
    if source is None:
        rows = load_generated(-(-number // len(tasks)), seed, tasks=tasks, masks=True, streaming=True)
        return rows.take(number), f"Generated scenes, seeds from {seed}", ROADS_AND_BUILDINGS
    rows = load_changechat(source, images, split=split, tasks=tasks, masks=True, revision=revision)
    return first_rows(rows.shuffle(seed=seed), number), f"{source}: {split}", find_classes(source, revision)


def write_sheet(
    rows: Iterable[dict], path: str | Path, title: str = "Records", classes: Classes = ROADS_AND_BUILDINGS
) -> int:
    """
    Writes a contact sheet that needs nothing but a browser. The file appears when it is complete.

    Args:
        rows (`Iterable[dict]`): as [`load_changechat`] and [`load_generated`] give them. Files that are missing or
            broken are shown as such. With a `mask` column what changed is laid over the second date.
        path (`str` or `Path`): the HTML file to write.
        title (`str`, *optional*).
        classes ([`Classes`], *optional*): of the masks; by default roads and buildings.

    Returns:
        `int`: how many records it shows.
    """
    undecoded_rows = undecoded(rows) if isinstance(rows, datasets.Dataset) else rows
    articles = [_article(row, classes) for row in undecoded_rows]
    colours = _colours(classes).items()
    page = _PAGE.substitute(
        title=html.escape(title),
        side=SIDE,
        articles="\n".join(articles),
        colours=" ".join(f".{_style(kind)} {{ color: rgb{colour} }}" for kind, colour in colours),
    )
    write_text(path, page)
    return len(articles)


def _colours(classes: Classes) -> dict[str, tuple[int, int, int]]:
    return COLOURS if classes == ROADS_AND_BUILDINGS else class_colours(classes.names, classes)


def _style(kind: str) -> str:
    return kind.replace(" ", "-")


def _article(row: dict, classes: Classes) -> str:
    state = {True: "changed", False: "unchanged", None: "unknown"}[row["changed"]]
    heading = f'{html.escape(row["id"])} · {row["task"]} · <span class="{state}">{state}</span>'
    figures = [figure("before", row["before"]), figure("after", row["after"])]
    if row.get("mask") is not None:
        legend = " ".join(f'<b class="{_style(kind)}">{kind}</b>' for kind in classes.names)
        figures.append(figure(f"changes: {legend}", row["after"], row["mask"], classes))
    texts = [(question, [answer]) for question, answer in turns_of(row)]
    if len(row["captions"]) > 1:
        texts = [(texts[0][0], row["captions"])]
    turns = "".join(
        f"<dt>{html.escape(question)}</dt>" + "".join(f"<dd>{html.escape(answer)}</dd>" for answer in answers)
        for question, answers in texts
    )
    images = "".join(figures)
    return f'<article><h2>{heading}</h2>\n<div class="images">{images}</div>\n<dl>{turns}</dl></article>'


def figure(
    caption: str,
    image: Image.Image | dict,
    mask: Image.Image | dict | None = None,
    classes: Classes = ROADS_AND_BUILDINGS,
) -> str:
    """
    An image within a page, perhaps with a mask laid over it; what is wrong with a file stands in its place.

    Args:
        caption (`str`): HTML.
        image (`PIL.Image.Image` or `dict`): decoded, or as `datasets` has it before.
        mask (`PIL.Image.Image` or `dict`, *optional*).
        classes ([`Classes`], *optional*): of the mask.
    """
    try:
        shown = as_seen(_decoded(image))
        if mask is not None:
            shown = overlay(shown, _decoded(mask), classes)
    except READING_ERRORS as error:
        return f"<figure><p>{html.escape(str(error))}</p><figcaption>{caption}</figcaption></figure>"
    buffer = io.BytesIO()
    shown.thumbnail((SIDE, SIDE))
    shown.save(buffer, "png")
    picture = f'<img src="{data_url(buffer.getvalue())}" alt="">'
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def data_url(png: bytes) -> str:
    """A picture that needs no file beside the page."""
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _decoded(image: Image.Image | dict) -> Image.Image:
    return image if isinstance(image, Image.Image) else read_image(image)


def overlay(image: Image.Image, mask: Image.Image, classes: Classes = ROADS_AND_BUILDINGS) -> Image.Image:
    """An image with a change mask laid over it in colours; see [`load_mask`] for its values."""
    pixels = np.asarray(image.convert("RGB"), np.float32)
    read = Image.fromarray(load_mask(mask, classes=classes))
    values = np.asarray(read.resize(image.size, Image.Resampling.NEAREST))
    for kind, colour in _colours(classes).items():
        changed = values == classes.values[kind]
        pixels = np.where(changed[..., None], (pixels + np.array(colour, np.float32)) / 2, pixels)
    return Image.fromarray(pixels.astype(np.uint8))
