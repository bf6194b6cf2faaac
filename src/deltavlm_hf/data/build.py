"""Builds a data set of ChangeChat-105k's form by rule, from captions and change masks."""

import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..processing.reading import READING_ERRORS, image_size
from .changechat import images_in, mask_folder
from .questions import TASKS, make_turns, says_change
from .records import Record, RecordError, check_path, write_records
from .rules import LEVIR, Facts, Thresholds, load_mask, read_facts

RULE_TASKS = ("caption", "binary", "count", "grid", "dialogue")
SPLITS = ("train", "val", "test")

_NEEDS = "captions need captions, yes/no either captions or masks, and all others masks."

# How names of files of one task end, as upstream has them.
FILE_SUFFIX = {
    "caption": "",
    "binary": "_binary",
    "count": "_count",
    "grid": "_loc",
    "open": "_open",
    "dialogue": "_dialog",
}


@dataclass(frozen=True)
class Pair:
    """
    What there is to build from.

    Attributes:
        name (`str`): of the image files, without ending; unique.
        before (`str`): the image of the first date, a path relative to the folder of images, with `/`.
        after (`str`): the image of the second date, likewise.
        captions (`tuple[str, ...]`): may be empty.
        mask (`Path`, *optional*): the change mask.
    """

    name: str
    before: str
    after: str
    captions: tuple[str, ...]
    mask: Path | None


def find_pairs(
    images: str | Path, captions: str | Path | None = None, masks: str | Path | None = None, split: str = "train"
) -> list[Pair]:
    """
    Pairs that have captions, a mask or both, sorted by name. Images need not be there yet.

    Args:
        images (`str` or `Path`): the folder that paths start from. Images are in `A` and `B` of its folder `split`, or
            right in its own, as LEVIR-CC and LEVIR-CD have them.
        captions (`str` or `Path`, *optional*): a JSON file, either `{file name: [captions]}` or LEVIR-CC's own
            (`LevirCCcaptions.json`, of which only `split` is taken).
        masks (`str` or `Path`, *optional*): the folder of masks, named as the images. Defaults to `label` beside `A`.
        split (`str`, *optional*, defaults to `"train"`).

    Raises:
        ValueError: if there is nothing to build from, the captions are of another form, a name comes twice or cannot
            be used, or masks cannot be opened or differ in size from their image; the message lists them.
        FileNotFoundError: if a file or folder that was named does not exist.
    """
    images = Path(images)
    for folder in (images, masks):
        if folder is not None and not Path(folder).is_dir():
            raise FileNotFoundError(f"The folder {folder} does not exist.")
    parent = "" if (images / "A").is_dir() and not (images / split / "A").is_dir() else f"{split}/"
    dates = images / f"{parent}A"
    labels = mask_folder(dates / "x") if masks is None else Path(masks)
    mask_of, image_of = images_in(labels), images_in(dates)
    written = {} if captions is None else read_captions(captions, split)
    pairs: dict[str, Pair] = {}
    for file, texts in [*written.items(), *((path.name, ()) for path in mask_of.values())]:
        name = _without_ending(file)
        if name in pairs and texts:
            raise ValueError(f"Two files are named {name}; names must differ in more than their ending.")
        if name not in pairs:
            found = image_of.get(name)
            pairs[name] = _make_pair(parent, file if found is None else found.name, name, texts, mask_of.get(name))
    if not pairs:
        raise ValueError(f"Nothing to build from: no captions were given, and there are no masks in {labels}.")
    _check_masks(images, pairs.values())
    return [pairs[name] for name in sorted(pairs)]


def _without_ending(file: str) -> str:
    return Path(file).stem if Path(file).suffix.lower() in Image.registered_extensions() else file


def _make_pair(parent: str, file: str, name: str, captions: tuple[str, ...], mask: Path | None) -> Pair:
    try:
        if "/" in file:
            raise RecordError("captions must be given by plain file names, without folders")
        before, after = (check_path(f"{parent}{date}/{file}") for date in "AB")
        before.encode()
    except (RecordError, UnicodeEncodeError) as error:
        raise ValueError(f"The file name {file!r} cannot be used: {error}.") from None
    return Pair(name, before, after, captions, mask)


def _check_masks(images: Path, pairs: Iterable[Pair]) -> None:
    """Tells all masks that do not fit at once, by their heads alone."""
    problems = []
    for pair in pairs:
        if pair.mask is not None:
            try:
                mask = image_size(pair.mask)
            except READING_ERRORS as error:
                problems.append(f"{pair.mask} cannot be opened: {error}")
                continue
            try:
                image = image_size(images / pair.before)
            except READING_ERRORS:  # it need not be there yet; `data check` tells what is wrong with it
                continue
            if mask != image:
                problems.append(f"{pair.mask} has {mask[0]}x{mask[1]}, its image {image[0]}x{image[1]} pixels")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"Masks do not fit: {'; '.join(problems[:5])}{more}.")


def read_captions(path: str | Path, split: str) -> dict[str, tuple[str, ...]]:
    """
    Captions by file name, from `{file name: [captions]}` or LEVIR-CC's own file, of which only `split` is taken.

    Raises:
        ValueError: if the file is of neither form.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable as JSON: {error}") from error
    try:
        if isinstance(content.get("images"), list):
            content = {
                item["filename"]: [sentence["raw"].strip() for sentence in item["sentences"]]
                for item in content["images"]
                if item.get("filepath", split) == split
            }
    except (AttributeError, KeyError, TypeError):
        content = None
    if not content or not all(_is_captions(captions) for captions in content.values()):
        raise ValueError(
            f'{path}: expected {{"train_000001.png": ["a caption", ...], ...}} or LEVIR-CC\'s captions with split '
            f"{split!r} in them."
        )
    return {name: tuple(captions) for name, captions in content.items()}


def _is_captions(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) and text.strip() for text in value)


@dataclass
class Summary:
    """
    What was built.

    Attributes:
        pairs (`int`): pairs that records were made of.
        changed (`int`): those that changed: by their captions or, without captions, by their mask.
        unchanged (`int`): the others.
        without_mask (`int`): pairs that lack a mask, and with it all tasks but captions and yes/no.
        contradictions (`list[str]`): names of pairs whose captions say that nothing changed while their mask has
            changes. (The other way round is no contradiction: captions speak of trees and lakes too.)
        records (`dict[str, int]`): records by task.
        files (`list[str]`): what was written.
    """

    pairs: int = 0
    changed: int = 0
    unchanged: int = 0
    without_mask: int = 0
    contradictions: list[str] = field(default_factory=list)
    records: dict[str, int] = field(default_factory=Counter)
    files: list[str] = field(default_factory=list)


def facts_of(pair: Pair, thresholds: Thresholds = LEVIR, binary_masks: bool = False) -> Facts | None:
    """The facts in a pair's mask, where it has one."""
    return None if pair.mask is None else read_facts(load_mask(pair.mask, binary_masks), thresholds)


def pair_changed(pair: Pair, facts: Facts | None) -> bool:
    """Whether a pair changed: by its captions or, without captions, by its mask."""
    return says_change(pair.captions) if pair.captions else bool(facts and facts.changed)


def build_records(
    pair: Pair,
    facts: Facts | None,
    tasks: Sequence[str] = RULE_TASKS,
    *,
    references: bool = False,
    seed: int = 0,
    paraphrase: float = 0.0,
) -> Iterator[Record]:
    """
    The records of one pair, by rule. They depend on the pair and the seed alone, not on other pairs.

    Args:
        pair ([`Pair`]).
        facts ([`Facts`], *optional*): what its mask says; without, only `caption` and `binary` are made.
        tasks (`Sequence[str]`, *optional*): some of `caption`, `binary`, `count`, `grid`, `dialogue`.
        references (`bool`, *optional*, defaults to `False`): make one captioning record with all captions as
            references, as test files have, not one for each.
        seed (`int`, *optional*, defaults to 0): chooses paraphrases.
        paraphrase (`float`, *optional*, defaults to 0): how often an instruction is put in other words.
    """
    changed = pair_changed(pair, facts)
    for task in tasks:
        # One generator for each pair and task: what one draws does not move the others.
        rng = np.random.default_rng([seed, zlib.crc32(pair.name.encode()), TASKS.index(task)])
        if task == "caption":
            each = () if not pair.captions else (pair.captions[:1] if references else pair.captions)
            for number, caption in enumerate(each):
                turns = make_turns(task, facts, rng, (caption,), 0.0 if references else paraphrase)
                captions = pair.captions if references else ()
                identity = f"{pair.name}-{task}" if references else f"{pair.name}-{task}-{number}"
                yield Record(identity, task, pair.before, pair.after, turns, changed, captions)
        elif facts is not None or (task == "binary" and pair.captions):
            turns = make_turns(task, facts, rng, pair.captions, 0.0 if task == "dialogue" else paraphrase)
            yield Record(f"{pair.name}-{task}", task, pair.before, pair.after, turns, changed)


def build_dataset(
    pairs: Sequence[Pair],
    output: str | Path,
    *,
    split: str = "train",
    name: str = "changechat",
    tasks: Sequence[str] = RULE_TASKS,
    thresholds: Thresholds = LEVIR,
    binary_masks: bool = False,
    seed: int = 0,
    paraphrase: float = 0.0,
    overwrite: bool = False,
) -> Summary:
    """
    Writes annotations that [`load_changechat`] reads: `NAME_train.json` with all tasks in one; for `val` and `test` a
    file for each task, with all captions of a pair as references. The same input and seed give the same bytes.

    Args:
        pairs (`Sequence[Pair]`): see [`find_pairs`].
        output (`str` or `Path`): the folder to write to.
        split (`str`, *optional*, defaults to `"train"`): `train`, `val` or `test`.
        name (`str`, *optional*, defaults to `"changechat"`): how file names begin.
        tasks (`Sequence[str]`, *optional*): some of `caption`, `binary`, `count`, `grid`, `dialogue`.
        thresholds ([`Thresholds`], *optional*): what is too small to count.
        binary_masks (`bool`, *optional*, defaults to `False`): masks have one class, taken for buildings.
        seed (`int`, *optional*, defaults to 0): chooses paraphrases.
        paraphrase (`float`, *optional*, defaults to 0): how often an instruction is put in other words, 0 to 1.
        overwrite (`bool`, *optional*, defaults to `False`): replace files that are there.

    Returns:
        [`Summary`].

    Raises:
        FileExistsError: if a file is there and `overwrite` is not set.
        ValueError: for an unknown split or task, a number out of range, a mask that cannot be read, or if no record
            can be made.
    """
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}, expected one of {', '.join(SPLITS)}.")
    unknown = [task for task in tasks if task not in RULE_TASKS]
    if unknown or not tasks:
        raise ValueError(
            f"Tasks that rules can build are {', '.join(RULE_TASKS)}; got {', '.join(unknown) or 'none'}."
        )
    if seed < 0:
        raise ValueError(f"`seed` must be at least 0, got {seed}.")
    if not 0 <= paraphrase <= 1:
        raise ValueError(f"`paraphrase` must be between 0 and 1, got {paraphrase}.")
    tasks = tuple(dict.fromkeys(tasks))
    together = split == "train"
    paths = {task: Path(output) / f"{name}_{split}{'' if together else FILE_SUFFIX[task]}.json" for task in tasks}
    there = sorted({str(path) for path in paths.values() if path.exists()})
    if there and not overwrite:
        raise FileExistsError(f"{', '.join(there)} exists; choose another name or folder, or overwrite it.")

    summary = Summary(pairs=len(pairs))
    records: dict[Path, list[Record]] = {path: [] for path in paths.values()}
    for pair in pairs:
        facts = facts_of(pair, thresholds, binary_masks)
        changed = pair_changed(pair, facts)
        summary.changed += changed
        summary.without_mask += facts is None
        if facts is not None and facts.changed and not changed:
            summary.contradictions.append(pair.name)
        made = build_records(pair, facts, tasks, references=not together, seed=seed, paraphrase=paraphrase)
        for record in made:
            records[paths[record.task]].append(record)
            summary.records[record.task] += 1
    summary.unchanged = summary.pairs - summary.changed
    if not summary.records:
        raise ValueError(f"There is nothing to make records of {', '.join(tasks)} from: {_NEEDS}")
    for path, content in records.items():
        if content:
            write_records(path, content)
            summary.files.append(str(path))
        else:
            path.unlink(missing_ok=True)  # of an earlier build: its records are not this one's
    return summary
