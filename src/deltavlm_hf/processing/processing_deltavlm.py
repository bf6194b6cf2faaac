"""Processor of DeltaVLM: image pairs, instructions and answers to tensors, and back."""

import os
from collections.abc import Iterable, Sequence
from typing import Any

from transformers import AutoTokenizer, BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, TextKwargs, Unpack
from transformers.tokenization_utils_base import AddedToken
from transformers.utils import PROCESSOR_NAME, cached_file

from .chat_template import check_chat_template
from .conversation import CHAT_TEMPLATE, IMAGE_SOURCES, Turn, normalize_text, read_chat, render, write_chat
from .image_processing_deltavlm import DeltaVLMImageProcessor
from .saving import loading, replacing  # a symlink to modeling/saving.py: the Hub gets each folder's files alone
from .tokenizer_check import FILES, MAX_PADDING, check_tokenizer

IMAGE_TOKEN = "<image>"
IGNORE_INDEX = -100
QFORMER_PROMPTS = ("question", "dialogue")
# Of what tokenizers take: followed or without effect on ids; done whatever is said; the rest is refused.
_FOLLOWED = {"padding", "padding_side", "max_length", "pad_to_multiple_of", "return_tensors"}
_FOLLOWED |= {"truncation", "verbose", "sanitize_control_tokens"}
_ALWAYS = {"add_special_tokens", "return_attention_mask"}
_REFUSED = {*TextKwargs.__annotations__, "videos", "audio"} - _FOLLOWED - _ALWAYS
# Of what `from_pretrained` takes: for finding files.
_OF_FILES = {"cache_dir", "force_download", "local_files_only", "proxies", "revision", "token"}
_UNLESS_MISSING = {"_raise_exceptions_for_missing_entries": False}


def _refuse_unsupported(kwargs: dict[str, Any]) -> None:
    """What the base class accepts and this processor would not follow."""
    for name, value in {**kwargs, **kwargs.get("text_kwargs", {})}.items():
        if (name in _ALWAYS and value is False) or (name in _REFUSED and value is not None and value is not False):
            raise ValueError(f"`{name}={value!r:.40}` is not supported by DeltaVLM's processor: leave it out.")


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
        chat_template (`str` or `dict[str, str]`, *optional*): how a dialogue becomes a prompt, or several ways by
            name, of which `"default"` is taken; by default the authors' form,
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
        for name, value, least, most in (
            ("num_query_tokens", num_query_tokens, 1, 2**14),
            ("qformer_max_length", qformer_max_length, 3, 2**20),
        ):
            if not isinstance(value, int) or not least <= value <= most:
                raise ValueError(
                    f"`{name}` must be an integer of at least {least}, and at most {most}, got {value!r:.60}."
                )
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
            check_chat_template(processor.chat_template)
            processor(text="")  # whether the tokenizers can be used at all
            return processor
        except (OSError, ImportError, MemoryError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a damaged file makes its readers raise all kinds; Rust's are no Exception
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
        options = {option: value for option, value in kwargs.items() if option in _OF_FILES}
        found = {
            file: cached_file(pretrained_model_name_or_path, file, subfolder=folder, **options, **_UNLESS_MISSING)
            for file in FILES
        }
        if found[FILES[0]] is None:
            raise OSError(f"{pretrained_model_name_or_path} has no {os.path.join(folder, FILES[0])}.")
        check_tokenizer({file: path for file, path in found.items() if path is not None})
        return AutoTokenizer.from_pretrained(pretrained_model_name_or_path, subfolder=folder, **kwargs)

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        history: Sequence[Turn] | Sequence[Sequence[Turn] | None] | None = None,
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
                even if empty, the prompt takes the dialogue form of the chat template, in which models are trained;
                without it, or with None in its place, a text is used as it stands. Where a prompt exceeds
                `max_length`, the oldest turns are dropped.
            answers (`str` or `list[str]`, *optional*): the right answers; adds `labels`.
            kwargs: `padding`, `max_length` (in tokens, placeholders and answer included; by default the tokenizer's
                `model_max_length`), `return_tensors`, and the image processor's. `normalize_text` and `qformer_prompt`
                take precedence over the processor's own. What a tokenizer can return besides is refused.

        Returns:
            [`BatchFeature`]: `input_ids`, `attention_mask` `(B, L)`, `qformer_input_ids`, `qformer_attention_mask`
            `(B, T)`, `labels` `(B, L)` with answers, `pixel_values` `(B, 2, 3, H, W)` with images.

        Raises:
            ValueError: if the numbers of pairs, texts, histories and answers differ, if a question alone exceeds
                `max_length`, if an image cannot be used, or for an argument that would have no effect.
        """
        return self._process(images, text, history, answers, is_complete=True, **kwargs)

    def _process(self, images, text, history, answers, is_complete: bool, **kwargs) -> BatchFeature:
        if images is None and text is None:
            raise ValueError("Give `images`, `text` or both.")
        if text is None and (history is not None or answers is not None):
            raise ValueError("`history` and `answers` belong to a `text`, which is missing.")
        _refuse_unsupported(kwargs)
        try:
            return self._tensors(images, text, history, answers, is_complete, **kwargs)
        except (Exception, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # of tokenizers, which is written in Rust
            raise ValueError(f"The tokenizer cannot read this text: {error}") from error

    def _tensors(self, images, text, history, answers, is_complete: bool, **kwargs) -> BatchFeature:
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
        if not isinstance(text, Iterable):
            raise ValueError(f"`text` must be a string or a list of them, got {type(text).__name__}: {text!r:.60}.")
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
        multiple = text_kwargs.get("pad_to_multiple_of") or 1
        most = max(multiple, max_length if padding == "max_length" else 1)
        if padding and most > MAX_PADDING:  # tokenizer_config.json may have these numbers, too
            raise ValueError(
                f"Padding to {most} tokens is asked for, at most {MAX_PADDING} are allowed: give `max_length`."
            )
        side = text_kwargs.get("padding_side") or self.tokenizer.padding_side
        encoding = dict(
            self.tokenizer.pad(
                {"input_ids": input_ids},
                padding=padding,
                max_length=max_length if padding == "max_length" else None,
                pad_to_multiple_of=multiple,
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
        """The prompt and its ids, with as many of the last turns as there is room for."""
        turns = [] if history is None else list(history)
        sizes: list[int] = []
        while True:
            prompt = normalize(question if history is None else self._prompt(write_chat(turns, question)))
            ids = self.tokenizer(prompt, split_special_tokens=True, verbose=False)["input_ids"]
            excess = len(ids) - room
            if excess <= 0:
                return prompt, ids
            if not turns:
                raise ValueError(
                    f"text {number}: {len(ids)} tokens, but only {max(room, 0)} fit beside {self.num_query_tokens} "
                    "image placeholders and the answer; shorten it or raise `max_length`"
                )
            # Tokenizing anew for each turn takes time that grows with the square of the dialogue: turns that cannot
            # hold as many tokens as there are too many go together.
            sizes = sizes or self._most_tokens(turns, normalize)
            freed = dropped = 0
            while dropped < len(turns) and freed < excess:
                freed += sizes[dropped]
                dropped += 1
            turns, sizes = turns[dropped:], sizes[dropped:]

    def _most_tokens(self, turns: Sequence[Turn], normalize) -> list[int]:
        """For each turn no fewer tokens than a prompt has for it, where tokens may reach across its ends."""
        alone = [normalize(self._prompt(write_chat([turn], ""))) for turn in turns]
        ids = self.tokenizer(alone, split_special_tokens=True, verbose=False)["input_ids"]
        return [max(len(text.encode()), len(row)) for text, row in zip(alone, ids, strict=True)]

    def _prompt(self, messages: list[dict], template: str | None = None, **variables) -> str:
        known = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        template = known.get(template or "default", template)
        if template is None:
            raise ValueError(f"No chat template is the default: name one of {', '.join(map(repr, known))}.")
        return render(template, messages, **{**self.tokenizer.special_tokens_map, **variables})

    def apply_chat_template(
        self,
        conversation: list[dict] | list[list[dict]],
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = "auto",
        return_dict: bool = False,
        processor_kwargs: dict | None = None,
        **kwargs,
    ):
        """
        The processor's inputs for one chat or a batch of chats, with the images taken from the messages.

        Args:
            conversation: messages `{"role": "user" | "assistant", "content": text or blocks}` that take turns,
                beginning with the user. A chat holds two images, before and after, or none.
            chat_template (`str`, *optional*): only without `tokenize`: another template, or the name of one.
            add_generation_prompt (`bool`, *optional*): that an answer is to follow, for which the prompt needs nothing
                more. Not after an assistant message.
            continue_final_message (`bool` or `"content"`, *optional*): whether a final assistant message is the
                beginning of the answer; otherwise it is the right answer, and the output has `labels`.
            tokenize (`bool`, *optional*): whether to return token ids rather than the prompt as a string, in which the
                normaliser has changed nothing yet.
            return_tensors (`str`, *optional*): as for [`~DeltaVLMProcessor.__call__`]; `"auto"` leaves it out.
            return_dict (`bool`, *optional*): whether to return all of the model's inputs rather than `input_ids`.
            processor_kwargs (`dict`, *optional*): for [`~DeltaVLMProcessor.__call__`], such as `padding`; they may
                also stand by themselves. With `images`, these are the images of the chat, or of each chat, whose
                messages then have none or `{"type": "image"}` alone.

        Raises:
            ValueError: if a message is not of this form, roles do not take turns, a chat's number of images is neither
                0 nor 2, or for what the dialogue form has no place for: system messages, `tools`, `documents`,
                `return_assistant_tokens_mask` (`labels` are -100 but on the final answer).
        """
        if add_generation_prompt and continue_final_message:
            raise ValueError("Give `add_generation_prompt` or `continue_final_message`: an answer begins or goes on.")
        for name in ("tools", "documents", "return_assistant_tokens_mask", "load_audio_from_video"):
            if kwargs.pop(name, None):
                raise ValueError(f"`{name}` is not supported: DeltaVLM's dialogue form has no place for it.")
        if not isinstance(conversation, (list, tuple)):
            raise ValueError(f"A conversation is a list of messages, got {type(conversation).__name__}.")
        if not conversation:
            raise ValueError("The conversation is empty: a chat needs at least one message, a user's.")
        chats = list(conversation) if isinstance(conversation[0], (list, tuple)) else [conversation]
        images, texts, histories, answers = map(list, zip(*map(read_chat, chats), strict=True))
        if add_generation_prompt and answers != [None] * len(chats):
            raise ValueError(
                "With `add_generation_prompt` a chat ends with a question; this one has its answer. Leave the flag "
                "out to learn the answer, or go on with it: `continue_final_message=True`."
            )
        if continue_final_message and (None in answers or continue_final_message not in (True, "content")):
            raise ValueError("`continue_final_message=True` needs a chat that ends with an assistant's message.")
        if not tokenize:
            if kwargs.pop("sanitize_control_tokens", None):
                raise ValueError("`sanitize_control_tokens` needs `tokenize=True`, where it is always done.")
            kwargs.update(add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message)
            prompts = [self._prompt(chat, chat_template, **kwargs) for chat in chats]
            return prompts[0] if chats[0] is conversation else prompts
        if chat_template is not None:
            raise ValueError("Set `processor.chat_template` to tokenize with another template.")
        options = {**(processor_kwargs or {}), **kwargs}
        if return_tensors != "auto":
            options["return_tensors"] = return_tensors
        for name in {"text", "history", "answers"} & options.keys():
            raise ValueError(f"`{name}` comes from the messages: leave it out of the arguments.")
        outputs = self._process(
            self._images_of(images, options.pop("images", None), is_batch=chats[0] is not conversation),
            texts,
            histories,
            answers,
            is_complete=not continue_final_message,
            **options,
        )
        return outputs if return_dict else outputs["input_ids"]

    @staticmethod
    def _images_of(found: list[list], given: Any, is_batch: bool) -> Any:
        """The images of all chats: those in the messages, or what was given for places without."""
        if given is not None:
            if any(image is not None for images in found for image in images):
                raise ValueError("Give the images in the messages or as `images`: only one.")
            return given if is_batch else [given]
        if any(found) and not all(found):
            raise ValueError("Some chats of the batch have images and others have none.")
        if any(image is None for images in found for image in images):
            raise ValueError(f"An image block needs one of {', '.join(map(repr, IMAGE_SOURCES))}.")
        return found if found[0] else None

    @property
    def model_input_names(self) -> list[str]:
        return [
            *self.tokenizer.model_input_names,
            *self.image_processor.model_input_names,
            "qformer_input_ids",
            "qformer_attention_mask",
        ]


__all__ = ["DeltaVLMProcessor"]
