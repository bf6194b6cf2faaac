"""A conversation about one image pair."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache, TextStreamer
from transformers.image_utils import ImageInput
from transformers.utils import ModelOutput

from ..modeling import DeltaVLMForConditionalGeneration
from ..modeling.cache_name import CACHE
from ..modeling.explain import DeltaVLMExplanation
from ..processing import DeltaVLMProcessor
from ..processing.conversation import Turn
from .asking import answer, check_options, encode


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
        self._cached: tuple[torch.Tensor, Cache] | None = None  # ids (L,) with the language model's cache of them
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
            reply = self._continue_from_cache(question, **generate_kwargs)
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
    def _continue_from_cache(self, question: str, **generate_kwargs) -> str:
        """An answer with the first question's change tokens, reading only what the cache does not hold."""
        for name in ("cache_implementation", "past_key_values", "cache", "assistant_model"):
            if generate_kwargs.get(name) is not None:
                raise ValueError(f"`{name}` does not go with `fixed_change_tokens`, which reads from its own cache.")
        generate_kwargs = _without_beams(generate_kwargs, "`fixed_change_tokens` keeps the cache of one answer")
        check_options(self.model, generate_kwargs)
        inputs = self.processor(text=[question], history=[self.history], return_tensors="pt").to(self.model.device)
        ids = inputs["input_ids"]
        if self._change_tokens is None:
            self._change_tokens = self.model.get_image_features(
                qformer_input_ids=inputs["qformer_input_ids"],
                qformer_attention_mask=inputs["qformer_attention_mask"],
                pair_features=self.pair_features,
                return_dict=True,
            )
        known, cache = self._reuse_cache(ids[0])
        images = {} if known else {"mm_encoder_outputs": {"image": self._change_tokens}}
        self._cached = None  # generation writes into the cache: after an error it is of no use
        outputs = self.model.generate(
            input_ids=ids,
            attention_mask=inputs["attention_mask"],
            **{CACHE: cache},
            **images,
            **_with_settings(generate_kwargs, return_dict_in_generate=True),
        )
        self._cached = (outputs.sequences[0], outputs[CACHE])
        reply = outputs.sequences[:, ids.shape[1] :]
        return self.processor.batch_decode(reply, skip_special_tokens=True)[0].strip()

    def _reuse_cache(self, ids: torch.Tensor) -> tuple[int, Cache]:
        """How many of these ids `(L,)` the cache holds, from the first one on, and the cache cut to them."""
        if self._cached is not None:
            read, cache = self._cached
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
