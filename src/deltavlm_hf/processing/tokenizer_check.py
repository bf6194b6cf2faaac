"""
What a tokenizer's files may ask for, looked at before they are loaded: its patterns run on an engine that backtracks,
and its steps may make a text many times as long as it was.
"""

import base64
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

MAX_FILE = 256 << 20  # bytes; the largest of known models have 35 MB
MAX_ADDED = 50_000  # tokens; a model of images as words adds 33,000
MAX_SETTINGS = 500  # entries
MAX_TOKEN = 10_000  # characters
MAX_NAME = 1_000  # characters of what is put before, after or in place of something
MAX_WORD = 10_000  # characters of a word that WordPiece takes apart, in time that grows with their square
MAX_PADDING = 1 << 20  # tokens
MAX_STEPS = 32  # of a pipeline
MAX_GROWTH = 1_000  # times that a text may grow in one
MAX_PATTERN = 2_000  # characters
MAX_REPEATS = 1_000
MAX_CHOICES = 64
MAX_GROUPS = 20  # one in another

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_PIPELINES = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_SEQUENCES = ("normalizers", "pretokenizers", "processors", "decoders")
# Repeats what is itself of two lengths, which no other pattern of known models does.
_KNOWN = (r"(?:\r?\n)+(?!\r?\n)",)


def check_tokenizer(files: dict[str, str | os.PathLike]) -> None:
    """
    Looks at the files of a tokenizer, [`FILES`], of which the first has to be there.

    Raises:
        ValueError: if they are none, or ask for what no tokenizer needs.
    """
    contents = {name: _read(name, path) for name, path in files.items()}
    for name, content in contents.items():
        for key in ("added_tokens", "added_tokens_decoder"):
            _check_texts(content.pop(key, None), MAX_ADDED, f"`{key}` of {name}")
    tokenizer = contents.pop("tokenizer.json")
    _check_texts(contents.pop("added_tokens.json", None), MAX_ADDED, "added_tokens.json")
    for name, settings in contents.items():
        settings.pop("chat_template", None)  # looked at where it is used
        _check_texts(settings, MAX_SETTINGS, name)
        if settings.get("fast_tokenizer_files"):
            raise ValueError(f"{name} names other files (`fast_tokenizer_files`); only tokenizer.json is read")
    for name in _PIPELINES:
        _check_pipeline(name, tokenizer.get(name))
    for value in _leaves(tokenizer.get("padding")):
        if isinstance(value, (int, float)) and abs(value) > MAX_PADDING:
            raise ValueError(f"tokenizer.json pads to {value} tokens, at most {MAX_PADDING} are allowed")
    _check_model(tokenizer.get("model"))


def _read(name: str, path: str | os.PathLike) -> dict:
    size = os.path.getsize(path)
    if size > MAX_FILE:
        raise ValueError(f"{name} has {size} bytes, at most {MAX_FILE} are taken")
    with open(path, encoding="utf-8") as file:
        content = json.load(file)
    if not isinstance(content, dict):
        raise ValueError(f"{name} must be a JSON object, got {type(content).__name__}")
    return content


def _check_texts(value: Any, most: int, where: str) -> None:
    if isinstance(value, (list, dict)) and len(value) > most:
        raise ValueError(f"{where} has {len(value)} entries, at most {most} are taken")
    for count, leaf in enumerate(_leaves(value)):
        if count == 10 * most:
            raise ValueError(f"{where} has more than {10 * most} values")
        if isinstance(leaf, str) and len(leaf) > MAX_NAME:
            raise ValueError(
                f"{where} has a text of {len(leaf)} characters ({leaf[:20]!r}...), at most {MAX_NAME} are taken"
            )


def _leaves(value: Any) -> Iterator:
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        yield value
        return
    for part in value:
        yield from _leaves(part)


def _check_model(model: Any) -> None:
    if not isinstance(model, dict):
        raise ValueError("tokenizer.json has no `model`")
    settings = {name: value for name, value in model.items() if name not in ("vocab", "merges")}
    _check_texts(settings, MAX_SETTINGS, "`model` of tokenizer.json")
    word = settings.get("max_input_chars_per_word") or 0
    if word > MAX_WORD:
        raise ValueError(f"`max_input_chars_per_word` is {word}, at most {MAX_WORD} are taken")
    tokens = model.get("vocab") or ()
    names = (token if isinstance(token, str) else token[0] for token in tokens)
    if max(map(len, names), default=0) > MAX_TOKEN:
        raise ValueError(f"`vocab` of tokenizer.json has a token of more than {MAX_TOKEN} characters")


def _check_pipeline(name: str, pipeline: Any) -> None:
    growth = 1.0
    for count, step in enumerate(_steps(pipeline)):
        if count == MAX_STEPS:
            raise ValueError(f"`{name}` of tokenizer.json has more than {MAX_STEPS} steps")
        kind = step.get("type")
        texts = {key: value for key, value in step.items() if key not in ("precompiled_charsmap", "pattern")}
        _check_texts(texts, MAX_SETTINGS, f"`{name}` of tokenizer.json")
        pattern = step.get("pattern") or {}
        expression = pattern.get("Regex") if isinstance(pattern, dict) else None
        if expression is not None:
            check_pattern(expression)
        if kind == "Replace" and expression is not None:
            growth *= 1 + len(step["content"])
        elif kind == "Replace":
            if not pattern["String"]:
                raise ValueError(f"`{name}` of tokenizer.json replaces texts without characters")
            growth *= max(1, len(step["content"]) / len(pattern["String"]))
        elif kind == "ByteLevel":
            growth *= 2
        elif kind == "Precompiled":
            growth *= _longest(step["precompiled_charsmap"])
        elif kind == "FixedLength" and not step.get("length"):
            raise ValueError(f"`{name}` of tokenizer.json cuts pieces without length")
        elif kind == "Strip" and max(step.get("start", 0), step.get("stop", 0)) > 1:
            raise ValueError(f"`{name}` of tokenizer.json strips several characters of each token")
        elif kind == "TemplateProcessing":
            growth *= max(len(step["single"]), len(step["pair"]))
            growth *= max((len(token["ids"]) for token in step["special_tokens"].values()), default=1)
        if growth > MAX_GROWTH:
            raise ValueError(f"`{name}` of tokenizer.json makes texts more than {MAX_GROWTH} times as long")


def _steps(step: Any) -> Iterator[dict]:
    if step is None:
        return
    if not isinstance(step, dict):
        raise ValueError(f"tokenizer.json has {step!r:.40} where a step is expected")
    parts = [part for name in _SEQUENCES for part in step.get(name) or ()]
    if step.get("type") != "Sequence" and not parts:
        yield step
    for part in parts:
        yield from _steps(part)


def _longest(charsmap: str) -> int:
    """The longest text that a character becomes by a map as SentencePiece makes them: a trie, then texts."""
    content = base64.b64decode(charsmap or "")
    texts = content[4 + int.from_bytes(content[:4], "little") :]
    return max(map(len, texts.split(b"\0"))) or 1


@dataclass(frozen=True)
class _Part:
    """How a part of a pattern can be matched, and so how often the engine may come back to it."""

    loops: int = 0  # without bound
    choices: int = 1  # ways to match, loops aside
    must: bool = False  # something has to match
    tail: bool = False  # something has to match after the last loop
    length: int = 0  # characters that are looked at, loops aside

    def then(self, other: "_Part") -> "_Part":
        return _Part(
            self.loops + other.loops,
            self.choices * other.choices,
            self.must or other.must,
            other.tail if other.loops else self.tail or (self.loops > 0 and other.must),
            self.length + other.length,
        )

    def otherwise(self, other: "_Part") -> "_Part":
        return _Part(
            max(self.loops, other.loops),
            self.choices + other.choices,
            self.must or other.must,
            self.tail or other.tail,
            self.length + other.length,
        )


_CHARACTER = _Part(must=True, length=1)
_ESCAPE = re.compile(r"\\(?:[pP]\{\^?[\w =-]{1,40}\}|x\{[0-9a-fA-F]{1,8}\}|x[0-9a-fA-F]{1,2}|u[0-9a-fA-F]{4}|"
                     r"[dDwWsShHbBAzZGnrtfvae0]|[^\w])", re.DOTALL)  # fmt: skip
_GROUP = re.compile(r"\((?:\?(?:[:=!>]|<[=!]|<[A-Za-z_]\w*>|[ims]*(?:-[ims]+)?:))?(?![?*+])")
_QUANTIFIER = re.compile(r"(?:[*+?]|\{(\d{1,6})?(,)?(\d{1,6})?\})")


def check_pattern(pattern: Any) -> None:
    """
    Whether an expression takes time that grows at most with the square of a text. In each of its alternatives there
    may be one loop, or a second one behind which nothing has to match; no loop in a loop, and nothing in one that can
    match in several ways; no references.

    Raises:
        ValueError: with the expression and what is wrong with it.
    """
    try:
        if not isinstance(pattern, str) or len(pattern) > MAX_PATTERN:
            raise ValueError(f"expected a text of at most {MAX_PATTERN} characters")
        if pattern in _KNOWN:
            return
        start = re.match(r"\(\?[ims]+\)", pattern)
        end = _alternatives(pattern, start.end() if start else 0, 0)[1]
        if end != len(pattern):
            raise ValueError(f"a bracket too many at {end}")
    except ValueError as error:
        raise ValueError(
            f"tokenizer.json has the pattern {pattern!r:.80}, which may take for ever ({error}); patterns of known "
            "models do not"
        ) from error


def _alternatives(pattern: str, at: int, depth: int) -> tuple[_Part, int]:
    if depth > MAX_GROUPS:
        raise ValueError(f"more than {MAX_GROUPS} groups in each other")
    whole: _Part | None = None
    while True:
        part, at = _sequence(pattern, at, depth)
        whole = part if whole is None else whole.otherwise(part)
        if pattern[at : at + 1] != "|":
            return whole, at
        at += 1


def _sequence(pattern: str, at: int, depth: int) -> tuple[_Part, int]:
    whole = _Part()
    while at < len(pattern) and pattern[at] not in "|)":
        part, at = _atom(pattern, at, depth)
        quantifier = _QUANTIFIER.match(pattern, at)
        if quantifier and quantifier[0] not in ("{}", "{,}"):
            at = quantifier.end()
            part = _repeated(part, quantifier)
            if pattern[at : at + 1] == "?" or (pattern[at : at + 1] == "+" and quantifier[0][0] != "{"):
                at += 1  # lazy, or possessive
                part = replace(part, choices=part.choices + (quantifier[0][0] == "{"))
            if again := _QUANTIFIER.match(pattern, at):
                raise ValueError(f"a repeat of a repeat, {again[0]!r} at {at}")
        whole = whole.then(part)
        if whole.loops > 2 or (whole.loops == 2 and whole.tail):
            raise ValueError(f"several loops after one another, up to {at}")
        if whole.choices > MAX_CHOICES or whole.length > MAX_REPEATS:
            raise ValueError(f"more than {MAX_CHOICES} choices or {MAX_REPEATS} characters in all, up to {at}")
    return whole, at


def _atom(pattern: str, at: int, depth: int) -> tuple[_Part, int]:
    character = pattern[at]
    if character in "*+?":
        raise ValueError(f"nothing to repeat at {at}")
    if character == "\\":
        escape = _ESCAPE.match(pattern, at)
        if escape is None:
            raise ValueError(f"{pattern[at : at + 2]!r} at {at}, which is not taken")
        return _CHARACTER, escape.end()
    if character == "[":
        return _CHARACTER, _class_end(pattern, at)
    if character != "(":
        return _CHARACTER, at + 1
    group = _GROUP.match(pattern, at)
    if group is None:
        raise ValueError(f"{pattern[at : at + 4]!r} at {at}, which is not taken")
    part, end = _alternatives(pattern, group.end(), depth + 1)
    if pattern[end : end + 1] != ")":
        raise ValueError(f"a bracket that is not closed, at {at}")
    if group[0][2:] in ("=", "!", "<=", "<!"):  # may fail, whatever is in it
        part = replace(part, must=True, tail=part.loops > 0)
    return part, end + 1


def _class_end(pattern: str, at: int) -> int:
    """Behind a class of characters, which may hold others."""
    start, depth = at, 0
    while at < len(pattern):
        if pattern[at] == "[":
            depth += 1
            if pattern[at + 1 : at + 2] == "]" or pattern[at + 1 : at + 3] == "^]":
                raise ValueError(f"a class that begins with ']', at {at}")
        elif pattern[at] == "]":
            depth -= 1
        elif pattern[at] == "\\":
            at += 1
        at += 1
        if depth == 0:
            return at
    raise ValueError(f"a class that is not closed, at {start}")


def _repeated(part: _Part, quantifier: re.Match) -> _Part:
    if quantifier[0] in "*+?":
        least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[quantifier[0]]
    else:
        least = int(quantifier[1] or 0)
        most = int(quantifier[3]) if quantifier[3] else None if quantifier[2] else least
    if most == 1:
        optional = least == 0
        return replace(part, choices=part.choices + optional, must=part.must and not optional)
    if part.loops or part.choices > 1:
        raise ValueError(f"{quantifier[0]!r} at {quantifier.start()} repeats what can match in several ways")
    if most is None:
        return _Part(loops=1, must=least > 0, length=part.length * max(1, least))
    return _Part(choices=max(1, most - least + 1), must=least > 0 and part.must, length=part.length * most)
