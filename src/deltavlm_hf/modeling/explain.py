"""Where the model looks, and where it sees change: heat maps over an image pair."""

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

_LOCK = threading.Lock()


@dataclass
class DeltaVLMExplanation(ModelOutput):
    """
    What [`~DeltaVLMModel.explain`] gives.

    Args:
        attention (`torch.FloatTensor` of shape `(B, 2, H, W)`): for each question, how much of the Q-Former's
            cross-attention each pixel of both dates gets; each question's values sum to 1 over both.
        change (`torch.FloatTensor` of shape `(B, H, W)`): how far the pair features of the two dates lie apart, by
            Euclidean distance; the same for all questions about a pair.
    """

    attention: torch.FloatTensor | None = None
    change: torch.FloatTensor | None = None


@torch.no_grad()
def explain(
    model: Any,
    pixel_values: torch.Tensor | None = None,
    qformer_input_ids: torch.LongTensor | None = None,
    qformer_attention_mask: torch.LongTensor | None = None,
    pair_features: torch.Tensor | None = None,
    **others,
) -> DeltaVLMExplanation:
    """
    Where the model looks for each question, and where it sees change: heat maps to lay over the images.

    Attention is what the Q-Former's queries read, averaged over queries, heads and layers, not proof of what an
    answer rests on. `explain(**inputs)` takes what the processor returned.

    Args:
        pixel_values (`torch.Tensor` of shape `(B, 2, 3, H, W)`, *optional*): before and after.
        qformer_input_ids (`torch.LongTensor` of shape `(B, T)`): the instructions.
        qformer_attention_mask (`torch.LongTensor` of shape `(B, T)`, *optional*): 0 at padding.
        pair_features (`torch.Tensor` of shape `(B, 2N, D)` or `(1, 2N, D)`, *optional*): in place of
            `pixel_values`. Maps then have the model's own image size.
        others: what the language model reads; not used.

    Returns:
        [`DeltaVLMExplanation`].

    Raises:
        ValueError: see [`~DeltaVLMModel.get_image_features`].
    """
    size = own = (model.config.image_size,) * 2
    if pixel_values is not None and pair_features is None:
        size = tuple(pixel_values.shape[-2:])
        pair_features, pixel_values = model.encode_pair(pixel_values, interpolate_pos_encoding=size != own), None
    with _LOCK:  # threads would leave each other's implementation behind
        implementation = model.qformer.config._attn_implementation
        model.qformer.set_attn_implementation("eager")  # the others keep no weights
        try:
            outputs = model.get_image_features(
                pixel_values,
                qformer_input_ids,
                qformer_attention_mask,
                pair_features=pair_features,
                interpolate_pos_encoding=size != own,
                output_attentions=True,
                return_dict=True,
            )
        finally:
            model.qformer.set_attn_implementation(implementation)
    grid, prefix = model.config.grid(*size), model.config.num_prefix_tokens
    queries = model.config.num_query_tokens
    layers = [layer[:, :, :queries].mean((1, 2)) for layer in outputs.qformer_outputs.cross_attentions]
    attention = torch.stack(layers).float().mean(0)  # L x (B, heads, Q, 2N) -> (B, 2N)
    attention = attention.unflatten(1, (2, -1))[:, :, prefix:].unflatten(2, grid)  # without CLS -> (B, 2, h, w)
    before, after = outputs.last_hidden_state.float().chunk(2, dim=1)
    change = (after - before)[:, prefix:].norm(dim=-1).unflatten(1, grid)  # (B, h, w)
    attention = nn.functional.interpolate(attention, size, mode="bilinear")
    return DeltaVLMExplanation(
        attention=attention / attention.sum((1, 2, 3), keepdim=True),
        change=nn.functional.interpolate(change.unsqueeze(1), size, mode="bilinear").squeeze(1),
    )
