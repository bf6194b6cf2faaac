"""Asking: the one place where answers are generated."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import torch
from transformers import Cache, DynamicCache, TextStreamer
from transformers.image_utils import ImageInput
from transformers.utils import ModelOutput

from .modeling import DeltaVLMForConditionalGeneration
from .modeling.cache_name import CACHE
from .modeling.modeling_deltavlm import DeltaVLMExplanation
from .modeling.weight_sources import fingerprint
from .processing import DeltaVLMProcessor
from .processing.processing_deltavlm import Turn

_PAIRS_AT_ONCE = 8  # these keep an accelerator busy; more outgrow the caches of a CPU


def answer(
    model: DeltaVLMForConditionalGeneration,
    processor: DeltaVLMProcessor,
    questions: Sequence[str],
    histories: Sequence[Sequence[Turn]] | None = None,
    images: ImageInput | None = None,
    **generate_kwargs,
) -> list[str]:
    """
    Answers a batch of questions.

    Args:
        model ([`DeltaVLMForConditionalGeneration`]): on any device.
        processor ([`DeltaVLMProcessor`]): the model's.
        questions (`Sequence[str]`): the questions.
        histories (*optional*): the earlier turns for each question, see [`~DeltaVLMProcessor.__call__`].
        images (*optional*): a pair for each question, or one for all, in place of `pair_features=`.
        generate_kwargs: for `generate`, beside the model's own defaults.

    Returns:
        `list[str]`: the answers, stripped of white space and special tokens.
    """
    inputs = processor(images=images, text=list(questions), history=histories, padding=True, return_tensors="pt")
    inputs = inputs.to(model.device, model.dtype)
    with torch.inference_mode():
        ids = model.generate(**inputs, **generate_kwargs)
    answers = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in answers]


def ask_pairs(
    model: DeltaVLMForConditionalGeneration,
    processor: DeltaVLMProcessor,
    pairs: Iterable[Sequence[ImageInput]],
    questions: Sequence[str],
    *,
    batch_size: int = 32,
    **generate_kwargs,
) -> Iterator[list[str]]:
    """
    Asks the same questions of many pairs, each by itself. Every pair is encoded once, both dates in one call.

    Args:
        model ([`DeltaVLMForConditionalGeneration`]): on any device.
        processor ([`DeltaVLMProcessor`]): the model's.
        pairs (`Iterable`): image pairs, before and after, of all that [`DeltaVLMImageProcessor`] takes. They may
            be made as they are fetched.
        questions (`Sequence[str]`): the questions.
        batch_size (`int`, *optional*, defaults to 32): pairs fetched at once, and questions answered at once.
        generate_kwargs: for `generate`, beside the model's own defaults.

    Yields:
        `list[str]`: for each pair, in order, the answers in the order of the questions.

    Raises:
        ValueError: if `questions` is a string, or if an image cannot be used, see [`DeltaVLMImageProcessor`]; all
            earlier batches have been yielded by then.
    """
    if isinstance(questions, str):
        raise ValueError(f"Give a list of questions, got the string {questions!r:.60}.")
    # The same question, and questions of like length, share batches: little padding, answers that end together.
    order = sorted(range(len(questions)), key=lambda number: (len(questions[number]), questions[number]))
    pairs = iter(pairs)
    while chunk := list(islice(pairs, batch_size)):
        pair_features = encode(model, processor, chunk)
        answers = [[""] * len(questions) for _ in chunk]
        rows = [(pair, question) for question in order for pair in range(len(chunk))]
        for start in range(0, len(rows), batch_size):
            which, asked = zip(*rows[start : start + batch_size], strict=True)
            said = answer(
                model,
                processor,
                [questions[question] for question in asked],
                pair_features=pair_features[list(which)],
                **generate_kwargs,
            )
            for pair, question, text in zip(which, asked, said, strict=True):
                answers[pair][question] = text
        yield from answers


def encode(
    model: DeltaVLMForConditionalGeneration, processor: DeltaVLMProcessor, pairs: Sequence[Sequence[ImageInput]]
) -> torch.Tensor:
    """Pair features `(P, 2N, D)`."""
    pixel_values = processor(images=list(pairs), return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        features = [
            model.encode_pair(some.to(model.device, model.dtype)) for some in pixel_values.split(_PAIRS_AT_ONCE)
        ]
    return torch.cat(features) if len(features) > 1 else features[0]  # which knows the weights that made it


class ChangeSession:
    """
    A conversation about one image pair. The pair is encoded once, however many questions follow.

    As the model was trained, the Q-Former reads each new question, so that the change tokens, which stand in front of
    the dialogue, differ from turn to turn, and the language model reads everything anew. With `fixed_change_tokens`
    those of the first question stay, and the language model goes on from its cache: later turns read only what is new.
    Answers are those of reading everything with these tokens; but what a later question is about was not looked for.

    After the model's vision encoder has been trained further, a session's pair is refused: start another session.

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
        self._made_by: str | None = None  # the weights of both
        self.history: list[tuple[str, str]] = []
        self.pair_features = encode(model, processor, [(before, after)])

    def ask(self, question: str, stream: Callable[[str], None] | None = None, **generate_kwargs) -> str:
        """
        Asks in the light of the turns so far, and adds the turn to them.

        Args:
            question (`str`): the question.
            stream (*optional*): called with each piece of the answer as it comes.
            generate_kwargs: for `generate`, beside the model's own defaults.

        Returns:
            `str`: the answer.
        """
        if stream is not None:
            # Streaming shows tokens as they are chosen; beams choose at the end.
            generate_kwargs = {
                "num_beams": 1,
                **generate_kwargs,
                "streamer": _CallbackStreamer(self.processor, stream),
            }
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
        inputs = self.processor(text=[question], history=[self.history], return_tensors="pt").to(self.model.device)
        ids = inputs["input_ids"]
        weights = fingerprint(self.model)
        if weights != self._made_by:  # trained since the last turn
            self._change_tokens = self._read = None
            self._made_by = weights
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
            return_dict_in_generate=True,
            **{CACHE: cache},
            **images,
            **{"num_beams": 1, **generate_kwargs},
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


class _CallbackStreamer(TextStreamer):
    def __init__(self, processor: DeltaVLMProcessor, callback: Callable[[str], None]):
        super().__init__(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.callback = callback

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.callback(text)
