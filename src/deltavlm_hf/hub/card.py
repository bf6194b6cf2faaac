"""The model card: facts that lie in a saved model and in what was measured of it, none of them as markup."""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import InstructBlipVisionConfig

from ..data.classes import ROADS_AND_BUILDINGS, Classes
from ..modeling.weight_sources import open_weights, shape
from ..training import SETTINGS_FILE

# Licences of what a model may be made from, as their owners state them.
LICENCES = {
    "lmsys/vicuna-7b-v1.5": "Vicuna: Llama 2 Community License",
    "Salesforce/instructblip-vicuna-7b": "InstructBLIP: see its card; its Vicuna is bound to LLaMA's licence",
    "google-bert/bert-base-uncased": "BERT's vocabulary: Apache-2.0",
}
# Of a small checkpoint's sources, by where their weights belong.
PARTS = {
    "vision_model": "the vision encoder's weights",
    "language_model": "the language model's weights",
    "qformer": "the Q-Former's weights",
}
DATA_LICENCE = "LEVIR-CC imagery: academic use only; ChangeChat-105k annotations: CC-BY-4.0"
OTHER_DATA = "The licences of the images and annotations that it learnt from are not recorded here"
SCENES = ("pairs", "validation_pairs", "seed")  # settings of generated ones, which other data do not have
TASK = "image-text-to-text"
# Of report.json: task, way to the figure, the metric's name on the Hub, what it is called here. NAME and PLURAL stand
# for those of each class.
NAME, PLURAL = "{name}", "{plural}"
FIGURES = (
    ("binary", ("accuracy",), "accuracy", "yes/no accuracy"),
    ("binary", ("f1",), "f1", "yes/no F1"),
    ("caption", ("all", "BLEU-4"), "bleu", "captions, BLEU-4"),
    ("caption", ("all", "METEOR"), "meteor", "captions, METEOR"),
    ("caption", ("all", "ROUGE-L"), "rouge", "captions, ROUGE-L"),
    ("caption", ("all", "CIDEr"), "cider", "captions, CIDEr"),
    ("count", (PLURAL, "exact"), "accuracy", f"{PLURAL}, exact count"),
    ("count", (PLURAL, "mae"), "mae", f"{PLURAL}, mean absolute error"),
    ("grid", (PLURAL, "f1"), "f1", f"3x3 grid, {PLURAL}, micro-F1"),
    ("open", ("all", "ROUGE-L"), "rouge", "open questions, ROUGE-L"),
    ("open", ("exact",), "accuracy", "open questions, exact answer"),
    ("dialogue", ("whole",), "accuracy", "dialogues, all answers right"),
    ("dialogue", ("consistent",), "accuracy", "dialogues, yes or no agrees with the counts"),
)
# The same of its masks, and of how often its words say what these show.
MASK_FIGURES = (
    ("masks", ("classes", NAME, "f1"), "f1", f"change masks, pixel F1, {PLURAL}"),
    ("masks", ("miou",), "mean_iou", "change masks, mIoU with unchanged pixels"),
    ("agreement", ("binary", "all"), "accuracy", "words and masks agree, yes/no"),
    ("agreement", ("count", "all"), "accuracy", "words and masks agree, counts"),
    ("agreement", ("grid", "all"), "accuracy", "words and masks agree, 3x3 grid"),
)
CITATION = """@article{deng2026deltavlm,
  title   = {DeltaVLM: Interactive Remote Sensing Image Change Analysis via Instruction-Guided Difference Perception},
  author  = {Deng, Pei and Zhou, Wenqian and Wu, Hanlin},
  journal = {Remote Sensing},
  volume  = {18},
  number  = {4},
  pages   = {541},
  year    = {2026}
}"""


def make_card(
    folder: Path,
    config: Mapping[str, Any],
    repo_id: str,
    license: str,
    base_models: Sequence[str],
    report: Mapping[str, Any] | None,
    changes: Sequence[str] = (),
) -> ModelCard:
    """
    A card for a saved model.

    Args:
        folder (`Path`): the model's.
        config (`dict`): what its `config.json` says.
        repo_id (`str`): `owner/name`.
        license (`str`): the Hub's name of the weights' licence.
        base_models (`Sequence[str]`): Hub ids of what the model was made from.
        report (`dict`, *optional*): its figures, see [`read_report`].
        changes (`Sequence[str]`, *optional*): what was done to the weights after they were measured.
    """
    stated = config.get("change_classes")
    classes = ROADS_AND_BUILDINGS if stated is None else Classes.from_dict(stated)
    results = _eval_results(report, classes) if report else []
    run = folder / SETTINGS_FILE
    settings = read_settings(run) if run.exists() else None
    data = ModelCardData(
        language="en",
        license=license,
        library_name="transformers",
        pipeline_tag=TASK,
        tags=["deltavlm", "remote-sensing", "change-detection", "change-captioning", "custom_code"],
        base_model=list(base_models) or None,
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=repo_id.rpartition("/")[2],
        eval_results=results or None,
        widget=[{"text": "Please briefly describe the changes in these two images."}],
    )
    parts = [
        f"# {data.model_name}",
        "Answers instructions about two images of the same place at two dates: "
        "[DeltaVLM](https://arxiv.org/abs/2507.22346) in the form of Transformers.",
        _use(repo_id),
        _contents(folder, config, license, base_models, classes),
        _training(settings),
        _figures(report, results, changes),
        _limits(report),
        f"## Citation\n\n```bibtex\n{CITATION}\n```",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _use(repo_id: str) -> str:
    return f"""## Use

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

repo, revision = "{repo_id}", "main"  # a commit in place of "main" pins code and weights
model = AutoModelForImageTextToText.from_pretrained(repo, revision=revision, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(repo, revision=revision, trust_remote_code=True)

# With history, empty at first, a question takes the form that the model was trained on.
inputs = processor(images=("before.png", "after.png"), text="What changed?", history=[], return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=64)
print(processor.batch_decode(ids[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)[0])
```

With `import deltavlm_hf` (the package) in front, `trust_remote_code` is not needed. The six kinds of instruction that
ChangeChat-105k knows: captions, yes or no, counts, 3x3 grid, open questions, dialogues."""


def base_models_of(config: Mapping[str, Any]) -> list[str]:
    """The Hub ids of what a model was made from, as far as its configuration says."""
    pointed_at = [source["name_or_path"] for source in config.get("weight_sources") or []]
    return list(
        dict.fromkeys([*pointed_at, *(each["name"] for each in config.get("made_from") or [] if "name" in each)])
    )


def _contents(
    folder: Path, config: Mapping[str, Any], license: str, base_models: Sequence[str], classes: Classes
) -> str:
    with ExitStack() as stack:
        weights = open_weights([str(path) for path in sorted(folder.glob("*.safetensors"))], stack)
        count = sum(math.prod(shape(weight)) for weight in weights.values())
    text, vision = config.get("text_config") or {}, config.get("vision_config") or {}
    lines = [
        "## What it is made of",
        "",
        f"- {count:,} parameters in these files",
        f"- vision encoder: {_vision(vision)}, {_text(vision.get('image_size', 224))} pixels",
        f"- difference module: {_text(config.get('difference_module', 'csrm'))}",
        f"- language model: {_text(text.get('model_type', 'llama'))}, "
        f"{_text(text.get('num_hidden_layers', 32))} layers",
    ]
    if config.get("change_classes"):
        lines.append(f"- what it counts and places: {_text(', '.join(classes.names))}")
    if config.get("mask_classes"):
        lines.append(f"- change masks: {_text(', '.join(config['mask_classes']))}")
    for source in config.get("weight_sources") or []:
        place, revision = _as_code(source["name_or_path"]), _as_code(source["revision"])
        part = _part(source.get("prefix", "").partition(".")[0])
        lines.append(f"- {part} are read from {place} at revision {revision}")
    lines += ["", "## Licences", "", f"These weights: {_as_code(license)}. The code: Apache-2.0."]
    said = {each.get("name"): each["license"] for each in config.get("made_from") or [] if "license" in each}
    for name in base_models:
        own = f"{_text(said[name])}, as its own card says" if name in said else "see its own card"
        lines.append(f"- {_as_code(name)}: {LICENCES.get(name, own)}")
    for each in config.get("made_from") or []:
        if "license" in each and "name" not in each:
            lines.append(f"- {_part(each.get('part', ''))}: {_text(each['license'])}, as its folder says")
    return "\n".join(lines)


def _part(name: str) -> str:
    return PARTS.get(name, "the other weights")


def _vision(settings: Mapping[str, Any]) -> str:
    kind = settings.get("model_type", InstructBlipVisionConfig.model_type)
    if kind == InstructBlipVisionConfig.model_type:
        return f"InstructBLIP's ViT, {_text(settings.get('num_hidden_layers', 39))} blocks"
    place = str(settings.get("_name_or_path"))
    is_known = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", place) and not os.path.exists(place)
    maps = ", ".join(settings.get("out_features") or ["of the last stage"])
    return f"{_text(kind)}{f' ({_as_code(place)})' if is_known else ''}, its feature maps {_text(maps)}"


def _limits(report: Mapping[str, Any] | None) -> str:
    known = "" if report else " No figures were measured for this card."
    return (
        f"## Limits\n\nAnswers can be wrong, and sound sure when they are.{known} The model compares two images "
        "of one place at equal extent; it was not made for other sensors, resolutions or places than those of its "
        "training data, nor for decisions about people. Heat maps of `model.explain` show attention, not proof."
    )


def read_settings(path: Path) -> dict[str, Any]:
    """A file with a JSON object; ValueError for any other."""
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is damaged: expected a JSON object, got {settings!r:.40}.")
    return settings


def read_report(path: Path, names: set[str], fingerprints: Sequence[str]) -> dict[str, Any]:
    """
    The figures of a model in a report. Reports say which weights they are of, by [`fingerprint`]; those of earlier
    versions only what the model was called.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; `deltavlm evaluate` writes it as report.json.")
    try:
        report = json.loads(path.read_text())
        settings, systems = dict(report["settings"]), dict(report["systems"])
        models = dict(report.get("models") or {})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no report.json of `deltavlm evaluate`.") from error
    if models:
        own = [name for name in systems if models.get(name) in fingerprints]
    else:
        own = sorted(names & systems.keys())
    if models and not own:
        raise ValueError(
            f"{path} has figures of {', '.join(models)}, whose weights or settings are not those of the folder "
            "that is to be published, nor of what `deltavlm export` made it from: evaluate it as it is now."
        )
    if not own:
        raise ValueError(
            f"{path} has figures of {', '.join(systems) or 'nothing'}, none of them this model, which `deltavlm "
            f"evaluate` would call {' or '.join(sorted(names))}: evaluate the folder that is to be published."
        )
    published_tasks = report.get("published_tasks", ())
    return {"settings": settings, "published_tasks": published_tasks, "results": systems[own[0]]}


def _figures_of(classes: Classes) -> Iterator[tuple[str, tuple[str, ...], str, str]]:
    """All figures, those of classes for one class after the other."""
    for (task, _), rows in groupby((*FIGURES, *MASK_FIGURES), key=lambda row: (row[0], PLURAL in row[3])):
        found = list(rows)
        for each in classes.each if PLURAL in found[0][3] else classes.each[:1]:
            words = {"name": each.name, "plural": each.plural}
            for _, way, metric, name in found:
                yield task, tuple(step.format(**words) for step in way), metric, name.format(**words)


def _eval_results(report: Mapping[str, Any], classes: Classes) -> list[EvalResult]:
    data = report["settings"]["data"]
    kind = "generated" if data.startswith("generated") else "other"  # than the whole test split
    results = []
    for task, way, metric, name in _figures_of(classes):
        value: Any = report["results"].get(task, {})
        protocol = value.get("protocol")
        for step in way:
            value = value.get(step) if isinstance(value, Mapping) else None
        if isinstance(value, (int, float)):
            results.append(
                EvalResult(
                    task_type=TASK,
                    dataset_type="changechat" if task in report["published_tasks"] else kind,
                    dataset_name=f"{data} ({task})",
                    dataset_config=task,
                    metric_type=metric,
                    metric_name=f"{name}, protocol {protocol}" if protocol and len(way) > 1 else name,
                    metric_value=round(value, 4),
                )
            )
    return results


def _figures(report: Mapping[str, Any] | None, results: Sequence[EvalResult], changes: Sequence[str]) -> str:
    if report is None:
        return "## Figures\n\nNone were measured."
    settings = report["settings"]
    part = f", its first {_text(settings['limit'])} records" if settings.get("limit") else ""
    questions = _text(settings.get("questions", "verbatim"))  # as they were before reports said so
    lines = [
        "## Figures",
        "",
        f"Measured by `deltavlm evaluate` on {_text(settings['data'])}{part}; questions: {questions}; history of "
        f"dialogues: {_text(settings.get('history'))}. Answers that do not parse count as wrong."
        + (f" Measured before this was done: {_text('; '.join(changes))}." if changes else ""),
        "",
        "| figure | value |",
        "|---|---:|",
    ]
    return "\n".join([*lines, *(f"| {_text(result.metric_name)} | {result.metric_value} |" for result in results)])


def _training(settings: Mapping[str, Any] | None) -> str:
    if settings is None:
        return "## Training\n\nNothing is recorded here."
    source = (settings.get("data") or {}).get("source")
    rows = []
    for section, values in settings.items():
        fields = values.items() if isinstance(values, dict) else (("", values),)
        for name, value in fields:
            local = name == "output_dir" or (isinstance(value, str) and os.path.isabs(value))
            unused = source and section == "data" and name in SCENES
            if value is not None and not local and not unused:
                rows.append(f"| {_text('.'.join(filter(None, (section, name))))} | {_as_code(value)} |")
    known = DATA_LICENCE if "changechat" in str(source).lower() else OTHER_DATA
    licence = f"\n\n{known}." if source else ""
    return "\n".join(["## Training", "", "| setting | value |", "|---|---|", *rows]) + licence


def _text(value: Any) -> str:
    """A value as text in Markdown: on one line, and none of it is taken for anything else, HTML above all."""
    return re.sub(r"[][&<>|`*~!\\]|\b_|_\b", lambda found: f"&#{ord(found[0])};", " ".join(str(value).split()))


def _as_code(value: Any) -> str:
    """A value as code in Markdown, see [`_text`]."""
    return f"`{value}`" if re.fullmatch(r"[\w .,:/+@=-]+", str(value)) else f"<code>{_text(value)}</code>"
