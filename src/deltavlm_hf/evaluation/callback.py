"""The same figures during training: generated answers to a validation set at every evaluation of `Trainer`."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
from transformers import TrainerCallback

from ..data.classes import ROADS_AND_BUILDINGS, Classes
from ..inference.processes import process_state
from ..processing import DeltaVLMProcessor
from .answering import ModelAnswerer, predict
from .captions import Protocol
from .masks import score_pixels, see_masks
from .score import evaluate_predictions

# Of each task the ways to its figures; CLASS stands for each class.
CLASS = "class"
FIGURES: dict[str, Sequence[tuple[str, ...]]] = {
    "binary": (("accuracy",), ("f1",)),
    "count": ((CLASS, "mae"), (CLASS, "exact")),
    "grid": ((CLASS, "f1"),),
    "caption": (("all", "BLEU-4"), ("all", "METEOR"), ("all", "ROUGE-L"), ("all", "CIDEr")),
    "open": (("exact",), ("all", "ROUGE-L"), ("all", "CIDEr")),
    "dialogue": (("turns",), ("whole",)),
}
MASK_FIGURES: dict[str, Sequence[tuple[str, ...]]] = {"masks": (("all", "f1"), ("all", "iou"), ("miou",))}


class AnswerMetrics(TrainerCallback):
    """
    Adds what [`evaluate_predictions`] says of generated answers to the metrics of every evaluation, such as
    `eval_binary_accuracy`, `eval_grid_roads_f1` or `eval_caption_CIDEr`: for logs and `metric_for_best_model`. The
    answers are kept in `OUTPUT_DIR/answers/STEP`. Of a model with masks, where rows have some, also `eval_masks_f1`,
    `eval_masks_iou` (all classes together) and `eval_masks_miou`, see [`~evaluation.masks.score_pixels`].

    Args:
        processor ([`DeltaVLMProcessor`]): the model's.
        rows (`Dataset`): validation data, see [`load_changechat`], not unrolled. A few hundred rows are enough.
        protocol ([`Protocol`], *optional*): for captions and open questions; defaults to `coco`.
        batch_size (`int`, *optional*, defaults to 8).
        classes ([`Classes`], *optional*): of the data set, see [`find_classes`]; by default roads and buildings.
        generate_kwargs: for `generate`, such as `max_new_tokens=64`.
    """

    def __init__(
        self,
        processor: DeltaVLMProcessor,
        rows: datasets.Dataset,
        *,
        protocol: Protocol | None = None,
        batch_size: int = 8,
        classes: Classes = ROADS_AND_BUILDINGS,
        **generate_kwargs,
    ):
        self.processor = processor
        self.rows = rows
        self.protocol = protocol
        self.batch_size = batch_size
        self.classes = classes
        self.generate_kwargs = generate_kwargs

    def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs) -> None:
        model = getattr(model, "module", model)  # without the wrapping of several processes
        training = model.training
        model.eval()
        answerer = ModelAnswerer(model, self.processor, **self.generate_kwargs)
        folder = Path(args.output_dir) / "answers" / str(state.global_step)
        processes = process_state()
        if processes.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)  # of another run, or of this one before it was killed
        processes.wait_for_everyone()
        predictions = predict(answerer, self.rows, folder, {"step": state.global_step}, batch_size=self.batch_size)
        seen = None
        if "mask" in self.rows.column_names:
            seen = see_masks(model, self.processor, self.rows, self.classes)
        model.train(training)
        images = [name for name in ("before", "after", "mask") if name in self.rows.column_names]
        results, _ = evaluate_predictions(
            self.rows.remove_columns(images), predictions, self.protocol, intervals=False, classes=self.classes
        )
        if seen is not None and len(seen.confusions):
            results["masks"] = score_pixels(seen.confusions, seen.classes)
        found = dict(_flatten(results, self.classes))
        metrics.update(found)
        state.log_history.append({**found, "step": state.global_step})


def figure_names(tasks: Sequence[str], classes: Classes = ROADS_AND_BUILDINGS) -> list[str]:
    """What [`AnswerMetrics`] may add for these tasks, and of masks, without `eval_`: for `metric_for_best_model`."""
    figures = {task: FIGURES[task] for task in tasks} | MASK_FIGURES
    return [_name(task, path) for task, paths in figures.items() for path in _of_classes(paths, classes)]


def _of_classes(paths: Sequence[tuple[str, ...]], classes: Classes) -> Iterator[tuple[str, ...]]:
    """The ways with each class in place of [`CLASS`], one class after the other."""
    for plural in classes.plurals:
        yield from ((plural, *rest) for first, *rest in paths if first == CLASS)
    yield from (path for path in paths if path[0] != CLASS)


def _name(task: str, path: Sequence[str]) -> str:
    return "_".join([task, *(part for part in path if part != "all")]).replace(" ", "_")


def _flatten(results: dict[str, dict], classes: Classes) -> Iterator[tuple[str, float]]:
    for task, figures in results.items():
        for path in _of_classes((FIGURES | MASK_FIGURES)[task], classes):
            *groups, name = path
            value = figures
            for group in groups:
                value = value.get(group, {})
            if value.get(name) is not None:
                yield f"eval_{_name(task, path)}", value[name]
