"""
DeltaVLM: answers instructions about two images of one place at two dates.

Shapes: B pairs, N vision tokens of one date (for InstructBLIP's ViT patches + 1, CLS first), D vision width, Q query
tokens, T instruction tokens of the Q-Former, L tokens of the language model, K classes of masks.

    pixel_values (B, 2, 3, H, W) -> vision_model -> difference -> pair features (B, 2N, D)
    pair features, feature maps -> mask_decoder -> masks (B, K, H, W), where the model makes them
    pair features, instruction -> qformer -> language_projection -> change tokens (B, Q, d_llm)
    change tokens in place of the placeholders, prompt -> language_model -> answer
"""

import inspect
import math
import re
from collections.abc import Sequence

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Cache,
    InstructBlipPreTrainedModel,
    InstructBlipQFormerModel,
)
from transformers import initialization as init
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

from .cache_name import CACHE, named_by_transformers
from .checkpoints import CheckpointMixin
from .checks import (
    check_ids,
    check_mask_labels,
    check_number_of_pairs,
    check_pair_features,
    check_pixel_values,
    check_placeholders,
    given_images,
)
from .configuration_deltavlm import DeltaVLMConfig
from .csrm import make_difference_module
from .explain import explain
from .frozen_parts import set_frozen_parts_to_eval
from .generation_deltavlm import DeltaVLMGenerationMixin
from .lora import LORA_MARK
from .losses import answer_loss, mask_loss, share_of_step
from .mask_decoder import MaskConvolution, MaskDecoder, segment
from .outputs import DeltaVLMCausalLMOutputWithPast, DeltaVLMImageOutput
from .positions import add_spatial_codes, position_ids_from_mask
from .vision_backbone import make_vision_model

# `Trainer` shifts labels under label smoothing for the classes that are named here, and for no others.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[DeltaVLMConfig.model_type] = "DeltaVLMForConditionalGeneration"

_MODULE = __name__.rpartition(".")[2]  # this file, as a saved folder's `auto_map` names it


class DeltaVLMPreTrainedModel(CheckpointMixin, InstructBlipPreTrainedModel):
    config: DeltaVLMConfig
    base_model_prefix = ""
    _no_split_modules = [*InstructBlipPreTrainedModel._no_split_modules, "CrossSemanticRelationMeasuring"]

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, MaskConvolution):
            return module.init_weights()
        super()._init_weights(module)
        if isinstance(module, DeltaVLMModel):  # at zero, as InstructBLIP leaves them, all would learn the same
            init.normal_(module.query_tokens, mean=0.0, std=self.config.initializer_range)

    def train(self, mode: bool = True):
        """
        As in any module, but parts whose parameters are all frozen stay in evaluation mode: nothing drops out there.
        """
        super().train(mode)
        if mode:
            set_frozen_parts_to_eval(self)
        return self


class DeltaVLMModel(DeltaVLMPreTrainedModel):
    """
    DeltaVLM without its language model: from an image pair and an instruction to change tokens. It loads from a
    complete checkpoint and leaves the language model's weights on disk.
    """

    main_input_name = "pixel_values"
    auto_map = {"AutoModel": f"{_MODULE}.DeltaVLMModel"}
    explain = explain  # a method, in a file of its own
    segment = segment  # likewise
    _keys_to_ignore_on_load_unexpected = [r"^language_model\."]

    def __init__(self, config: DeltaVLMConfig):
        config.check()
        super().__init__(config)
        self._add_parts(config)
        self.post_init()

    def _add_parts(self, config: DeltaVLMConfig) -> None:
        self.vision_model = make_vision_model(config)
        self.difference = make_difference_module(
            config.difference_module, config.vision_width, config.difference_dropout
        )
        if config.mask_classes:
            maps = self.vision_model.backbone.channels if config.has_backbone else []
            self.mask_decoder = MaskDecoder(config, maps[: config.mask_skip_maps])
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, config.qformer_config.hidden_size))
        self.qformer = InstructBlipQFormerModel._from_config(config.qformer_config)
        self.language_projection = nn.Linear(config.qformer_config.hidden_size, config.text_config.hidden_size)

    def get_input_embeddings(self) -> nn.Module:
        return self.qformer.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.qformer.set_input_embeddings(value)

    def _encode_pair(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False, masks: bool = False, **kwargs
    ) -> tuple[ModelOutput, torch.Tensor, torch.Tensor | None]:
        check_pixel_values(pixel_values, self.config.image_size, any_size=interpolate_pos_encoding)
        vision_outputs = self.vision_model(
            pixel_values.flatten(0, 1),  # (B, 2, 3, H, W) -> (2B, 3, H, W)
            interpolate_pos_encoding=interpolate_pos_encoding,
            return_dict=True,
            **kwargs,
        )
        maps, size = vision_outputs.get("feature_maps", ()), pixel_values.shape[-2:]
        return vision_outputs, *self._compare_dates(vision_outputs.last_hidden_state, *size, maps, masks)

    def _compare_dates(
        self, vision_features: torch.Tensor, height: int, width: int, feature_maps=(), masks: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        before, after = vision_features.unflatten(0, (-1, 2)).unbind(1)  # (2B, N, D) -> 2 x (B, N, D)
        pair_features = self.difference(before, after)  # (B, 2N, D)
        grid, mask_logits = self.config.grid(height, width), None
        if self.config.spatial_position_codes:
            pair_features = add_spatial_codes(pair_features, *grid, self.config.num_prefix_tokens)
        if masks or self.config.mask_evidence:
            mask_logits = self.mask_decoder(pair_features, grid, feature_maps[: self.config.mask_skip_maps])
        if self.config.mask_evidence:
            pair_features = pair_features + self.mask_decoder.evidence(mask_logits, grid)
        return pair_features, mask_logits

    def compare_dates(
        self, vision_features: torch.Tensor, height: int, width: int, feature_maps: Sequence[torch.Tensor] = ()
    ) -> torch.Tensor:
        """
        From vision features to pair features: what [`encode_pair`] does after the vision encoder (paper, visual
        difference perception).

        Args:
            vision_features (`torch.Tensor` of shape `(2B, N, D)`): before and after of the first pair, and so on.
            height, width (`int`): of the images, in pixels.
            feature_maps (`Sequence[torch.Tensor]` of shape `(2B, C, h, w)` each, *optional*): a backbone's, for models
                with `mask_evidence`.

        Returns:
            `torch.Tensor` of shape `(B, 2N, D)`.
        """
        return self._compare_dates(vision_features, height, width, feature_maps)[0]

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
        masks: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DeltaVLMImageOutput:
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
            masks (`bool`, *optional*): with the mask decoder's logits; of `pixel_values` alone.
            kwargs: `output_hidden_states` and `output_attentions`, of vision encoder and Q-Former.

        Returns:
            [`DeltaVLMImageOutput`].

        Raises:
            ValueError: if not exactly one of `pixel_values` and `pair_features` is given, `qformer_input_ids` is
                missing or has unknown ids, shapes do not go together, or `pair_features` are of another size or type.
        """
        if given_images(pixel_values=pixel_values, pair_features=pair_features) is None:
            raise ValueError("Give the images, as `pixel_values` or as `pair_features`.")
        if qformer_input_ids is None:
            raise ValueError("`qformer_input_ids` is missing: the Q-Former reads the instruction with the images.")
        check_ids(qformer_input_ids, self.config.qformer_config.vocab_size, "qformer_tokenizer")
        vision_outputs = mask_logits = None
        if pixel_values is not None:
            vision_outputs, pair_features, mask_logits = self._encode_pair(
                pixel_values, interpolate_pos_encoding, masks, **kwargs
            )
        else:
            tokens, width = 2 * self.config.num_vision_tokens, self.config.vision_width
            dtypes = {self.query_tokens.dtype, self.vision_model.dtype}
            check_pair_features(pair_features, tokens, width, dtypes, any_size=interpolate_pos_encoding)
        questions = qformer_input_ids.shape[0]
        check_number_of_pairs(pair_features.shape[0], questions)
        pair_features = pair_features.expand(questions, -1, -1).to(self.query_tokens.dtype)

        query_tokens = self.query_tokens.expand(questions, -1, -1)  # (B, Q, d)
        if qformer_attention_mask is None:
            qformer_attention_mask = torch.ones_like(qformer_input_ids)
        query_mask = qformer_attention_mask.new_ones(query_tokens.shape[:2])
        qformer_outputs = self.qformer(
            input_ids=qformer_input_ids,
            attention_mask=torch.cat([query_mask, qformer_attention_mask], dim=1),  # (B, Q + T)
            position_ids=position_ids_from_mask(qformer_attention_mask),  # padding may be on either side
            query_embeds=query_tokens,
            encoder_hidden_states=pair_features,
            return_dict=True,
            **kwargs,
        )
        queries = qformer_outputs.last_hidden_state[:, : query_tokens.shape[1]]  # (B, Q + T, d) -> (B, Q, d)
        return DeltaVLMImageOutput(
            last_hidden_state=pair_features,
            pooler_output=self.language_projection(queries),  # (B, Q, d_llm)
            hidden_states=None if vision_outputs is None else vision_outputs.hidden_states,
            attentions=None if vision_outputs is None else vision_outputs.attentions,
            vision_outputs=vision_outputs,
            qformer_outputs=qformer_outputs,
            mask_logits=mask_logits if masks else None,
        )

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        qformer_input_ids: torch.LongTensor | None = None,
        qformer_attention_mask: torch.LongTensor | None = None,
        pair_features: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DeltaVLMImageOutput:
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
    _keys_to_ignore_on_load_unexpected = [re.escape(LORA_MARK)]  # `restore_lora` loads them

    def _add_parts(self, config: DeltaVLMConfig) -> None:
        super()._add_parts(config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self._language_model_inputs = set(inspect.signature(self.language_model.forward).parameters)

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
        if ids.shape[1] > 1:  # a single token has just been generated
            check_ids(ids, getattr(embeddings, "num_embeddings", math.inf), "tokenizer")  # PEFT may wrap it
        return embeddings(ids)

    def _merge_change_tokens(
        self, input_ids: torch.LongTensor, inputs_embeds: torch.Tensor, change_tokens: torch.Tensor
    ) -> torch.Tensor:
        placeholders = input_ids == self.config.image_token_id  # (B, L)
        counts = placeholders.sum(-1)
        check_placeholders(
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
                to predict: where a sequence is split among devices, its part does not hold the next token; and
                `mask_labels` `(B, K, H, W)`, whose loss is added, or is all where there is no prompt, with
                `centre_labels` of the same shape, see `losses.py`.

        Raises:
            ValueError: if placeholders and change tokens differ in number, or inputs contradict each other.
        """
        # Not among the parameters: `Trainer` asks a batch for every label that it finds there.
        shift_labels, mask_labels, centre_labels = (
            kwargs.pop(name, None) for name in ("shift_labels", "mask_labels", "centre_labels")
        )
        check_mask_labels(mask_labels, pixel_values, self.config.mask_classes)
        if mask_labels is not None and input_ids is None and inputs_embeds is None:
            mask_logits = self._encode_pair(pixel_values, interpolate_pos_encoding, masks=True)[2]
            loss = mask_loss(mask_logits, mask_labels, centre_labels)
            return DeltaVLMCausalLMOutputWithPast(loss=loss, mask_logits=mask_logits)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give the prompt as `input_ids` or as `inputs_embeds`: exactly one of them.")
        features = (mm_encoder_outputs or {}).get("image")
        given = given_images(pixel_values=pixel_values, pair_features=pair_features, mm_encoder_outputs=features)
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
                masks=mask_labels is not None,
                return_dict=True,
                **captured,
            )
        if inputs_embeds is None:
            inputs_embeds = self._embed(input_ids)
            if features is not None:
                inputs_embeds = self._merge_change_tokens(input_ids, inputs_embeds, features.pooler_output)
            elif input_ids.shape[1] > 1:  # one token is a decoding step, whose images are in the cache
                placeholders = (input_ids == self.config.image_token_id).sum()
                check_placeholders(
                    (placeholders == 0) | (cache is not None and cache.get_seq_length() > 0),
                    lambda: f"The prompts hold {placeholders} image placeholders, but there are 0 images.",
                )
        length = inputs_embeds.shape[1]
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            # A mask of these tokens alone says nothing of what a cache holds before them.
            if attention_mask.shape[1] > length or cache is None or cache.get_seq_length() == 0:
                position_ids = position_ids_from_mask(attention_mask)[:, -length:]

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
        kept = logits_to_keep if "logits_to_keep" in self._language_model_inputs else None
        loss = answer_loss(self, outputs.logits, labels, shift_labels, kept, **loss_kwargs)
        if mask_labels is not None:
            of_masks = mask_loss(features.mask_logits, mask_labels, centre_labels)
            of_masks = of_masks * share_of_step(labels, **loss_kwargs)
            loss = of_masks if loss is None else loss + of_masks.to(loss.device)
        return DeltaVLMCausalLMOutputWithPast(
            loss=loss,
            logits=outputs.logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=None if features is None else features.pooler_output,
            image_outputs=features,
            vision_outputs=None if features is None else features.vision_outputs,
            qformer_outputs=None if features is None else features.qformer_outputs,
            mask_logits=None if features is None else features.get("mask_logits"),
            **{CACHE: outputs[CACHE] if CACHE in outputs else None},
        )


__all__ = ["DeltaVLMForConditionalGeneration", "DeltaVLMModel", "DeltaVLMPreTrainedModel"]
