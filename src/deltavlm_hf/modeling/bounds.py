"""
What a configuration may ask for. A `config.json` is a stranger's: before anything is built from it, its numbers are
held against bounds that no model comes near, and what would make Transformers fetch or run code is refused.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

MOST_WEIGHTS = 2 * 10**12  # in dense layers: several times the largest language model that exists
MOST_CLASSES = 1000  # of masks
MOST_METRES = 100_000  # per pixel: no satellite sees coarser
_MOST_PARTS = 2**19  # layers times experts, each of which may be modules of its own
_DEPTH = 20  # of dicts in dicts

# Bounds by what a number counts: the first pattern that a name matches, whole.
_LARGEST = (
    (re.compile(r".*(_ids?|_index|theta|freq|base|alpha|seed|version|param\w*)"), 2**40),  # nothing is made of it
    (re.compile(r".*(layers?|blocks?|depths?|stages?)"), 2**10),
    (re.compile(r".*heads?"), 2**12),
    (re.compile(r".*experts?(_per_tok\w*)?"), 2**14),
    (re.compile(r"num_query_tokens|(num_)?labels"), 2**14),
    (re.compile(r"(image|patch)_size"), 2**16),
    (re.compile(r".*(vocab|position|length|len|window|context|ctx|seq|token|pixel|sample|byte|hash)\w*"), 2**24),
    (re.compile(r"(.*_)?num_.*"), 2**14),
    (re.compile(r".*"), 2**20),  # widths, and whatever else there is
)
# Each of these makes weights by itself: an integer, no bool, no text, and at least so much.
_SMALLEST = {
    "hidden_size": 1,
    "intermediate_size": 1,
    "num_hidden_layers": 0,
    "num_attention_heads": 1,
    "vocab_size": 1,
    "num_query_tokens": 1,
    "image_size": 1,
    "patch_size": 1,
    "max_position_embeddings": 1,
    "encoder_hidden_size": 1,
    "cross_attention_frequency": 1,
    "image_token_id": 0,
}
_SEVERAL = ("image_size", "patch_size", "intermediate_size", "num_attention_heads")  # some models have one for each
_PLAIN = re.compile(r"[\w.]{1,200}")
_DTYPE = re.compile(r"b?float\d*|half|double|float8_\w+")
# What Transformers looks for in any configuration and `save_pretrained` of DeltaVLM never writes.
_NEVER = (
    "transformers_weights",
    "fusion_config",
    "distributed_config",
    "custom_pipelines",
    "use_kernels",
    "kernel_config",
    "backbone",
)

# Of a `generation_config.json`: what multiplies the work of an answer, or keeps it from ending.
_OF_GENERATION = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), 2**8),
    **dict.fromkeys(("min_length", "min_new_tokens", "prompt_lookup_num_tokens", "max_matching_ngram_size"), 2**12),
    **dict.fromkeys(("max_length", "max_new_tokens"), 2**20),
}

# What a source may say, and what it looks like.
_SOURCE = {
    "name_or_path": re.compile(r"[^\0-\x1f]{1,4096}"),
    "revision": re.compile(r"(?!.*\.\.)[\w./-]{1,200}"),
    "prefix": re.compile(r"([A-Za-z_]\w*\.)*"),
    "digests": re.compile(r"(sha256:)?[0-9a-f]{64}"),
}
# What is said of a part that others made.
_ORIGIN = {
    "part": re.compile(r"[a-z_]{0,40}"),
    "name": re.compile(r"[\w-][\w.-]*/[\w.-]+"),
    "revision": _SOURCE["revision"],
    "license": re.compile(r"[\w .,:/+()-]{1,200}"),
}


def check_sizes(settings: Mapping[str, Any]) -> None:
    """
    Refuses sizes that are no numbers, or such that no model has them.

    Args:
        settings (`Mapping`): of a model, with those of its parts as dicts in it.

    Raises:
        ValueError: naming the setting, its value and the bound.
    """
    _check_vision(settings)
    for path, name, value in _walk(settings):
        if name in _SMALLEST and value is not None:
            fits = isinstance(value, int) and not isinstance(value, bool)
            if not fits or (path.endswith("]") and name not in _SEVERAL):
                raise ValueError(f"`{path}` is {_short(value)}, expected an integer.")
            if value < _SMALLEST[name]:
                raise ValueError(f"`{path}` is {_short(value)}, expected at least {_SMALLEST[name]}.")
        largest = next(most for pattern, most in _LARGEST if pattern.fullmatch(name))
        if isinstance(value, int) and abs(value) > largest:
            raise ValueError(
                f"`{path}` is {_short(value)}, and at most {largest} is built: the configuration is damaged, or made "
                "to eat this machine."
            )
    for path, name, part in _all(settings):
        if name == "depths" and isinstance(part, list | tuple):  # of stages, each within its bound by now
            blocks = sum(each for each in part if isinstance(each, int))
            if blocks > 2**10:
                raise ValueError(f"`{path}` asks for {blocks} blocks in all stages, and at most {2**10} are built.")
        if not isinstance(part, Mapping):
            continue
        layers = _most(part, r".*(layers?|blocks?|depths?)")
        experts = _most(part, r".*experts?")
        if layers * experts > _MOST_PARTS:
            raise ValueError(
                f"`{path or 'the configuration'}` asks for {layers} layers of {experts} experts, and at most "
                f"{_MOST_PARTS} experts are built."
            )
        width, depth = _most(part, "hidden_size|n_embd|d_model|dim"), _most(part, r"(num_hidden|num|n)_layers?")
        inner = _most(part, "intermediate_size|n_inner|ffn_dim|hidden_dim")
        weights = depth * width * (width + inner) + width * _most(part, "vocab_size")
        if weights > MOST_WEIGHTS:
            raise ValueError(
                f"`{path or 'the configuration'}` asks for at least {weights} weights: {depth} layers, `hidden_size` "
                f"{width}, `intermediate_size` {inner}. At most {MOST_WEIGHTS} are built."
            )


def check_file(settings: Mapping[str, Any]) -> None:
    """
    Refuses what a file says beyond settings: that by which Transformers would fetch or run code, or read other files.
    The caller's own arguments are not asked: `from_pretrained(..., attn_implementation=...)` takes what it did.

    Raises:
        ValueError: naming the setting.
    """
    _check_vision(settings)
    kind = _kind(settings, "text_config")
    if kind in CONFIG_MAPPING_NAMES and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"`text_config.model_type` is {kind!r}, which is no causal language model of Transformers.")
    for path, name, value in _all(settings):
        if value is None:
            continue
        if re.fullmatch(r"_?(attn|experts)_implementation(_internal)?", name):
            if not (isinstance(value, str) and re.fullmatch(r"[a-z0-9_]+(\|[a-z0-9_]+)?", value)):
                raise ValueError(
                    f"`{path}` is {value!r:.60}: a file may only name what is built into Transformers, such as "
                    "'sdpa', and kernels of others are never fetched for it. Take it out of the file; if you want "
                    "that kernel, ask for it yourself: from_pretrained(..., attn_implementation=...)."
                )
        elif name in ("dtype", "torch_dtype", "compute_dtype"):
            if not (isinstance(value, str) and _DTYPE.fullmatch(value)) and type(value).__name__ != "dtype":
                raise ValueError(f"`{path}` is {value!r:.60}, expected a precision such as 'float32' or 'bfloat16'.")
        elif name in _NEVER:
            raise ValueError(f"`{path}` has no place in the file of a DeltaVLM: take it out, if you trust the rest.")
        elif name == "quant_method" and not str(value).startswith("bitsandbytes"):
            raise ValueError(
                f"`{path}` is {value!r:.60}: of files, only bitsandbytes' quantisation is taken. Pass any other "
                "yourself: from_pretrained(..., quantization_config=...)."
            )
        elif name == "llm_int8_skip_modules" and not isinstance(value, list):
            check_name(f"`{path}`", value)


def _check_vision(settings: Mapping[str, Any]) -> None:
    kind = _kind(settings, "vision_config")
    if isinstance(kind, str) and kind.startswith("timm"):
        raise ValueError(
            f"`vision_config.model_type` is {kind!r}: models of timm are not taken, for timm needs torchvision and "
            "fetches weights by a name of its own. Use the same architecture of Transformers, such as 'resnet', "
            "'convnext' or 'dinov2'."
        )


def _kind(settings: Mapping[str, Any], part: str) -> Any:
    config = settings.get(part)
    return config.get("model_type") if isinstance(config, Mapping) else None


def check_generation(settings: Mapping[str, Any]) -> None:
    """
    Refuses settings of generation from a file that would keep an answer from ending, or take all memory.

    Raises:
        ValueError: naming the setting, its value and the bound.
    """
    for path, name, value in _walk(settings):
        largest = _OF_GENERATION.get(name, 2**24)
        if isinstance(value, int) and abs(value) > largest:
            raise ValueError(
                f"`{path}` of generation_config.json is {_short(value)}, and at most {largest} is taken from a file: "
                "pass it yourself, from_pretrained(..., generation_config=...)."
            )


def check_name(what: str, name: Any) -> None:
    """Raises `ValueError` unless it is a plain name of a module or weight, as a regular expression quick too."""
    if not isinstance(name, str) or not _PLAIN.fullmatch(name):
        raise ValueError(
            f"{what} is {_short(name)}, expected a plain name: letters, digits, '_' and '.'. What else there is would "
            "be taken for a regular expression, and some of those never end."
        )


def check_sources(sources: Any) -> None:
    """
    Refuses a `config.weight_sources` that is not of the form that `weight_sources.py` describes.

    Raises:
        ValueError: saying what is wrong.
    """
    if not isinstance(sources, list | tuple) or len(sources) > 100:
        raise ValueError(f"`weight_sources` is {sources!r:.60}, expected a list of dicts.")
    for number, source in enumerate(sources):
        where = f"`weight_sources[{number}]`"
        if not isinstance(source, Mapping) or not source.get("name_or_path"):
            raise ValueError(f"{where} is {source!r:.60}, expected a dict with `name_or_path`.")
        for name, value in source.items():
            if name not in _SOURCE:
                raise ValueError(f"{where} has {name!r:.60}, expected no other keys than {', '.join(_SOURCE)}.")
            if name != "digests":
                if value is not None and not (isinstance(value, str) and _SOURCE[name].fullmatch(value)):
                    raise ValueError(f"{where} has {value!r:.60} as its `{name}`.")
                continue
            for file, content in value.items() if isinstance(value, Mapping) else [(value, None)] if value else []:
                if not (is_file_name(file) and isinstance(content, str) and _SOURCE[name].fullmatch(content)):
                    raise ValueError(f"{where} has {file!r:.60}: {content!r:.60} among its `digests`.")


def check_origins(origins: Any) -> None:
    """
    Refuses a `config.made_from` that is not of the form that [`DeltaVLMConfig`] describes.

    Raises:
        ValueError: saying what is wrong.
    """
    if not isinstance(origins, list | tuple) or len(origins) > 100:
        raise ValueError(f"`made_from` is {origins!r:.60}, expected a list of dicts.")
    for number, origin in enumerate(origins):
        for name, value in origin.items() if isinstance(origin, Mapping) else [(origin, None)]:
            if name not in _ORIGIN or not (isinstance(value, str) and _ORIGIN[name].fullmatch(value)):
                raise ValueError(f"`made_from[{number}]` has {name!r:.60}: {value!r:.60}, which cannot be.")


def is_file_name(name: Any) -> bool:
    """Whether it names a file of a folder, on any system, and no other place."""
    return isinstance(name, str) and bool(re.fullmatch(r"[\w@+-][\w@+.-]{0,254}", name))


def _walk(settings: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Path, name and value of each setting, one by one where there is a list of them."""
    for path, name, value in _all(settings):
        if not isinstance(value, Mapping | list | tuple | set):
            yield path, name, value


def _all(value: Any, path: str = "", name: str = "", depth: int = 0) -> Iterator[tuple[str, str, Any]]:
    """A value and all that lies in it, whose name within lists is that of the list."""
    if depth > _DEPTH:
        raise ValueError(f"`{path:.60}...` lies too deep in the configuration.")
    yield path, name, value
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _all(each, f"{path}.{key}".lstrip("."), str(key), depth + 1)
    elif isinstance(value, list | tuple | set):
        for number, each in enumerate(value):
            yield from _all(each, f"{path}[{number}]", name, depth + 1)


def _most(part: Mapping[str, Any], names: str) -> int:
    """The largest number under such a name, at least 1."""
    found = [value for name, value in part.items() if isinstance(value, int) and re.fullmatch(names, str(name))]
    return max([1, *found])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
