"""Builds a data set of ChangeChat-105k's form by rule, from captions and change masks."""

import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..processing.reading import READING_ERRORS, image_size
from .changechat import ENDINGS, AnnotationFile, dated_images, find_mask, images_in, mask_folder
from .classes import FILE, ROADS_AND_BUILDINGS, Classes, classes_in, write_classes
from .pairs import read_table
from .questions import TASKS, make_turns, says_change
from .records import Record, RecordError, check_path, write_records
from .rules import LEVIR, Facts, Thresholds, load_mask, read_facts
from .words import shorten

RULE_TASKS = ("caption", "binary", "count", "grid", "dialogue")
SPLITS = ("train", "val", "test")
SHARES = (0.7, 0.15, 0.15)  # of pairs that are split by place
NAME = "changechat"  # how files begin

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
            right in its own, as LEVIR-CC and LEVIR-CD have them; or, in either, both dates lie together, named like
            `x_pre.png` and `x_post.png`, see [`dated_images`].
        captions (`str` or `Path`, *optional*): a JSON file, either `{file name: [captions]}` or LEVIR-CC's own
            (`LevirCCcaptions.json`, of which only `split` is taken).
        masks (`str` or `Path`, *optional*): the folder of masks, named as the images. Defaults to `label` beside `A`;
            where both dates lie together, see [`find_mask`].
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
    written = {} if captions is None else read_captions(captions, split)
    for place in (images / split, images):
        if (place / "A").is_dir():
            break
        before, after = dated_images(place)
        if before or after:
            return _dated_pairs(images, before, after, written, None if masks is None else Path(masks))
    parent = "" if (images / "A").is_dir() and not (images / split / "A").is_dir() else f"{split}/"
    dates = images / f"{parent}A"
    labels = mask_folder(dates / "x") if masks is None else Path(masks)
    mask_of, image_of = images_in(labels), images_in(dates)
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


def _dated_pairs(
    images: Path,
    before: dict[str, Path],
    after: dict[str, Path],
    written: dict[str, tuple[str, ...]],
    masks: Path | None,
) -> list[Pair]:
    """Of images that lie together. Captions are by the pair's name, `x`, or by that of either image."""
    if alone := sorted(
        path.name for key, path in {**before, **after}.items() if key not in before or key not in after
    ):
        raise ValueError(f"Images without their other date: {shorten(alone)}.")
    texts: dict[str, tuple[str, ...]] = {}
    for file, captions in written.items():
        name = _without_ending(file)
        found = ENDINGS.fullmatch(name)
        texts[name if found is None else found[1]] = captions
    pairs: dict[str, Pair] = {}
    seen: dict[Path, dict[str, Path]] = {}
    for key, path in before.items():
        name = ENDINGS.fullmatch(key)[1]  # type: ignore[index]
        if name in pairs:
            raise ValueError(f"Two pairs are named {name}: {Path(pairs[name].before).name} and {path.name}.")
        if masks is None:
            mask = find_mask(path, seen)
        else:
            seen.setdefault(masks, images_in(masks))
            mask = seen[masks].get(name, seen[masks].get(path.stem))
        first, second = (check_path(each.relative_to(images).as_posix()) for each in (path, after[key]))
        pairs[name] = Pair(name, first, second, texts.get(name, ()), mask)
    pairs = {name: pair for name, pair in pairs.items() if pair.captions or pair.mask is not None}
    if not pairs:
        raise ValueError(f"Nothing to build from: none of the pairs in {images} has captions or a mask.")
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


def split_by_place(
    pairs: Sequence[Pair], places: Mapping[str, str], shares: Sequence[float] = SHARES, seed: int = 0
) -> dict[str, list[Pair]]:
    """
    Pairs as train, val and test, each place on one side alone: what a model saw of a place it must not be asked about.

    Args:
        pairs (`Sequence[Pair]`): see [`find_pairs`].
        places (`Mapping[str, str]`): of each pair's name its place, see [`find_places`].
        shares (`Sequence[float]`, *optional*, defaults to `(0.7, 0.15, 0.15)`): of the pairs. Places are taken whole,
            in an order that follows from their names and the seed, and each goes where most is missing.
        seed (`int`, *optional*, defaults to 0).

    Raises:
        ValueError: if there are fewer places than splits that want some, or a share is out of range.
    """
    if len(shares) != len(SPLITS) or min(shares) < 0 or sum(shares) <= 0:
        raise ValueError(f"Expected three shares, of train, val and test, none below 0; got {list(shares)}.")
    of_place: dict[str, list[Pair]] = {}
    for pair in pairs:
        of_place.setdefault(places[pair.name], []).append(pair)
    wanted = {split: share * len(pairs) / sum(shares) for split, share in zip(SPLITS, shares, strict=True) if share}
    if len(of_place) < len(wanted):
        raise ValueError(
            f"There are {len(of_place)} places, and each of {', '.join(wanted)} needs one: {', '.join(of_place)}."
        )
    found: dict[str, list[Pair]] = {split: [] for split in wanted}
    for place in sorted(of_place, key=lambda place: zlib.crc32(f"{seed} {place}".encode())):
        empty = [split for split in wanted if not found[split]]
        left = len(of_place) - len({places[pair.name] for each in found.values() for pair in each})
        among = empty if empty and left <= len(empty) else list(wanted)
        split = max(among, key=lambda split: wanted[split] - len(found[split]))
        found[split] += of_place[place]
    return {split: sorted(each, key=lambda pair: pair.name) for split, each in found.items()}


def find_places(names: Iterable[str], places: str) -> dict[str, str]:
    """
    The place of each pair.

    Args:
        names (`Iterable[str]`): of pairs.
        places (`str`): either a table and its column, `pairs.csv:city`, whose column `name` has the pairs' names (or
            those of files); or a regular expression, whose first group in a name is the place: `(.+)_\\d+`.

    Raises:
        ValueError: if the table or the expression cannot be used, or a pair has no place; the message names some.
    """
    names = list(names)
    table, colon, column = places.rpartition(":")
    if colon and Path(table).is_file():
        rows = read_table(Path(table))
        if not {"name", column} <= set(rows.column_names):
            raise ValueError(
                f"{table} has the columns {', '.join(rows.column_names)}; expected `name` and `{column}`."
            )
        stated = zip(rows["name"].to_pylist(), rows[column].to_pylist(), strict=True)
        of_name = {_without_ending(str(name)): str(place) for name, place in stated if place is not None}
        found = {name: of_name[name] for name in names if name in of_name}
    else:
        try:
            expression = re.compile(places)
        except re.error as error:
            raise ValueError(f"--places {places!r} is no table with its column, nor an expression: {error}") from None
        if not expression.groups:
            raise ValueError(f"--places {places!r} has no group: put the place in brackets, as in (.+)_\\d+")
        matches = {name: expression.search(name) for name in names}
        found = {name: match[1] for name, match in matches.items() if match and match[1]}
    if lacking := [name for name in names if name not in found]:
        raise ValueError(f"These pairs have no place by {places!r}: {shorten(lacking)}.")
    return found


def places_on_both_sides(splits: Mapping[str, Sequence[Pair]], places: Mapping[str, str]) -> list[str]:
    """What is known of one place in more than one split, in words."""
    sides: dict[str, dict[str, int]] = {}
    for split, pairs in splits.items():
        for pair in pairs:
            of_place = sides.setdefault(places[pair.name], {})
            of_place[split] = of_place.get(split, 0) + 1
    return [
        f"{place} ({', '.join(f'{number} in {split}' for split, number in counts.items())})"
        for place, counts in sides.items()
        if len(counts) > 1
    ]


def facts_of(
    pair: Pair,
    thresholds: Thresholds = LEVIR,
    binary_masks: bool = False,
    classes: Classes = ROADS_AND_BUILDINGS,
) -> Facts | None:
    """The facts in a pair's mask, where it has one."""
    if pair.mask is None:
        return None
    return read_facts(load_mask(pair.mask, binary_masks, classes), thresholds, classes)


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


def find_splits(
    images: str | Path,
    captions: str | Path | None = None,
    masks: str | Path | None = None,
    places: str | None = None,
    shares: Sequence[float] = SHARES,
    seed: int = 0,
) -> tuple[dict[str, list[Pair]], dict[str, str]]:
    """
    The pairs of all splits at once: of the folders `train`, `val` and `test`, or of one folder, split by place.

    Args:
        images, captions, masks: see [`find_pairs`]. Captions and masks of all splits may lie together: whose image of
            the first date is in none of the folders is left out.
        places (`str`, *optional*): see [`find_places`]; needed unless there are folders of splits.
        shares, seed: see [`split_by_place`].

    Returns:
        `tuple[dict[str, list[Pair]], dict[str, str]]`: pairs by split, and by the name of each its place, where
        `places` says it.

    Raises:
        ValueError: if there are neither folders of splits nor places, and as [`find_pairs`] and [`split_by_place`] do.
    """
    folders = {split: Path(images) / split for split in SPLITS}
    there = [split for split, each in folders.items() if (each / "A").is_dir() or any(dated_images(each))]
    if there:
        found = {}
        for split in there:
            pairs = find_pairs(images, captions, masks, split)
            found[split] = [pair for pair in pairs if (Path(images) / pair.before).is_file()]
        found = {split: pairs for split, pairs in found.items() if pairs}
    elif places is None:
        raise ValueError(
            f"{images} has no folders train, val and test. To split its pairs, say which place each is of: --places "
            "TABLE.csv:COLUMN (with a column `name`), or an expression whose group in a name is the place."
        )
    else:
        pairs = find_pairs(images, captions, masks)
        of_name = find_places([pair.name for pair in pairs], places)
        return split_by_place(pairs, of_name, shares, seed), of_name
    if places is None:
        return found, {}
    return found, find_places([pair.name for pairs in found.values() for pair in pairs], places)


def build_splits(splits: Mapping[str, Sequence[Pair]], output: str | Path, **kwargs) -> dict[str, Summary]:
    """
    [`build_dataset`] for each split; what stands in the way of one is told before any is written.

    Args:
        splits (`Mapping[str, Sequence[Pair]]`): see [`find_splits`].
        output (`str` or `Path`): the folder to write to.
        kwargs: for [`build_dataset`].
    """
    refuse_other_classes(output, kwargs.get("classes", ROADS_AND_BUILDINGS))
    if not kwargs.get("overwrite"):
        named = {"name": kwargs.get("name", NAME), "tasks": kwargs.get("tasks", RULE_TASKS)}
        _refuse_existing(path for split in splits for path in _paths(output, split=split, **named).values())
    return {split: build_dataset(pairs, output, split=split, **kwargs) for split, pairs in splits.items()}


def _paths(output: str | Path, name: str, split: str, tasks: Sequence[str]) -> dict[str, Path]:
    """Of each task its file."""
    return {
        task: Path(output) / f"{name}_{split}{'' if split == 'train' else FILE_SUFFIX[task]}.json" for task in tasks
    }


def _refuse_existing(paths: Iterable[Path]) -> None:
    if there := sorted({str(path) for path in paths if path.exists()}):
        raise FileExistsError(f"{', '.join(there)} exists; choose another name or folder, or overwrite it.")


def refuse_other_classes(output: str | Path, classes: Classes) -> None:
    """Annotations in one folder have the same classes, or those that were there first would be read wrongly."""
    folder = Path(output)
    there = [path.name for path in folder.glob("*.json") if AnnotationFile.from_path(path)]
    if there and (known := classes_in(folder)) != classes:
        raise FileExistsError(
            f"{folder} has annotations ({', '.join(sorted(there)[:3])}) of other classes: {', '.join(known.names)}, "
            f"and not {', '.join(classes.names)} as given, with the same values and colours ({FILE} is of all "
            "annotations in a folder). Choose another folder, or remove what is there."
        )


def build_dataset(
    pairs: Sequence[Pair],
    output: str | Path,
    *,
    split: str = "train",
    name: str = NAME,
    tasks: Sequence[str] = RULE_TASKS,
    thresholds: Thresholds = LEVIR,
    binary_masks: bool = False,
    classes: Classes = ROADS_AND_BUILDINGS,
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
        classes ([`Classes`], *optional*): what masks mark, by default roads and buildings. Others are written beside
            the annotations, as `classes.yaml`, from where all that reads them takes names and colours.
        seed (`int`, *optional*, defaults to 0): chooses paraphrases.
        paraphrase (`float`, *optional*, defaults to 0): how often an instruction is put in other words, 0 to 1.
        overwrite (`bool`, *optional*, defaults to `False`): replace files that are there.

    Returns:
        [`Summary`].

    Raises:
        FileExistsError: if a file is there and `overwrite` is not set, or if there are annotations of other classes.
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
    paths = _paths(output, name, split, tasks)
    if not overwrite:
        _refuse_existing(paths.values())
    refuse_other_classes(output, classes)

    summary = Summary(pairs=len(pairs))
    records: dict[Path, list[Record]] = {path: [] for path in paths.values()}
    for pair in pairs:
        facts = facts_of(pair, thresholds, binary_masks, classes)
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
    write_classes(output, classes)
    for path, content in records.items():
        if content:
            write_records(path, content)
            summary.files.append(str(path))
        else:
            path.unlink(missing_ok=True)  # of an earlier build: its records are not this one's
    return summary
