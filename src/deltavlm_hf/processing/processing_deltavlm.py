"""Processor of DeltaVLM: image pairs, instructions and answers to tensors, and back."""

import os
import re
from collections.abc import Sequence

from transformers import AutoTokenizer, BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, Unpack
from transformers.tokenization_utils_base import AddedToken
from transformers.utils import PROCESSOR_NAME

from .image_processing_deltavlm import DeltaVLMImageProcessor
from .saving import loading, replacing  # a link to that of the model: each folder's files travel alone

IMAGE_TOKEN = "<image>"
IGNORE_INDEX = -100
QFORMER_PROMPTS = ("question", "dialogue")

# The authors' form of a conversation: "q: <question 1> a: <answer 1> q: <question 2>", then the answer.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if not loop.first %}{{ ' ' }}{% endif -%}
    {%- if message['role'] == 'user' %}{{ 'q: ' }}{% elif not loop.last %}{{ 'a: ' }}{% endif -%}
    {%- if message['content'] is string -%}
        {{ message['content'] }}
    {%- else -%}
        {%- for block in message['content'] if block['type'] == 'text' %}{{ block['text'] }}{% endfor -%}
    {%- endif -%}
{%- endfor -%}"""

Turn = tuple[str, str]


def normalize_text(text: str) -> str:
    """
    The authors' text normaliser, which the released weights saw in training: lower case, `.!"()*#:;~` become spaces,
    spaces are squeezed. Their cut after 50 words is left out: in a long dialogue it removes the question itself.
    """
    text = re.sub(r"([.!\"()*#:;~])", " ", text.lower())
    return re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")


class DeltaVLMProcessorKwargs(ProcessingKwargs, total=False):
    normalize_text: bool
    qformer_prompt: str


class DeltaVLMProcessor(ProcessorMixin):
    r"""
    Turns image pairs and questions, with or without answers, into the inputs of a DeltaVLM model.

    The language model reads `[placeholders] prompt`, where the tokenizer's own special tokens (BOS) open the prompt;
    with answers, `[placeholders] prompt answer EOS` and `labels` that are -100 but on the answer and EOS. User text is
    data: in it, special tokens are spelled out, never obeyed.

    Args:
        image_processor ([`DeltaVLMImageProcessor`]): for the image pairs.
        tokenizer (`PreTrainedTokenizerBase`): the language model's. `<image>` is added to it if it has none, and it
            pads on the left.
        qformer_tokenizer (`PreTrainedTokenizerBase`): the Q-Former's. Long instructions lose their beginning.
        num_query_tokens (`int`, *optional*, defaults to 32): placeholders per pair; the model's `num_query_tokens`.
        qformer_prompt (`str`, *optional*, defaults to `"question"`): what the Q-Former reads of a dialogue: the
            current `"question"`, or the flattened `"dialogue"` with it, as the authors' model does.
        qformer_max_length (`int`, *optional*, defaults to 128): most tokens of an instruction for the Q-Former.
        normalize_text (`bool`, *optional*, defaults to `False`): whether prompts and answers go through the authors'
            normaliser, see [`normalize_text`]. Checkpoints converted from the authors' release switch it on.
        chat_template (`str`, *optional*): how a dialogue becomes a prompt; by default the authors' form,
            `q: <question 1> a: <answer 1> q: <question 2>`.
    """

    valid_processor_kwargs = DeltaVLMProcessorKwargs

    def __init__(
        self,
        image_processor: DeltaVLMImageProcessor,
        tokenizer,
        qformer_tokenizer,
        num_query_tokens: int = 32,
        qformer_prompt: str = "question",
        qformer_max_length: int = 128,
        normalize_text: bool = False,
        chat_template: str | None = None,
    ):
        for name, value, least in (
            ("num_query_tokens", num_query_tokens, 1),
            ("qformer_max_length", qformer_max_length, 3),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}.")
        if tokenizer.pad_token_id is None:
            raise ValueError("The language model's tokenizer has no padding token: set `tokenizer.pad_token` first.")
        if IMAGE_TOKEN not in tokenizer.get_vocab():
            tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)], special_tokens=True)
        tokenizer.padding_side = "left"  # as generation needs
        qformer_tokenizer.truncation_side = "left"
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.num_query_tokens = num_query_tokens
        self.qformer_prompt = qformer_prompt
        self.qformer_max_length = qformer_max_length
        self.normalize_text = normalize_text
        super().__init__(image_processor, tokenizer, qformer_tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """
        As in Transformers.

        Raises:
            OSError: if a file is missing, or another process saves to the folder meanwhile.
            ValueError: if files are damaged or of another model.
        """
        folder = os.path.join(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        try:
            with loading(folder, PROCESSOR_NAME):
                processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
            for name in ("tokenizer", "qformer_tokenizer"):
                tokenizer = getattr(processor, name)
                if set(tokenizer.get_vocab().values()) <= tokenizer.added_tokens_decoder.keys():
                    raise ValueError(f"the vocabulary of `{name}` is missing")  # transformers goes on without
            processor(text="", history=[("", "")])  # whether tokenizers and chat template can be used at all
            return processor
        except (OSError, ImportError, MemoryError):
            raise
        except Exception as error:  # a damaged file makes its readers raise all kinds of errors
            raise ValueError(
                f"{os.fspath(pretrained_model_name_or_path)} cannot be loaded as a {cls.__name__}: one of its files "
                f"is damaged or of another model ({type(error).__name__}: {error})"
            ) from error

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """
        As in Transformers, but the files are written apart and take the place of older ones when all are complete.

        Raises:
            OSError: if the folder cannot be written to; what was there before is untouched.
        """
        if push_to_hub:
            kwargs.setdefault("repo_id", os.path.basename(save_directory))
        with replacing(save_directory) as partial:
            files = super().save_pretrained(partial, push_to_hub, **kwargs)
        return [os.path.join(save_directory, os.path.relpath(file, partial)) for file in files]

    @classmethod
    def _load_tokenizer_from_pretrained(cls, name, pretrained_model_name_or_path, subfolder="", **kwargs):
        # Where the Q-Former's tokenizer cannot be read, transformers would give it the language model's.
        folder = subfolder if name == "tokenizer" else os.path.join(subfolder, name)
        return AutoTokenizer.from_pretrained(pretrained_model_name_or_path, subfolder=folder, **kwargs)

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        history: Sequence[Turn] | Sequence[Sequence[Turn]] | None = None,
        answers: str | list[str] | None = None,
        **kwargs: Unpack[DeltaVLMProcessorKwargs],
    ) -> BatchFeature:
        """
        Args:
            images: one pair `(before, after)` or a list of pairs, see [`DeltaVLMImageProcessor`]. Without images the
                prompts still hold their placeholders, for `generate(pair_features=...)`. A single pair may go with
                several texts.
            text (`str` or `list[str]`, *optional*): the questions, one per pair.
            history (*optional*): the earlier turns of each dialogue, oldest first, as `(question, answer)`. With it,
                even if empty, the prompt takes the dialogue form of the chat template; without it, a text is used as
                it stands. Where a prompt exceeds `max_length`, the oldest turns are dropped.
            answers (`str` or `list[str]`, *optional*): the right answers; adds `labels`.
            kwargs: `padding`, `max_length` (in tokens, placeholders and answer included; by default the tokenizer's
                `model_max_length`), `return_tensors`, and the image processor's. `normalize_text` and `qformer_prompt`
                take precedence over the processor's own.

        Returns:
            [`BatchFeature`]: `input_ids`, `attention_mask` `(B, L)`, `qformer_input_ids`, `qformer_attention_mask`
            `(B, T)`, `labels` `(B, L)` with answers, `pixel_values` `(B, 2, 3, H, W)` with images.

        Raises:
            ValueError: if the numbers of pairs, texts, histories and answers differ, if a question alone exceeds
                `max_length`, or if an image cannot be used.
        """
        return self._process(images, text, history, answers, is_complete=True, **kwargs)

    def _process(self, images, text, history, answers, is_complete: bool, **kwargs) -> BatchFeature:
        if images is None and text is None:
            raise ValueError("Give `images`, `text` or both.")
        if text is None and (history is not None or answers is not None):
            raise ValueError("`history` and `answers` belong to a `text`, which is missing.")
        merged = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        return_tensors = merged["text_kwargs"].pop("return_tensors", None)
        data = {}
        if images is not None:
            data.update(self.image_processor(images, **{**merged["images_kwargs"], "return_tensors": None}))
        if text is not None:
            texts, histories, answers = self._as_batch(text, history, answers)
            pairs = len(data.get("pixel_values", texts))
            if pairs not in (1, len(texts)):
                raise ValueError(
                    f"Got {pairs} image pairs for {len(texts)} texts: give one text for each pair, or several texts "
                    "for a single pair."
                )
            data.update(self._process_text(texts, histories, answers, is_complete, merged))
        return BatchFeature(data, tensor_type=return_tensors)

    @staticmethod
    def _as_batch(text, history, answers) -> tuple[list[str], list[Sequence[Turn] | None], list[str | None]]:
        if isinstance(text, str):
            text = [text]
            history = None if history is None else [history]
            answers = None if answers is None else [answers]
        texts = list(text)
        histories = [None] * len(texts) if history is None else list(history)
        answers = [None] * len(texts) if answers is None else [answers] if isinstance(answers, str) else list(answers)
        for name, values in (("histories", histories), ("answers", answers)):
            if len(values) != len(texts):
                raise ValueError(f"Got {len(values)} {name} for {len(texts)} texts: give one for each text.")
        for name, values in (("text", texts), ("answers", [answer for answer in answers if answer is not None])):
            for value in values:
                if not isinstance(value, str):
                    raise ValueError(f"`{name}` must be strings, got {type(value).__name__}: {value!r:.60}.")
        if any(answer is None for answer in answers) and any(answer is not None for answer in answers):
            raise ValueError("Some `answers` are None: give an answer for every text or for none.")
        return texts, histories, answers

    def _process_text(self, texts, histories, answers, is_complete: bool, merged: dict) -> dict[str, list]:
        qformer_prompt = merged["qformer_prompt"]
        if qformer_prompt not in QFORMER_PROMPTS:
            raise ValueError(f"`qformer_prompt` is {qformer_prompt!r}, expected one of {', '.join(QFORMER_PROMPTS)}.")
        normalize = normalize_text if merged["normalize_text"] else str
        text_kwargs = merged["text_kwargs"]
        max_length = text_kwargs.get("max_length") or self.tokenizer.model_max_length

        instructions, input_ids, labels = [], [], []
        for number, (question, history, answer) in enumerate(zip(texts, histories, answers, strict=True), start=1):
            answer_ids = [] if answer is None else self._answer_ids(normalize(answer), is_complete)
            room = max_length - self.num_query_tokens - len(answer_ids)
            prompt, prompt_ids = self._fit_prompt(question, history, normalize, room, number)
            instructions.append(prompt if qformer_prompt == "dialogue" else normalize(question))
            ids = [self.image_token_id] * self.num_query_tokens + prompt_ids
            input_ids.append(ids + answer_ids)
            labels.append([IGNORE_INDEX] * len(ids) + answer_ids)

        padding = text_kwargs.get("padding", False)
        side = text_kwargs.get("padding_side") or self.tokenizer.padding_side
        encoding = dict(
            self.tokenizer.pad(
                {"input_ids": input_ids},
                padding=padding,
                max_length=max_length if padding == "max_length" else None,
                pad_to_multiple_of=text_kwargs.get("pad_to_multiple_of"),
                padding_side=side,
            )
        )
        if is_complete and answers[0] is not None:
            filling = [
                [IGNORE_INDEX] * (len(ids) - len(row)) for ids, row in zip(encoding["input_ids"], labels, strict=True)
            ]
            encoding["labels"] = [
                fill + row if side == "left" else row + fill for fill, row in zip(filling, labels, strict=True)
            ]
        qformer_encoding = self.qformer_tokenizer(
            instructions,
            padding="longest" if padding else False,
            truncation=True,
            max_length=self.qformer_max_length,
            split_special_tokens=True,
        )
        encoding["qformer_input_ids"] = qformer_encoding["input_ids"]
        encoding["qformer_attention_mask"] = qformer_encoding["attention_mask"]
        return encoding

    def _answer_ids(self, answer: str, is_complete: bool) -> list[int]:
        ids = self.tokenizer(answer, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [*ids, self.tokenizer.eos_token_id] if is_complete else ids

    def _fit_prompt(self, question, history, normalize, room: int, number: int) -> tuple[str, list[int]]:
        turns = [] if history is None else list(history)
        while True:
            prompt = normalize(question if history is None else self._flatten(turns, question))
            ids = self.tokenizer(prompt, split_special_tokens=True, verbose=False)["input_ids"]
            if len(ids) <= room:
                return prompt, ids
            if not turns:
                raise ValueError(
                    f"text {number}: {len(ids)} tokens, but only {max(room, 0)} fit beside {self.num_query_tokens} "
                    "image placeholders and the answer; shorten it or raise `max_length`"
                )
            turns = turns[1:]

    def _flatten(self, turns: Sequence[Turn], question: str) -> str:
        messages = []
        for turn in turns:
            if not isinstance(turn, (tuple, list)) or len(turn) != 2:
                raise ValueError(f"`history` must hold (question, answer) pairs, got {turn!r:.80}.")
            messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
        return super().apply_chat_template([*messages, {"role": "user", "content": question}])

    def apply_chat_template(
        self,
        conversation: list[dict] | list[list[dict]],
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = None,
        return_dict: bool = False,
        processor_kwargs: dict | None = None,
        **kwargs,
    ):
        """
        The processor's inputs for one chat or a batch of chats, with the images taken from the messages.

        Args:
            conversation: messages `{"role": "user" | "assistant", "content": text or blocks}` that take turns,
                beginning with the user. A chat holds two images, before and after, or none.
            chat_template (`str`, *optional*): only without `tokenize`, see [`ProcessorMixin.apply_chat_template`].
            add_generation_prompt (`bool`, *optional*): changes nothing: an answer follows its question directly.
            continue_final_message (`bool`, *optional*): whether a final assistant message is the beginning of the
                answer; otherwise it is the right answer, and the output has `labels`.
            tokenize (`bool`, *optional*): whether to return token ids rather than the prompt as a string.
            return_dict (`bool`, *optional*): whether to return all of the model's inputs rather than `input_ids`.
            processor_kwargs (`dict`, *optional*): for [`~DeltaVLMProcessor.__call__`], such as `padding`; they may
                also stand by themselves.

        Raises:
            ValueError: if roles do not take turns, or a chat's number of images is neither 0 nor 2.
        """
        if not tokenize:
            return super().apply_chat_template(conversation, chat_template=chat_template, **kwargs)
        if chat_template is not None:
            raise ValueError("Set `processor.chat_template` to tokenize with another template.")
        if not conversation:
            raise ValueError("The conversation is empty: a chat needs at least one message, a user's.")
        is_batch = not isinstance(conversation[0], dict)
        chats = [self._read_chat(chat) for chat in (conversation if is_batch else [conversation])]
        images, texts, histories, answers = map(list, zip(*chats, strict=True))
        if any(images) and not all(images):
            raise ValueError("Some chats of the batch have images and others have none.")
        outputs = self._process(
            images if images[0] else None,
            texts,
            histories,
            answers,
            is_complete=not continue_final_message,
            return_tensors=None if return_tensors == "auto" else return_tensors,
            **{**(processor_kwargs or {}), **kwargs},
        )
        return outputs if return_dict else outputs["input_ids"]

    @staticmethod
    def _read_chat(messages: list[dict]) -> tuple[list, str, list[Turn], str | None]:
        if not messages:
            raise ValueError("A chat needs at least one message, a user's.")
        images, texts = [], []
        for index, message in enumerate(messages):
            expected = "assistant" if index % 2 else "user"
            if message["role"] != expected:
                raise ValueError(f"Message {index} has the role {message['role']!r}, expected {expected!r}.")
            content = message["content"]
            blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
            for block in blocks:
                if block["type"] not in ("text", "image", "image_url"):
                    raise ValueError(f"Message {index} has a block of type {block['type']!r}, expected text or image.")
                if block["type"] == "image":
                    images += [block[key] for key in ("image", "url", "path", "base64") if key in block]
                elif block["type"] == "image_url":
                    url = block["image_url"]
                    images.append(url["url"] if isinstance(url, dict) else url)
            texts.append("".join(block["text"] for block in blocks if block["type"] == "text"))
        if len(images) not in (0, 2):
            raise ValueError(f"A chat needs two images, before and after; got {len(images)}.")
        answer = texts.pop() if len(texts) % 2 == 0 else None
        question = texts.pop()
        return images, question, list(zip(texts[::2], texts[1::2], strict=True)), answer

    @property
    def model_input_names(self) -> list[str]:
        return [
            *self.tokenizer.model_input_names,
            *self.image_processor.model_input_names,
            "qformer_input_ids",
            "qformer_attention_mask",
        ]


__all__ = ["DeltaVLMProcessor"]
