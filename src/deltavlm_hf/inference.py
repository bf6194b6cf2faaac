"""Asking: the one place where answers are generated."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal

import torch
from transformers import Cache, DynamicCache, TextStreamer
from transformers.image_utils import ImageInput
from transformers.utils import ModelOutput

from .modeling import DeltaVLMForConditionalGeneration
from .modeling.cache_name import CACHE
from .modeling.explain import DeltaVLMExplanation
from .processing import DeltaVLMProcessor
from .processing.processing_deltavlm import Turn

_OUTPUTS = ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states")
_PAIRS_AT_ONCE = 8  # these keep an accelerator busy; more outgrow the caches of a CPU


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
    questions = _as_questions(questions)
    _check_options(model, generate_kwargs)
    if len(questions) > 1 and generate_kwargs.get("streamer") is not None:
        raise ValueError(f"A `streamer` follows one answer, got {len(questions)} questions: ask them one by one.")
    histories = [[] for _ in questions] if histories is None else histories
    inputs = processor(images=images, text=questions, history=histories, padding=True, return_tensors="pt")
    inputs = inputs.to(model.device, model.dtype)
    with torch.inference_mode():
        outputs = model.generate(**inputs, **generate_kwargs)
    ids = outputs if isinstance(outputs, torch.Tensor) else outputs.sequences  # as the model's own defaults say
    answers = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in answers]


def _as_questions(questions: Sequence[str]) -> list[str]:
    if isinstance(questions, str):
        raise ValueError(f"Give a list of questions, got the string {questions!r:.60}.")
    return list(questions)


def _check_options(model: DeltaVLMForConditionalGeneration, options: dict[str, Any]) -> None:
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
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"`batch_size` must be an integer of at least 1, got {batch_size!r}.")
    if on_error not in ("raise", "yield"):
        raise ValueError(f"`on_error` must be 'raise' or 'yield', got {on_error!r}.")
    if generate_kwargs.get("streamer") is not None:
        raise ValueError("A `streamer` follows one answer: `ChangeSession.ask(question, stream=...)` has that.")
    _check_options(model, generate_kwargs)
    if questions:
        processor(text=questions, history=[[] for _ in questions])  # are they texts that fit?
    try:
        pairs = iter(pairs)
    except TypeError as error:
        raise ValueError(f"`pairs` must be an iterable of image pairs, got {type(pairs).__name__}.") from error
    return _ask_pairs(model, processor, pairs, questions, batch_size, on_error == "raise", generate_kwargs)


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
    # The same question, and questions of like length, share batches: little padding, answers that end together.
    order = sorted(range(len(questions)), key=lambda number: (len(questions[number]), questions[number]))
    found: list[Any] = []  # for each pair its pixels, then its features; or an exception
    for pair in chunk:
        found += _each(lambda one: [_pixels(processor, *one)], [pair])
    usable = [number for number, what in enumerate(found) if not isinstance(what, Exception)]
    features = _each(lambda pixels: _encode(model, torch.cat(pixels)), [found[number] for number in usable])
    for number, what in zip(usable, features, strict=True):
        found[number] = what

    def ask(rows: list[tuple[int, int]]) -> list[str]:
        pair_features = torch.stack([found[pair] for pair, _ in rows])
        asked = [questions[question] for _, question in rows]
        return answer(model, processor, asked, pair_features=pair_features, **options)

    answers = [[""] * len(questions) for _ in chunk]
    rows = [(pair, question) for question in order for pair in usable]
    for start in range(0, len(rows), batch_size):
        batch = [row for row in rows[start : start + batch_size] if not isinstance(found[row[0]], Exception)]
        for (pair, question), text in zip(batch, _each(ask, batch), strict=True):
            if isinstance(text, Exception):
                found[pair] = text
            else:
                answers[pair][question] = text
    return [what if isinstance(what, Exception) else said for what, said in zip(found, answers, strict=True)]


def _each(work: Callable[[list], Iterable], items: list) -> list:
    """What `work` makes of each item, of all at once; or, where that fails, of each by itself, or its error."""
    try:
        return list(work(items)) if items else []
    except Exception as error:
        return [error] if len(items) == 1 else [what for item in items for what in _each(work, [item])]


def _name_pair(number: int, error: Exception) -> Exception:
    """The error with the pair's number in the whole run; to the processor each pair is the first."""

    def named(text: str) -> str:
        return f"pair {number}{text.removeprefix('pair 1') if text.startswith('pair 1') else f': {text}'}"

    if isinstance(error, OSError) and error.errno is not None:
        renamed: Exception = OSError(error.errno, named(error.strerror or ""), error.filename)
    elif isinstance(error, ValueError):
        renamed = ValueError(named(str(error)))
    else:
        error.add_note(f"pair {number}")
        return error
    renamed.__cause__ = error
    return renamed


def _pixels(processor: DeltaVLMProcessor, pair: Any) -> torch.Tensor:
    """Of one pair: `(1, 2, 3, H, W)`."""
    pixel_values = processor.image_processor(pair, return_tensors="pt")["pixel_values"]
    if len(pixel_values) != 1:
        raise ValueError(f"expected one pair of images, got {len(pixel_values)} pairs")
    return pixel_values


def encode(
    model: DeltaVLMForConditionalGeneration, processor: DeltaVLMProcessor, pairs: Sequence[Sequence[ImageInput]]
) -> torch.Tensor:
    """Pair features `(P, 2N, D)`."""
    return _encode(model, processor(images=list(pairs), return_tensors="pt")["pixel_values"])


def _encode(model: DeltaVLMForConditionalGeneration, pixel_values: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        features = [
            model.encode_pair(some.to(model.device, model.dtype)) for some in pixel_values.split(_PAIRS_AT_ONCE)
        ]
    return torch.cat(features)


class ChangeSession:
    """
    A conversation about one image pair. The pair is encoded once, however many questions follow.

    As the model was trained, the Q-Former reads each new question, so that the change tokens, which stand in front of
    the dialogue, differ from turn to turn, and the language model reads everything anew. With `fixed_change_tokens`
    those of the first question stay, and the language model goes on from its cache: later turns read only what is new.
    Answers are those of reading everything with these tokens; but what a later question is about was not looked for.

    After the model has been trained further, start another session: this one knows the pair by its earlier weights.

    Args:
        model ([`DeltaVLMForConditionalGeneration`]): on any device.
        processor ([`DeltaVLMProcessor`]): the model's.
        before: the image of the first date, anything that [`DeltaVLMImageProcessor`] takes.
        after: the image of the second date.
        fixed_change_tokens (`bool`, *optional*, defaults to `False`): see above. Not with beams.

    Attributes:
        history (`list[tuple[str, str]]`): the turns so far, as `(question, answer)`.
    """

    def __init__(
        self,
        model: DeltaVLMForConditionalGeneration,
        processor: DeltaVLMProcessor,
        before: ImageInput,
        after: ImageInput,
        fixed_change_tokens: bool = False,
    ):
        self.model = model
        self.processor = processor
        self.fixed_change_tokens = fixed_change_tokens
        self._change_tokens: ModelOutput | None = None
        self._read: tuple[torch.Tensor, Cache] | None = None  # ids (L,) with the language model's cache of them
        self.history: list[tuple[str, str]] = []
        self.pair_features = encode(model, processor, [(before, after)])

    def ask(self, question: str, stream: Callable[[str], None] | None = None, **generate_kwargs) -> str:
        """
        Asks in the light of the turns so far, and adds the turn to them.

        Args:
            question (`str`): the question.
            stream (*optional*): called with each piece of the answer as it comes. Not with beams.
            generate_kwargs: for `generate`, beside the model's own defaults, see [`answer`].

        Returns:
            `str`: the answer.

        Raises:
            ValueError: for an option of `generate` that has no place here.
        """
        if stream is not None:
            if generate_kwargs.get("streamer") is not None:
                raise ValueError("Give `stream` or a `streamer`: only one of them.")
            generate_kwargs = _without_beams(generate_kwargs, "`stream` shows tokens as they are chosen")
            generate_kwargs["streamer"] = _CallbackStreamer(self.processor, stream)
        if self.fixed_change_tokens:
            reply = self._go_on(question, **generate_kwargs)
        else:
            (reply,) = self._answer([question], [self.history], **generate_kwargs)
        self.history.append((question, reply))
        return reply

    def ask_apart(self, questions: Sequence[str], **generate_kwargs) -> list[str]:
        """Asks each question by itself, in one batch, outside the conversation: `history` stays as it is."""
        return self._answer(questions, [[] for _ in questions], **generate_kwargs)

    def explain(self) -> DeltaVLMExplanation:
        """
        Where the model looked for the last question, see [`~DeltaVLMModel.explain`]; maps of the model's image size.

        Raises:
            ValueError: if nothing has been asked.
        """
        if not self.history:
            raise ValueError("Nothing has been asked yet: there is no question to explain.")
        *earlier, (question, _) = self.history
        inputs = self.processor(text=[question], history=[earlier], return_tensors="pt").to(self.model.device)
        return self.model.explain(pair_features=self.pair_features, **inputs)

    @torch.inference_mode()
    def _go_on(self, question: str, **generate_kwargs) -> str:
        """An answer with the first question's change tokens, reading only what the cache does not hold."""
        for name in ("cache_implementation", "past_key_values", "cache", "assistant_model"):
            if generate_kwargs.get(name) is not None:
                raise ValueError(f"`{name}` does not go with `fixed_change_tokens`, which reads from its own cache.")
        generate_kwargs = _without_beams(generate_kwargs, "`fixed_change_tokens` keeps the cache of one answer")
        _check_options(self.model, generate_kwargs)
        inputs = self.processor(text=[question], history=[self.history], return_tensors="pt").to(self.model.device)
        ids = inputs["input_ids"]
        if self._change_tokens is None:
            self._change_tokens = self.model.get_image_features(
                qformer_input_ids=inputs["qformer_input_ids"],
                qformer_attention_mask=inputs["qformer_attention_mask"],
                pair_features=self.pair_features,
                return_dict=True,
            )
        known, cache = self._known(ids[0])
        images = {} if known else {"mm_encoder_outputs": {"image": self._change_tokens}}
        self._read = None  # generation writes into the cache: after an error it is of no use
        outputs = self.model.generate(
            input_ids=ids,
            attention_mask=inputs["attention_mask"],
            **{CACHE: cache},
            **images,
            **_with_settings(generate_kwargs, return_dict_in_generate=True),
        )
        self._read = (outputs.sequences[0], outputs[CACHE])
        reply = outputs.sequences[:, ids.shape[1] :]
        return self.processor.batch_decode(reply, skip_special_tokens=True)[0].strip()

    def _known(self, ids: torch.Tensor) -> tuple[int, Cache]:
        """How many of these ids `(L,)` the cache holds, from the first one on, and the cache cut to them."""
        if self._read is not None:
            read, cache = self._read
            most = min(len(read), len(ids) - 1, cache.get_seq_length())
            known = int((read[:most] == ids[:most]).long().cumprod(0).sum())
            if known >= self.model.config.num_query_tokens:
                if known < cache.get_seq_length():
                    cache.crop(known - cache.get_seq_length())
                return known, cache
        return 0, DynamicCache(config=self.model.config.get_text_config(decoder=True))

    def _answer(self, questions: Sequence[str], histories: Sequence[Sequence[Turn]], **generate_kwargs) -> list[str]:
        pair_features = self.pair_features
        return answer(self.model, self.processor, questions, histories, pair_features=pair_features, **generate_kwargs)


def _without_beams(options: dict[str, Any], reason: str) -> dict[str, Any]:
    beams = options.get("num_beams") or getattr(options.get("generation_config"), "num_beams", None) or 1
    if beams > 1:
        raise ValueError(f"{reason}, and {beams} beams choose at the end: take num_beams=1.")
    return _with_settings(options, num_beams=1)  # whatever the model's default is


def _with_settings(options: dict[str, Any], **settings: Any) -> dict[str, Any]:
    if options.get("generation_config") is None:
        return {**options, **settings}
    config = copy.deepcopy(options["generation_config"])  # beside which `generate` warns of settings
    config.update(**settings)
    return {**options, "generation_config": config}


class _CallbackStreamer(TextStreamer):
    def __init__(self, processor: DeltaVLMProcessor, callback: Callable[[str], None]):
        super().__init__(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.callback = callback

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.callback(text)
