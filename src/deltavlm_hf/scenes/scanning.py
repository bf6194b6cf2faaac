"""Asking about a scene, tile by tile."""

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ..data.asked import questions_of
from ..data.classes import classes_of
from ..data.masks import to_mask
from ..inference import stream_answers
from ..inference.engines import Engine
from ..inference.identity import commit_of
from ..inference.loading import name_model
from ..journal import Journal
from ..modeling import DeltaVLMForConditionalGeneration
from ..processing import DeltaVLMProcessor
from .answers import FoundObject, Source, TileAnswer
from .objects import trace
from .scene import OVERLAP, Scene, TooLittleGround

QUESTIONS = ("binary", "count", "grid")


def scan(
    model: DeltaVLMForConditionalGeneration,
    processor: DeltaVLMProcessor,
    before: str | os.PathLike,
    after: str | os.PathLike,
    *,
    questions: Sequence[str] | None = None,
    journal: str | os.PathLike | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    num_workers: int = 1,
    generate_kwargs: dict[str, Any] | None = None,
    **scene_options,
) -> Iterator[TileAnswer]:
    """
    Asks the same questions about every tile of a scene, and has the model draw its masks, if it makes any.

    Args:
        model ([`DeltaVLMForConditionalGeneration`]): on any device.
        processor ([`DeltaVLMProcessor`]): the model's.
        before (`str` or `Path`): raster of the first date.
        after (`str` or `Path`): raster of the second date.
        questions, journal, limit, batch_size, num_workers: see [`answer_tiles`].
        generate_kwargs (`dict`, *optional*): for `generate`, see [`~deltavlm_hf.inference.asking.answer`].
        scene_options: see [`open_scene`].

    Yields:
        [`TileAnswer`], see [`answer_tiles`].

    Raises:
        ValueError: see [`Scene`] and [`answer_tiles`].
    """
    scene = open_scene(model, processor, before, after, **scene_options)
    return answer_tiles(
        model,
        processor,
        scene,
        questions=questions,
        journal=journal,
        limit=limit,
        batch_size=batch_size,
        num_workers=num_workers,
        **(generate_kwargs or {}),
    )


def open_scene(
    model: DeltaVLMForConditionalGeneration,
    processor: DeltaVLMProcessor,
    before: str | os.PathLike,
    after: str | os.PathLike,
    *,
    resolution: float | None = None,
    overlap: float | None = None,
    **options,
) -> Scene:
    """
    A scene as a model knows the world.

    Args:
        resolution (`float`, *optional*): metres per pixel; by default the configuration's `ground_resolution`, and
            where that is not said, date 1's own.
        overlap (`float`, *optional*): by default a quarter of a tile for a model with masks, whose objects are counted
            in cores. Words speak of whole tiles: without masks there is none, so that nothing is counted twice.
        options: see [`Scene`].
    """
    config = model.config
    return Scene(
        before,
        after,
        processor.image_processor.size["height"],
        resolution=config.ground_resolution if resolution is None else resolution,
        overlap=(OVERLAP if config.mask_classes else 0.0) if overlap is None else overlap,
        **options,
    )


def answer_tiles(
    model: DeltaVLMForConditionalGeneration,
    processor: DeltaVLMProcessor,
    scene: Scene,
    *,
    questions: Sequence[str] | None = None,
    journal: str | os.PathLike | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    num_workers: int = 1,
    engine: Engine = stream_answers,
    **generate_kwargs,
) -> Iterator[TileAnswer]:
    """
    Asks about the tiles of a scene.

    Args:
        model ([`DeltaVLMForConditionalGeneration`]): on any device.
        processor ([`DeltaVLMProcessor`]): the model's.
        scene ([`Scene`]): see [`open_scene`].
        questions (`Sequence[str]`, *optional*): questions, or names of tasks, see
            [`~deltavlm_hf.data.asked.questions_of`]; by default whether anything changed, how many roads and
            buildings (or what else the model learnt), and in which cells.
        journal (`str` or `Path`, *optional*): a file that each tile is written to as it is answered. A scan that was
            killed goes on from there; a tile that failed is asked again.
        limit (`int`, *optional*): only the first so many tiles.
        batch_size (`int`, *optional*, defaults to 32): tiles encoded, and questions answered, at once.
        num_workers (`int`, *optional*, defaults to 1): processes that read tiles ahead of the model.
        engine (`Callable`, *optional*): what reads and answers, see
            [`~deltavlm_hf.inference.cluster.Cluster.stream_answers`]; by default this machine.
        generate_kwargs: for `generate`.

    Yields:
        [`TileAnswer`]: of each tile, those in the journal first.

    Raises:
        ValueError: if an argument cannot be, or the journal is of another scan.
    """
    asked, classes = QUESTIONS if questions is None else questions, classes_of(model.config)
    dialogues = list(dict.fromkeys(questions_of(each, classes) for each in asked))
    source = describe(model, scene, tuple(turn for turns in dialogues for turn in turns), generate_kwargs)
    chosen = scene.chosen[:limit]
    kept = None if journal is None else Journal(Path(journal), _header(scene, source), ("tile",))
    done = {index for (index,), entry in kept.entries.items() if not entry["failed"]} if kept else set()
    stream = engine(
        model,
        processor,
        scene,
        dialogues,
        indices=[index for index in chosen if index not in done],
        batch_size=batch_size,
        num_workers=num_workers,
        masks=bool(source.kinds),
        **generate_kwargs,
    )

    def answers() -> Iterator[TileAnswer]:
        for index in chosen:
            if kept and index in done:
                yield TileAnswer.from_entry(kept.entries[(index,)], source, scene.tiling[index])
        while some := [_understand(scene, source, answered) for answered in islice(stream, batch_size)]:
            if kept:
                kept.append(*(answer.to_entry() for answer in some))
            yield from some

    return answers()


def _understand(scene: Scene, source: Source, answered: Any) -> TileAnswer:
    tile = scene.tiling[answered.index]
    if answered.error is not None:
        failed = not isinstance(answered.error, TooLittleGround)
        return TileAnswer(source, tile, reason=str(answered.error), failed=failed)
    objects: tuple[FoundObject, ...] = ()
    if answered.mask is not None and (mask := to_mask(answered.mask, source.kinds, source.classes)).any():
        objects = trace(mask, scene.known(tile), tile, source.kinds, source.classes)
    return TileAnswer(source, tile, tuple(answered.answers), objects)


def describe(
    model: DeltaVLMForConditionalGeneration, scene: Scene, questions: tuple[str, ...], options: dict[str, Any]
) -> Source:
    """What the answers about a scene have in common."""
    facts = {
        **scene.facts(),
        "model": name_model(model.config.name_or_path),
        "commit": commit_of(model),
        "generate": {key: repr(value) for key, value in options.items()},
    }
    return Source(scene.grid, questions, tuple(model.config.mask_classes or ()), facts, classes_of(model.config))


def _header(scene: Scene, source: Source) -> dict[str, Any]:
    written = [os.stat(raster.path).st_mtime if os.path.isfile(raster.path) else None for raster in scene.rasters]
    said = {"questions": list(source.questions), "kinds": list(source.kinds)}
    return {**source.facts, **said, "written": written}
