"""What the model's inputs must be: each check names what was given and what was expected."""

from collections.abc import Callable
from typing import Any

import torch
from transformers.utils import is_tracing, torch_compilable_check


def given_images(**forms: Any) -> str | None:
    """Which of the arguments that images may come in is given, if any. Raises `ValueError` if there are several."""
    given = [name for name, value in forms.items() if value is not None]
    if len(given) > 1:
        *others, last = forms
        raise ValueError(
            f"Give the images as `{'`, `'.join(others)}` or `{last}`: one of them, got {' and '.join(given)}."
        )
    return given[0] if given else None


def check_pixel_values(pixel_values: torch.Tensor, image_size: int, any_size: bool) -> None:
    """Raises `ValueError` unless these are pairs, of the vision encoder's size: it takes smaller ones in silence."""
    if pixel_values.ndim != 5 or pixel_values.shape[1:3] != (2, 3):
        raise ValueError(
            "`pixel_values` must be image pairs of shape (batch, 2, 3, height, width), before and after, as "
            f"`DeltaVLMProcessor` makes them; got {tuple(pixel_values.shape)}."
        )
    size = (image_size, image_size)
    if pixel_values.shape[-2:] != size and not any_size:
        raise ValueError(
            f"`pixel_values` have the size {tuple(pixel_values.shape[-2:])}, expected {size}: the processor's `size` "
            "must be the model's, or pass interpolate_pos_encoding=True."
        )


def check_pair_features(
    pair_features: torch.Tensor, tokens: int, width: int, dtypes: set[torch.dtype], any_size: bool
) -> None:
    """Raises `ValueError` unless a caller's features are of the form that this model makes."""
    if pair_features.ndim != 3 or pair_features.shape[-1] != width:
        raise ValueError(
            f"`pair_features` must have shape (batch, {tokens}, {width}), as `encode_pair` of this model gives; got "
            f"{tuple(pair_features.shape)}."
        )
    if pair_features.shape[1] != tokens and not any_size:
        raise ValueError(
            f"`pair_features` hold {pair_features.shape[1]} tokens, where images of this model's size give {tokens}. "
            "For images of another size say so: `interpolate_pos_encoding=True`."
        )
    if torch.is_autocast_enabled(pair_features.device.type):
        dtypes = dtypes | {torch.get_autocast_dtype(pair_features.device.type)}
    if pair_features.dtype not in dtypes:
        raise ValueError(
            f"`pair_features` are {pair_features.dtype}, but this model computes in "
            f"{' or '.join(map(str, sorted(dtypes, key=str)))}: encode the pair again, or cast them if that is what "
            "you want."
        )


def check_number_of_pairs(pairs: int, questions: int) -> None:
    """Raises `ValueError` unless there is a pair for each instruction, or one for all."""
    if pairs not in (1, questions):
        raise ValueError(
            f"Got {pairs} image pairs for {questions} instructions: give one pair for each instruction, or a single "
            "pair for all."
        )


def check_ids(ids: torch.Tensor, vocabulary: float, tokenizer: str) -> None:
    """Raises `ValueError` for ids that a vocabulary does not have."""
    if not is_tracing(ids) and (ids >= vocabulary).any():
        raise ValueError(
            f"Token {ids.max()} is not in the model's vocabulary of {vocabulary}: the processor's `{tokenizer}` is "
            "another model's."
        )


def check_placeholders(condition: torch.Tensor, message: Callable[[], str]) -> None:
    """Raises `ValueError` where placeholders and images do not match; in a compiled graph an error without numbers."""
    if torch.compiler.is_compiling():  # where reading the condition, as below, would break the graph
        torch._assert_async(condition, "Image placeholders and change tokens do not match.")
    else:
        torch_compilable_check(condition, message)


def check_mask_labels(
    mask_labels: torch.Tensor | None, pixel_values: torch.Tensor | None, classes: list[str] | None
) -> None:
    """Raises `ValueError` for labels of masks that the model does not make, or that come without their images."""
    if mask_labels is None:
        return
    if not classes:
        raise ValueError("Got `mask_labels`, but this model makes no masks: `config.mask_classes` names no class.")
    if pixel_values is None:
        raise ValueError("`mask_labels` need the images that they are of, as `pixel_values`.")
    if mask_labels.ndim != 4 or mask_labels.shape[:2] != (pixel_values.shape[0], len(classes)):
        raise ValueError(
            f"`mask_labels` have the shape {tuple(mask_labels.shape)}, expected ({pixel_values.shape[0]}, "
            f"{len(classes)}, height, width): for each pair a mask of each of {', '.join(classes)}."
        )
