"""A model's figures on a data set, from the questions to the report: what `deltavlm evaluate` does."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from ..data import TASKS, load_changechat, load_generated
from ..data.build import read_captions
from ..data.changechat import find_classes
from ..data.classes import ROADS_AND_BUILDINGS, Classes
from ..data.rows import first_rows, undecoded
from ..inference.identity import fingerprint_of, identify
from ..inference.loading import load_model
from ..inference.processes import lock_folder, own_device, process_state
from .answering import ModelAnswerer, digest_rows, group_by_pair, predict
from .baselines import BASELINES, make_baseline
from .captions import Protocol, has_java, make_vocabulary
from .masks import SeenMasks, against_masks, answers_of_masks, score_agreement, score_pixels, see_masks
from .published import published_tasks
from .records import Entry, make_records
from .report import write_report
from .score import evaluate_predictions

_LEARNING = {"majority", "nearest"}  # baselines that need training data


@dataclass
class EvaluationRun:
    """
    What to ask of whom.

    Args:
        model (`str`): folder or Hub id, `small`, `tiny`, or the name of a baseline.
        data (`str`, *optional*): folder, file or Hub id, see [`load_changechat`]; without any, scenes are generated.
        images (`str` or `Path`, *optional*): the folder of images, see [`load_changechat`].
        split (`str`, *optional*, defaults to `"test"`): of `data`.
        tasks (`Sequence[str]`, *optional*): some of the six.
        limit (`int`, *optional*): only the first records.
        pairs (`int`, *optional*, defaults to 100): generated pairs.
        seed (`int`, *optional*, defaults to 5000000): of the first of them.
        output (`str` or `Path`, *optional*, defaults to `"evaluation"`): the folder of answers and report.
        protocol (`str`, *optional*, defaults to `"coco"`): for captions and open questions, see [`Protocol`].
        gpt2 (`str`, *optional*): GPT-2's tokenizer, for `gpt2-ids`.
        train_captions (`str` or `Path`, *optional*): a file of captions, for `levir-words`.
        baselines (`Sequence[str]`, *optional*): what stands beside the model, some of [`BASELINES`].
        batch_size (`int`, *optional*, defaults to 16).
        workers (`int`, *optional*, defaults to 1): processes that read images; with 0 the model's own does.
        device (`str`, *optional*, defaults to `"auto"`).
        dtype (`str`, *optional*, defaults to `"auto"`): by default as saved.
        quantization_config (*optional*): such as [`four_bit_config`]'s.
        max_new_tokens, num_beams (`int`, *optional*): for `generate`; by default the model's own.
        right_history (`bool`, *optional*, defaults to `False`): put right answers before a dialogue's next question.
        verbatim_questions (`bool`, *optional*, defaults to `False`): ask single questions as they stand.

    Raises:
        ValueError: if the protocol lacks what it needs.
    """

    model: str
    data: str | None = None
    images: str | Path | None = None
    split: str = "test"
    tasks: Sequence[str] = TASKS
    limit: int | None = None
    pairs: int = 100
    seed: int = 5_000_000
    output: str | Path = "evaluation"
    protocol: str = "coco"
    gpt2: str | None = None
    train_captions: str | Path | None = None
    baselines: Sequence[str] = ()
    batch_size: int = 16
    workers: int = 1
    device: str = "auto"
    dtype: str = "auto"
    quantization_config: Any = None
    max_new_tokens: int | None = None
    num_beams: int | None = None
    right_history: bool = False
    verbatim_questions: bool = False

    def __post_init__(self):
        self.output = Path(self.output)
        if self.protocol == "levir-words" and not self.train_captions:
            raise ValueError("--protocol levir-words needs the words of the training captions: --train-captions FILE")

    def load(self) -> tuple[datasets.Dataset, datasets.Dataset | None]:
        """The rows to ask about, and those that baselines learn from, if one of them does."""
        learns = bool(_LEARNING & {self.model, *self.baselines})
        training = None
        if self.data:
            rows = load_changechat(self.data, self.images, split=self.split, tasks=self.tasks, masks=True)
            if learns:
                training = load_changechat(self.data, self.images, split="train")
        else:
            rows = load_generated(self.pairs, self.seed, tasks=self.tasks, masks=True)
            if learns:
                training = load_generated(self.pairs, self.seed + self.pairs)
        return first_rows(rows, self.limit), training

    @property
    def classes(self) -> Classes:
        """What is counted and placed: those of the data set."""
        return find_classes(self.data) if self.data else ROADS_AND_BUILDINGS

    @property
    def generate_kwargs(self) -> dict[str, int]:
        given = {"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def settings(self) -> dict[str, Any]:
        """What the report's head says, and what a run that goes on must have in common with the earlier one."""
        generated = f"generated, seeds from {self.seed}, {self.pairs} pairs"
        verbatim = "verbatim, as in the authors' evaluation"
        return {
            "data": f"{self.data}, {self.split}" if self.data else generated,
            "tasks": list(self.tasks),
            "limit": self.limit,
            "dtype": self.dtype,
            "load_in_4bit": self.quantization_config is not None,
            "generate": self.generate_kwargs,
            "history": "right answers" if self.right_history else "own answers",
            "questions": verbatim if self.verbatim_questions else "as in training, q: ...",
        }


@dataclass
class Evaluation:
    """
    What came of a run.

    Attributes:
        files (`list[Path]`): the report as JSON, Markdown and HTML.
        unanswered (`int`): records to which the model gave no answer; the reasons are with the predictions.
    """

    files: list[Path]
    unanswered: int


def evaluate(run: EvaluationRun) -> Evaluation | None:
    """
    Asks a model, and baselines, all questions of a data set and writes the report, see [`write_report`]; a model's
    masks are scored beside its words. A run that was stopped goes on; under `torchrun` processes share the work.

    Args:
        run ([`EvaluationRun`]).

    Returns:
        [`Evaluation`], in the main process; None in the others.

    Raises:
        ValueError: for a model that cannot be loaded, or an output folder with answers of another run.
        BlockingIOError: if another run answers into the same folder.
    """
    vocabulary = None
    if run.train_captions:
        captions = read_captions(run.train_captions, "train")
        vocabulary = make_vocabulary(text for texts in captions.values() for text in texts)
    protocol = Protocol(run.protocol, tokenizer=run.gpt2, vocabulary=vocabulary)
    state = process_state()
    with state.main_process_first():  # the others find its Arrow tables
        rows, training = run.load()
    classes = run.classes
    texts = rows.remove_columns(["before", "after", "mask"])
    pairs = group_by_pair(undecoded(rows.with_format(None))) if state.is_main_process else []
    differing = against_masks(rows, pairs, classes) if run.data else []
    doubtful = {index for pair in differing for index in pair}
    systems: dict[str, dict] = {}
    models: dict[str, str] = {}
    records: dict[str, list[Entry]] = {}
    model_cases: list = []
    for name in dict.fromkeys((run.model, *run.baselines)):
        predictions, masks, model = _predict(run, name, rows, training, classes)
        if state.is_main_process:
            systems[name], cases = evaluate_predictions(texts, predictions, protocol, classes=classes)
            model_cases = model_cases or cases
            records[name] = make_records(pairs, cases, masks)
            if doubtful and len(doubtful) < len(texts):
                kept = [index for index in range(len(texts)) if index not in doubtful]
                without = f"{name}, without pairs whose captions and masks differ"
                chosen = [predictions[index] for index in kept]
                systems[without], _ = evaluate_predictions(texts.select(kept), chosen, protocol, classes=classes)
            if model is not None:
                models[name] = model
            if masks is not None:
                systems[name] |= _score_masks(texts, predictions, masks)
                asked, read = answers_of_masks(texts, masks)
                if asked:
                    systems[f"{name}, read off its masks"], _ = evaluate_predictions(asked, read, classes=classes)
    if not state.is_main_process:
        return None
    settings = run.settings
    if run.protocol == "coco" and {*run.tasks} & {"caption", "open"} and not has_java("In the report's captions"):
        settings["captions"] = "split at white space, not by the Penn Treebank tokenizer, for want of Java"
    if classes != ROADS_AND_BUILDINGS:
        settings["classes"] = [*classes.names]
    if differing:
        settings["captions against masks"] = f"{len(differing)} of {len(pairs)} pairs"
    files = write_report(
        run.output,
        systems,
        model_cases,
        rows,
        title=f"{run.model} on {settings['data']}",
        settings=settings,
        models=models,
        records=records,
        published_tasks=published_tasks(rows, run.data, run.split) if run.data else [],
        classes=classes,
    )
    return Evaluation(files, sum(case.error is not None for case in model_cases))


def _predict(
    run: EvaluationRun, name: str, rows: datasets.Dataset, training: datasets.Dataset | None, classes: Classes
) -> tuple[list[dict[str, Any]], SeenMasks | None, str | None]:
    """The answers of the model or of a baseline; of a model its masks, if it makes any, and its fingerprint."""
    folder = Path(run.output) / "predictions" / Path(name).name
    with lock_folder(folder):  # before the model is loaded, which takes its time
        if name in BASELINES:
            answerer: Any = make_baseline(name, training, classes)
            made_of: Any = None if training is None else digest_rows(training)
        else:
            model, processor = load_model(name, own_device(run.device), run.dtype, run.quantization_config)
            answerer = ModelAnswerer(model, processor, **run.generate_kwargs)
            made_of = identify(model)
        predictions = predict(
            answerer,
            rows,
            folder,
            {"system": name, "made_of": made_of, **run.settings},
            batch_size=run.batch_size,
            num_workers=run.workers,
            own_history=not run.right_history,
            verbatim_questions=run.verbatim_questions,
        )
        if name in BASELINES:
            return predictions, None, None
        return predictions, see_masks(model, processor, rows, classes), fingerprint_of(model)


def _score_masks(texts: datasets.Dataset, predictions: list[dict[str, Any]], seen: SeenMasks) -> dict[str, dict]:
    """What is said of a model's masks beside the figures of its words."""
    found = {"agreement": score_agreement(texts, predictions, seen)}
    if len(seen.confusions):
        sizes = {"samples": len(seen.confusions), "failed": 0, "unreadable_truths": seen.unreadable}
        found["masks"] = {**sizes, **score_pixels(seen.confusions, seen.classes, intervals=True)}
    return {name: figures for name, figures in found.items() if figures}
