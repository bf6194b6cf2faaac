"""Putting a model on the Hub: which files go up, with the model card, in one commit."""

import copy
import fnmatch
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..inference.identity import EXPORT_FILE, fingerprint
from ..inference.loading import SHIPPED
from ..modeling import DeltaVLMConfig
from ..modeling.weight_sources import check_index, check_inside
from ..training import SETTINGS_FILE
from .card import base_models_of, make_card, read_report, read_settings
from .export import read_export

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


class Publication:
    """
    A saved model on its way to the Hub.

    Args:
        folder (`str` or `Path`): what `save_pretrained` or `deltavlm train`, `export` or `convert` made.
        repo_id (`str`): `owner/name`.
        report (`str` or `Path`, *optional*): `report.json` of `deltavlm evaluate`, for the card's figures: of this
            model, or of the checkpoint that it was exported from.
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
        self._refuse([name for name in names if _loads(name) or name in (*FOLDERS, SETTINGS_FILE, EXPORT_FILE)])
        self.config = read_settings(self.folder / CONFIG_NAME)
        DeltaVLMConfig.from_dict(copy.deepcopy(self.config))  # or an error that says what is wrong with it
        for name in names:
            if fnmatch.fnmatch(name, "*.index*.json"):
                check_index(self.folder / name)
        sources = self.config.get("weight_sources") or []
        _check_sources(sources, self.folder)
        self.base_models = list(dict.fromkeys([*base_models_of(self.config), *base_models]))
        self.license = license
        called = {self.folder.name, repo_id.rpartition("/")[2]}
        called |= {name for name, place in SHIPPED.items() if self.folder.resolve() == Path(place()).resolve()}
        self.report = None
        changes: list[str] = []
        if report:
            known = fingerprint(str(self.folder), sources=sources)
            exported_from, changes = read_export(self.folder, known)
            self.report = read_report(Path(report), called, [known, exported_from or known])
        code = self._code()
        self._refuse([name for name in names if name in code])
        self.names = [name for name in names if name in code or _loads(name)]
        self.left = sorted(
            {name.partition("/")[0] for name in names} - {name.partition("/")[0] for name in self.names}
        )
        own = self.folder / CARD
        self.card = (
            ModelCard.load(own)
            if own.exists()
            else make_card(self.folder, self.config, repo_id, license, self.base_models, self.report, changes)
        )

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
            places = read_settings(self.folder / name).get("auto_map")
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


def _check_sources(sources: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Whether others will get the same weights from there: from a commit of a repository that has an owner."""
    for source in sources:
        place, revision = source["name_or_path"], source.get("revision")
        if os.path.isabs(place) or os.path.exists(place) or place.startswith((".", "~")) or "\\" in place:
            raise ValueError(
                f"This checkpoint's other weights are in {place}, which nobody else has. Make it whole, "
                f"`deltavlm export {folder} {folder}-whole`, and publish that: a report of the checkpoint holds. "
                f"Or publish those weights first and name them in `weight_sources` of {CONFIG_NAME}, by commit: "
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


def _loads(name: str) -> bool:
    folder, _, file = name.rpartition("/")
    return folder in FOLDERS and any(fnmatch.fnmatch(file, pattern) for pattern in FILES)


def _with_code(folder: Path) -> dict[str, Path | bytes]:
    """Configuration, processor and the code that they name, for a folder that was saved without."""
    from ..processing import DeltaVLMProcessor
    from .folder import save_without_weights

    config, processor = DeltaVLMConfig.from_pretrained(folder), DeltaVLMProcessor.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as partial:
        save_without_weights(config, processor, Path(partial))
        return {name: (Path(partial) / name).read_bytes() for name in _files_in(Path(partial))}
