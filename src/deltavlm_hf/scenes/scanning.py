"""Asking about a scene, tile by tile."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..data.masks import to_mask
from ..evaluation.answering import identify
from ..inference import stream_answers
from ..journal import Journal
from ..modeling import DeltaVLMForConditionalGeneration
from ..processing import DeltaVLMProcessor
from .answers import FoundObject, Source, TileAnswer, default_questions
from .objects import trace
from .scene import OVERLAP, Scene, TooLittleGround


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
    **generate_kwargs,
) -> Iterator[TileAnswer]:
    """
    Asks about the tiles of a scene.

    Args:
        model ([`DeltaVLMForConditionalGeneration`]): on any device.
        processor ([`DeltaVLMProcessor`]): the model's.
        scene ([`Scene`]): see [`open_scene`].
        questions (`Sequence[str]`, *optional*): by default whether anything changed, how many roads and buildings, and
            in which cells: [`~deltavlm_hf.data.questions.INSTRUCTIONS`].
        journal (`str` or `Path`, *optional*): a file that each tile is written to as it is answered. A scan that was
            killed goes on from there; a tile that failed is asked again.
        limit (`int`, *optional*): only the first so many tiles.
        batch_size (`int`, *optional*, defaults to 32): tiles encoded, and questions answered, at once.
        num_workers (`int`, *optional*, defaults to 1): processes that read tiles ahead of the model.
        generate_kwargs: for `generate`.

    Yields:
        [`TileAnswer`]: of each tile, those in the journal first.

    Raises:
        ValueError: if an argument cannot be, or the journal is of another scan.
    """
    questions = tuple(default_questions() if questions is None else questions)
    source = describe(model, scene, questions, generate_kwargs)
    chosen = scene.chosen[:limit]
    kept = None if journal is None else Journal(Path(journal), _header(source), ("tile",))
    done = {index for (index,), entry in kept.entries.items() if not entry["failed"]} if kept else set()

    def answers() -> Iterator[TileAnswer]:
        for index in chosen:
            if kept and index in done:
                yield TileAnswer.from_entry(kept.entries[(index,)], source, scene.tiling[index])
        waiting = [index for index in chosen if index not in done]
        for answered in stream_answers(
            model,
            processor,
            scene,
            questions,
            indices=waiting,
            batch_size=batch_size,
            num_workers=num_workers,
            masks=bool(source.kinds),
            **generate_kwargs,
        ):
            answer = _understand(scene, source, answered)
            if kept:
                kept.append(answer.to_entry())
            yield answer

    return answers()


def _understand(scene: Scene, source: Source, answered: Any) -> TileAnswer:
    tile = scene.tiling[answered.index]
    if answered.error is not None:
        failed = not isinstance(answered.error, TooLittleGround)
        return TileAnswer(source, tile, reason=str(answered.error), failed=failed)
    objects: tuple[FoundObject, ...] = ()
    if answered.mask is not None and (mask := to_mask(answered.mask, source.kinds)).any():
        objects = trace(mask, scene.known(tile), tile, source.kinds)
    return TileAnswer(source, tile, tuple(answered.answers), objects)


def describe(
    model: DeltaVLMForConditionalGeneration, scene: Scene, questions: tuple[str, ...], options: dict[str, Any]
) -> Source:
    """What the answers about a scene have in common."""
    name, _, commit = identify(model)[0].rpartition(": ")
    facts = {
        **scene.facts(),
        "model": Path(name).name if os.path.isdir(name) else name,
        "commit": commit,
        "generate": {key: repr(value) for key, value in options.items()},
    }
    return Source(scene.grid, questions, tuple(model.config.mask_classes or ()), facts)


def _header(source: Source) -> dict[str, Any]:
    return {**source.facts, "questions": list(source.questions), "kinds": list(source.kinds)}
