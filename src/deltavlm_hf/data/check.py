"""Checks a copy of ChangeChat-105k, or data of its form: what is there, what is missing, what contradicts itself."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..processing.reading import READING_ERRORS, read_image
from .changechat import AnnotationFile, find_annotations, find_classes, find_images, find_mask
from .classes import FILE, ROADS_AND_BUILDINGS, Classes
from .questions import TASKS, parse_count, parse_grid, parse_yes_no, question_task, says_change
from .records import Record, RecordError, read_items
from .rules import load_mask, marks_change

OFFICIAL = "changechat_105k_"  # how the official files' names begin

# Records by split and task in the paper (arXiv 2507.22346, table of ChangeChat-105k).
PUBLISHED = {
    "train": {"caption": 34_075, "binary": 6_815, "count": 6_815, "grid": 6_815, "open": 26_600, "dialogue": 6_815},
    "test": {"caption": 1_929, "binary": 1_929, "count": 1_929, "grid": 1_929, "open": 7_527, "dialogue": 1_929},
}
PUBLISHED["train_loc"] = PUBLISHED["train"]  # the same records with other grid answers

README_NOTE = (
    "The authors' README speaks of 10,077 image pairs (train 7,590 / val 1,438 / test 2,135): these sum to 11,163. "
    "10,077 is the sum of LEVIR-CC's 6,815 / 1,333 / 1,929, which the annotations follow."
)


@dataclass(frozen=True)
class Problem:
    """
    Something wrong.

    Attributes:
        kind (`str`): one of [`KINDS`].
        where (`str`): a file of annotations or an image.
        record (`str`): the record's id, or empty.
        detail (`str`): what was found, in words.
    """

    kind: str
    where: str
    record: str
    detail: str


KINDS = (
    "unreadable file",
    "malformed record",
    "duplicate id",
    "unparsed answer",
    "contradiction",
    "missing image",
    "unreadable image",
    "sizes differ",
    "caption against mask",
    "count differs",
)


@dataclass
class Report:
    """
    The outcome of [`check_data`].

    Attributes:
        source (`str`): what was checked.
        images (`str`, *optional*): the folder of images; None if they were not looked at.
        files (`list[str]`): the annotation files.
        records (`dict[str, dict[str, int]]`): how many there are by split and task.
        pairs (`dict[str, dict[str, int]]`): by split, how many image pairs the records are about: `all`, `changed`,
            `unchanged`, `unknown`. Without a `changeflag`, captions decide.
        published (`bool`): whether these are the official files, to be compared with the paper.
        problems (`list[Problem]`).
        masks (`int`): pairs with a change mask, where images were looked at.
        unmarked (`list[str]`): of these, the pairs that changed while their mask marks nothing. That need not be
            wrong, for captions speak of trees and lakes too, and masks do not.
        notes (`list[str]`): what one should know, though nothing is wrong.
    """

    source: str
    images: str | None = None
    files: list[str] = field(default_factory=list)
    records: dict[str, dict[str, int]] = field(default_factory=dict)
    pairs: dict[str, dict[str, int]] = field(default_factory=dict)
    published: bool = False
    problems: list[Problem] = field(default_factory=list)
    masks: int = 0
    unmarked: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the attributes, and the number of problems by kind."""
        counts = Counter(problem.kind for problem in self.problems)
        problems = [vars(problem) for problem in self.problems]
        return {**vars(self), "problems": problems, "problems_by_kind": {kind: counts[kind] for kind in KINDS}}

    def table(self, examples: int = 3) -> str:
        """The summary for a person, with a few examples of each kind of problem."""
        lines = [f"{'split':<10} {'task':<9} {'records':>8}" + f" {'paper':>8}" * self.published]
        for split, tasks in self.records.items():
            for task in TASKS:
                expected = PUBLISHED.get(split, {}).get(task) if self.published else None
                if tasks.get(task) or expected:
                    line = f"{split:<10} {task:<9} {tasks.get(task, 0):>8,}"
                    lines.append(line + (f" {expected:>8,}" if expected else ""))
        for split, pairs in self.pairs.items():
            parts = ", ".join(f"{number:,} {name}" for name, number in pairs.items() if name != "all" and number)
            lines.append(f"{split}: {pairs['all']:,} pairs ({parts})")
        if self.images is None:
            lines.append("Images were not looked at.")
        by_kind: dict[str, list[Problem]] = defaultdict(list)
        for problem in self.problems:
            by_kind[problem.kind].append(problem)
        for kind in KINDS:
            found = by_kind[kind]
            if found:
                lines.append(f"{kind}: {len(found):,}")
                lines += [f"  {_in_line(problem)}" for problem in found[:examples]]
                lines += [f"  ... and {len(found) - examples:,} more"] * (len(found) > examples)
        lines += [f"Note: {note}" for note in self.notes]
        lines.append(f"{len(self.problems):,} problems" if self.problems else "No problems.")
        return "\n".join(lines)


def _in_line(problem: Problem) -> str:
    return f"{problem.where}{f', {problem.record}' if problem.record else ''}: {problem.detail}"


def check_data(
    source: str | Path, images: str | Path | None = None, *, look_at_images: bool = True, revision: str | None = None
) -> Report:
    """
    Reads every annotation and decodes every image once.

    Args:
        source (`str` or `Path`): a folder, a file or a Hub id, see [`find_annotations`].
        images (`str` or `Path`, *optional*): the folder of images. Defaults to `images` in or beside `source`.
        look_at_images (`bool`, *optional*, defaults to `True`): without, annotations alone are checked.
        revision (`str`, *optional*): of the Hub's data set.

    Returns:
        [`Report`].

    Raises:
        FileNotFoundError: if there are no annotations or no folder of images.
        ValueError: if the data set's `classes.yaml` is of another form.
    """
    files = find_annotations(source, revision)
    classes = find_classes(source, revision)
    folder = find_images(source, images) if look_at_images else None
    report = Report(str(source), None if folder is None else str(folder), [file.path.name for file in files])
    if classes != ROADS_AND_BUILDINGS:
        report.notes.append(f"Answers and masks are about {', '.join(classes.plurals)}, as {FILE} says.")
    report.published = any(name.startswith(OFFICIAL) for name in report.files)

    pairs: dict[str, dict[tuple[str, str], _Pair]] = {file.split: {} for file in files}
    records: dict[str, Counter[str]] = {file.split: Counter() for file in files}
    for file in files:
        for record in _check_file(file, report.problems, classes):
            records[file.split][record.task] += 1
            pair = pairs[file.split].setdefault((record.before, record.after), _Pair(file.path.name, record.id))
            pair.add(record)
    for split, found in pairs.items():
        report.records[split] = {task: records[split][task] for task in TASKS if records[split][task]}
        report.pairs[split] = _count_pairs(found.values(), report.problems)
    if report.published:
        report.problems += _compare(report.records)
        report.notes.append(README_NOTE)
    if folder is not None:
        report.problems += _check_images(folder, {names for found in pairs.values() for names in found})
        known = {names[0]: pair for found in pairs.values() for names, pair in found.items()}
        _check_masks(report, folder, known, classes)
    return report


@dataclass
class _Pair:
    """What all records of a pair say about whether it changed."""

    file: str  # where the pair is met first
    record: str
    flags: set[bool] = field(default_factory=set)
    captions_say: set[bool] = field(default_factory=set)

    def add(self, record: Record) -> None:
        if record.changed is not None:
            self.flags.add(record.changed)
        if record.task == "caption":
            self.captions_say.add(says_change(record.captions or [record.turns[0][1]]))

    @property
    def changed(self) -> bool | None:
        """Whether it changed: by the flags or, without, the captions; None: neither says."""
        if self.flags:
            return any(self.flags)
        return any(self.captions_say) if self.captions_say else None


def _check_file(file: AnnotationFile, problems: list[Problem], classes: Classes) -> Iterator[Record]:
    name = file.path.name
    seen = set()
    index = -1
    try:
        for index, item in enumerate(read_items(file.path)):
            try:
                record = Record.from_json(item, file.task)
            except RecordError as error:
                problems.append(Problem("malformed record", name, f"item {index}", str(error)))
                continue
            if record.id in seen:
                problems.append(Problem("duplicate id", name, record.id, f"item {index} has an id that was used"))
            seen.add(record.id)
            problems += (Problem(kind, name, record.id, detail) for kind, detail in _check_answers(record, classes))
            yield record
        if index < 0:
            problems.append(Problem("unreadable file", name, "", "it holds no records"))
    except (OSError, ValueError) as error:
        problems.append(Problem("unreadable file", name, "", str(error)))


def _check_answers(record: Record, classes: Classes) -> Iterator[tuple[str, str]]:
    for question, answer in record.turns:
        task = question_task(question, classes) if record.task == "dialogue" else record.task
        says = _read(task, answer, classes)
        if says is None:
            yield "unparsed answer", f"{task}: {answer!r}"
        elif record.changed is False and says and task in ("binary", "count", "grid"):
            yield "contradiction", f"changeflag is 0, the answer is {answer!r}"
        elif record.changed and not says and task == "binary":
            yield "contradiction", f"changeflag is not 0, the answer is {answer!r}"


def _read(task: str, answer: str, classes: Classes) -> bool | None:
    """Whether an answer tells of a change; None if it cannot be read."""
    if task == "binary":
        return parse_yes_no(answer)
    if task == "count":
        counts = parse_count(answer, classes)
        return None if counts is None else any(counts)
    if task == "grid":
        cells = parse_grid(answer, classes)
        return None if cells is None else any(bool(each.any()) for each in cells)
    return True if answer.strip() else None


def _count_pairs(pairs: Iterable[_Pair], problems: list[Problem]) -> dict[str, int]:
    counts = {"all": 0, "changed": 0, "unchanged": 0, "unknown": 0}
    for pair in pairs:
        counts["all"] += 1
        if len(pair.flags) > 1:
            problems.append(
                Problem("contradiction", pair.file, pair.record, "records of its pair differ in changeflag")
            )
        says = any(pair.captions_say)  # one of several captions is enough
        if pair.captions_say and pair.flags == {not says}:
            detail = f"changeflag is {int(not says)}, the captions {'tell of a change' if says else 'tell of none'}"
            problems.append(Problem("contradiction", pair.file, pair.record, detail))
        known = pair.changed
        counts["unknown" if known is None else "changed" if known else "unchanged"] += 1
    return counts


def _compare(records: dict[str, dict[str, int]]) -> Iterator[Problem]:
    for split in ("train", "test", *(["train_loc"] if "train_loc" in records else [])):
        for task, expected in PUBLISHED[split].items():
            found = records.get(split, {}).get(task, 0)
            if found != expected:
                yield Problem("count differs", split, "", f"{found:,} {task} records, the paper has {expected:,}")


def _check_images(folder: Path, pairs: Iterable[tuple[str, str]]) -> Iterator[Problem]:
    pairs = sorted(pairs)
    names = sorted({name for pair in pairs for name in pair})
    with ThreadPoolExecutor() as pool:
        found = list(tqdm(pool.map(lambda name: _look_at(folder, name), names), total=len(names), desc="images"))
    sizes = dict(zip(names, found, strict=True))
    for outcome in found:
        if isinstance(outcome, Problem):
            yield outcome
    for before, after in pairs:
        one, other = sizes[before], sizes[after]
        if isinstance(one, tuple) and isinstance(other, tuple) and one != other:
            yield Problem("sizes differ", before, "", f"{one[0]}x{one[1]}, and {after} has {other[0]}x{other[1]}")


def _check_masks(report: Report, folder: Path, pairs: Mapping[str, "_Pair"], classes: Classes) -> None:
    """Whether masks mark what captions and flags say, by the image of the first date."""
    seen: dict[Path, dict[str, Path]] = {}
    masks = {name: mask for name in sorted(pairs) if (mask := find_mask(folder / name, seen)) is not None}
    for name, mask in tqdm(masks.items(), desc="masks", disable=not masks):
        pair = pairs[name]
        try:
            marked = marks_change(load_mask(mask, classes=classes), classes)
        except ValueError as error:
            report.problems.append(Problem("unreadable image", mask.name, "", str(error)))
            continue
        report.masks += 1
        if marked and pair.changed is False:
            what = "captions and changeflag tell of no change, its mask marks one"
            report.problems.append(Problem("caption against mask", pair.file, pair.record, f"{name}: {what}"))
        elif pair.changed and not marked:
            report.unmarked.append(name)
    against = sum(problem.kind == "caption against mask" for problem in report.problems)
    if against or report.unmarked:
        share = 100 * (against + len(report.unmarked)) / report.masks
        report.notes.append(
            f"Of {report.masks:,} pairs with masks, {against:,} did not change by their captions while these mark "
            f"a change, and {len(report.unmarked):,} changed while they mark none (trees, perhaps, which masks do not "
            f"know): {share:.2f} % in all. `deltavlm evaluate` gives its figures without them too."
        )


def _look_at(folder: Path, name: str) -> tuple[int, int] | Problem:
    """An image's width and height, or what is wrong with it."""
    path = folder / name
    if not path.is_file():
        return Problem("missing image", name, "", "no such file")
    try:
        return read_image(path).size
    except READING_ERRORS as error:
        return Problem("unreadable image", name, "", str(error).replace(str(path), path.name))
