"""
Saving and loading: small checkpoints, LoRA adapters of the language model, folders that are whole or refused.

`weight_sources.py` says what a small checkpoint is, `saving.py` how a folder is written, `lora.py` which adapters.
"""

import copy
import json
import os
from contextlib import ExitStack, suppress
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import find_adapter_config_file
from transformers.utils.hub import extract_commit_hash

from .bounds import check_generation
from .csrm import current_name
from .lora import LORA_MARK, check_adapter, lora_settings, restore_lora, without_adapter
from .saving import loading, replacing
from .weight_sources import DOWNLOAD, add_missing, check_indexes, names_in, open_weights

_BY_AUTO_CLASSES = {"config", "adapter_kwargs", "trust_remote_code"}  # what they pass beside the caller's arguments
_FINDS_FILES = {*DOWNLOAD, "revision", "subfolder"}
_MOST_TABLES = 2**32  # bytes of tables that no file holds


class CheckpointMixin(PreTrainedModel):
    """`from_pretrained` and `save_pretrained` of DeltaVLM, with or without its language model."""

    weights_revision: str | None = None  # the commit of the Hub that the weights are of

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """
        As in Transformers; with the LoRA adapter that the language model was saved with, if it has one. New weights
        where the files have none, or of another shape, are an error unless asked for: `ignore_mismatched_sizes=True`.

        Raises:
            OSError: if a file is missing, or another process saves to the folder meanwhile.
            ValueError: if files are damaged, of another model or do not go together.

        Errors of the call itself, such as an unknown argument, are those of Transformers.
        """
        folder = os.path.join(pretrained_model_name_or_path or "", kwargs.get("subfolder") or "")
        try:
            with loading(folder):
                check_indexes(folder)
                loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            if model.can_generate() and kwargs.get("generation_config") is None:
                check_generation(model.generation_config.to_dict())
            if model.config.language_model_lora and hasattr(model, "language_model"):
                restore_lora(model, model.__dict__.pop("_lora_weights", {}))
            return loaded
        except (OSError, ImportError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a damaged file makes its readers raise all kinds of errors
            # With arguments of the caller's own, or on the meta device, an error may be of the call, not of the files.
            by_caller = args or kwargs.keys() - _BY_AUTO_CLASSES or torch.empty(0).device.type == "meta"
            if by_caller and not isinstance(error, ValueError):
                if cls._can_be_built(pretrained_model_name_or_path, **kwargs):
                    raise  # then it is not the files
            reason = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{os.fspath(pretrained_model_name_or_path or 'The model')} cannot be loaded as a "
                f"{cls.__name__}: {reason}"
            ) from error

    @classmethod
    def _can_be_built(cls, pretrained_model_name_or_path, **kwargs) -> bool:
        """Whether the settings in a folder, without what the caller adds to them, are those of a model."""
        where = {name: kwargs[name] for name in _FINDS_FILES & kwargs.keys()}
        try:
            config = cls.config_class.from_pretrained(pretrained_model_name_or_path, **where)
            with torch.device("meta"):
                cls._from_config(config)
            with suppress(OSError):  # it need not be there
                GenerationConfig.from_pretrained(pretrained_model_name_or_path, **where)
        except Exception:
            return False
        return True

    def load_adapter(self, peft_model_id=None, *args, load_config=None, **kwargs):
        """As in Transformers. `from_pretrained` loads an adapter that lies in a folder only if it is a plain LoRA."""
        if load_config is not None and peft_model_id is not None:  # not asked for by the caller, but by a file
            where = {**(load_config.download_kwargs or {}), **(kwargs.get("adapter_kwargs") or {})}
            found = find_adapter_config_file(
                peft_model_id, **{name: where[name] for name in _FINDS_FILES & where.keys()}
            )
            try:
                check_adapter(json.loads(Path(found).read_text()))
            except ValueError as error:
                raise ValueError(
                    f"There is an adapter beside the model, which is not loaded unasked: {error} Remove {found}; to "
                    "load it nevertheless, if you trust it, call `load_adapter` on the model without."
                ) from error
        return super().load_adapter(peft_model_id, *args, load_config=load_config, **kwargs)

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys=None):
        """Where `from_pretrained` reads weights: those of other places join the folder's, old names become new."""
        if expected_keys is not None:  # an adapter is loaded into a model that is whole
            return PreTrainedModel._load_pretrained_model(
                model, state_dict, checkpoint_files, load_config, expected_keys
            )
        tables = sum(table.nbytes for _, table in model.named_non_persistent_buffers())
        if tables > _MOST_TABLES:
            raise ValueError(
                f"The configuration asks for {tables} bytes of tables that are computed, such as masks and positions; "
                f"at most {_MOST_TABLES} are made. Look at `max_position_embeddings` and its like."
            )
        sources, renamed = model.config.weight_sources or [], False
        if checkpoint_files:
            # The commit, where they came from the Hub.
            model.weights_revision = extract_commit_hash(str(checkpoint_files[0]), None)
            with ExitStack() as stack:
                weights = open_weights(checkpoint_files, stack)  # which names the file that is damaged
                if model.config.language_model_lora:
                    model._lora_weights = {name: weight[...] for name, weight in weights.items() if LORA_MARK in name}
                renamed = any(current_name(name) != name for name in weights)
        with ExitStack() as stack:
            if state_dict is not None:
                state_dict = {current_name(name): weight for name, weight in state_dict.items()}
            elif sources or renamed:
                if "disk" in (load_config.device_map or {}).values():
                    raise ValueError(
                        "A small checkpoint, or one with names of weights that are no longer in use, cannot be "
                        "offloaded to disk: load it once without, and save it with "
                        "`save_pretrained(..., only_trained=False)`."
                    )
                weights = open_weights(checkpoint_files, stack)
                name_in_model = names_in(model)
                weights = {name_in_model(name): weight for name, weight in weights.items()}
                wanted = model.state_dict().keys() - model.all_tied_weights_keys.keys()
                add_missing(weights, wanted, sources, name_in_model, stack, **(load_config.download_kwargs or {}))
                state_dict = {name: weight for name, weight in weights.items() if LORA_MARK not in name}
                if is_deepspeed_zero3_enabled():
                    state_dict = {name: weight[...] for name, weight in state_dict.items()}
                checkpoint_files = None
            loaded = PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config)
        _check_complete(model, load_config, loaded[0])
        return loaded

    def keep_out_of_checkpoints(self, names: list[str], sources: list[dict]) -> None:
        """
        From now on `save_pretrained` writes small checkpoints.

        Args:
            names (`list[str]`): the weights that are left out.
            sources (`list[dict]`): where `from_pretrained` will find them, see `weight_sources.py`.
        """
        self._keys_to_ignore_on_save = list(names)
        self.config.weight_sources = list(sources)

    def save_pretrained(
        self,
        save_directory,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        *,
        only_trained: bool = True,
        **kwargs,
    ):
        """
        As in Transformers. A LoRA adapter of the language model (`model.language_model.add_adapter(LoraConfig())`) is
        saved with the rest, and `from_pretrained` restores it.

        Args:
            save_directory (`str` or `os.PathLike`): the folder.
            is_main_process, state_dict, kwargs: see [`~PreTrainedModel.save_pretrained`].
            only_trained (`bool`, *optional*, defaults to `True`): after [`keep_out_of_checkpoints`], leave those
                weights out, but for what trains by now. With `False`, or where that was not called, everything is
                written.

        The files are written apart and take the place of older ones when all are complete, see `saving.py`.

        Raises:
            OSError: if the folder cannot be written to; what was there before is untouched.
            ValueError: if the weights that are left out lie in this very folder, if weights in 4-bit would have to be
                written, though the rest is trained in full precision, or if the language model has another adapter
                than a single LoRA.
        """
        if self._auto_class is not None:  # the folder carries its code
            self.config.auto_map = dict(self.auto_map)
        left_out, sources = self._keys_to_ignore_on_save, self.config.weight_sources
        whole = not (only_trained and left_out)
        if whole and getattr(getattr(self, "language_model", None), "is_quantized", False):
            raise ValueError(
                "The language model is in 4-bit around trained parts in full precision: save only what was trained "
                "(`leave_out_frozen(model)`), load that without quantisation and save it whole."
            )
        adapters = getattr(getattr(self, "language_model", None), "peft_config", None)
        if adapters:
            self.config.language_model_lora = lora_settings(adapters)
            tensors = self.state_dict() if state_dict is None else state_dict
            state_dict = {without_adapter(name): tensor for name, tensor in tensors.items()}
        if whole:
            self._keys_to_ignore_on_save = self.config.weight_sources = None
        else:
            for source in sources:
                if os.path.realpath(source["name_or_path"]) == os.path.realpath(save_directory):
                    raise ValueError(
                        f"A small checkpoint in {os.fspath(save_directory)!r} would take the place of the weights "
                        "there that it leaves out: choose another folder, or save_pretrained(..., only_trained=False)."
                    )
            trained = {without_adapter(name) for name, weight in self.named_parameters() if weight.requires_grad}
            self._keys_to_ignore_on_save = [name for name in left_out if name not in trained]
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", os.path.basename(save_directory))
        try:
            if not is_main_process or kwargs.get("distributed_checkpoint"):  # writes nothing, or together with others
                super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
            else:
                with replacing(save_directory) as partial:
                    super().save_pretrained(partial, is_main_process, state_dict, **kwargs)
        finally:
            self._keys_to_ignore_on_save, self.config.weight_sources = left_out, sources


def _check_complete(model: PreTrainedModel, load_config, loading_info) -> None:
    """Refuses weights that are missing or of another shape, before any is made: there may be no room for it."""
    if load_config.ignore_mismatched_sizes or load_config.pretrained_model_name_or_path is None:
        return
    ways_out = (
        "Give it the configuration and the weights that belong together; to go on with new weights in their place, "
        "which must be trained, pass ignore_mismatched_sizes=True."
    )
    for name, found, expected in sorted(loading_info.mismatched_keys):
        raise ValueError(
            f"The weight {name} has shape {tuple(found)}, but the configuration asks for {tuple(expected)}. {ways_out}"
        )
    counted = copy.copy(loading_info)
    model._adjust_missing_and_unexpected_keys(counted)
    tied = model.all_tied_weights_keys
    elsewhere = tied.keys() | {owner for name, owner in tied.items() if name not in loading_info.missing_keys}
    if missing := sorted(counted.missing_keys - elsewhere):
        raise ValueError(
            f"{len(missing)} of the model's weights are not in its files, among them {missing[0]}. {ways_out}"
        )
