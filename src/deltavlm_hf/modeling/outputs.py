"""What DeltaVLM returns."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.instructblip.modeling_instructblip import BaseModelOutputWithVisionQformerOutputs
from transformers.utils import ModelOutput


@dataclass
class DeltaVLMImageOutput(BaseModelOutputWithVisionQformerOutputs):
    """
    What [`~DeltaVLMModel.get_image_features`] gives.

    Args:
        pooler_output (`torch.FloatTensor` of shape `(B, Q, d_llm)`): the change tokens.
        last_hidden_state (`torch.FloatTensor` of shape `(B, 2N, D)`): the pair features.
        hidden_states, attentions (*optional*): the vision encoder's, of `(2B, ...)`: before, after, before, ...
        vision_outputs (`ModelOutput`, *optional*): of the vision encoder.
        qformer_outputs (`ModelOutput`, *optional*): of the Q-Former; `cross_attentions` on request.
        mask_logits (`torch.FloatTensor` of shape `(B, C, h, w)`, *optional*): of the mask decoder, where it was asked.
    """

    mask_logits: torch.FloatTensor | None = None


@dataclass
class DeltaVLMCausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    Output of [`DeltaVLMForConditionalGeneration`].

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*): next-token loss, when `labels` are given, and the mask
            decoder's, when `mask_labels` are.
        logits (`torch.FloatTensor` of shape `(B, L, vocab_size)`): scores of the language model.
        cache (`Cache`, *optional*): the language model's cache; `past_key_values` before Transformers 5.24.
        hidden_states, attentions (*optional*): the language model's, on request.
        image_hidden_states (`torch.FloatTensor` of shape `(B, Q, d_llm)`, *optional*): the change tokens.
        image_outputs ([`DeltaVLMImageOutput`], *optional*): what [`~DeltaVLMModel.get_image_features`] gave.
        vision_outputs (`ModelOutput`, *optional*): of the vision encoder, on `(2B, ...)`: before, after, before, ...
        qformer_outputs (`ModelOutput`, *optional*): of the Q-Former; `cross_attentions` on request.
        mask_logits (`torch.FloatTensor` of shape `(B, C, h, w)`, *optional*): of the mask decoder, with `mask_labels`.
    """

    image_hidden_states: torch.FloatTensor | None = None
    image_outputs: DeltaVLMImageOutput | None = None
    vision_outputs: ModelOutput | None = None
    qformer_outputs: ModelOutput | None = None
    mask_logits: torch.FloatTensor | None = None

    def to_tuple(self) -> tuple:
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())
