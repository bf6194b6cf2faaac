"""
BLEU, METEOR, ROUGE-L and CIDEr of captions and free answers, through pycocoevalcap, under three named protocols.

The protocol decides what counts as a word, and moves the scores by points: compare only what used the same.
"""

import logging
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

from transformers import GPT2Tokenizer, PreTrainedTokenizerBase

from ..extras import missing

try:
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS, PTBTokenizer
except ImportError as error:
    raise missing("Caption scores need more packages", "eval") from error

logger = logging.getLogger(__name__)

PROTOCOLS = ("coco", "gpt2-ids", "levir-words")
SCORES = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")
GPT2 = "openai-community/gpt2"

_UNKNOWN = 0  # the id of rare words, where the vocabulary has none for them


@dataclass(frozen=True)
class CaptionScores:
    """
    Scores of a set of captions.

    Attributes:
        overall (`dict[str, float | None]`): by the names in [`SCORES`], as fractions (CIDEr up to 10). METEOR is None
            where there is no Java.
        each (`dict[str, list[float]]`): of single captions. Only ROUGE-L and CIDEr are the means of theirs:
            BLEU and METEOR add up matches over the set first.
        bleu (`list[tuple[int, ...]]`): what each caption adds to BLEU-4: n-grams of 1 to 4 words that are right, all
            of them, and how many words it has and should have.
    """

    overall: dict[str, float | None]
    each: dict[str, list[float]]
    bleu: list[tuple[int, ...]]


class Protocol:
    """
    How texts become the words that are scored.

    - `coco` (the default of the field): words as the Penn Treebank tokenizer splits them, in lower case, without
      punctuation. It needs Java; without, a plain split stands in, with a warning.
    - `gpt2-ids` (the authors' benchmark script): GPT-2 token ids, written in digits.
    - `levir-words` (the authors' notebook, and LEVIR-CC's own evaluation): ids of the words between spaces, written in
      digits; words rarer than 5 in the training captions have one id.

    Digits are words of their own to METEOR: synonyms and stems, which it credits under `coco`, do not count under the
    other two. It still takes some short numbers for one another, so that under `levir-words` METEOR, and nothing else,
    moves by tenths of a point with the numbering of the vocabulary. Those two take full stops away as the authors do,
    and nothing else: case counts, and for `gpt2-ids` so does a space that stood before a prediction's full stop.

    Args:
        name (`str`, *optional*, defaults to `"coco"`): one of [`PROTOCOLS`].
        tokenizer (`str` or `PreTrainedTokenizerBase`, *optional*): for `gpt2-ids`: GPT-2's, by default from the Hub.
        vocabulary (`Mapping[str, int]`, *optional*): for `levir-words`, see [`make_vocabulary`]; or a word map that
            LEVIR-CC's own tools wrote, whose `<unk>` is then the id of rare words.

    Raises:
        ValueError: for an unknown name, or `levir-words` without a vocabulary.
    """

    def __init__(
        self,
        name: str = "coco",
        *,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        vocabulary: Mapping[str, int] | None = None,
    ):
        if name not in PROTOCOLS:
            raise ValueError(f"Unknown protocol {name!r}, expected one of {', '.join(PROTOCOLS)}.")
        if name == "levir-words" and vocabulary is None:
            raise ValueError(
                "The protocol levir-words needs the vocabulary of the training captions: pass "
                "vocabulary=make_vocabulary(captions)."
            )
        self.name = name
        self.vocabulary = vocabulary or {}
        self.unknown = self.vocabulary.get("<unk>", _UNKNOWN)
        if name == "gpt2-ids" and not isinstance(tokenizer, PreTrainedTokenizerBase):
            tokenizer = GPT2Tokenizer.from_pretrained(tokenizer or GPT2)
        self.tokenizer: Any = tokenizer

    def encode(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[list, list]:
        """Both as texts whose words are between spaces."""
        if self.name == "coco":
            return _in_one_call(_split_as_treebank, predictions, references)
        # As the authors clean them: full stops out of predictions, only a final one out of references.
        predictions = [text.replace(".", "") for text in predictions]
        references = [[text.replace(" .", "").strip() for text in texts] for texts in references]
        return _in_one_call(self._to_ids, predictions, references)

    def _to_ids(self, texts: list[str]) -> list[str]:
        if self.name == "gpt2-ids":
            encoded = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        else:
            encoded = [[self.vocabulary.get(word, self.unknown) for word in text.split()] for text in texts]
        return [" ".join(map(str, ids)) for ids in encoded]


def make_vocabulary(captions: Iterable[str], min_count: int = 5) -> dict[str, int]:
    """
    The words of training captions that are not rare, with an id each: 1, 2, ... in order of their first coming.

    Args:
        captions (`Iterable[str]`): all captions of the training split.
        min_count (`int`, *optional*, defaults to 5): how often a word must come.
    """
    counts = Counter(word for caption in captions for word in caption.split())
    words = (word for word, count in counts.items() if count >= min_count)
    return {word: number for number, word in enumerate(words, start=_UNKNOWN + 1)}


def score_captions(
    predictions: Sequence[str], references: Sequence[Sequence[str]], protocol: Protocol | None = None
) -> CaptionScores:
    """
    Scores captions against their references.

    CIDEr weighs words by how few pairs have them: where all pairs have the same references, as unchanged ones do in
    LEVIR-CC, every weight is 0 and so is CIDEr, whatever was answered.

    Args:
        predictions (`Sequence[str]`): a caption for each pair.
        references (`Sequence[Sequence[str]]`): at least one for each pair.
        protocol ([`Protocol`], *optional*): defaults to `coco`.

    Raises:
        ValueError: if the two differ in length or are empty, or a pair has no reference.
    """
    return score_by_change(predictions, references, None, protocol)["all"]


def score_by_change(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    changed: Sequence[bool | None] | None,
    protocol: Protocol | None = None,
) -> dict[str, CaptionScores]:
    """
    Scores all captions, those of changed pairs, and those of unchanged pairs, each as a set of its own.

    Args:
        predictions (`Sequence[str]`): a caption for each pair.
        references (`Sequence[Sequence[str]]`): at least one for each pair.
        changed (`Sequence[bool | None]`, *optional*): whether each pair changed; None: neither subset has it.
        protocol ([`Protocol`], *optional*): defaults to `coco`.

    Returns:
        `dict[str, CaptionScores]`: `all`, and `changed` and `unchanged` where there are such pairs.

    Raises:
        ValueError: if lengths differ, there is nothing to score, or a pair has no reference.
    """
    if len(predictions) != len(references) or not predictions:
        raise ValueError(
            f"Expected as many captions as pairs, at least one; got {len(predictions)} and {len(references)}."
        )
    for index, texts in enumerate(references):
        if isinstance(texts, str) or not texts:
            raise ValueError(f"Pair {index} must have a list of at least one reference, got {texts!r}.")
    if changed is not None and len(changed) != len(predictions):
        raise ValueError(f"Expected a flag in `changed` for each of {len(predictions)} pairs, got {len(changed)}.")
    encoded = (protocol or Protocol()).encode([_in_one_line(text) for text in predictions], references)
    everything = range(len(predictions))
    subsets: dict[str, Sequence[int]] = {"all": everything}
    if changed is not None:
        for name, flag in (("changed", True), ("unchanged", False)):
            subsets[name] = [i for i in everything if changed[i] is not None and bool(changed[i]) is flag]
    return {
        name: _score([encoded[0][index] for index in indices], [encoded[1][index] for index in indices])
        for name, indices in subsets.items()
        if indices
    }


@cache
def _meteor(process: int) -> Meteor:
    """
    One Java process for all calls, which ends with this one: starting it takes seconds. A forked process needs
    another, since two that read from one pipe take each other's lines.
    """
    return Meteor()


def _score_meteor(targets: dict, candidates: dict) -> tuple[float, list[float]]:
    """Starts Java anew, once, if it has died."""
    meteor = _meteor(os.getpid())
    try:
        return meteor.compute_score(targets, candidates)
    except BaseException as error:
        meteor.meteor_p.kill()
        with suppress(OSError):
            meteor.meteor_p.stdin.close()
        if meteor.lock.locked():  # pycocoevalcap keeps it when it fails, and would wait for it for ever, at exit too
            meteor.lock.release()
        _meteor.cache_clear()
        if not isinstance(error, (OSError, ValueError)):  # those are a broken pipe, or no more lines
            raise
    return _meteor(os.getpid()).compute_score(targets, candidates)


def _score(predictions: list[str], references: list[list[str]]) -> CaptionScores:
    candidates = {index: [text] for index, text in enumerate(predictions)}
    targets = dict(enumerate(references))
    scorer = BleuScorer(n=4)
    for said, wanted in zip(predictions, references, strict=True):
        scorer += (said, wanted)
    bleu, each_bleu = scorer.compute_score(option="closest", verbose=0)
    rouge, each_rouge = Rouge().compute_score(targets, candidates)
    if any(text for texts in references for text in texts):
        cider, each_cider = Cider().compute_score(targets, candidates)
    else:  # no word to weigh
        cider, each_cider = 0.0, [0.0] * len(predictions)
    overall = {**dict(zip(SCORES, map(float, bleu), strict=False)), "METEOR": None}
    overall |= {"ROUGE-L": float(rouge), "CIDEr": float(cider)}
    each = {name: list(map(float, values)) for name, values in zip(SCORES, each_bleu, strict=False)}
    each |= {"ROUGE-L": list(map(float, each_rouge)), "CIDEr": list(map(float, each_cider))}
    if has_java("METEOR is left out"):
        overall["METEOR"], each["METEOR"] = _score_meteor(targets, candidates)
    counts = [_counts(found) for found in scorer.ctest]
    return CaptionScores({name: overall[name] for name in SCORES}, each, counts)


def _counts(found: dict[str, Any]) -> tuple[int, ...]:
    said = found["testlen"]
    wanted = min((abs(length - said), length) for length in found["reflen"])[1]
    return (*found["correct"], *found["guess"], said, wanted)


def has_java(consequence: str) -> bool:
    """Whether Java is there and starts; if not, says what follows."""
    problem = _java_problem()
    if problem:
        logger.warning("%s: %s", consequence, problem)
    return problem is None


@cache
def _java_problem() -> str | None:
    if shutil.which("java") is None:
        return "Java is not installed (any runtime from 8 on will do)."
    # With the memory that METEOR asks for. Where that cannot be had, pycocoevalcap fails with a lock held, and hangs.
    command = ["java", "-Xmx2G", "-version"]
    done = subprocess.run(command, capture_output=True, text=True)
    return f"`{' '.join(command)}` fails: {done.stderr.strip()}" if done.returncode else None


def _in_one_line(text: str) -> str:
    return " ".join(text.split())


def _in_one_call(
    encode: Callable[[list[str]], list[str]], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """Encodes everything at once, since starting a tokenizer takes its time."""
    flat = iter(encode([*predictions, *(_in_one_line(text) for texts in references for text in texts)]))
    return [next(flat) for _ in predictions], [[next(flat) for _ in texts] for texts in references]


def _split_as_treebank(texts: list[str]) -> list[str]:
    if not has_java("Captions are split at white space and punctuation, not by the Penn Treebank tokenizer"):
        words = (re.findall(r"[\w'-]+", text.lower()) for text in texts)
        return [" ".join(word for word in found if word not in PUNCTUATIONS) for found in words]
    # A lone full stop, which is taken away again, keeps the place of an empty text.
    captions = {index: [{"caption": text or "."}] for index, text in enumerate(texts)}
    return [split for (split,) in PTBTokenizer().tokenize(captions).values()]
