"""Putting a model on the Hub: which files go up, and a model card made of facts that lie in them."""

import copy
import fnmatch
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .. import tiny
from ..modeling import DeltaVLMConfig
from ..modeling.weight_sources import check_index, check_inside, open_weights, shape
from ..training import SETTINGS_FILE

CARD = "README.md"
# What a loaded model is made of; optimizers, checkpoints, logs and answers stay at home.
FILES = (
    CARD,
    CONFIG_NAME,
    "*.safetensors",
    SAFE_WEIGHTS_INDEX_NAME,
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template.json",
    "*.jinja",
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
)
FOLDERS = ("", "qformer_tokenizer", "additional_chat_templates")
# Licences of what a model may be made from, as their owners state them.
LICENCES = {
    "lmsys/vicuna-7b-v1.5": "Vicuna: Llama 2 Community License",
    "Salesforce/instructblip-vicuna-7b": "InstructBLIP: see its card; its Vicuna is bound to LLaMA's licence",
    "google-bert/bert-base-uncased": "BERT's vocabulary: Apache-2.0",
}
DATA_LICENCE = "LEVIR-CC imagery: academic use only; ChangeChat-105k annotations: CC-BY-4.0"
TASK = "image-text-to-text"
# Of report.json: task, way to the figure, the metric's name on the Hub, what it is called here.
FIGURES = (
    ("binary", ("accuracy",), "accuracy", "yes/no accuracy"),
    ("binary", ("f1",), "f1", "yes/no F1"),
    ("caption", ("all", "BLEU-4"), "bleu", "captions, BLEU-4"),
    ("caption", ("all", "METEOR"), "meteor", "captions, METEOR"),
    ("caption", ("all", "ROUGE-L"), "rouge", "captions, ROUGE-L"),
    ("caption", ("all", "CIDEr"), "cider", "captions, CIDEr"),
    ("count", ("roads", "exact"), "accuracy", "roads, exact count"),
    ("count", ("roads", "mae"), "mae", "roads, mean absolute error"),
    ("count", ("buildings", "exact"), "accuracy", "buildings, exact count"),
    ("count", ("buildings", "mae"), "mae", "buildings, mean absolute error"),
    ("grid", ("roads", "f1"), "f1", "3x3 grid, roads, micro-F1"),
    ("grid", ("buildings", "f1"), "f1", "3x3 grid, buildings, micro-F1"),
    ("open", ("all", "ROUGE-L"), "rouge", "open questions, ROUGE-L"),
    ("open", ("exact",), "accuracy", "open questions, exact answer"),
    ("dialogue", ("whole",), "accuracy", "dialogues, all answers right"),
    ("dialogue", ("consistent",), "accuracy", "dialogues, yes or no agrees with the counts"),
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


class Publication:
    """
    A saved model on its way to the Hub.

    Args:
        folder (`str` or `Path`): what `save_pretrained`, `deltavlm train` or `deltavlm convert` made.
        repo_id (`str`): `owner/name`.
        report (`str` or `Path`, *optional*): `report.json` of `deltavlm evaluate`, for the card's figures.
        license (`str`, *optional*, defaults to `"other"`): the Hub's name of the weights' licence.
        base_models (`Sequence[str]`, *optional*): Hub ids of what the model was made from, beside those that its
            configuration points to.

    Attributes:
        card (`ModelCard`): the folder's own `README.md` if there is one, else made from facts.

    Raises:
        FileNotFoundError: if the folder, one of its necessary files or the report is missing.
        ValueError: if one of the files to send is a link or no file at all, if the weights point to anything but a
            commit on the Hub, if `repo_id` or the configuration cannot be, or the report is of another model or form.
    """

    def __init__(
        self,
        folder: str | Path,
        repo_id: str,
        report: str | Path | None = None,
        license: str = "other",
        base_models: Sequence[str] = (),
    ):
        self.folder, self.repo_id = Path(folder), repo_id
        validate_repo_id(repo_id)
        names = _files_in(self.folder)
        for needed in ((CONFIG_NAME,), (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), ("processor_config.json",)):
            if not set(needed) & set(names):
                raise FileNotFoundError(
                    f"{self.folder} is no saved model with its processor: {' or '.join(needed)} is missing."
                )
        self._refuse([name for name in names if _loads(name) or name in (*FOLDERS, SETTINGS_FILE)])
        self.config = _read_settings(self.folder / CONFIG_NAME)
        DeltaVLMConfig.from_dict(copy.deepcopy(self.config))  # or an error that says what is wrong with it
        for name in names:
            if fnmatch.fnmatch(name, "*.index*.json"):
                check_index(self.folder / name)
        sources = self.config.get("weight_sources") or []
        _check_sources(sources)
        self.base_models = list(dict.fromkeys([*(source["name_or_path"] for source in sources), *base_models]))
        self.license = license
        called = {self.folder.name, repo_id.rpartition("/")[2]}
        if self.folder.resolve() == Path(tiny()).resolve():
            called.add("tiny")
        self.report = _read_report(Path(report), called) if report else None
        code = self._code()
        self._refuse([name for name in names if name in code])
        self.names = [name for name in names if name in code or _loads(name)]
        self.left = sorted(
            {name.partition("/")[0] for name in names} - {name.partition("/")[0] for name in self.names}
        )
        own = self.folder / CARD
        self.card = ModelCard.load(own) if own.exists() else self._make_card()

    def _refuse(self, names: Sequence[str]) -> None:
        """What would be sent by one of these names, and is no file of this folder."""
        strange = {name: _strange(self.folder / name) for name in names}
        if found := [f"{name} ({what})" for name, what in strange.items() if what]:
            raise ValueError(
                f"{self.folder} has what is not sent to anyone, by the names of files that are: {', '.join(found)}. "
                "Put the files themselves there, or save the model anew: load it, `save_pretrained` to another folder."
            )

    def _code(self) -> set[str]:
        """The files of code that configuration and processor name, and those that these import."""
        code = set()
        for name in (CONFIG_NAME, "processor_config.json"):
            places = _read_settings(self.folder / name).get("auto_map")
            for place in places.values() if isinstance(places, dict) else ():
                module = str(place).partition(".")[0]
                file = self.folder / f"{module}.py"
                if module.isidentifier() and os.path.lexists(file):
                    self._refuse([file.name])
                    code |= {file.name, *(Path(one).name for one in get_relative_import_files(file))}
        return code

    def files(self) -> dict[str, Path | bytes]:
        """What goes up, by name there. Folders without their code get it."""
        files: dict[str, Path | bytes] = {name: self.folder / name for name in self.names}
        if "auto_map" not in self.config:
            files.update(_with_code(self.folder))
        files[CARD] = str(self.card).encode()
        return dict(sorted(files.items()))

    def preview(self) -> str:
        """Every file with its size, what stays behind, and the card."""
        files = self.files()
        sizes = {name: len(each) if isinstance(each, bytes) else each.stat().st_size for name, each in files.items()}
        lines = [f"{size:>16,}  {name}" for name, size in sizes.items()]
        lines.append(f"{sum(sizes.values()):>16,}  bytes to {self.repo_id}")
        if self.left:
            lines.append(f"Not sent: {', '.join(self.left)}")
        return "\n".join([*lines, "", str(self.card)])

    def push(self, private: bool | None = None, revision: str | None = None, token: str | None = None) -> str:
        """
        Checks the card with the Hub and uploads everything in one commit: the model is there as a whole or not at all.

        Args:
            private (`bool`, *optional*): whether a new repository is private.
            revision (`str`, *optional*): the branch, by default `main`.
            token (`str`, *optional*): by default the one that `hf auth login` keeps.

        Returns:
            `str`: the commit's address.

        Raises:
            ValueError: if the Hub refuses the card.
            OSError: if the Hub cannot be reached or refuses the upload.
        """
        api = HfApi(token=token)
        self.card.validate(repo_type="model")
        api.create_repo(self.repo_id, private=private, exist_ok=True)
        if revision:
            api.create_branch(self.repo_id, branch=revision, exist_ok=True)
        operations = [CommitOperationAdd(name, each) for name, each in self.files().items()]
        commit = api.create_commit(self.repo_id, operations, commit_message="Publish DeltaVLM", revision=revision)
        return commit.commit_url

    # The card

    def _make_card(self) -> ModelCard:
        results = _eval_results(self.report) if self.report else []
        run = self.folder / SETTINGS_FILE
        settings = _read_settings(run) if run.exists() else None
        data = ModelCardData(
            language="en",
            license=self.license,
            library_name="transformers",
            pipeline_tag=TASK,
            tags=["deltavlm", "remote-sensing", "change-detection", "change-captioning", "custom_code"],
            base_model=self.base_models or None,
            metrics=sorted({result.metric_type for result in results}) or None,
            model_name=self.repo_id.rpartition("/")[2],
            eval_results=results or None,
            widget=[{"text": "Please briefly describe the changes in these two images."}],
        )
        parts = [
            f"# {data.model_name}",
            "Answers instructions about two images of the same place at two dates: "
            "[DeltaVLM](https://arxiv.org/abs/2507.22346) in the form of Transformers.",
            self._use(),
            self._made_of(),
            _training(settings),
            _figures(self.report, results),
            self._limits(),
            f"## Citation\n\n```bibtex\n{CITATION}\n```",
        ]
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")

    def _use(self) -> str:
        return f"""## Use

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

repo, revision = "{self.repo_id}", "main"  # a commit in place of "main" pins code and weights
model = AutoModelForImageTextToText.from_pretrained(repo, revision=revision, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(repo, revision=revision, trust_remote_code=True)

# With history, empty at first, a question takes the form that the model was trained on.
inputs = processor(images=("before.png", "after.png"), text="What changed?", history=[], return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=64)
print(processor.batch_decode(ids[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)[0])
```

With `import deltavlm_hf` (the package) in front, `trust_remote_code` is not needed. The six kinds of instruction that
ChangeChat-105k knows: captions, yes or no, counts, 3x3 grid, open questions, dialogues."""

    def _made_of(self) -> str:
        with ExitStack() as stack:
            weights = open_weights([str(path) for path in sorted(self.folder.glob("*.safetensors"))], stack)
            count = sum(_product(shape(weight)) for weight in weights.values())
        text, vision = self.config.get("text_config") or {}, self.config.get("vision_config") or {}
        lines = [
            "## What it is made of",
            "",
            f"- {count:,} parameters in these files",
            f"- vision encoder: {_text(vision.get('num_hidden_layers', 39))} blocks, "
            f"{_text(vision.get('image_size', 224))} pixels",
            f"- difference module: {_text(self.config.get('difference_module', 'csrm'))}",
            f"- language model: {_text(text.get('model_type', 'llama'))}, "
            f"{_text(text.get('num_hidden_layers', 32))} layers",
        ]
        for source in self.config.get("weight_sources") or []:
            place, revision = _as_code(source["name_or_path"]), _as_code(source["revision"])
            lines.append(f"- the other weights are read from {place} at revision {revision}")
        lines += ["", "## Licences", "", f"These weights: {_as_code(self.license)}. The code: Apache-2.0."]
        lines += [f"- {_as_code(name)}: {LICENCES.get(name, 'see its own card')}" for name in self.base_models]
        return "\n".join(lines)

    def _limits(self) -> str:
        known = "" if self.report else " No figures were measured for this card."
        return (
            f"## Limits\n\nAnswers can be wrong, and sound sure when they are.{known} The model compares two images "
            "of one place at equal extent; it was not made for other sensors, resolutions or places than those of its "
            "training data, nor for decisions about people. Heat maps of `model.explain` show attention, not proof."
        )


def _files_in(folder: Path) -> list[str]:
    """All that lies in a folder and is no folder of its own: links too, wherever they lead."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _strange(path: Path) -> str:
    """What a path is that is no regular file in its folder. Files of a snapshot in the Hub's cache are links there."""
    if not path.is_symlink():
        return "" if path.is_file() else "no regular file"
    try:
        check_inside(path)
        inside = path.resolve().parent == path.parent.resolve()  # to what may not be sent by its own name
    except ValueError:
        inside = True
    return f"a link to {os.readlink(path)}" if inside or not path.is_file() else ""


def _check_sources(sources: Sequence[Mapping[str, Any]]) -> None:
    """Whether others will get the same weights from there: from a commit of a repository that has an owner."""
    for source in sources:
        place, revision = source["name_or_path"], source.get("revision")
        if os.path.isabs(place) or os.path.exists(place) or place.startswith((".", "~")) or "\\" in place:
            raise ValueError(
                f"This checkpoint's other weights are in {place}, which nobody else has. Publish the whole: "
                "load it and save it with `save_pretrained(..., only_trained=False)`; or publish those weights first "
                f"and name them in `weight_sources` of {CONFIG_NAME}, with their commit: "
                '"name_or_path": "owner/name", "revision": "..."'
            )
        try:
            validate_repo_id(place)
            with_owner = "/" in place
        except HFValidationError:
            with_owner = False
        if not with_owner:
            raise ValueError(
                f"This checkpoint's other weights are in {place!r}, which is no Hub id with an owner (owner/name): "
                f"anyone could come to own it. Correct `weight_sources` of {CONFIG_NAME}."
            )
        if not re.fullmatch("[0-9a-f]{40}", revision or ""):
            raise ValueError(
                f"This checkpoint's other weights are in {place}, whose owner could exchange them: `weight_sources` "
                f"of {CONFIG_NAME} has the revision {revision!r}, and needs a commit, 40 hex digits. That of today: "
                f"python -c \"from huggingface_hub import HfApi; print(HfApi().model_info('{place}').sha)\""
            )


def _text(value: Any) -> str:
    """A value as text in Markdown: on one line, and none of it is taken for anything else, HTML above all."""
    return re.sub(r"[][&<>|`*~!\\]|\b_|_\b", lambda found: f"&#{ord(found[0])};", " ".join(str(value).split()))


def _as_code(value: Any) -> str:
    """A value as code in Markdown, see [`_text`]."""
    return f"`{value}`" if re.fullmatch(r"[\w .,:/+@=-]+", str(value)) else f"<code>{_text(value)}</code>"


def _loads(name: str) -> bool:
    folder, _, file = name.rpartition("/")
    return folder in FOLDERS and any(fnmatch.fnmatch(file, pattern) for pattern in FILES)


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is damaged: expected a JSON object, got {settings!r:.40}.")
    return settings


def _read_report(path: Path, names: set[str]) -> dict[str, Any]:
    """The figures of this model in a report."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; `deltavlm evaluate` writes it as report.json.")
    try:
        report = json.loads(path.read_text())
        settings, systems = dict(report["settings"]), dict(report["systems"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no report.json of `deltavlm evaluate`.") from error
    own = sorted(names & systems.keys())
    if not own:
        raise ValueError(
            f"{path} has figures of {', '.join(systems) or 'nothing'}, none of them this model, which `deltavlm "
            f"evaluate` would call {' or '.join(sorted(names))}: evaluate the folder that is to be published."
        )
    published_tasks = report.get("published_tasks", ())
    return {"settings": settings, "published_tasks": published_tasks, "results": systems[own[0]]}


def _eval_results(report: Mapping[str, Any]) -> list[EvalResult]:
    data = report["settings"]["data"]
    kind = "generated" if data.startswith("generated") else "other"  # than the whole test split
    results = []
    for task, way, metric, name in FIGURES:
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


def _figures(report: Mapping[str, Any] | None, results: Sequence[EvalResult]) -> str:
    if report is None:
        return "## Figures\n\nNone were measured."
    settings = report["settings"]
    part = f", its first {_text(settings['limit'])} records" if settings.get("limit") else ""
    questions = _text(settings.get("questions", "verbatim"))  # as they were before reports said so
    lines = [
        "## Figures",
        "",
        f"Measured by `deltavlm evaluate` on {_text(settings['data'])}{part}; questions: {questions}; history of "
        f"dialogues: {_text(settings.get('history'))}. Answers that do not parse count as wrong.",
        "",
        "| figure | value |",
        "|---|---:|",
    ]
    return "\n".join([*lines, *(f"| {_text(result.metric_name)} | {result.metric_value} |" for result in results)])


def _training(settings: Mapping[str, Any] | None) -> str:
    if settings is None:
        return "## Training\n\nNothing is recorded here."
    rows = []
    for section, values in settings.items():
        fields = values.items() if isinstance(values, dict) else (("", values),)
        for name, value in fields:
            local = name == "output_dir" or (isinstance(value, str) and os.path.isabs(value))
            if value is not None and not local:
                rows.append(f"| {_text('.'.join(filter(None, (section, name))))} | {_as_code(value)} |")
    data = settings.get("data") or {}
    licence = f"\n\n{DATA_LICENCE}." if data.get("source") else ""
    return "\n".join(["## Training", "", "| setting | value |", "|---|---|", *rows]) + licence


def _product(numbers: Sequence[int]) -> int:
    result = 1
    for number in numbers:
        result *= number
    return result


def _with_code(folder: Path) -> dict[str, Path | bytes]:
    """Configuration, processor and the code that they name, for a folder that was saved without."""
    from ..processing import DeltaVLMProcessor
    from .folder import save_without_weights

    config, processor = DeltaVLMConfig.from_pretrained(folder), DeltaVLMProcessor.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as partial:
        save_without_weights(config, processor, Path(partial))
        return {name: (Path(partial) / name).read_bytes() for name in _files_in(Path(partial))}
