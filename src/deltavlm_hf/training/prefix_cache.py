"""Hidden states of the frozen vision blocks, computed once for each image and kept on disk."""

import hashlib
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from filelock import FileLock
from tqdm import tqdm

from ..data.rows import undecoded
from ..journal import Journal
from ..modeling import DeltaVLMForConditionalGeneration
from ..modeling.vision_backbone import feature_map_shapes
from ..processing import DeltaVLMProcessor
from ..processing.reading import open_file, read_image
from .freezing import vision_layers

_KEPT_AS = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: np.uint16}  # NumPy has no bfloat16

_NOT_SETTINGS = ("auto_map", "image_processor_type", "processor_class")  # which saving and loading add


def encode_vision_prefix(
    model: DeltaVLMForConditionalGeneration, pixel_values: torch.Tensor, blocks: int
) -> torch.Tensor:
    """
    The first part of the vision encoder alone.

    Args:
        model ([`DeltaVLMForConditionalGeneration`]).
        pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): single images.
        blocks (`int`): how many blocks; of a backbone, all of them.

    Returns:
        `torch.Tensor` of shape `(B, N, D)`: the states that enter the block with this number; of a backbone
        `(B, values)`: its feature maps, one after the other.
    """
    if model.config.has_backbone:
        feature_maps = model.vision_model.backbone(pixel_values).feature_maps
        return torch.cat([feature_map.flatten(1) for feature_map in feature_maps], dim=1)
    states = model.vision_model.embeddings(pixel_values)
    for block in model.vision_model.encoder.layers[:blocks]:
        states = block(states)
    return states


def take_vision_states(model: DeltaVLMForConditionalGeneration) -> None:
    """
    From now on the model's `forward` takes, in place of `pixel_values`, `vision_states` `(B, 2, N, D)`, of both
    dates what enters the vision block `vision_states_block`; of a backbone `(B, 2, values)`, its feature maps. It goes
    on from there within its own call, so that what wraps the model (`DistributedDataParallel`) sees the gradients of
    the parts that train. Mixed precision reaches them only where it is on around the call, as with
    [`DeltaVLMTrainer`]: `accelerate` by itself turns it on further in, and they then compute in full precision.
    """
    sizes = _map_sizes(model) if model.config.has_backbone else []
    model.register_forward_pre_hook(partial(_go_on, sizes), with_kwargs=True)


def _go_on(
    sizes: list[torch.Size], model: DeltaVLMForConditionalGeneration, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    states, block = kwargs.pop("vision_states", None), kwargs.pop("vision_states_block", 0)
    if states is None:
        return None
    vision, feature_maps = model.vision_model, []
    size = (model.config.image_size,) * 2
    states = states.flatten(0, 1).to(model.query_tokens.dtype)  # (B, 2, ...) -> (2B, ...)
    if model.config.has_backbone:
        parts = states.split([math.prod(each) for each in sizes], dim=1)
        feature_maps = [part.unflatten(1, each) for part, each in zip(parts, sizes, strict=True)]
        features = vision.neck(feature_maps, *size)
    else:
        for layer in vision.encoder.layers[block:]:
            states = layer(states)
        features = vision.post_layernorm(states)
    kwargs["pair_features"] = model.compare_dates(features, *size, feature_maps)
    return args, kwargs


def _map_sizes(model: DeltaVLMForConditionalGeneration) -> list[torch.Size]:
    """Of a backbone's feature maps, (C, h, w) each."""
    return feature_map_shapes(model.config.vision_config, model.config.image_size)


class PrefixCache:
    """
    For each image the hidden state that enters the first vision block that trains.

    The blocks before it are frozen and preprocessing is the same each time, so that this state never changes: it is
    computed once, instead of for every question on a pair and every epoch. The model goes on from it: see
    [`take_vision_states`], which this calls.

    States are kept by the image's content in a folder named by all that they depend on: the weights of these blocks,
    the preprocessing and the precision. Other weights make another folder; nothing stale is read. A state counts
    once it is on the disk as a whole, so that a run that was killed goes on. One image takes N x D numbers: at full
    size 257 x 1408, that is 0.72 MB in 16 bits. Of a backbone all feature maps are kept, where it is wholly frozen.

    A pickled copy, as worker processes of a `DataLoader` get it, reads the folder anew and has no model: it cannot be
    filled.

    Args:
        folder (`str` or `Path`): where states are kept; several runs may share it.
        model ([`DeltaVLMForConditionalGeneration`]): after [`freeze`].
        processor ([`DeltaVLMProcessor`]): the model's.
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`): float32, float16 or bfloat16.

    Attributes:
        first_block (`int`): the vision block that states enter.

    Raises:
        ValueError: if the first block trains, or the embeddings do: there is nothing that stays the same; or for
            another precision.
    """

    def __init__(
        self,
        folder: str | Path,
        model: DeltaVLMForConditionalGeneration,
        processor: DeltaVLMProcessor,
        dtype: torch.dtype = torch.bfloat16,
    ):
        if dtype not in _KEPT_AS:
            raise ValueError(f"Vision states are kept as float32, float16 or bfloat16, not {dtype}.")
        vision, layers = model.vision_model, vision_layers(model)
        frozen = [not any(p.requires_grad for p in block.parameters()) for block in layers]
        self.first_block = frozen.index(False) if False in frozen else len(frozen)
        if model.config.has_backbone:
            if any(p.requires_grad for p in vision.backbone.parameters()):
                raise ValueError(
                    "There are no vision states to cache: a part of the backbone trains. Freeze all of it, as "
                    "`freeze(model)` does, or leave the cache out."
                )
            self.shape: tuple[int, ...] = (sum(map(math.prod, _map_sizes(model))),)
        else:
            if self.first_block == 0 or any(p.requires_grad for p in vision.embeddings.parameters()):
                raise ValueError(
                    "There are no vision states to cache: the first vision block or the embeddings train. Freeze "
                    "them, as `freeze(model)` does, or leave the cache out."
                )
            self.shape = (vision.embeddings.position_embedding.shape[1], vision.config.hidden_size)  # N, D
        take_vision_states(model)
        self.model: DeltaVLMForConditionalGeneration | None = model
        self.processor = processor
        self.dtype = dtype
        self.folder = Path(folder).expanduser().absolute() / self._key(model)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._states_file = self.folder / "states.bin"
        self._states_file.touch()
        self._contents: dict[str, str] = {}  # path -> content
        self._read()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "model": None, "_places": None, "_states": None, "_contents": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._read()

    def _key(self, model: DeltaVLMForConditionalGeneration) -> str:
        summary = hashlib.sha256()
        vision = model.vision_model
        if model.config.has_backbone:
            parts = [vision.backbone]
        else:
            parts = [vision.embeddings, *vision.encoder.layers[: self.first_block]]
        for part in parts:
            for name, tensor in part.state_dict().items():
                summary.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                summary.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        settings = self.processor.image_processor.to_dict()
        settings = {name: value for name, value in settings.items() if name not in _NOT_SETTINGS and name[0] != "_"}
        summary.update(json.dumps(settings, sort_keys=True, default=str).encode())
        summary.update(f"{vision.config.to_json_string(use_diff=False)} {self.dtype}".encode())
        return summary.hexdigest()[:24]

    def _journal(self) -> Journal:
        return Journal(self.folder / "images.jsonl", {"shape": list(self.shape), "dtype": str(self.dtype)}, ("image",))

    def _read(self) -> None:
        # Content -> number of its state.
        self._places: dict[str, int] = {image: entry["place"] for (image,), entry in self._journal().entries.items()}
        self._states = np.empty((0, *self.shape), _KEPT_AS[self.dtype])
        size = int(np.prod(self.shape))
        whole = self._states_file.stat().st_size // (size * np.dtype(_KEPT_AS[self.dtype]).itemsize)
        if whole:
            self._states = np.memmap(self._states_file, _KEPT_AS[self.dtype], "r", shape=(whole, *self.shape))

    def fill(self, rows: datasets.Dataset, device: torch.device | str = "cpu", batch_size: int = 16) -> int:
        """
        Computes what is not there yet.

        Args:
            rows (`datasets.Dataset`): with `before` and `after`.
            device (`torch.device` or `str`, *optional*): where to compute; the model is taken there.
            batch_size (`int`, *optional*, defaults to 16): images at once.

        Returns:
            `int`: how many images were computed.

        Raises:
            ValueError: in a worker process's copy.
        """
        if self.model is None:
            raise ValueError("A pickled `PrefixCache` only reads: fill it where its model is.")
        with FileLock(self.folder / "lock"):
            self._read()
            journal = self._journal()
            waiting: dict[str, dict] = {}
            for row in undecoded(rows.with_format(None)).select_columns(["before", "after"]):
                for image in row.values():
                    content = self._content(image)
                    if content not in self._places:
                        waiting[content] = image
            contents = list(waiting)
            starts = range(0, len(contents), batch_size)
            self.model.vision_model.to(device)
            with self._states_file.open("r+b") as file, torch.inference_mode():
                for start in tqdm(starts, desc="vision states", disable=not contents):
                    chosen = contents[start : start + batch_size]
                    states = self._compute(self.model, [waiting[content] for content in chosen], device)
                    file.seek(len(self._places) * states[0].nbytes)
                    file.write(states.tobytes())
                    file.flush()
                    for content in chosen:
                        place = len(self._places)
                        journal.append({"image": content, "place": place})
                        self._places[content] = place
            self._read()
        return len(contents)

    def _compute(
        self, model: DeltaVLMForConditionalGeneration, images: list[dict], device: torch.device | str
    ) -> np.ndarray:
        decoded = [read_image(image) for image in images]
        pairs = [(image, image) for image in decoded]
        pixel_values = self.processor(images=pairs, return_tensors="pt")["pixel_values"][:, 0]
        states = encode_vision_prefix(model, pixel_values.to(device, model.dtype), self.first_block)
        states = states.to(self.dtype).cpu()
        return (states.view(torch.uint16) if self.dtype == torch.bfloat16 else states).numpy()

    def _content(self, image: dict[str, Any]) -> str:
        """What tells an image from others, from the bytes of its file."""
        if image.get("bytes"):
            return hashlib.sha256(image["bytes"]).hexdigest()
        path = image["path"]
        if path not in self._contents:
            with open_file(path) as file:
                self._contents[path] = hashlib.file_digest(file, "sha256").hexdigest()
        return self._contents[path]

    def __len__(self) -> int:
        return len(self._places)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> torch.Tensor:
        """
        The states of both dates, `(B, 2, N, D)`.

        Args:
            rows (`Sequence[dict]`): with undecoded images `before` and `after`.

        Raises:
            KeyError: for an image that [`~PrefixCache.fill`] has not seen.
        """
        places = [self._places[self._content(row[date])] for row in rows for date in ("before", "after")]
        states = torch.from_numpy(self._states[places])
        if self.dtype == torch.bfloat16:
            states = states.view(torch.bfloat16)
        return states.unflatten(0, (len(rows), 2))
