"""Rows of a data set: their columns, what a record becomes there, and images that are looked at later."""

from collections.abc import Iterator
from dataclasses import replace

import datasets
import numpy as np
from PIL import Image

from ..processing import DeltaVLMImageProcessor
from .records import Record


def features(masks: bool = False) -> datasets.Features:
    """
    The columns of every data set of this package: those of [`Record`], images decoded when they are looked at.

    Args:
        masks (`bool`, *optional*, defaults to `False`): with a column `mask`.
    """
    text = datasets.Value("string")
    columns = {
        "id": text,
        "task": text,
        "before": datasets.Image(),
        "after": datasets.Image(),
        "changed": datasets.Value("bool"),
        "turns": datasets.List({"question": text, "answer": text}),
        "captions": datasets.List(text),
    }
    return datasets.Features({**columns, "mask": datasets.Image()} if masks else columns)


def to_row(record: Record, before, after) -> dict:
    """A record as a row of [`features`], with its images: paths, PIL images or `{"bytes", "path"}`."""
    turns = [{"question": question, "answer": answer} for question, answer in record.turns]
    return {
        "id": record.id,
        "task": record.task,
        "before": before,
        "after": after,
        "changed": record.changed,
        "turns": turns,
        "captions": list(record.captions),
    }


def turns_of(row: dict) -> list[tuple[str, str]]:
    """A row's questions with their answers, as the processor takes them for `history`."""
    return [(turn["question"], turn["answer"]) for turn in row["turns"]]


def unroll(record: Record) -> Iterator[Record]:
    """A dialogue as one record for each of its turns, each with the turns before; any other record as it is."""
    if len(record.turns) == 1:
        yield record
    else:
        for number in range(1, len(record.turns) + 1):
            yield replace(record, id=f"{record.id}.{number}", turns=record.turns[:number])


def first_rows(rows: datasets.Dataset, number: int | None) -> datasets.Dataset:
    """As many rows as there are, or as are asked for."""
    return rows if number is None else rows.select(range(min(number, len(rows))))


def undecoded(rows):
    """The same data set with images as `datasets` has them before decoding: looking at a row cannot fail."""
    for column, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows


def as_seen(image: Image.Image) -> Image.Image:
    """An image of any mode in the colours that the model gets: 16 bits scaled, not cut off."""
    levels = DeltaVLMImageProcessor().process_image(image)  # (3, H, W)
    return Image.fromarray(np.moveaxis(levels, 0, -1))


def load(builder: datasets.GeneratorBasedBuilder, split: str | None, streaming: bool):
    """A builder's data set, or one split of it; what the builder raised is raised as it was."""
    if streaming:
        splits = builder.as_streaming_dataset(split)
        return datasets.IterableDatasetDict(splits) if split is None else splits
    try:
        builder.download_and_prepare()
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ or error from None
    filled = [name for name, info in builder.info.splits.items() if info.num_examples]
    if not filled or (split is not None and split.partition("[")[0] not in filled):
        raise ValueError(f"No records of the tasks {', '.join(builder.config.tasks)} in {split or 'any split'}.")
    if split is not None:
        return builder.as_dataset(split)
    return datasets.DatasetDict({name: builder.as_dataset(name) for name in filled})
