"""From a raster's values to the 8 bits that a model reads: one way for both dates."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

PERCENTILES = (2.0, 98.0)
_QUANTILES = np.linspace(0, 1, 257)


@dataclass(frozen=True)
class Stretch:
    """
    What is black and what is white, the same at both dates.

    Args:
        low (`tuple[float, float, float]`): of red, green and blue: this and less is black.
        high (`tuple[float, float, float]`): this and more is white.
    """

    low: tuple[float, float, float]
    high: tuple[float, float, float]

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Values `(3, H, W)` to uint8 `(H, W, 3)`; what is not finite is black, for the caller to fill."""
        low, high = (np.array(each, np.float32)[:, None, None] for each in (self.low, self.high))
        scaled = (values.astype(np.float32) - low) * (255 / (high - low))
        return np.rint(np.clip(np.nan_to_num(scaled), 0, 255)).astype(np.uint8).transpose(1, 2, 0)

    def __str__(self) -> str:
        return " ".join(f"{low:.6g}..{high:.6g}" for low, high in zip(self.low, self.high, strict=True))


def full_range(dtype: np.dtype) -> Stretch:
    """All that a type can hold, for floats 0 to 1: what the processor makes of such images by itself."""
    low, high = (0.0, 1.0) if dtype.kind == "f" else (max(0, np.iinfo(dtype).min), np.iinfo(dtype).max)
    return Stretch((float(low),) * 3, (float(high),) * 3)


def measure_stretch(before: np.ndarray, after: np.ndarray) -> Stretch:
    """
    Percentiles 2 and 98 of both dates' values together, band by band.

    Args:
        before (`np.ndarray` of shape `(3, N)`): known values of date 1.
        after (`np.ndarray` of shape `(3, N)`): known values of date 2.
    """
    low, high = np.percentile(np.concatenate([before, after], axis=1).astype(np.float64), PERCENTILES, axis=1)
    high = np.where(high > low, high, low + 1)  # a band of one value
    return Stretch(tuple(low.tolist()), tuple(high.tolist()))


def choose_stretch(given: str | Sequence[float] | None, dtypes: Sequence[np.dtype], sample: Any) -> Stretch:
    """
    The stretch of a scene.

    Args:
        given: None: 8-bit values as they are, else [`measure_stretch`]; `"none"`: [`full_range`]; or two numbers.
        dtypes (`Sequence[np.dtype]`): of both dates.
        sample (`tuple[np.ndarray, np.ndarray]`): see [`measure_stretch`].

    Raises:
        ValueError: if it is none of these, or the dates have values of different kinds, which no one stretch suits.
    """
    kinds = dict.fromkeys(str(dtype) for dtype in dtypes)
    if given is None or given == "none":
        if len(kinds) > 1 and ("uint8" in kinds or given == "none"):
            raise ValueError(
                f"One date has values of type {' and the other of type '.join(kinds)}: no one stretch suits both. "
                "Convert one of them, or say what is black and white at both: --stretch LOW HIGH."
            )
        if given == "none" or "uint8" in kinds:
            return full_range(np.dtype(dtypes[0]))
        return measure_stretch(*sample)
    if isinstance(given, str) or len(given) != 2 or not given[0] < given[1]:
        raise ValueError(f"`stretch` is {given!r}, expected two numbers, the lower one first, or 'none'.")
    return Stretch((float(given[0]),) * 3, (float(given[1]),) * 3)


@dataclass(frozen=True)
class Matching:
    """
    Brings the values of date 2 to the distribution of date 1, band by band.

    Args:
        after (`np.ndarray` of shape `(3, 257)`): quantiles of date 2.
        before (`np.ndarray` of shape `(3, 257)`): of date 1.
    """

    after: np.ndarray
    before: np.ndarray

    @classmethod
    def measure(cls, before: np.ndarray, after: np.ndarray) -> "Matching":
        """Args: see [`measure_stretch`]."""
        quantiles = [np.quantile(each.astype(np.float64), _QUANTILES, axis=1).T for each in (after, before)]
        return cls(*quantiles)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Values `(3, ...)` of date 2, as floats."""
        bands = zip(values, self.after, self.before, strict=True)
        return np.stack([np.interp(band, after, before) for band, after, before in bands]).astype(np.float32)
