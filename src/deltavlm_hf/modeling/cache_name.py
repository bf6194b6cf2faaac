"""
The language model's cache by the name that the installed Transformers has for it.

Release 5.24 calls `cache` what releases before it call `past_key_values`, in arguments and in outputs.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields

from transformers.modeling_outputs import CausalLMOutputWithPast

CACHE = next(field.name for field in fields(CausalLMOutputWithPast) if field.name in ("cache", "past_key_values"))


def named_by_transformers(method: Callable) -> Callable:
    """
    Makes a method with a parameter `cache` take it under either name. Its signature, which `generate` reads to tell
    known arguments from mistyped ones, shows the name that this release of Transformers uses.

    Raises:
        ValueError: in the call, if both names are given.
    """

    @functools.wraps(method)
    def renamed(*args, **kwargs):
        if "past_key_values" in kwargs:
            past_key_values = kwargs.pop("past_key_values")
            if past_key_values is not None and kwargs.get("cache") is not None:
                raise ValueError("`cache` and `past_key_values` are two names of one argument: give one of them.")
            kwargs.setdefault("cache", past_key_values)
        return method(*args, **kwargs)

    signature = inspect.signature(method)
    parameters = [
        parameter.replace(name=CACHE) if name == "cache" else parameter
        for name, parameter in signature.parameters.items()
    ]
    renamed.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return renamed
