"""Questions to a model: a batch of them, or the same ones about many pairs."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from transformers import BatchFeature
from transformers.image_utils import ImageInput

from ..modeling import DeltaVLMForConditionalGeneration
from ..processing import DeltaVLMImageProcessor, DeltaVLMProcessor
from ..processing.conversation import Turn
from .remote import RemoteLanguageModel, UnreachableError, generate_remotely

_OUTPUTS = ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states")
PAIRS_AT_ONCE = 8  # these keep an accelerator busy; more outgrow the caches of a CPU


def answer(
    model: DeltaVLMForConditionalGeneration,
    processor: DeltaVLMProcessor,
    questions: Sequence[str],
    histories: Sequence[Sequence[Turn] | None] | None = None,
    images: ImageInput | None = None,
    **generate_kwargs,
) -> list[str]:
    """
    Answers a batch of questions, in the form that models are trained on: `q: <question>`.

    Args:
        model ([`DeltaVLMForConditionalGeneration`]): on any device.
        processor ([`DeltaVLMProcessor`]): the model's.
        questions (`Sequence[str]`): the questions.
        histories (*optional*): the earlier turns for each question, by default none, see
            [`~DeltaVLMProcessor.__call__`]. With None in place of its turns, a question is put as it stands.
        images (*optional*): a pair for each question, or one for all, in place of `pair_features=`.
        generate_kwargs: for `generate`, beside the model's own defaults. Each question has one answer, as text:
            `num_return_sequences`, `return_dict_in_generate` and `output_...` belong to `generate` itself.

    Returns:
        `list[str]`: the answers, stripped of white space and special tokens.

    Raises:
        ValueError: if `questions` is a string, or for an option of `generate` that has no place here.
    """
    answers = generate_ids(model, processor, questions, histories, images, **generate_kwargs)
    return [text.strip() for text in processor.batch_decode(answers, skip_special_tokens=True)]


def generate_ids(
    model: DeltaVLMForConditionalGeneration,
    processor: DeltaVLMProcessor,
    questions: Sequence[str],
    histories: Sequence[Sequence[Turn] | None] | None = None,
    images: ImageInput | None = None,
    **generate_kwargs,
) -> torch.Tensor:
    """The answers of [`answer`] as token ids `(B, L)`, padded on the right."""
    questions = _as_questions(questions)
    check_options(model, generate_kwargs)
    if len(questions) > 1 and generate_kwargs.get("streamer") is not None:
        raise ValueError(f"A `streamer` follows one answer, got {len(questions)} questions: ask them one by one.")
    if isinstance(model.language_model, RemoteLanguageModel):
        features = generate_kwargs.pop("pair_features", None)
        prompts = embed_questions(model, processor, questions, histories, images, pair_features=features)
        return generate_remotely(model, prompts, generate_kwargs)
    inputs = _prepare(model, processor, questions, histories, images)
    with torch.inference_mode():
        outputs = model.generate(**inputs, **generate_kwargs)
    ids = outputs if isinstance(outputs, torch.Tensor) else outputs.sequences  # as the model's own defaults say
    return ids[:, inputs["input_ids"].shape[1] :]


def _prepare(model, processor, questions, histories, images) -> BatchFeature:
    histories = [[] for _ in questions] if histories is None else histories
    inputs = processor(images=images, text=questions, history=histories, padding=True, return_tensors="pt")
    return inputs.to(model.device, model.dtype)


def embed_questions(
    model: DeltaVLMForConditionalGeneration,
    processor: DeltaVLMProcessor,
    questions: Sequence[str],
    histories: Sequence[Sequence[Turn] | None] | None = None,
    images: ImageInput | None = None,
    pair_features: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """What the language model reads of each question of [`answer`]: `(L, d_llm)`, change tokens in it, no padding."""
    inputs = _prepare(model, processor, questions, histories, images)
    with torch.inference_mode():
        prompts = model.embed_prompt(**inputs, pair_features=pair_features)
    return [prompt[mask.bool()] for prompt, mask in zip(prompts, inputs["attention_mask"], strict=True)]


def _as_questions(questions: Sequence[str]) -> list[str]:
    if isinstance(questions, str):
        raise ValueError(f"Give a list of questions, got the string {questions!r:.60}.")
    return list(questions)


def check_options(model: DeltaVLMForConditionalGeneration, options: dict[str, Any]) -> None:
    """Refuses what `generate` would do beside or instead of one answer, as text, to each question."""
    given = options.get("generation_config")

    def option(name: str) -> Any:
        return options[name] if name in options else getattr(given or model.generation_config, name, None)

    if (option("num_return_sequences") or 1) > 1:
        raise ValueError(
            f"`num_return_sequences={option('num_return_sequences')}`: here each question has one answer. Ask several "
            "times, or call `model.generate`."
        )
    for name in _OUTPUTS:
        if options.get(name) or getattr(given, name, None):
            raise ValueError(f"`{name}`: here answers are text alone. Call `model.generate` for what is beside them.")
    if options.get("max_length") is not None:
        raise ValueError(
            "`max_length` would count the prompt with its placeholders: say `max_new_tokens`, the length of an answer."
        )
    if (option("guidance_scale") or 1) != 1 and (option("num_beams") or 1) > 1:
        raise ValueError(
            f"`guidance_scale` with {option('num_beams')} beams: Transformers loses track of which beam it guides. "
            "Take num_beams=1."
        )


def ask_pairs(
    model: DeltaVLMForConditionalGeneration,
    processor: DeltaVLMProcessor,
    pairs: Iterable[Sequence[ImageInput] | ImageInput],
    questions: Sequence[str],
    *,
    batch_size: int = 32,
    on_error: Literal["raise", "yield"] = "raise",
    **generate_kwargs,
) -> Iterator[list[str] | Exception]:
    """
    Asks the same questions of many pairs, each by itself. Every pair is encoded once, both dates in one call.

    Args:
        model ([`DeltaVLMForConditionalGeneration`]): on any device.
        processor ([`DeltaVLMProcessor`]): the model's.
        pairs (`Iterable`): image pairs, before and after, of all that [`DeltaVLMImageProcessor`] takes as one pair:
            two images, or an array or tensor `(2, ...)` of both. They may be made as they are fetched; an array
            `(P, 2, ...)` is such an iterable.
        questions (`Sequence[str]`): the questions.
        batch_size (`int`, *optional*, defaults to 32): pairs fetched at once, and questions answered at once.
        on_error (`str`, *optional*, defaults to `"raise"`): what becomes of a pair that cannot be used or answered:
            its error is raised, after the answers to the pairs before it; or, with `"yield"`, stands in the place of
            its answers, and the others have theirs. An error of `pairs` itself, where the next one is fetched, is
            always raised.
        generate_kwargs: for `generate`, beside the model's own defaults, see [`answer`].

    Yields:
        `list[str]`: for each pair, in order, the answers in the order of the questions; with `on_error="yield"`, or an
        `Exception`.

    Raises:
        ValueError: at once, if an argument cannot be; later if an image cannot be used, see
            [`DeltaVLMImageProcessor`]. Messages number the pairs of the whole run, from 1.
    """
    questions = _as_questions(questions)
    if on_error not in ("raise", "yield"):
        raise ValueError(f"`on_error` must be 'raise' or 'yield', got {on_error!r}.")
    check_many(model, processor, questions, batch_size, generate_kwargs)
    try:
        pairs = iter(pairs)
    except TypeError as error:
        raise ValueError(f"`pairs` must be an iterable of image pairs, got {type(pairs).__name__}.") from error
    return _ask_pairs(model, processor, pairs, questions, batch_size, on_error == "raise", generate_kwargs)


def check_many(
    model: DeltaVLMForConditionalGeneration,
    processor: DeltaVLMProcessor,
    questions: list[str],
    batch_size: int,
    options: dict[str, Any],
) -> None:
    """Refuses, before many pairs are asked, what each of them would fail for."""
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"`batch_size` must be an integer of at least 1, got {batch_size!r}.")
    if options.get("streamer") is not None:
        raise ValueError("A `streamer` follows one answer: `ChangeSession.ask(question, stream=...)` has that.")
    check_options(model, options)
    if questions:
        processor(text=questions, history=[[] for _ in questions])  # are they texts that fit?


def _ask_pairs(model, processor, pairs, questions, batch_size, raises, options) -> Iterator[list[str] | Exception]:
    done, failure = 0, None
    while failure is None:
        chunk: list[Any] = []
        try:
            for pair in islice(pairs, batch_size):
                chunk.append(pair)
        except Exception as error:  # in making the next pair; those before it come first
            failure = error
        for answers in _ask_chunk(model, processor, chunk, questions, batch_size, options):
            done += 1
            if isinstance(answers, Exception):
                answers = _name_pair(done, answers)
                if raises:
                    raise answers
            yield answers
        if failure is None and len(chunk) < batch_size:
            return
    raise failure


def _ask_chunk(model, processor, chunk, questions, batch_size, options) -> list[list[str] | Exception]:
    """For each pair its answers, or why there are none."""
    read: list[Any] = []
    for pair in chunk:
        read += _each(lambda one: [pair_pixels(processor.image_processor, *one)], [pair])
    features = each_usable(lambda pixels: encode_pixels(model, _joined(pixels)), read)
    answers = ask_turns(model, processor, features, [[question] for question in questions], batch_size, options)
    return [said if isinstance(said, Exception) else [text for (text,) in said] for said in answers]


def ask_turns(
    model: DeltaVLMForConditionalGeneration,
    processor: DeltaVLMProcessor,
    features: Sequence[torch.Tensor | Exception],
    dialogues: Sequence[Sequence[str]],
    batch_size: int,
    options: dict[str, Any],
) -> list[list[list[str]] | Exception]:
    """
    Asks dialogues of one turn or more, each by itself, about encoded pairs.

    Args:
        model ([`DeltaVLMForConditionalGeneration`]): on any device.
        processor ([`DeltaVLMProcessor`]): the model's.
        features (`Sequence`): for each pair its features `(2N, D)`, or an exception, which stays.
        dialogues (`Sequence[Sequence[str]]`): the questions of each; before a later one stand the earlier ones, with
            the model's own answers.
        batch_size (`int`): questions answered at once.
        options (`dict`): for `generate`.

    Returns:
        `list`: for each pair the answers of each dialogue, turn by turn; or an exception, if one of them failed.
    """
    # The same question, and questions of like length, share batches: little padding, answers that end together.
    order = sorted(range(len(dialogues)), key=lambda number: (len(dialogues[number][0]), dialogues[number]))
    found: list[Any] = list(features)
    answers: list[list[list[str]]] = [[[] for _ in dialogues] for _ in found]

    def ask(rows: list[tuple[int, int]]) -> list[str]:
        pair_features = torch.stack([found[pair] for pair, _ in rows])
        asked = [dialogues[number][turn] for _, number in rows]
        histories = [list(zip(dialogues[number], answers[pair][number], strict=False)) for pair, number in rows]
        return answer(model, processor, asked, histories, pair_features=pair_features, **options)

    usable = [pair for pair, what in enumerate(found) if not isinstance(what, Exception)]
    for turn in range(max(map(len, dialogues), default=0)):
        rows = [(pair, number) for number in order if len(dialogues[number]) > turn for pair in usable]
        for start in range(0, len(rows), batch_size):
            batch = [row for row in rows[start : start + batch_size] if not isinstance(found[row[0]], Exception)]
            for (pair, number), text in zip(batch, _each(ask, batch), strict=True):
                if isinstance(text, Exception):
                    found[pair] = text
                else:
                    answers[pair][number].append(text)
    return [what if isinstance(what, Exception) else texts for what, texts in zip(found, answers, strict=True)]


def each_usable(work: Callable[[list], Iterable], items: Sequence[Any]) -> list:
    """What `work` makes of each item, see [`_each`]; an exception among them stays in its place."""
    done = iter(_each(work, [item for item in items if not isinstance(item, Exception)]))
    return [item if isinstance(item, Exception) else next(done) for item in items]


def _each(work: Callable[[list], Iterable], items: list) -> list:
    """What `work` makes of each item, of all at once; or, where that fails, of each by itself, or its error."""
    try:
        return list(work(items)) if items else []
    except UnreachableError:  # no item's own
        raise
    except Exception as error:
        return [error] if len(items) == 1 else [what for item in items for what in _each(work, [item])]


def _name_pair(number: int, error: Exception) -> Exception:
    """The error with the pair's number in the whole run; to the processor each pair is the first."""
    renamed = _reworded(
        error, lambda text: f"pair {number}{text.removeprefix('pair 1') if text.startswith('pair 1') else f': {text}'}"
    )
    if renamed is error:
        error.add_note(f"pair {number}")
    return renamed


def without_number(error: Exception) -> Exception:
    """The error without the number that the processor gave the pair."""
    return _reworded(error, lambda text: re.sub("^pair 1[,:] ", "", text))


def _reworded(error: Exception, word: Callable[[str], str]) -> Exception:
    """An error that reading an image may raise, in other words; another one as it is."""
    if isinstance(error, OSError) and error.errno is not None:
        renamed: Exception = OSError(error.errno, word(error.strerror or ""), error.filename)
    elif isinstance(error, ValueError):
        renamed = ValueError(word(str(error)))
    else:
        return error
    renamed.__cause__ = error
    return renamed


def pair_pixels(image_processor: DeltaVLMImageProcessor, pair: Any) -> np.ndarray:
    """Of one pair: `(1, 2, 3, H, W)`."""
    pixel_values = image_processor(pair, return_tensors="np")["pixel_values"]
    if len(pixel_values) != 1:
        raise ValueError(f"expected one pair of images, got {len(pixel_values)} pairs")
    return pixel_values


def _joined(pixels: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(pixels))


def encode(
    model: DeltaVLMForConditionalGeneration, processor: DeltaVLMProcessor, pairs: Sequence[Sequence[ImageInput]]
) -> torch.Tensor:
    """Pair features `(P, 2N, D)`."""
    return encode_pixels(model, processor(images=list(pairs), return_tensors="pt")["pixel_values"])


def encode_pixels(model: DeltaVLMForConditionalGeneration, pixel_values: torch.Tensor) -> torch.Tensor:
    """Pair features `(P, 2N, D)` of pixels `(P, 2, 3, H, W)`, some pairs at a time."""
    with torch.inference_mode():
        features = [
            model.encode_pair(some.to(model.device, model.dtype)) for some in pixel_values.split(PAIRS_AT_ONCE)
        ]
    return torch.cat(features)
