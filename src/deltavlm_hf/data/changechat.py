"""ChangeChat-105k, and data of its form, as `datasets`: annotations from a folder or the Hub, images from disk."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from PIL import Image

from .classes import FILE, Classes, classes_in
from .questions import TASKS, check_tasks
from .records import Record, read_records
from .rows import features, load, to_row, unroll

SPLITS = ("train", "train_loc", "val", "test")

_AFTER = {"pre_disaster": "post_disaster", "pre": "post", "before": "after"}  # how names of one pair end
ENDINGS = re.compile(rf"(.+)_({'|'.join([*_AFTER, *_AFTER.values()])})")
# The file's name gives the split and, where it holds one task only, the task.
_FILE_NAME = re.compile(r"(?:.*_)?(train_loc|train|val|test)(?:_(binary|count|loc|open|dialog))?\.json")
_TASK_NAMES = {"loc": "grid", "dialog": "dialogue"}  # upstream's name -> ours


@dataclass(frozen=True)
class AnnotationFile:
    """
    A file of annotations.

    Attributes:
        split (`str`): `train`, `train_loc` (upstream's second training file: `train` with other grid answers), `val`
            or `test`.
        task (`str`, *optional*): the task of all its records, where the file's name gives it.
        path (`Path`): where it lies.
    """

    split: str
    task: str | None
    path: Path

    @classmethod
    def from_path(cls, path: Path) -> "AnnotationFile | None":
        match = _FILE_NAME.fullmatch(path.name)
        if match is None:
            return None
        return cls(match[1], match[2] and _TASK_NAMES.get(match[2], match[2]), path)

    def records(self) -> Iterator[Record]:
        return read_records(self.path, self.task)


def find_annotations(source: str | Path, revision: str | None = None) -> list[AnnotationFile]:
    """
    The annotation files of a data set, by split and task. Other files are passed over.

    Args:
        source (`str` or `Path`): a folder with annotation files, or with a folder `annotations` of them; one file; or
            the Hub id of a data set, such as `hlwu/changechat-105k`.
        revision (`str`, *optional*): of the Hub's data set: a branch, tag or commit.

    Raises:
        FileNotFoundError: if there are none; the message says what the names must be.
    """
    folder = _annotation_folder(source, revision)
    paths = [Path(source).expanduser()] if Path(source).expanduser().is_file() else sorted(folder.glob("*.json"))
    files = [file for file in map(AnnotationFile.from_path, paths) if file]
    if not files:
        raise FileNotFoundError(
            f"No annotations in {source}: expected JSON files named like changechat_105k_train.json or "
            f"changechat_105k_test_binary.json, found {', '.join(path.name for path in paths) or 'no JSON file'}."
        )
    return sorted(files, key=lambda file: (SPLITS.index(file.split), file.task or "", file.path))


def find_classes(source: str | Path, revision: str | None = None) -> Classes:
    """
    The classes of a data set: those of `classes.yaml` beside its annotations, else roads and buildings.

    Args:
        source (`str` or `Path`), revision (`str`, *optional*): see [`find_annotations`].

    Raises:
        ValueError: if the file is of another form; the message names it.
    """
    return classes_in(_annotation_folder(source, revision))


def _annotation_folder(source: str | Path, revision: str | None) -> Path:
    folder = Path(source).expanduser()
    if folder.is_file():
        return folder.parent
    if not folder.is_dir():
        folder = _download(str(source), revision)
    return folder / "annotations" if (folder / "annotations").is_dir() else folder


def _download(repository: str, revision: str | None) -> Path:
    files = ["*.json", f"**/{FILE}", FILE]
    try:
        folder = snapshot_download(repository, repo_type="dataset", revision=revision, allow_patterns=files)
    except (HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(
            f"{repository} is neither a folder here nor a data set that can be fetched from the Hub: "
            f"{' '.join(str(error).split())}"
        ) from error
    return Path(folder)


def find_images(source: str | Path, images: str | Path | None = None) -> Path:
    """
    The folder that the paths in annotations start from: what is given, or `images` beside or in the annotations, or
    the folder around them that has `A`, or `train`, `val` or `test` with an `A`.

    Raises:
        FileNotFoundError: if there is no such folder.
    """
    if images is not None:
        if not Path(images).expanduser().is_dir():
            raise FileNotFoundError(f"The folder of images {images} does not exist.")
        return Path(images).expanduser().absolute()
    start = Path(source).expanduser().absolute()
    around = (start, start.parent, start.parent.parent) if start.exists() else ()
    for folder in around:
        if (folder / "images").is_dir():
            return folder / "images"
    for folder in around:
        if any((folder / split / "A").is_dir() for split in ("", "train", "val", "test")):
            return folder
    raise FileNotFoundError(
        f"No images in or beside {source}: give as `images` the folder with A and B (first and second dates), or with "
        "train/, val/ and test/ that have them."
    )


def images_in(folder: Path) -> dict[str, Path]:
    """
    The image files right in a folder, by name without ending; none if there is no such folder.

    Raises:
        ValueError: if two differ in nothing but their ending.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix.lower() in Image.registered_extensions() and not path.name.startswith("."):
            if path.stem in found:
                raise ValueError(f"{folder} has both {found[path.stem].name} and {path.name}; one of them must go.")
            found[path.stem] = path
    return found


def dated_images(folder: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """
    The images of both dates that lie together in one folder, told apart by how their names end: `x_pre` and `x_post`,
    `x_before` and `x_after` or, as in xBD, `x_pre_disaster` and `x_post_disaster`.

    Returns:
        `tuple[dict[str, Path], dict[str, Path]]`: first and second dates, by `x` and the ending of the first date.
    """
    by_date: tuple[dict[str, Path], dict[str, Path]] = ({}, {})
    for stem, file in images_in(folder).items():
        if found := ENDINGS.fullmatch(stem):
            name, ending = found.groups()
            kind = ending if ending in _AFTER else next(key for key, value in _AFTER.items() if value == ending)
            by_date[ending not in _AFTER][f"{name}_{kind}"] = file
    return by_date


def find_mask(before: Path, seen: dict[Path, dict[str, Path]]) -> Path | None:
    """
    The change mask of a pair, if there is one: named as the image in `label` beside its folder `A`. Where both dates
    lie together, that of `x_pre.png` is `label/x.png` in their folder, or `x_mask.png` beside it.

    Args:
        before (`Path`): the image of the first date.
        seen (`dict`): what folders hold, filled in as they are looked at.
    """
    found = None if before.parent.name in ("A", "before") else ENDINGS.fullmatch(before.stem)
    places = [(mask_folder(before), before.stem)]
    if found is not None:
        places = [(before.parent / "label", found[1]), (before.parent, f"{found[1]}_mask")]
    for folder, name in places:
        if folder not in seen:
            seen[folder] = images_in(folder)
        if name in seen[folder]:
            return seen[folder][name]
    return None


def mask_folder(before: Path) -> Path:
    """Where LEVIR-MCI keeps change masks: `label` beside `A`."""
    return before.parent.parent / "label"


@dataclass
class ChangeChatConfig(datasets.BuilderConfig):
    """What [`load_changechat`] is given; `files` carries size and time of each file, so that changed files count."""

    files: tuple[tuple[AnnotationFile, int, int], ...] = ()
    images: str = ""
    tasks: tuple[str, ...] = TASKS
    unroll: bool = False
    masks: bool = False
    mask_times: tuple[int, ...] = ()


class ChangeChat(datasets.GeneratorBasedBuilder):
    """The builder behind [`load_changechat`]."""

    BUILDER_CONFIG_CLASS = ChangeChatConfig
    VERSION = datasets.Version("1.0.0")  # of what rows hold: a new one leaves older caches aside

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(
            features=features(self.config.masks),
            homepage="https://huggingface.co/datasets/hlwu/changechat-105k",
            license="annotations: CC-BY-4.0; LEVIR-CC images: academic use only",
        )

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        splits: dict[str, list[AnnotationFile]] = {}
        for file, *_ in self.config.files:
            splits.setdefault(file.split, []).append(file)
        return [datasets.SplitGenerator(name, {"files": files}) for name, files in splits.items()]

    def _generate_examples(self, files: list[AnnotationFile]) -> Iterator[tuple[int, dict]]:
        images = Path(self.config.images)
        key = 0
        masks: dict[Path, dict[str, Path]] = {}
        for file in files:
            if file.task and file.task not in self.config.tasks:
                continue
            for number, record in enumerate(file.records()):
                before, after = images / record.before, images / record.after
                if number == 0:
                    _check_images(file, before, after)
                if record.task in self.config.tasks:
                    for part in unroll(record) if self.config.unroll else (record,):
                        row = to_row(part, str(before), str(after))
                        if self.config.masks:
                            mask = find_mask(before, masks)
                            row["mask"] = None if mask is None else str(mask)
                        yield key, row
                        key += 1


def _check_images(file: AnnotationFile, *paths: Path) -> None:
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}, which {file.path.name} starts with, is not there. Give LEVIR-CC's folder with train/, val/ "
                "and test/ as `images`; `deltavlm data check` lists all that is missing."
            )


def load_changechat(
    source: str | Path,
    images: str | Path | None = None,
    *,
    split: str | None = None,
    tasks: Sequence[str] = TASKS,
    unroll: bool = False,
    masks: bool = False,
    streaming: bool = False,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> datasets.DatasetDict | datasets.IterableDatasetDict | datasets.Dataset | datasets.IterableDataset:
    """
    Loads ChangeChat-105k, or data of its form, as Arrow tables on disk. Images stay where they are and are decoded
    when a row is looked at, so that memory does not grow with their number.

    Rows have the columns `id`, `task`, `before`, `after` (PIL images), `changed` (or None), `turns` (a list of
    `question` and `answer`; the authors' `<image>` marks are taken out) and `captions` (a captioning test file's
    references, else empty).

    Args:
        source (`str` or `Path`): a folder, a file or the Hub id `hlwu/changechat-105k`, see [`find_annotations`].
        images (`str` or `Path`, *optional*): the folder with LEVIR-CC's `train/`, `val/`, `test/`, each with the first
            dates in `A` and the second in `B`. Defaults to `images` in or beside `source`.
        split (`str`, *optional*): `train`, `train_loc`, `val` or `test`: that one, not a dictionary of all; slices
            such as `train[:10%]` as `datasets` has them. Files make splits; `test` is made of the test files of all
            tasks.
        tasks (`Sequence[str]`, *optional*): only these of `caption`, `binary`, `count`, `grid`, `open`, `dialogue`.
        unroll (`bool`, *optional*, defaults to `False`): make a row of every turn of a dialogue, the turns before it
            in front: what training takes, since a row's last answer is what is learnt.
        masks (`bool`, *optional*, defaults to `False`): with a column `mask`, read from `label` beside `A` and `B`, as
            LEVIR-MCI has it; None where there is none.
        streaming (`bool`, *optional*, defaults to `False`): read annotations as rows are asked for, cache nothing.
        revision (`str`, *optional*): of the Hub's data set.
        cache_dir (`str` or `Path`, *optional*): where the Arrow tables go. Defaults to that of `datasets`.

    Returns:
        `DatasetDict` by split (those that have such records), or the `Dataset` of one split; their iterable kin with
        `streaming`.

    Raises:
        FileNotFoundError: if there are no annotations, no folder of images, or a file's first images are missing.
        ValueError: for an unknown task or split, or if there are no records of these tasks.
        RecordError: for an annotation that is not of ChangeChat-105k's form, when it is read.
    """
    tasks = check_tasks(tasks)
    files = find_annotations(source, revision)
    if split is not None:
        known = dict.fromkeys(file.split for file in files)
        files = [file for file in files if file.split == split.partition("[")[0]]
        if not files:
            raise ValueError(f"No split {split!r} in {source}, which has {', '.join(known)}.")
    files = [replace(file, path=file.path.absolute()) for file in files]
    stats = [file.path.stat() for file in files]
    folder = find_images(source, images)
    splits = ("", "train", "val", "test") if masks else ()
    mask_folders = [folder / split / "label" for split in splits]
    mask_folders += [folder / split for split in splits if any((folder / split).glob("*_mask.*"))]
    builder = ChangeChat(
        cache_dir=None if cache_dir is None else str(cache_dir),
        files=tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in zip(files, stats, strict=True)),
        images=str(folder),
        tasks=tasks,
        unroll=unroll,
        masks=masks,
        mask_times=tuple(folder.stat().st_mtime_ns for folder in mask_folders if folder.is_dir()),
    )
    return load(builder, split, streaming)
