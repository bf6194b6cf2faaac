"""Asking: the one place where the command line and the demo generate answers."""

from collections.abc import Callable, Sequence

import torch
from transformers import TextStreamer
from transformers.image_utils import ImageInput

from .modeling import DeltaVLMForConditionalGeneration
from .processing import DeltaVLMProcessor


class ChangeSession:
    """
    A conversation about one image pair. The pair is encoded once, however many questions follow.

    Args:
        model ([`DeltaVLMForConditionalGeneration`]): on any device.
        processor ([`DeltaVLMProcessor`]): the model's.
        before: the image of the first date, anything that [`DeltaVLMImageProcessor`] takes.
        after: the image of the second date.

    Attributes:
        history (`list[tuple[str, str]]`): the turns so far, as `(question, answer)`.
    """

    def __init__(
        self,
        model: DeltaVLMForConditionalGeneration,
        processor: DeltaVLMProcessor,
        before: ImageInput,
        after: ImageInput,
    ):
        self.model = model
        self.processor = processor
        self.history: list[tuple[str, str]] = []
        pixel_values = processor(images=(before, after), return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            self.pair_features = model.encode_pair(pixel_values.to(model.device, model.dtype))

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
        inputs = self.processor(text=question, history=self.history, return_tensors="pt").to(self.model.device)
        if stream is not None:
            # Streaming shows tokens as they are chosen; beams choose at the end.
            generate_kwargs = {
                "num_beams": 1,
                **generate_kwargs,
                "streamer": _CallbackStreamer(self.processor, stream),
            }
        with torch.inference_mode():
            ids = self.model.generate(**inputs, pair_features=self.pair_features, **generate_kwargs)
        answer = self.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        self.history.append((question, answer))
        return answer

    def ask_apart(self, questions: Sequence[str], **generate_kwargs) -> list[str]:
        """Asks each question by itself, in one batch, outside the conversation: `history` stays as it is."""
        histories: list[list] = [[] for _ in questions]
        inputs = self.processor(text=list(questions), history=histories, padding=True, return_tensors="pt")
        inputs = inputs.to(self.model.device)
        with torch.inference_mode():
            ids = self.model.generate(**inputs, pair_features=self.pair_features, **generate_kwargs)
        answers = self.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [answer.strip() for answer in answers]


class _CallbackStreamer(TextStreamer):
    def __init__(self, processor: DeltaVLMProcessor, callback: Callable[[str], None]):
        super().__init__(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.callback = callback

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.callback(text)
