"""
DeltaVLM: answers instructions about two images of one place at two dates.

Shapes: B pairs, N = patches + 1 vision tokens of one date (CLS first), D vision width, Q query tokens, T instruction
tokens of the Q-Former, L tokens of the language model.

    pixel_values (B, 2, 3, H, W) -> vision_model -> difference -> pair features (B, 2N, D)
    pair features, instruction -> qformer -> language_projection -> change tokens (B, Q, d_llm)
    change tokens in place of the placeholders, prompt -> language_model -> answer
"""

import copy
import inspect
import json
import math
import os
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Cache,
    GenerationConfig,
    InstructBlipPreTrainedModel,
    InstructBlipQFormerModel,
    InstructBlipVisionModel,
)
from transformers import initialization as init
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.instructblip.modeling_instructblip import BaseModelOutputWithVisionQformerOutputs
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple, find_adapter_config_file
from transformers.utils.hub import extract_commit_hash

from .cache_name import CACHE, named_by_transformers
from .checks import check, check_ids, check_pair_features, check_pixel_values, form_of_images
from .configuration_deltavlm import DeltaVLMConfig
from .csrm import Concatenation, CrossSemanticRelationMeasuring, current_name
from .explain import explain
from .generation_deltavlm import DeltaVLMGenerationMixin
from .lora import IN_NAMES, check_adapter, lora_settings, make_lora_config, without_adapter
from .saving import loading, replacing
from .spatial_codes import add_spatial_codes
from .weight_sources import DOWNLOAD, add_missing, check_indexes, open_weights, shape

# `Trainer` shifts labels under label smoothing for the classes that are named here, and for no others.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[DeltaVLMConfig.model_type] = "DeltaVLMForConditionalGeneration"

_BY_AUTO_CLASSES = {"config", "adapter_kwargs", "trust_remote_code"}  # what they pass beside the caller's arguments
_PLACE = {*DOWNLOAD, "revision", "subfolder", "variant"}
_MOST_COMPUTED = 2**32  # bytes of tables that no file holds
_MODULE = __name__.rpartition(".")[2]  # this file, as a saved folder's `auto_map` names it


@dataclass
class DeltaVLMCausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    Output of [`DeltaVLMForConditionalGeneration`].

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*): next-token loss, when `labels` are given.
        logits (`torch.FloatTensor` of shape `(B, L, vocab_size)`): scores of the language model.
        cache (`Cache`, *optional*): the language model's cache; `past_key_values` before Transformers 5.24.
        hidden_states, attentions (*optional*): the language model's, on request.
        image_hidden_states (`torch.FloatTensor` of shape `(B, Q, d_llm)`, *optional*): the change tokens.
        image_outputs (`BaseModelOutputWithVisionQformerOutputs`, *optional*): what
            [`~DeltaVLMModel.get_image_features`] gave.
        vision_outputs (`ModelOutput`, *optional*): of the vision encoder, on `(2B, ...)`: before, after, before, ...
        qformer_outputs (`ModelOutput`, *optional*): of the Q-Former; `cross_attentions` on request.
    """

    image_hidden_states: torch.FloatTensor | None = None
    image_outputs: BaseModelOutputWithVisionQformerOutputs | None = None
    vision_outputs: ModelOutput | None = None
    qformer_outputs: ModelOutput | None = None

    def to_tuple(self) -> tuple:
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


def _positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions `(B, L)` that padding takes no part in, unless it ends the sequence, where nothing follows."""
    padding = attention_mask == 0
    ends_sequence = padding.flip(-1).cumprod(-1).flip(-1).bool()
    skipped = (padding & ~ends_sequence).cumsum(-1)
    return (torch.arange(attention_mask.shape[-1], device=attention_mask.device) - skipped).clamp(min=0)


def _rest_frozen_parts(module: nn.Module) -> None:
    for child in module.children():
        parameters = list(child.parameters())
        if not parameters or any(parameter.requires_grad for parameter in parameters):
            _rest_frozen_parts(child)
            continue
        child.eval()
        for part in child.modules():
            if getattr(part, "gradient_checkpointing", False):  # which looks at its own module's mode
                part.training = True


class DeltaVLMPreTrainedModel(InstructBlipPreTrainedModel):
    config: DeltaVLMConfig
    base_model_prefix = ""
    weights_revision: str | None = None
    _no_split_modules = [*InstructBlipPreTrainedModel._no_split_modules, "CrossSemanticRelationMeasuring"]

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, DeltaVLMModel):  # InstructBLIP leaves them at zero, from where they could not part
            init.normal_(module.query_tokens, mean=0.0, std=self.config.initializer_range)

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
                if pretrained_model_name_or_path is not None:
                    check_indexes(
                        pretrained_model_name_or_path, **{name: kwargs[name] for name in _PLACE & kwargs.keys()}
                    )
                loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            if model.config.language_model_lora:
                model._restore_lora()
            return loaded
        except (OSError, ImportError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a damaged file makes its readers raise all kinds of errors
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
        where = {name: kwargs[name] for name in _PLACE - {"variant"} & kwargs.keys()}
        try:
            config = cls.config_class.from_pretrained(pretrained_model_name_or_path, **where)
            with torch.device("meta"):
                cls._from_config(config)
            with suppress(OSError):  # it need not be there
                GenerationConfig.from_pretrained(pretrained_model_name_or_path, **where)
        except Exception:
            return False
        return True

    def _restore_lora(self) -> None:
        """Nothing, where there is no language model."""

    def load_adapter(self, peft_model_id=None, *args, load_config=None, **kwargs):
        """As in Transformers. `from_pretrained` loads an adapter that lies in a folder only if it is a plain LoRA."""
        if load_config is not None and peft_model_id is not None:  # not asked for by the caller, but by a file
            where = {**(load_config.download_kwargs or {}), **(kwargs.get("adapter_kwargs") or {})}
            found = find_adapter_config_file(
                peft_model_id, **{name: where[name] for name in _PLACE - {"variant"} & where.keys()}
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
    def _finalize_model_loading(model, load_config, loading_info):
        if load_config.ignore_mismatched_sizes or load_config.pretrained_model_name_or_path is None:
            return InstructBlipPreTrainedModel._finalize_model_loading(model, load_config, loading_info)
        ways_out = (
            "Give it the configuration and the weights that belong together; to go on with new weights in their "
            "place, which must be trained, pass ignore_mismatched_sizes=True."
        )
        for name, found, expected in sorted(loading_info.mismatched_keys):
            raise ValueError(
                f"The weight {name} has shape {tuple(found)}, but the configuration asks for {tuple(expected)}. "
                f"{ways_out}"
            )
        # Told before any of them is made: a configuration can ask for more than there is memory.
        expected = copy.copy(loading_info)
        model._adjust_missing_and_unexpected_keys(expected)
        tied = model.all_tied_weights_keys
        elsewhere = tied.keys() | {owner for name, owner in tied.items() if name not in loading_info.missing_keys}
        if missing := sorted(expected.missing_keys - elsewhere):
            raise ValueError(
                f"{len(missing)} of the model's weights are not in its files, among them {missing[0]}. {ways_out}"
            )
        return InstructBlipPreTrainedModel._finalize_model_loading(model, load_config, loading_info)

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys=None):
        tables = sum(table.nbytes for _, table in model.named_non_persistent_buffers())
        if tables > _MOST_COMPUTED:
            raise ValueError(
                f"The configuration asks for {tables} bytes of tables that are computed, such as masks and positions; "
                f"at most {_MOST_COMPUTED} are made. Look at `max_position_embeddings` and its like."
            )
        sources, renamed = model.config.weight_sources or [], False
        if checkpoint_files:  # the commit, where they came from the Hub
            model.weights_revision = extract_commit_hash(str(checkpoint_files[0]), None)
            with ExitStack() as stack:
                weights = open_weights(checkpoint_files, stack)  # which names the file that is damaged
                if model.config.language_model_lora:
                    model._lora_weights = {name: weight[...] for name, weight in weights.items() if IN_NAMES in name}
                renamed = any(current_name(name) != name for name in weights)
        if state_dict is not None:
            state_dict = {current_name(name): weight for name, weight in state_dict.items()}
        if state_dict is not None or not (sources or renamed):
            return InstructBlipPreTrainedModel._load_pretrained_model(
                model, state_dict, checkpoint_files, load_config, expected_keys
            )
        if "disk" in (load_config.device_map or {}).values():
            raise ValueError(
                "A small checkpoint, or one with names of weights that are no longer in use, cannot be offloaded to "
                "disk: load it once without, and save it with `save_pretrained(..., only_trained=False)`."
            )
        with ExitStack() as stack:
            weights = open_weights(checkpoint_files, stack)
            weights = {current_name(name): weight for name, weight in weights.items()}
            add_missing(weights, set(model.state_dict()), sources, stack, **(load_config.download_kwargs or {}))
            weights = {name: weight for name, weight in weights.items() if IN_NAMES not in name}
            if is_deepspeed_zero3_enabled():
                weights = {name: weight[...] for name, weight in weights.items()}
            return InstructBlipPreTrainedModel._load_pretrained_model(model, weights, None, load_config, expected_keys)

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

    def train(self, mode: bool = True):
        """
        As in any module, but parts whose parameters are all frozen stay in evaluation mode: nothing drops out there.
        """
        super().train(mode)
        if mode:
            _rest_frozen_parts(self)
        return self


class DeltaVLMModel(DeltaVLMPreTrainedModel):
    """
    DeltaVLM without its language model: from an image pair and an instruction to change tokens. It loads from a
    complete checkpoint and leaves the language model's weights on disk.
    """

    main_input_name = "pixel_values"
    auto_map = {"AutoModel": f"{_MODULE}.DeltaVLMModel"}
    explain = explain  # a method, in a file of its own
    _keys_to_ignore_on_load_unexpected = [r"^language_model\."]

    def __init__(self, config: DeltaVLMConfig):
        config.check()
        super().__init__(config)
        self._add_parts(config)
        self.post_init()

    def _add_parts(self, config: DeltaVLMConfig) -> None:
        vision_width = config.vision_config.hidden_size
        self.vision_model = InstructBlipVisionModel._from_config(config.vision_config)
        self.vision_model.post_layernorm.eps = config.post_layernorm_eps
        if config.difference_module == "csrm":
            self.difference = CrossSemanticRelationMeasuring(vision_width, config.difference_dropout)
        else:
            self.difference = Concatenation()
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, config.qformer_config.hidden_size))
        self.qformer = InstructBlipQFormerModel._from_config(config.qformer_config)
        self.language_projection = nn.Linear(config.qformer_config.hidden_size, config.text_config.hidden_size)

    def get_input_embeddings(self) -> nn.Module:
        return self.qformer.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.qformer.set_input_embeddings(value)

    def _encode_pair(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False, **kwargs):
        check_pixel_values(pixel_values, self.config.vision_config.image_size, any_size=interpolate_pos_encoding)
        vision_outputs = self.vision_model(
            pixel_values.flatten(0, 1),  # (B, 2, 3, H, W) -> (2B, 3, H, W)
            interpolate_pos_encoding=interpolate_pos_encoding,
            return_dict=True,
            **kwargs,
        )
        return vision_outputs, self.compare_dates(vision_outputs.last_hidden_state, *pixel_values.shape[-2:])

    def compare_dates(self, vision_features: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """
        From vision features to pair features (paper section 3.3): what [`encode_pair`] does after the vision encoder.

        Args:
            vision_features (`torch.Tensor` of shape `(2B, N, D)`): before and after of the first pair, and so on.
            height, width (`int`): of the images, in pixels.

        Returns:
            `torch.Tensor` of shape `(B, 2N, D)`.
        """
        before, after = vision_features.unflatten(0, (-1, 2)).unbind(1)  # (2B, N, D) -> 2 x (B, N, D)
        pair_features = self.difference(before, after)  # (B, 2N, D)
        if self.config.spatial_position_codes:
            patch = self.config.vision_config.patch_size
            pair_features = add_spatial_codes(pair_features, height // patch, width // patch)
        return pair_features

    def encode_pair(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        """
        Encodes both dates once. The result answers any number of instructions as `pair_features=`, for as long as
        the vision encoder and the difference module keep their weights: after training, encode the pair again.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 2, 3, H, W)`): before and after.
            interpolate_pos_encoding (`bool`, *optional*): for images of another size than the model's.

        Returns:
            `torch.Tensor` of shape `(B, 2N, D)`: the pair features.

        Raises:
            ValueError: if `pixel_values` is not made of pairs, or has another size than the model's.
        """
        return self._encode_pair(pixel_values, interpolate_pos_encoding)[1]

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        qformer_input_ids: torch.LongTensor | None = None,
        qformer_attention_mask: torch.LongTensor | None = None,
        pair_features: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithVisionQformerOutputs:
        """
        Computes the change tokens.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 2, 3, H, W)`, *optional*): before and after.
            qformer_input_ids (`torch.LongTensor` of shape `(B, T)`): the instruction, in the Q-Former's vocabulary.
            qformer_attention_mask (`torch.LongTensor` of shape `(B, T)`, *optional*): 0 at padding.
            pair_features (`torch.Tensor` of shape `(B, 2N, D)` or `(1, 2N, D)`, *optional*): in place of
                `pixel_values`, what [`~DeltaVLMModel.encode_pair`] gave; a single pair answers all instructions.
            interpolate_pos_encoding (`bool`, *optional*): for images of another size than the model's, and for pair
                features of such.

        Returns:
            `BaseModelOutputWithVisionQformerOutputs`: `pooler_output` are the change tokens `(B, Q, d_llm)`,
            `last_hidden_state` the pair features `(B, 2N, D)`; `vision_outputs` and `qformer_outputs` in full. On
            request, `hidden_states` and `attentions` are the vision encoder's, of `(2B, ...)`: before, after, ...

        Raises:
            ValueError: unless one of `pixel_values` and `pair_features` is given, without `qformer_input_ids`, if
                shapes do not go together, or if `pair_features` are of another size or precision.
        """
        if form_of_images(pixel_values=pixel_values, pair_features=pair_features) is None:
            raise ValueError("Give the images, as `pixel_values` or as `pair_features`.")
        if qformer_input_ids is None:
            raise ValueError("`qformer_input_ids` is missing: the Q-Former reads the instruction with the images.")
        check_ids(qformer_input_ids, self.config.qformer_config.vocab_size, "qformer_tokenizer")
        vision_outputs = None
        if pixel_values is not None:
            vision_outputs, pair_features = self._encode_pair(pixel_values, interpolate_pos_encoding, **kwargs)
        else:
            tokens, width = 2 * self.vision_model.embeddings.num_positions, self.config.vision_config.hidden_size
            dtypes = {self.query_tokens.dtype, self.vision_model.dtype}
            check_pair_features(pair_features, tokens, width, dtypes, any_size=interpolate_pos_encoding)
        questions = qformer_input_ids.shape[0]
        if pair_features.shape[0] not in (1, questions):
            raise ValueError(
                f"Got {pair_features.shape[0]} image pairs for {questions} instructions: give one pair for each "
                "instruction, or a single pair for all."
            )
        pair_features = pair_features.expand(questions, -1, -1).to(self.query_tokens.dtype)

        query_tokens = self.query_tokens.expand(questions, -1, -1)  # (B, Q, d)
        if qformer_attention_mask is None:
            qformer_attention_mask = torch.ones_like(qformer_input_ids)
        query_mask = qformer_attention_mask.new_ones(query_tokens.shape[:2])
        qformer_outputs = self.qformer(
            input_ids=qformer_input_ids,
            attention_mask=torch.cat([query_mask, qformer_attention_mask], dim=1),  # (B, Q + T)
            position_ids=_positions(qformer_attention_mask),  # padding may be on either side
            query_embeds=query_tokens,
            encoder_hidden_states=pair_features,
            return_dict=True,
            **kwargs,
        )
        queries = qformer_outputs.last_hidden_state[:, : query_tokens.shape[1]]  # (B, Q + T, d) -> (B, Q, d)
        return BaseModelOutputWithVisionQformerOutputs(
            last_hidden_state=pair_features,
            pooler_output=self.language_projection(queries),  # (B, Q, d_llm)
            hidden_states=None if vision_outputs is None else vision_outputs.hidden_states,
            attentions=None if vision_outputs is None else vision_outputs.attentions,
            vision_outputs=vision_outputs,
            qformer_outputs=qformer_outputs,
        )

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        qformer_input_ids: torch.LongTensor | None = None,
        qformer_attention_mask: torch.LongTensor | None = None,
        pair_features: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithVisionQformerOutputs:
        """The change tokens and what leads to them: see [`~DeltaVLMModel.get_image_features`]."""
        return self.get_image_features(
            pixel_values, qformer_input_ids, qformer_attention_mask, pair_features=pair_features, **kwargs
        )


class DeltaVLMForConditionalGeneration(DeltaVLMModel, DeltaVLMGenerationMixin):
    """
    DeltaVLM with its language model: answers instructions about image pairs through the stock `generate`.

    `generate` also takes `pair_features=model.encode_pair(pixel_values)` in place of `pixel_values`, to ask about one
    pair many times. A `repetition_penalty` applies to the answer alone, not to the prompt, as in the authors' code.
    """

    main_input_name = "input_ids"
    auto_map = {
        **DeltaVLMModel.auto_map,
        "AutoModelForImageTextToText": f"{_MODULE}.DeltaVLMForConditionalGeneration",
        "AutoModelForMultimodalLM": f"{_MODULE}.DeltaVLMForConditionalGeneration",
    }
    _keys_to_ignore_on_load_unexpected = [r"\.lora_"]

    def _add_parts(self, config: DeltaVLMConfig) -> None:
        super()._add_parts(config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self._language_model_inputs = set(inspect.signature(self.language_model.forward).parameters)

    def _restore_lora(self) -> None:
        # From here PEFT knows which kind of layer to put around a quantised one.
        self.language_model.is_loaded_in_4bit = getattr(self, "is_loaded_in_4bit", False)
        settings = dict(self.config.language_model_lora or {}, init_lora_weights=True)  # others change the base too
        with torch.device("meta"):  # nothing is made that the files do not hold
            self.language_model.add_adapter(make_lora_config(settings))
        weights = self.__dict__.pop("_lora_weights", {})
        expected = {name: shape(weight) for name, weight in self.state_dict().items() if IN_NAMES in name}
        found = {name: shape(weight) for name, weight in weights.items()}
        if found != expected:
            differing = sorted(name for name in found.keys() | expected if found.get(name) != expected.get(name))
            raise ValueError(
                "The weights of the language model's LoRA adapter do not fit `language_model_lora` of its "
                f"configuration: {len(expected)} expected, {len(found)} found; {differing[0]} has shape "
                f"{found.get(differing[0])}, expected {expected.get(differing[0])}."
            )
        for name, weight in weights.items():
            base = self.get_submodule(name.partition(IN_NAMES)[0]).get_base_layer().weight
            weights[name] = weight.to(base.device, base.dtype if base.is_floating_point() else None)
        self.load_state_dict(weights, strict=False, assign=True)
        self.language_model.requires_grad_(False).eval()  # what is added is in training mode

    def _get_name(self) -> str:
        # Of a subclass too, such as FSDP makes: `Trainer` looks it up, see MODEL_FOR_CAUSAL_LM_MAPPING_NAMES above.
        return DeltaVLMForConditionalGeneration.__name__

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module):
        self.language_model.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    def _embed(self, input_ids: torch.LongTensor) -> torch.Tensor:
        # The placeholder may lie outside the language model's vocabulary.
        ids = input_ids.masked_fill(input_ids == self.config.image_token_id, 0)
        embeddings = self.get_input_embeddings()
        if ids.shape[1] > 1:  # one token is the model's own
            check_ids(ids, getattr(embeddings, "num_embeddings", math.inf), "tokenizer")  # an adapter hides it
        return embeddings(ids)

    def _merge_change_tokens(
        self, input_ids: torch.LongTensor, inputs_embeds: torch.Tensor, change_tokens: torch.Tensor
    ) -> torch.Tensor:
        placeholders = input_ids == self.config.image_token_id  # (B, L)
        counts = placeholders.sum(-1)
        check(
            (counts == change_tokens.shape[1]).all() & (counts.shape[0] == change_tokens.shape[0]),
            lambda: (
                f"Image placeholders and change tokens do not match: the prompts hold {counts.tolist()} placeholders "
                f"(token {self.config.image_token_id}), the images give {change_tokens.shape[1]} change tokens for "
                f"each of {change_tokens.shape[0]}. The processor's `num_query_tokens` must equal the model's, "
                f"{self.config.num_query_tokens}."
            ),
        )
        change_tokens = change_tokens.to(inputs_embeds.device, inputs_embeds.dtype)
        return inputs_embeds.masked_scatter(placeholders.unsqueeze(-1).to(inputs_embeds.device), change_tokens)

    @can_return_tuple
    @named_by_transformers
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        qformer_input_ids: torch.LongTensor | None = None,
        qformer_attention_mask: torch.LongTensor | None = None,
        pair_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        interpolate_pos_encoding: bool = False,
        mm_encoder_outputs: dict[str, ModelOutput] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DeltaVLMCausalLMOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`): Q placeholders, then the prompt.
            pixel_values, qformer_input_ids, qformer_attention_mask, pair_features, interpolate_pos_encoding: the pair
                and its instruction, see [`~DeltaVLMModel.get_image_features`].
            attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*): 0 at padding, which may be on either side.
            position_ids (`torch.LongTensor` of shape `(B, L)`, *optional*): by default padding takes no position.
            cache (`Cache`, *optional*): the language model's cache; `past_key_values` is the same.
            inputs_embeds (`torch.Tensor` of shape `(B, L, d_llm)`, *optional*): in place of `input_ids`, with the
                change tokens already in them; images are refused beside it.
            labels (`torch.LongTensor` of shape `(B, L)`, *optional*): -100 where nothing is to be learned.
            logits_to_keep (`int` or `torch.Tensor`, *optional*): compute the last logits only, 0 for all, or those at
                these positions. With `labels`, the loss is that of what these predict.
            mm_encoder_outputs (`dict[str, ModelOutput]`, *optional*): `{"image": get_image_features(...)}`, in place
                of the images.
            kwargs: for the language model; and `shift_labels` `(B, L)`, in place of `labels`, what each position is
                to predict: where a sequence is split among devices, its part does not hold the next token.

        Raises:
            ValueError: if placeholders and change tokens differ in number, or inputs contradict each other.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give the prompt as `input_ids` or as `inputs_embeds`: exactly one of them.")
        features = (mm_encoder_outputs or {}).get("image")
        given = form_of_images(pixel_values=pixel_values, pair_features=pair_features, mm_encoder_outputs=features)
        if given and inputs_embeds is not None:
            raise ValueError("`inputs_embeds` must hold the change tokens already: give no images beside them.")
        if given in ("pixel_values", "pair_features"):
            captured = {key: kwargs[key] for key in ("output_attentions", "output_hidden_states") if key in kwargs}
            features = self.get_image_features(
                pixel_values,
                qformer_input_ids,
                qformer_attention_mask,
                pair_features=pair_features,
                interpolate_pos_encoding=interpolate_pos_encoding,
                return_dict=True,
                **captured,
            )
        if inputs_embeds is None:
            inputs_embeds = self._embed(input_ids)
            if features is not None:
                inputs_embeds = self._merge_change_tokens(input_ids, inputs_embeds, features.pooler_output)
            elif input_ids.shape[1] > 1:  # one token is a decoding step, whose images are in the cache
                placeholders = (input_ids == self.config.image_token_id).sum()
                check(
                    (placeholders == 0) | (cache is not None and cache.get_seq_length() > 0),
                    lambda: f"The prompts hold {placeholders} image placeholders, but there are 0 images.",
                )
        length = inputs_embeds.shape[1]
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            # A mask of these tokens alone says nothing of what a cache holds before them.
            if attention_mask.shape[1] > length or cache is None or cache.get_seq_length() == 0:
                position_ids = _positions(attention_mask)[:, -length:]

        # Not among the parameters: `Trainer` asks a batch for every label that it finds there.
        shift_labels = kwargs.pop("shift_labels", None)
        loss_kwargs = {key: kwargs.pop(key) for key in ("num_items_in_batch", "ignore_index") if key in kwargs}
        optional = {"position_ids": position_ids, "logits_to_keep": logits_to_keep}
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            return_dict=True,
            **{CACHE: cache},
            **{key: value for key, value in optional.items() if key in self._language_model_inputs},
            **kwargs,
        )
        loss = None
        if labels is not None or shift_labels is not None:
            targets = shift_labels
            if targets is None:  # a position predicts the one after it
                targets = nn.functional.pad(labels, (0, 1), value=loss_kwargs.get("ignore_index", -100))[:, 1:]
            if "logits_to_keep" in self._language_model_inputs:
                kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
                targets = targets[:, kept]
            loss = self.loss_function(
                logits=outputs.logits,
                labels=labels,
                vocab_size=outputs.logits.shape[-1],
                shift_labels=targets.contiguous(),
                **loss_kwargs,
            )
        return DeltaVLMCausalLMOutputWithPast(
            loss=loss,
            logits=outputs.logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=None if features is None else features.pooler_output,
            image_outputs=features,
            vision_outputs=None if features is None else features.vision_outputs,
            qformer_outputs=None if features is None else features.qformer_outputs,
            **{CACHE: outputs[CACHE] if CACHE in outputs else None},
        )


__all__ = ["DeltaVLMForConditionalGeneration", "DeltaVLMModel", "DeltaVLMPreTrainedModel"]
