"""A fine-tuning run from a YAML file: what `deltavlm train` does."""

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..data import TASKS, load_changechat, load_generated
from ..data.changechat import find_classes
from ..data.classes import ROADS_AND_BUILDINGS, Classes
from ..data.questions import check_tasks
from ..data.rows import first_rows, undecoded
from ..files import find_licences, write_text
from ..inference.loading import find_source
from ..modeling import DeltaVLMConfig
from ..modeling.lora import make_lora_config
from . import SETTINGS_FILE
from .arguments import DeltaVLMTrainingArguments
from .augmentation import PairAugmentation
from .checkpoints import last_complete_checkpoint
from .fields import fit, nearest, read_yaml
from .freezing import FreezePolicy, freeze, trainable_table
from .quantization import four_bit_config
from .rows import TrainingRows
from .small_data import choose
from .trainer import CACHE_AND_AUGMENTATION, DeltaVLMTrainer

logger = logging.getLogger(__name__)


@dataclass
class DataConfig:
    """
    Which rows to train on.

    Args:
        source (`str`, *optional*): a folder as in docs/data.md, or a Hub id; without any, scenes are generated.
        images (`str`, *optional*): the folder of images, see [`load_changechat`].
        train (`str`, *optional*, defaults to `"train"`): the split that is trained on.
        validation (`str`, *optional*, defaults to `"val"`): the split for validation; null for none.
        tasks (`list[str]`, *optional*): some of the six.
        limit (`int`, *optional*): only the first rows of each split, for a trial.
        pairs (`int`, *optional*, defaults to 1000): generated pairs to train on.
        validation_pairs (`int`, *optional*, defaults to 100): generated pairs to validate on.
        seed (`int`, *optional*, defaults to 6000000): of the first generated pair.

    Raises:
        ValueError: for an unknown task, a limit below 1, or a folder of images without `source`.
    """

    source: str | None = None
    images: str | None = None
    train: str = "train"
    validation: str | None = "val"
    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    limit: int | None = None
    pairs: int = 1000
    validation_pairs: int = 100
    seed: int = 6_000_000

    def __post_init__(self):
        check_tasks(self.tasks)
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"`limit` must be at least 1, got {self.limit}; leave it out for all rows.")
        if self.images and not self.source:
            raise ValueError(f"`images` is {self.images!r}, but `source`, whose images they are, is missing.")

    @property
    def validates(self) -> bool:
        """Whether there are rows for validation."""
        return bool(self.validation if self.source else self.validation_pairs)

    @property
    def classes(self) -> Classes:
        """What is learnt to be counted and placed: those of the data set."""
        return find_classes(self.source) if self.source else ROADS_AND_BUILDINGS

    def load(self, validation: bool = False, unroll: bool = True, masks: bool = False) -> datasets.Dataset:
        """The rows to train on, or those for validation."""
        options: dict[str, Any] = {"tasks": self.tasks, "unroll": unroll, "masks": masks}
        if self.source:
            split = self.validation if validation else self.train
            rows = load_changechat(self.source, self.images, split=str(split), **options)
        else:
            pairs = self.validation_pairs if validation else self.pairs
            rows = load_generated(pairs, self.seed + self.pairs * validation, **options)
        return first_rows(rows, self.limit)


@dataclass
class TrainingRun:
    """
    Everything about a run.

    Args:
        training (`dict`): for [`DeltaVLMTrainingArguments`]; `output_dir` is needed.
        model (`str`, *optional*, defaults to `"tiny"`): folder or Hub id.
        revision (`str`, *optional*): of the Hub id.
        dtype (`str`, *optional*, defaults to `"auto"`): of the weights. What trains is best kept in `float32`.
        load_in_4bit (`bool`, *optional*, defaults to `False`): the language model in 4-bit.
        device_map (*optional*): see `from_pretrained`; for a language model over several GPUs.
        data ([`DataConfig`]).
        freeze ([`FreezePolicy`]).
        augmentation ([`PairAugmentation`], *optional*).
        task_weights (`dict[str, float]`, *optional*): see [`TrainingRows`].
        validate_answers (`int`, *optional*, defaults to 0): so many validation rows are answered at each evaluation,
            for the figures of `deltavlm evaluate`.
    """

    training: dict[str, Any]
    model: str = "tiny"
    revision: str | None = None
    dtype: str = "auto"
    load_in_4bit: bool = False
    device_map: Any = None
    data: DataConfig = field(default_factory=DataConfig)
    freeze: FreezePolicy = field(default_factory=FreezePolicy)
    augmentation: PairAugmentation | None = None
    task_weights: dict[str, float] | None = None
    validate_answers: int = 0

    @property
    def source(self) -> str:
        """The folder or Hub id to start from."""
        return find_source(self.model)

    @classmethod
    def from_yaml(cls, path: str | Path, changes: Sequence[str] = ()) -> "TrainingRun":
        """
        Reads a file with the fields above.

        Args:
            path (`str` or `Path`).
            changes (`Sequence[str]`, *optional*): fields in place of the file's, such as `data.limit=10`.

        Raises:
            ValueError: if it is no YAML, or has unknown fields or values of another type; the message names the field
                that was meant.
        """
        content = read_yaml(path, changes)
        if not isinstance(content, dict) or not isinstance(content.get("training"), dict):
            raise ValueError(f"{path} must be a YAML mapping with at least `training: {{output_dir: ...}}`.")
        parts = {"data": DataConfig, "freeze": FreezePolicy, "augmentation": PairAugmentation}
        sections = {**parts, "training": DeltaVLMTrainingArguments}
        places: dict[str, type] = {f"under `{name}`": kind for name, kind in sections.items()}
        places["at the top of the file"] = cls
        content = {name: value for name, value in content.items() if value is not None or name not in parts}
        for name, kind in sections.items():
            if isinstance(content.get(name), dict):
                content[name] = fit(kind, content[name], f"{path}, `{name}`", places)
        if "output_dir" not in content["training"]:
            raise ValueError(f"{path}, `training`: `output_dir` is missing.")
        for name, kind in parts.items():
            if isinstance(content.get(name), dict):
                content[name] = _named(f"{path}, `{name}`", kind, **content[name])
        return cls(**fit(cls, content, str(path), places))


def _named(where: str, kind: type, **fields: Any) -> Any:
    """Makes an object; what it objects to is told with the place where it stands."""
    try:
        return kind(**fields)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error


def train(run: TrainingRun, show: Callable[[str], None] = logger.info) -> Path:
    """
    Trains, going on from the last complete checkpoint in the output folder if there is one, and writes the result
    there. A model that makes masks learns them too where the data have any; without, its mask decoder stays as it is.
    What is written: the model (the best by `metric_for_best_model`, where there is validation), the processor and the
    licence that lies beside the model it began from.
    With fewer than 500 pairs, what `run.training` does not say of epochs, warm-up, evaluation, saving and logging is
    chosen, see [`~training.small_data.choose`].

    Args:
        run ([`TrainingRun`]).
        show (*optional*): is given the table of what trains, and what was chosen; by default they are logged.

    Returns:
        `Path`: the output folder.

    Raises:
        ValueError: if the settings do not go together, or hold a token.
    """
    args = _check(run)
    revision = {"revision": run.revision} if run.revision else {}
    masks = bool(DeltaVLMConfig.from_pretrained(run.source, **revision).mask_classes)
    if args.vision_cache and not run.freeze.masks:
        masks = False  # else refused: beside cached states there are no pixels, of which masks are made
    with args.main_process_first(local=False, desc="data"):
        rows = run.data.load(masks=masks)
        validation = run.data.load(validation=True, masks=masks) if run.data.validates else None
    chosen, told = choose(run.training, args, rows)
    if chosen:
        run = dataclasses.replace(run, training={**run.training, **chosen})
        args = _check(run)
        if args.process_index == 0:
            show(told)
    policy = run.freeze
    if masks and all(mask is None for mask in undecoded(rows)["mask"]):
        rows = rows.remove_columns("mask")
        masks = False
    if not masks:
        policy = dataclasses.replace(policy, masks=False)  # text alone would not hold the decoder to masks
        if (args.metric_for_best_model or "").removeprefix("eval_").startswith("masks_"):
            raise ValueError(
                f"`metric_for_best_model` is {args.metric_for_best_model!r}, and this run learns no masks: it takes a "
                "model with `mask_classes`, data with masks, and neither `vision_cache` nor `masks: false`."
            )
    training_rows = TrainingRows(rows, run.augmentation, run.task_weights, args.seed)
    options: dict[str, Any] = {"dtype": run.dtype, "revision": run.revision, "device_map": run.device_map}
    if run.load_in_4bit:
        options["quantization_config"] = four_bit_config(torch.bfloat16 if args.bf16 else torch.float32)
        if run.device_map is None and torch.cuda.is_available():
            options["device_map"] = {"": args.device}  # quantised where it stays
    options = {name: value for name, value in options.items() if value is not None}
    model = AutoModelForImageTextToText.from_pretrained(run.source, **options)
    processor = AutoProcessor.from_pretrained(run.source, **revision)
    classes = run.data.classes
    model.config.change_classes = None if classes == ROADS_AND_BUILDINGS else classes.to_dict()
    freeze(model, policy)
    if args.process_index == 0:
        show(trainable_table(model))

    callbacks = []
    if run.validate_answers:
        from ..evaluation.callback import AnswerMetrics

        whole = first_rows(run.data.load(validation=True, unroll=False, masks=masks), run.validate_answers)
        callbacks.append(AnswerMetrics(processor, whole, classes=classes))
    trainer = DeltaVLMTrainer(
        model,
        args,
        train_dataset=training_rows,
        eval_dataset=validation,
        processing_class=processor,
        callbacks=callbacks,
    )
    checkpoint = last_complete_checkpoint(args.output_dir)
    if checkpoint:
        logger.warning("Going on from %s", checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.is_world_process_zero():  # a kill leaves no model beside the settings of another
        (Path(args.output_dir) / SETTINGS_FILE).unlink(missing_ok=True)
    trainer.save_model()
    if trainer.is_world_process_zero():
        for file in find_licences(Path(run.source)):
            (Path(args.output_dir) / file.name).write_bytes(file.read_bytes())
        described = json.dumps(dataclasses.asdict(run), indent=2, default=str) + "\n"
        write_text(Path(args.output_dir) / SETTINGS_FILE, described)
    return Path(args.output_dir)


def _check(run: TrainingRun) -> DeltaVLMTrainingArguments:
    """The arguments for `Trainer`, after all that can be known to be wrong before data and model are loaded."""
    settings = dict(run.training)
    if settings.get("hub_token"):
        raise ValueError(
            "`training` has a `hub_token`, which would be kept with the model, and published with it. Take it out: "
            "`hf auth login` or the variable HF_TOKEN serve as well."
        )
    for what in ("eval", "save"):
        if settings.get(f"{what}_steps") and f"{what}_strategy" not in settings:
            raise ValueError(
                f"`training` has `{what}_steps: {settings[f'{what}_steps']}`, which has no effect while "
                f"`{what}_strategy` is 'epoch', as by default: add `{what}_strategy: steps`, or leave it out."
            )
    if run.data.validates:
        _check_metric(run, settings.get("metric_for_best_model"))
    else:
        wants = [
            name
            for name in ("eval_strategy", "load_best_model_at_end")
            if settings.get(name) not in (None, False, "no")
        ]
        if run.validate_answers:
            wants.append("validate_answers")
        if wants:
            raise ValueError(
                f"`{wants[0]}` needs rows for validation, and `data` has none: give `validation`, or "
                "`validation_pairs` where scenes are generated, or leave it out."
            )
        settings = {"eval_strategy": "no", "load_best_model_at_end": False, **settings}
    if run.augmentation is not None and settings.get("vision_cache"):
        raise ValueError(CACHE_AND_AUGMENTATION)
    if run.dtype != "auto" and not isinstance(getattr(torch, run.dtype, None), torch.dtype):
        raise ValueError(
            f"`dtype` is {run.dtype!r}, expected 'auto' or a precision of PyTorch, such as 'float32' or 'bfloat16'."
        )
    if run.freeze.language_model and run.load_in_4bit:
        raise ValueError("A language model in 4-bit cannot be trained: leave out `load_in_4bit` or `language_model`.")
    if run.freeze.lora is not None:
        make_lora_config(run.freeze.lora)
    args = _named("`training`", DeltaVLMTrainingArguments, **settings)
    if not args.save_frozen_weights and os.path.realpath(run.source) == os.path.realpath(args.output_dir):
        raise ValueError(
            f"`output_dir` is {args.output_dir!r}, where the model comes from: what is saved there points to the "
            "weights that it would take the place of. Choose another folder, or `save_frozen_weights: true`."
        )
    return args


def _check_metric(run: TrainingRun, metric: str | None) -> None:
    known = ["loss"]
    if run.validate_answers:
        from ..evaluation.callback import figure_names

        known += figure_names(run.data.tasks, run.data.classes)
    if metric is not None and metric.removeprefix("eval_") not in known:
        raise ValueError(
            f"`metric_for_best_model` is {metric!r}, expected one of {', '.join(known)}."
            + (nearest(metric, known) if run.validate_answers else " Others need `validate_answers`.")
        )
