"""What is minimised: the loss of answers, and that of masks."""

from typing import Any

import torch
from torch import nn

from .vision_backbone import resize

IGNORE_INDEX = -100


def answer_loss(
    model: Any,
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    shift_labels: torch.Tensor | None,
    logits_to_keep: int | torch.Tensor | None,
    **kwargs,
) -> torch.Tensor | None:
    """
    Next-token loss, if there are labels.

    Args:
        model ([`PreTrainedModel`]): whose `loss_function` it is.
        logits (`torch.Tensor` of shape `(B, L, vocab_size)`): those that were kept.
        labels (`torch.Tensor` of shape `(B, L)`, *optional*): -100 where nothing is to be learned.
        shift_labels (`torch.Tensor` of shape `(B, L)`, *optional*): in their place, what each position is to predict.
        logits_to_keep (`int` or `torch.Tensor`, *optional*): which logits were kept; None where all were.
        kwargs: `num_items_in_batch` and `ignore_index`.

    Returns:
        `torch.Tensor` of shape `(1,)`, or None.
    """
    if labels is None and shift_labels is None:
        return None
    targets = shift_labels
    if targets is None:  # a position predicts the one after it
        targets = nn.functional.pad(labels, (0, 1), value=kwargs.get("ignore_index", IGNORE_INDEX))[:, 1:]
    if logits_to_keep is not None:
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        targets = targets[:, kept]
    return model.loss_function(
        logits=logits,
        labels=labels,
        vocab_size=logits.shape[-1],
        shift_labels=targets.contiguous(),
        **kwargs,
    )


def share_of_step(
    labels: torch.Tensor | None, num_items_in_batch: int | torch.Tensor | None = None, **_
) -> torch.Tensor | float:
    """How much of a step a batch is, where several make one: of the loss of answers, each adds its share by itself."""
    if labels is None or num_items_in_batch is None:
        return 1.0
    return (labels != IGNORE_INDEX).sum() / num_items_in_batch


def mask_loss(
    logits: torch.Tensor, mask_labels: torch.Tensor, centre_labels: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Cross-entropy plus the Dice loss of each class; for centres, cross-entropy in which they weigh more.

    Args:
        logits (`torch.Tensor` of shape `(B, K, h, w)`, or `(B, 2K, h, w)` with centres).
        mask_labels (`torch.Tensor` of shape `(B, K, H, W)`): 1 where the class changed, 0 elsewhere, -100 where it is
            not known.
        centre_labels (`torch.Tensor` of shape `(B, K, H, W)`, *optional*): 1 at the centre of each object, falling to
            0 around it; -100 where it is not known.

    Returns:
        `torch.Tensor` of shape `(1,)`, in float32.

    Raises:
        ValueError: if there are `centre_labels` for a decoder without centres.
    """
    classes = mask_labels.shape[1]
    scores = resize(logits.float(), mask_labels.shape[-2:])
    known = (mask_labels != IGNORE_INDEX).float()
    truth = mask_labels.clamp(min=0).float()
    entropy = nn.functional.binary_cross_entropy_with_logits(scores[:, :classes], truth, known, reduction="sum")
    loss = entropy / known.sum().clamp(min=1)
    found = scores[:, :classes].sigmoid() * known
    common, both = (found * truth).sum((0, 2, 3)), found.sum((0, 2, 3)) + (truth * known).sum((0, 2, 3))
    loss = loss + (1 - (2 * common + 1) / (both + 1)).mean()
    if centre_labels is not None:
        if logits.shape[1] != 2 * classes:
            raise ValueError("`centre_labels` are for models with `mask_evidence`, which marks centres.")
        known = (centre_labels != IGNORE_INDEX).float()
        truth = centre_labels.clamp(min=0).float()
        weights = known * (1 + 9 * truth)
        entropy = nn.functional.binary_cross_entropy_with_logits(scores[:, classes:], truth, weights, reduction="sum")
        loss = loss + entropy / known.sum().clamp(min=1)
    return loss
