"""Change masks of pairs, at the size of their images."""

import io
import os

import numpy as np
from PIL import Image
from transformers.image_utils import ImageInput

from ..data.classes import Classes, classes_of
from ..data.masks import to_mask
from ..files import write_bytes
from ..modeling import DeltaVLMForConditionalGeneration
from ..modeling.vision_backbone import resize
from ..processing import DeltaVLMProcessor


def predict_mask(
    model: DeltaVLMForConditionalGeneration,
    processor: DeltaVLMProcessor,
    before: ImageInput,
    after: ImageInput,
    size: tuple[int, int] | None = None,
    classes: Classes | None = None,
) -> np.ndarray:
    """
    Which pixels changed, by a model's own masks.

    Args:
        model ([`DeltaVLMForConditionalGeneration`]): with `mask_classes`, on any device.
        processor ([`DeltaVLMProcessor`]): the model's.
        before: the image of the first date, anything that [`DeltaVLMImageProcessor`] takes.
        after: the image of the second date.
        size (`tuple[int, int]`, *optional*): height and width of the mask; by default those of `after`.
        classes ([`Classes`], *optional*): whose values the mask has; by default those that the model learnt.

    Returns:
        `np.ndarray` of shape `(H, W)`, uint8: 0 where nothing changed, else the value of a class, such as 128 (road)
        and 255 (building), or, where `classes` do not say it, its number in `mask_classes`, from 1 on. A pixel has the
        class with the highest probability, if that is above one half.

    Raises:
        ValueError: if the model makes no masks, or an image cannot be used.
    """
    image_processor = processor.image_processor
    (pair,) = image_processor.fetch_images([(before, after)])
    if size is None:
        size = image_processor.process_image(pair[1]).shape[1:]
    pixel_values = processor(images=[pair], return_tensors="pt")["pixel_values"]
    probabilities = model.segment(pixel_values=pixel_values.to(model.device, model.dtype))  # (1, K, h, w)
    found = resize(probabilities, size)[0].cpu().numpy()
    return to_mask(found, model.config.mask_classes or (), classes or classes_of(model.config))


def write_mask(path: str | os.PathLike, mask: np.ndarray) -> None:
    """A mask `(H, W)`, uint8, as a grey PNG, whole or not at all."""
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "png")
    write_bytes(path, buffer.getvalue())
