"""A fine-tuning run from a YAML file: what `deltavlm train` does."""

import dataclasses
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import yaml
from transformers import AutoModelForImageTextToText, AutoProcessor

from .. import tiny
from ..data import TASKS, load_changechat, load_generated
from ..files import write_whole
from ..quantization import four_bit_config
from .arguments import DeltaVLMTrainingArguments
from .augmentation import PairAugmentation
from .checkpoints import last_complete_checkpoint
from .freezing import FreezePolicy, freeze, trainable_table
from .rows import TrainingRows
from .trainer import DeltaVLMTrainer

logger = logging.getLogger(__name__)

SETTINGS_FILE = "training_run.json"  # in the output folder: with what the model was trained


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

    @property
    def validates(self) -> bool:
        """Whether there are rows for validation."""
        return bool(self.validation if self.source else self.validation_pairs)

    def load(self, validation: bool = False, unroll: bool = True) -> datasets.Dataset:
        """The rows to train on, or those for validation."""
        if self.source:
            split = self.validation if validation else self.train
            rows = load_changechat(self.source, self.images, split=str(split), tasks=self.tasks, unroll=unroll)
        else:
            pairs = self.validation_pairs if validation else self.pairs
            rows = load_generated(pairs, self.seed + self.pairs * validation, tasks=self.tasks, unroll=unroll)
        return rows.select(range(min(self.limit or len(rows), len(rows))))


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

    @classmethod
    def from_yaml(cls, path: str | Path) -> "TrainingRun":
        """
        Reads a file with the fields above.

        Raises:
            ValueError: if it is no YAML, or has unknown fields; the message names those that there are.
        """
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is no YAML: {error}") from error
        if not isinstance(content, dict) or not isinstance(content.get("training"), dict):
            raise ValueError(f"{path} must be a YAML mapping with at least `training: {{output_dir: ...}}`.")
        parts = {"data": DataConfig, "freeze": FreezePolicy, "augmentation": PairAugmentation}
        for name, part in parts.items():
            if isinstance(content.get(name), dict):
                content[name] = _make(part, content[name], f"{path}, `{name}`")
        _known(DeltaVLMTrainingArguments, content["training"], f"{path}, `training`")
        if "output_dir" not in content["training"]:
            raise ValueError(f"{path}, `training`: `output_dir` is missing.")
        return _make(cls, content, str(path))


def _make(kind: type, content: dict[str, Any], where: str):
    _known(kind, content, where)
    return kind(**content)


def _known(kind: type, content: dict[str, Any], where: str) -> None:
    known = [each.name for each in dataclasses.fields(kind) if each.init]
    unknown = [name for name in content if name not in known]
    if unknown:
        close = ", ".join(known) if len(known) < 20 else "see the documentation of `TrainingArguments`"
        raise ValueError(f"{where} has unknown fields {', '.join(map(str, unknown))}; known are: {close}.")


def train(run: TrainingRun, show: Callable[[str], None] = logger.info) -> Path:
    """
    Trains, going on from the last complete checkpoint in the output folder if there is one, and writes the result
    there: the model (the best by `metric_for_best_model`, where there is validation) and the processor.

    Args:
        run ([`TrainingRun`]).
        show (*optional*): is given the table of what trains; by default it is logged.

    Returns:
        `Path`: the output folder.

    Raises:
        ValueError: if the settings do not go together, or hold a token.
    """
    settings = dict(run.training)
    if settings.get("hub_token"):
        raise ValueError(
            "`training` has a `hub_token`, which would be kept with the model, and published with it. Take it out: "
            "`hf auth login` or the variable HF_TOKEN serve as well."
        )
    if not run.data.validates:
        settings = {"eval_strategy": "no", "load_best_model_at_end": False, **settings}
    args = DeltaVLMTrainingArguments(**settings)
    with args.main_process_first(local=False, desc="data"):
        rows = run.data.load()
        validation = run.data.load(validation=True) if run.data.validates else None
    source = tiny() if run.model == "tiny" else run.model
    options: dict[str, Any] = {"dtype": run.dtype, "revision": run.revision, "device_map": run.device_map}
    if run.load_in_4bit:
        options["quantization_config"] = four_bit_config(torch.bfloat16 if args.bf16 else torch.float32)
        if run.device_map is None and torch.cuda.is_available():
            options["device_map"] = {"": args.device}  # quantised where it stays
    options = {name: value for name, value in options.items() if value is not None}
    model = AutoModelForImageTextToText.from_pretrained(source, **options)
    processor = AutoProcessor.from_pretrained(source, **({"revision": run.revision} if run.revision else {}))
    freeze(model, run.freeze)
    if args.process_index == 0:
        show(trainable_table(model))

    callbacks = []
    if run.validate_answers and run.data.validates:
        from ..evaluation.callback import AnswerMetrics

        whole = run.data.load(validation=True, unroll=False)
        whole = whole.select(range(min(run.validate_answers, len(whole))))
        callbacks.append(AnswerMetrics(processor, whole))
    trainer = DeltaVLMTrainer(
        model,
        args,
        train_dataset=TrainingRows(rows, run.augmentation, run.task_weights, args.seed),
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
        described = json.dumps(dataclasses.asdict(run), indent=2, default=str) + "\n"
        write_whole(Path(args.output_dir) / SETTINGS_FILE, described)
    return Path(args.output_dir)
