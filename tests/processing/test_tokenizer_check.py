"""Tokenizers of a stranger: those that models have are taken, those that would never end are refused, and soon."""

import base64
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

import deltavlm_hf
from deltavlm_hf import DeltaVLMProcessor
from deltavlm_hf.processing.tokenizer_check import check_pattern

ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LETTERS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {  # of models
    "GPT-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "Llama 3": rf"{ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}",
    "Qwen 2": rf"{ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}",
    "GPT-4o": rf"[^\r\n\p{{L}}\p{{N}}]?{LETTERS[0]}*{LETTERS[1]}+{ENGLISH}?|[^\r\n\p{{L}}\p{{N}}]?{LETTERS[0]}+"
    rf"{LETTERS[1]}*{ENGLISH}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}",
    "Kimi": r"[\p{Han}]+|[\p{Lu}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{M}&&[^\p{Han}]]+",
    "DeepSeek": r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+| ?[\p{P}\p{S}]+[\r\n]*|\s+$",
    "Bloom": r" ?[^(\s|[.,!?…。，、।۔،])]+",
    "LLaDA": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]",
    "Cohere": r"\d{1,3}(?=(?:\d{3})*\b)",
    "Laguna": r"(?:\r?\n)+(?!\r?\n)",
    "Falcon": r"[0-9][0-9][0-9]",
    "T5": r" {2,}",
}
ENDLESS = [
    *(r"(a+)+$", r"(a|aa)+$", r"(?:a*)*b", r"(a{1,30}){1,30}$", r"(a?){40}b", r"(?>a+)+", r"(?i:a+)+", r"(?=(a+)+b)"),
    *(
        r".*.*x",
        r"a*a*a*a*$",
        r"a+b+c",
        r".*x.*y",
        r"a+(?!a+b)",
        "a?" * 40 + "a" * 40,
        "(a|a)" * 40,
        r"x{0,99}x{0,99}",
    ),
    *(
        r"(a)\1+$",
        r"(?<x>a)\k<x>+",
        r"(?<x>a\g<x>?)",
        r"(?(1)a|b)",
        r"(?~a)+",
        r"(?#(a+)+)",
        r"a(?x)b",
        r"\X+",
        r"\R+",
    ),
    *(
        r"a{2,}{2,}",
        r"a{1,3}+",
        r"a++b++c++",
        r"((((a{99}){99}){99}){99})",
        r"a{100000}",
        "(" * 40 + ")" * 40,
        "a" * 3000,
    ),
    *("(", "(a))", "[a", r"[]a](a+)+]", r"[^](a+)+]", "*", "a**", "\\", r"\p{L", r"(\s|[^a]x)*y"),
]


@pytest.mark.parametrize("model", PATTERNS)
def test_patterns_of_models(model):
    check_pattern(PATTERNS[model])


@pytest.mark.parametrize("pattern", [*ENDLESS, 3, None], ids=lambda pattern: str(pattern)[:20])
def test_patterns_without_end(pattern):
    with pytest.raises(ValueError, match="has the pattern .* patterns of known models do not"):
        check_pattern(pattern)


def split(pattern: Any) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replaced(text: str, by: str, kind: str = "String") -> dict:
    return {"type": "Replace", "pattern": {kind: text}, "content": by}


def normalizers(*steps: dict) -> dict:
    return {"normalizer": {"type": "Sequence", "normalizers": list(steps)}}


def processing(pieces: int, ids: int = 1) -> dict:
    return {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}] * pieces
            + [{"SpecialToken": {"id": "s", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"s": {"id": "s", "ids": [1] * ids, "tokens": ["<s>"] * ids}},
        }
    }


def padded(**settings: Any) -> dict:
    of_pad = {"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>", "direction": "Left", "pad_to_multiple_of": None}
    return {"padding": {**of_pad, "strategy": "BatchLongest", **settings}}


def added(text: str = "new", number: int = 1) -> dict:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False)
    return {
        "added_tokens": [{"id": 5000 + i, "content": f"{text}{i}", "normalized": True, **flags} for i in range(number)]
    }


def nested(depth: int) -> str:
    return '{"normalizer":' + '{"type":"Sequence","normalizers":[' * depth + "]}" * depth + "}"


CHARSMAP = base64.b64encode((4).to_bytes(4, "little") + bytes(4) + b"a" * 2000).decode()
HOSTILE: dict[str, tuple[str, Any]] = {
    "pattern to split by": ("tokenizer.json", {"pre_tokenizer": split("(a+)+$")}),
    "pattern to replace": ("tokenizer.json", normalizers(replaced("(a|aa)+$", "b", "Regex"))),
    "pattern to decode by": ("tokenizer.json", {"decoder": replaced("(a|aa)+$", "b", "Regex")}),
    "pattern, and a text for it": (
        "tokenizer.json",
        {**normalizers(replaced(".*.*x", "b", "Regex")), **added("a" * 999)},
    ),
    "pattern that is none": ("tokenizer.json", {"pre_tokenizer": split(r"\p{Nothing}+")}),
    "texts that double": ("tokenizer.json", normalizers(*[replaced("a", "aa")] * 30)),
    "bytes that double": ("tokenizer.json", normalizers(*[{"type": "ByteLevel"}] * 30)),
    "long replacement": ("tokenizer.json", normalizers(replaced("a", "b" * 10**6))),
    "replaced nothing": ("tokenizer.json", normalizers(replaced("", "b"))),
    "long prefix": ("tokenizer.json", normalizers({"type": "Prepend", "prepend": "b" * 10**6})),
    "long texts for characters": (
        "tokenizer.json",
        normalizers({"type": "Precompiled", "precompiled_charsmap": CHARSMAP}),
    ),
    "map that panics": ("tokenizer.json", normalizers({"type": "Precompiled", "precompiled_charsmap": "!"})),
    "many steps": ("tokenizer.json", normalizers(*[{"type": "NFC"}] * 1000)),
    "steps in steps": ("tokenizer.json", nested(5000)),
    "pieces without length": ("tokenizer.json", {"pre_tokenizer": {"type": "FixedLength", "length": 0}}),
    "text many times": ("tokenizer.json", processing(2000)),
    "token many times": ("tokenizer.json", processing(1, 2000)),
    "wide padding": ("tokenizer.json", padded(strategy={"Fixed": 10**9})),
    "padding to a multiple": ("tokenizer.json", padded(pad_to_multiple_of=10**9)),
    "many tokens": ("tokenizer.json", added(number=60_000)),
    "long token": ("tokenizer.json", added("a" * 10**6)),
    "strips more than there is": (
        "tokenizer.json",
        {"decoder": {"type": "Strip", "content": "a", "start": 0, "stop": 9**9}},
    ),
    "model": ("tokenizer.json", {"model": None}),
    "long words": (
        "tokenizer.json",
        {"model": {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a", "max_input_chars_per_word": 10**12}},
    ),
    "long word": (
        "tokenizer.json",
        {"model": {"type": "WordLevel", "vocab": {"a": 0, "b" * 10**6: 1}, "unk_token": "a"}},
    ),
    "long joint": (
        "tokenizer.json",
        {"model": {"type": "BPE", "vocab": {}, "continuing_subword_prefix": "a" * 10**6}},
    ),
    "other files": ("tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.0.0.1.json"]}),
    "many special tokens": ("tokenizer_config.json", {"extra_special_tokens": [f"x{i}" for i in range(10**5)]}),
    "long special token": ("tokenizer_config.json", {"pad_token": "x" * 10**6}),
    "many tokens elsewhere": (
        "tokenizer_config.json",
        {"added_tokens_decoder": {str(i): {"content": f"x{i}"} for i in range(60_000)}},
    ),
    "many tokens in an old file": ("added_tokens.json", {f"x{i}": i for i in range(60_000)}),
    "many names in an old file": (
        "special_tokens_map.json",
        {"extra_special_tokens": [f"x{i}" for i in range(10**5)]},
    ),
}


@pytest.mark.parametrize("subfolder", ["", "qformer_tokenizer"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_what_no_tokenizer_needs(kind, subfolder, tmp_path):
    folder = Path(shutil.copytree(deltavlm_hf.tiny(), tmp_path / "model"))
    name, change = HOSTILE[kind]
    file = folder / subfolder / name
    settings = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(change if isinstance(change, str) else json.dumps({**settings, **change}))
    started = time.monotonic()
    with pytest.raises(ValueError, match=f"{folder} cannot be loaded as a DeltaVLMProcessor"):
        DeltaVLMProcessor.from_pretrained(folder)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    "settings",
    [
        {"model_max_length": 10**12, "padding": "max_length"},
        {"padding": "max_length", "max_length": 10**12},
        {"padding": True, "pad_to_multiple_of": 10**12},
    ],
    ids=str,
)
def test_padding_without_end(settings, tmp_path):
    folder = Path(shutil.copytree(deltavlm_hf.tiny(), tmp_path / "model"))
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    with pytest.raises(ValueError, match="Padding to 1000000000000 tokens is asked for"):
        DeltaVLMProcessor.from_pretrained(folder)
    processor = DeltaVLMProcessor.from_pretrained(deltavlm_hf.tiny())
    with pytest.raises(ValueError, match="Padding to 1000000000000 tokens is asked for"):
        processor(text="What?", **{"padding": True, "max_length": 10**12, **settings} | {"model_max_length": None})


def test_a_text_that_breaks_the_tokenizer(tmp_path):
    """A map of characters whose trie points to where nothing is."""
    folder = Path(shutil.copytree(deltavlm_hf.tiny(), tmp_path / "model"))
    charsmap = base64.b64encode((4).to_bytes(4, "little") + bytes(4) + b"a\0b").decode()
    file = folder / "tokenizer.json"
    change = normalizers({"type": "Precompiled", "precompiled_charsmap": charsmap})
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    processor = DeltaVLMProcessor.from_pretrained(folder)
    with pytest.raises(ValueError, match="The tokenizer cannot read this text"):
        processor(text="What?")


def test_a_folder_without_tokenizer_json(tmp_path):
    """Whatever else transformers could make a tokenizer of has not been looked at."""
    folder = Path(shutil.copytree(deltavlm_hf.tiny(), tmp_path / "model"))
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(OSError, match=f"{folder} has no tokenizer.json"):
        DeltaVLMProcessor.from_pretrained(folder)
