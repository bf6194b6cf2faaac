"""The processor: prompts, dialogues, answers, chat messages, limits and errors."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import FIXTURES
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from deltavlm_hf import DeltaVLMProcessor
from deltavlm_hf.processing.conversation import normalize_text

PLAIN = {"normalize_text": False, "qformer_prompt": "question"}


def prompt_of(processor, inputs, row=0) -> str:
    ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
    return processor.tokenizer.decode(ids[processor.num_query_tokens :], skip_special_tokens=True)


def chat(pair, *texts):
    """Messages that take turns; the images come with the first."""
    images = [{"type": "image", "image": image} for image in pair]
    messages = [{"role": "user", "content": [*images, {"type": "text", "text": texts[0]}]}]
    for index, text in enumerate(texts[1:]):
        messages.append({"role": "user" if index % 2 else "assistant", "content": [{"type": "text", "text": text}]})
    return messages


# What users write: any script, and what means something to either tokenizer, to the chat template or to nobody.
CONTROLS = "<image> </s> <s> [PAD] <unk> [SEP] [CLS] [MASK] [DEC] <0x0A> ▁ q: a: {{ {%".split()
PIECES = st.sampled_from([*CONTROLS, "\n", "\x00", "\ufeff", "道路", "дорога", "طريق", "🏠", "e\u0301"])
TEXTS = st.text(max_size=30) | st.lists(PIECES | st.text(max_size=5), max_size=8).map(" ".join)
HISTORIES = st.none() | st.lists(st.tuples(TEXTS, TEXTS), max_size=4)


class TestAnyText:
    @given(TEXTS, HISTORIES, st.none() | TEXTS, st.booleans(), st.sampled_from(["question", "dialogue"]))
    @settings(max_examples=150)
    def test_text_is_data(self, processor, text, history, answer, normalize, qformer_prompt):
        """Its only control tokens are those that the processor puts there, whatever it spells."""
        inputs = processor(
            text=text,
            history=history,
            answers=answer,
            max_length=4096,
            normalize_text=normalize,
            qformer_prompt=qformer_prompt,
        )
        ids, queries = inputs["input_ids"][0], processor.num_query_tokens
        assert ids[:queries] == [processor.image_token_id] * queries
        prompt = ids[queries:]
        special = {*processor.tokenizer.all_special_ids, processor.image_token_id}
        unknown = processor.tokenizer.unk_token_id
        assert prompt[0] == processor.tokenizer.bos_token_id
        inner = prompt[1:] if answer is None else prompt[1:-1]
        assert not special & set(inner) - {unknown}
        instruction = inputs["qformer_input_ids"][0]
        assert len(instruction) <= processor.qformer_max_length
        controls = {*processor.qformer_tokenizer.all_special_ids} - {processor.qformer_tokenizer.unk_token_id}
        assert not controls & set(instruction[1:-1])
        if answer is None:
            assert "labels" not in inputs
        else:
            learned = [label for label in inputs["labels"][0] if label != -100]
            assert ids[-len(learned) :] == learned and learned[-1] == processor.tokenizer.eos_token_id
            alone = normalize_text(answer) if normalize else answer
            expected = processor.tokenizer(alone, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            assert learned[:-1] == expected

    @given(st.lists(st.tuples(TEXTS, HISTORIES, TEXTS), min_size=1, max_size=4), st.booleans(), st.booleans())
    @settings(max_examples=50)
    def test_batch_equals_singles(self, processor, rows, with_answers, normalize):
        texts, histories, answers = map(list, zip(*rows, strict=True))
        shared = {"max_length": 4096, "normalize_text": normalize}
        batch = processor(
            text=texts,
            history=histories,
            answers=answers if with_answers else None,
            padding=True,
            return_tensors="pt",
            **shared,
        )
        for row, (text, history, answer) in enumerate(rows):
            single = processor(text=text, history=history, answers=answer if with_answers else None, **shared)
            real = batch["attention_mask"][row].bool()
            assert batch["input_ids"][row][real].tolist() == single["input_ids"][0]
            seen = batch["qformer_attention_mask"][row].bool()
            assert batch["qformer_input_ids"][row][seen].tolist() == single["qformer_input_ids"][0]
            if with_answers:
                assert batch["labels"][row][real].tolist() == single["labels"][0]
                assert batch["labels"][row][~real].eq(-100).all()


class TestPrompts:
    def test_one_pair(self, processor, pairs):
        inputs = processor(images=pairs[0], text="What changed?", return_tensors="pt", **PLAIN)
        assert inputs["pixel_values"].shape == (1, 2, 3, 56, 56)
        assert inputs["input_ids"][0, :8].eq(processor.image_token_id).all()
        assert inputs["input_ids"][0, 8] == processor.tokenizer.bos_token_id
        assert prompt_of(processor, inputs) == "What changed?"
        assert processor.qformer_tokenizer.decode(inputs["qformer_input_ids"][0]) == "[CLS] what changed? [SEP]"
        assert "labels" not in inputs

    def test_batch(self, processor, pairs):
        inputs = processor(images=pairs, text=["What?", "How many roads are new?"], padding=True, return_tensors="pt")
        assert inputs["pixel_values"].shape == (2, 2, 3, 56, 56)
        assert inputs["attention_mask"][0, 0] == 0  # on the left, as generation needs
        assert inputs["qformer_attention_mask"][0, -1] == 0

    def test_images_alone_and_text_alone(self, processor, pairs):
        assert list(processor(images=pairs[0], return_tensors="pt")) == ["pixel_values"]
        inputs = processor(text="What?", return_tensors="pt")
        assert "pixel_values" not in inputs
        assert inputs["input_ids"].eq(processor.image_token_id).sum() == processor.num_query_tokens

    def test_several_texts_for_one_pair(self, processor, pairs):
        inputs = processor(images=pairs[0], text=["What?", "Where?"], padding=True, return_tensors="pt")
        assert (len(inputs["pixel_values"]), len(inputs["input_ids"])) == (1, 2)

    def test_without_padding(self, processor):
        inputs = processor(text=["What?", "How many roads are new?"])
        assert len(inputs["input_ids"][0]) < len(inputs["input_ids"][1])

    def test_padding_to_a_length(self, processor):
        inputs = processor(text=["What?", "Where?"], padding="max_length", max_length=40, return_tensors="pt")
        assert inputs["input_ids"].shape == (2, 40)

    def test_special_tokens_in_user_text_are_data(self, processor):
        text = "what is <image> and </s> and [PAD] and <unk>?"
        inputs = processor(text=text, return_tensors="pt", **PLAIN)
        prompt = inputs["input_ids"][0, 9:]
        assert not torch.isin(prompt, torch.tensor([processor.image_token_id, 0, 1, 2, 1000])).any()
        assert processor.tokenizer.decode(prompt) == text
        special = torch.tensor(processor.qformer_tokenizer.all_special_ids)
        instruction = processor(text="a [SEP] b [DEC] c", return_tensors="pt", **PLAIN)["qformer_input_ids"][0, 1:-1]
        assert not torch.isin(instruction, special).any()


class TestDialogue:
    HISTORY = [("What changed?", "A road."), ("Anything else?", "Two houses.")]

    def test_form(self, processor):
        inputs = processor(text="Where?", history=self.HISTORY, return_tensors="pt", **PLAIN)
        expected = "q: What changed? a: A road. q: Anything else? a: Two houses. q: Where?"
        assert prompt_of(processor, inputs) == expected

    def test_empty_history_still_takes_the_form(self, processor):
        inputs = processor(text="Where?", history=[], return_tensors="pt", **PLAIN)
        assert prompt_of(processor, inputs) == "q: Where?"

    @pytest.mark.parametrize(("field", "start"), [("question", "[CLS] where"), ("dialogue", "[CLS] q : what")])
    def test_what_the_qformer_reads(self, field, start, processor):
        kwargs = {**PLAIN, "qformer_prompt": field}
        inputs = processor(text="Where?", history=self.HISTORY, return_tensors="pt", **kwargs)
        assert processor.qformer_tokenizer.decode(inputs["qformer_input_ids"][0]).startswith(start)

    def test_long_instructions_lose_their_beginning(self, processor):
        history = [("what " * 200, "nothing")]
        kwargs = {**PLAIN, "qformer_prompt": "dialogue"}
        inputs = processor(text="and where?", history=history, max_length=999, return_tensors="pt", **kwargs)
        assert inputs["qformer_input_ids"].shape == (1, 128)
        assert processor.qformer_tokenizer.decode(inputs["qformer_input_ids"][0]).endswith("and where? [SEP]")

    def test_oldest_turns_are_dropped(self, processor):
        full = processor(text="Where?", history=self.HISTORY, **PLAIN)
        length = len(full["input_ids"][0])
        inputs = processor(text="Where?", history=self.HISTORY, max_length=length - 1, return_tensors="pt", **PLAIN)
        assert prompt_of(processor, inputs) == "q: Anything else? a: Two houses. q: Where?"

    @given(st.lists(st.tuples(st.text(max_size=40), st.text(max_size=40)), max_size=6), st.integers(30, 90))
    @settings(max_examples=50, deadline=None)
    def test_the_current_question_is_never_dropped(self, processor, history, max_length):
        inputs = processor(text="where?", history=history, max_length=max_length, return_tensors="pt", **PLAIN)
        assert inputs["input_ids"].shape[1] <= max_length
        assert prompt_of(processor, inputs).endswith("q: where?")

    def test_the_time_grows_with_the_dialogue_and_not_with_its_square(self, processor, monkeypatch):
        """Counts what is tokenized, which no other load on the machine changes."""
        read = []
        call = type(processor.tokenizer).__call__

        def counting(tokenizer, text, *args, **kwargs):
            read.append(sum(map(len, [text] if isinstance(text, str) else text)))
            return call(tokenizer, text, *args, **kwargs)

        monkeypatch.setattr(type(processor.tokenizer), "__call__", counting)
        history = [(f"What changed in the field number {number}?", "nothing, but a road") for number in range(400)]
        processor(text="Where?", history=history, max_length=120, **PLAIN)
        assert sum(read) < 12 * sum(len(question) + len(answer) for question, answer in history)

    def test_a_limit_by_default(self, processor, model, caplog):
        """Without `max_length`, what the language model can read counts, with room for an answer."""
        history = [(f"What changed in the field number {number}?", "nothing at all") for number in range(60)]
        inputs = processor(text="Where?", history=history, return_tensors="pt", **PLAIN)
        positions = model.config.text_config.max_position_embeddings
        assert inputs["input_ids"].shape[1] + model.generation_config.max_new_tokens <= positions
        assert prompt_of(processor, inputs).endswith("nothing at all q: Where?")
        assert caplog.text == ""  # no word of prompts that were tried and too long

    def test_a_question_that_does_not_fit(self, processor):
        with pytest.raises(ValueError, match=r"text 2: \d+ tokens, but only 12 fit beside 8 image placeholders"):
            processor(text=["Why?", "why " * 40], max_length=20)


def trained_tokenizer(model, pre_tokenizer, trainer, normalizer=None):
    """A tokenizer that has seen little but dialogues: its tokens reach across the ends of turns."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    turns = ["q: yes a: no ", "q: what? a: a road ", "q: a: ", "q: aaaa a: abab "]
    texts = [turn * number + last for turn in turns for number in range(1, 9) for last in ("q: ", "q: where?")]
    tokenizer.train_from_iterator(texts, trainer)
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def tokenizers() -> dict:
    special = ["<pad>", "<unk>", "<s>", "</s>"]
    byte_level, alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), ByteLevel.alphabet()
    bpe = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    unigram = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False)
    metaspace = pre_tokenizers.Metaspace(split=False)
    return {
        "BPE": trained_tokenizer(models.BPE(), byte_level, bpe),
        "unigram": trained_tokenizer(models.Unigram(), metaspace, unigram, normalizers.NFKC()),
    }


@pytest.fixture(scope="module")
def processors(processor):
    parts = processor.image_processor, processor.qformer_tokenizer
    made = {name: DeltaVLMProcessor(parts[0], each, parts[1], 4) for name, each in tokenizers().items()}
    return {"of the authors' form": processor, **made}


TURN_TEXTS = st.lists(
    st.sampled_from(
        ["yes", "no", "what?", "a road", "aaaa", "abab", "", " ", "q:", "a:", "道路", "🏠", "\ufdfa", "İ"]
    ),
    max_size=3,
).map(" ".join)


class TestWhatIsDropped:
    """The prompt is that of dropping the oldest turn, and again, until the rest fits."""

    @staticmethod
    def ids(processor, question, history, **options) -> list[int]:
        return processor(text=question, history=history, **options)["input_ids"][0]

    @given(st.data(), st.sampled_from(["of the authors' form", "BPE", "unigram"]), st.booleans())
    @settings(max_examples=60)
    def test_equals_the_plain_definition(self, processors, data, name, normalize):
        processor, options = processors[name], {"normalize_text": normalize}
        some = data.draw(st.lists(st.tuples(TURN_TEXTS, TURN_TEXTS), min_size=1, max_size=3))
        history = data.draw(st.lists(st.sampled_from(some), max_size=10))
        question = data.draw(TURN_TEXTS)
        kept = [
            self.ids(processor, question, history[start:], max_length=10**6, **options)
            for start in range(len(history) + 1)
        ]
        lengths = [len(ids) for ids in kept]
        max_length = data.draw(st.sampled_from(lengths) | st.integers(lengths[-1], max(lengths)))
        expected = next((ids for ids in kept if len(ids) <= max_length), None)
        if expected is None:
            with pytest.raises(ValueError, match=f"{lengths[-1] - processor.num_query_tokens} tokens, but only"):
                self.ids(processor, question, history, max_length=max_length, **options)
        else:
            assert self.ids(processor, question, history, max_length=max_length, **options) == expected

    def test_more_turns_may_have_fewer_tokens(self, processors):
        """What bisecting over the number of turns would get wrong."""
        processor = processors["BPE"]
        history = [("yes", "no")] * 9
        lengths = [len(self.ids(processor, "", history[start:])) for start in range(10)]
        assert sorted(lengths, reverse=True) != lengths
        for limit in set(lengths):
            expected = next(start for start, length in enumerate(lengths) if length <= limit)
            assert len(self.ids(processor, "", history, max_length=limit)) == lengths[expected]


class TestAnswers:
    def test_labels_cover_answer_and_end(self, processor, pairs):
        texts, answers = ["Changed?", "What?"], ["yes", "two new roads"]
        inputs = processor(images=pairs, text=texts, answers=answers, padding=True, return_tensors="pt")
        for row, answer in enumerate(answers):
            learned = inputs["labels"][row][inputs["labels"][row] != -100]
            assert learned[-1] == processor.tokenizer.eos_token_id
            assert processor.tokenizer.decode(learned, skip_special_tokens=True) == answer
            assert inputs["input_ids"][row][inputs["labels"][row] != -100].equal(learned)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_the_prompt_is_the_one_of_generation(self, side, processor):
        asked = processor(text="What?", history=[("a", "b")], return_tensors="pt")
        taught = processor(
            text=["What?", "How many houses?"],
            history=[[("a", "b")], []],
            answers=["a road", "3"],
            padding=True,
            padding_side=side,
            return_tensors="pt",
        )
        ids = taught["input_ids"][0][taught["attention_mask"][0].bool()]
        assert ids[: asked["input_ids"].shape[1]].equal(asked["input_ids"][0])

    @torch.no_grad()
    def test_the_loss_is_finite_and_falls_on_the_answer(self, model, processor, pairs):
        inputs = processor(images=pairs[0], text="Changed?", answers="yes", return_tensors="pt")
        outputs = model(**inputs)
        learned = inputs["labels"][0, 1:] != -100
        expected = torch.nn.functional.cross_entropy(outputs.logits[0, :-1][learned], inputs["labels"][0, 1:][learned])
        torch.testing.assert_close(outputs.loss, expected)


class TestNormalizer:
    @pytest.mark.parametrize("case", json.loads((FIXTURES / "text.json").read_text()), ids=lambda case: case["in"][:9])
    def test_equals_the_authors(self, case):
        # Their cut after 50 words is left out on purpose.
        assert " ".join(normalize_text(case["in"]).split(" ")[:50]) == case["out"]

    def test_applies_to_the_flattened_dialogue(self, processor):
        """The authors' training samples, from `dialogue.json`."""
        recorded = json.loads((FIXTURES / "dialogue.json").read_text())
        for annotation in recorded["annotations"]:
            values = [turn["value"].replace("<image>", "").strip() for turn in annotation["conversations"]]
            turns = list(zip(values[::2], values[1::2], strict=True))
            samples = [sample for sample in recorded["samples"] if sample["id"] == annotation["id"]]
            for index, sample in enumerate(samples):
                question, answer = turns[index]
                inputs = processor(text=question, history=turns[:index], answers=answer, return_tensors="pt")
                labels = inputs["labels"][0]
                asked = inputs["input_ids"][0, 8:][labels[8:] == -100]
                prompt = processor.tokenizer.decode(asked, skip_special_tokens=True)
                assert " ".join(prompt.split(" ")[:50]) == sample["text_input"]
                learned = processor.tokenizer.decode(labels[labels != -100], skip_special_tokens=True)
                assert learned == sample["text_output"]


class TestChat:
    def test_equals_the_plain_call(self, processor, pairs):
        messages = chat(pairs[0], "What changed?", "A road.", "Where?")
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        expected = processor(
            images=pairs[0], text="Where?", history=[("What changed?", "A road.")], return_tensors="pt"
        )
        assert list(inputs) == list(expected)
        for name in expected:
            assert inputs[name].equal(expected[name])

    def test_as_a_string(self, processor, pairs):
        messages = chat(pairs[0], "What changed?", "A road.", "Where?")
        expected = "q: What changed? a: A road. q: Where?"
        assert processor.apply_chat_template(messages, add_generation_prompt=True) == expected

    def test_batch(self, processor, pairs):
        chats = [chat(pairs[0], "What?"), chat(pairs[1], "What?", "A road.", "Where are the new roads?")]
        inputs = processor.apply_chat_template(
            chats, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
        )
        assert inputs["pixel_values"].shape == (2, 2, 3, 56, 56)

    def test_a_final_answer_gives_labels(self, processor, pairs):
        inputs = processor.apply_chat_template(
            chat(pairs[0], "What?", "A road."), tokenize=True, return_dict=True, return_tensors="pt"
        )
        expected = processor(images=pairs[0], text="What?", history=[], answers="A road.", return_tensors="pt")
        assert inputs["labels"].equal(expected["labels"])
        assert inputs["input_ids"].equal(expected["input_ids"])

    def test_a_final_answer_can_be_continued(self, processor, pairs):
        inputs = processor.apply_chat_template(
            chat(pairs[0], "What?", "A road"),
            continue_final_message=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        assert "labels" not in inputs
        assert prompt_of(processor, inputs) == "q what? a road"

    def test_paths_and_openai_blocks(self, processor, pairs, tmp_path):
        paths = [tmp_path / "before.png", tmp_path / "after.png"]
        for image, path in zip(pairs[0], paths, strict=True):
            image.save(path)
        first = [{"type": "image", "path": str(path)} for path in paths]
        second = [{"type": "image_url", "image_url": {"url": str(path)}} for path in paths]
        expected = processor(images=pairs[0], return_tensors="pt")["pixel_values"]
        for blocks in (first, second):
            messages = [{"role": "user", "content": [*blocks, {"type": "text", "text": "What?"}]}]
            inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
            assert inputs["pixel_values"].equal(expected)

    @pytest.mark.parametrize("tokenize", [True, False])
    @pytest.mark.parametrize(
        ("messages", "message"),
        [
            ([], "at least one message"),
            ("What?", "at least one message, a user's; got 'What\\?'|is a list of messages, got str"),
            (["What?"], "Message 0 must be a dict with 'role' and 'content', got 'What\\?'"),
            ([None], "Message 0 must be a dict"),
            (
                [{"role": "system", "content": "Be brief."}],
                "Message 0 has the role 'system', expected 'user'.*no system",
            ),
            ([{"role": "user", "content": "a"}] * 2, "Message 1 .* expected 'assistant'"),
            ([{"role": "user", "content": "a"}, {"role": "tool", "content": "a"}], "Message 1 has the role 'tool'"),
            ([{"content": "a"}], "Message 0 has the role None, expected 'user'"),
            ([{"role": "user"}], "Message 0 needs 'content', a string or a list of blocks; got None"),
            ([{"role": "user", "content": None}], "Message 0 needs 'content'.* got None"),
            ([{"role": "user", "content": 3}], "Message 0 needs 'content'.* got 3"),
            (
                [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}],
                "Message 1 has 'tool_calls'",
            ),
            ([{"role": "user", "content": ["a"]}], "Message 0 has a block of type None, .* got 'a'"),
            ([{"role": "user", "content": [{"text": "a"}]}], "block of type None, .* got {'text': 'a'}"),
            (
                [{"role": "user", "content": [{"type": "text"}]}],
                "block of type 'text', expected .* got {'type': 'text'}",
            ),
            ([{"role": "user", "content": [{"type": "text", "text": None}]}], "got {'type': 'text', 'text': None}"),
            ([{"role": "user", "content": [{"type": "video", "path": "a"}]}], "block of type 'video'"),
            ([{"role": "user", "content": [{"type": "image", "path": "a"}]}], "two images, before and after; got 1"),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_errors(self, messages, message, tokenize, processor):
        with pytest.raises(ValueError, match=message):
            processor.apply_chat_template([messages] if isinstance(messages, list) else messages, tokenize=tokenize)

    @pytest.mark.parametrize(
        "block", [{"type": "image"}, {"type": "image_url"}, {"type": "image_url", "image_url": {}}]
    )
    def test_images_without_a_source(self, block, processor):
        messages = [{"role": "user", "content": [block, block, {"type": "text", "text": "What?"}]}]
        with pytest.raises(ValueError, match="An image block needs one of 'image', 'url', 'path', 'base64'"):
            processor.apply_chat_template(messages, tokenize=True)

    @pytest.mark.parametrize("is_batch", [False, True])
    def test_images_beside_the_messages(self, is_batch, processor, pairs):
        """As stock processors take them: `processor_kwargs={"images": ...}`."""
        expected = processor(images=pairs[0], text="What?", history=[], return_tensors="pt")
        for blocks in ([], [{"type": "image"}, {"type": "image"}]):
            messages = [{"role": "user", "content": [*blocks, {"type": "text", "text": "What?"}]}]
            images = {"images": [pairs[0]] if is_batch else pairs[0], "return_tensors": "pt"}
            inputs = processor.apply_chat_template(
                [messages] if is_batch else messages, tokenize=True, return_dict=True, processor_kwargs=images
            )
            for name in expected:
                assert inputs[name].equal(expected[name])
        with pytest.raises(ValueError, match="in the messages or as `images`: only one"):
            processor.apply_chat_template(
                chat(pairs[0], "What?"), tokenize=True, processor_kwargs={"images": pairs[0]}
            )

    @pytest.mark.parametrize("tokenize", [True, False])
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"tools": [{"name": "zoom"}]}, "`tools` is not supported"),
            ({"documents": [{"title": "a", "text": "b"}]}, "`documents` is not supported"),
            ({"return_assistant_tokens_mask": True}, "`return_assistant_tokens_mask` is not supported"),
            ({"load_audio_from_video": True}, "`load_audio_from_video` is not supported"),
            ({"add_generation_prompt": True, "continue_final_message": True}, "an answer begins or goes on"),
            ({"continue_final_message": True}, "needs a chat that ends with an assistant's message"),
        ],
        ids=str,
    )
    def test_arguments_without_effect_are_refused(self, arguments, message, tokenize, processor):
        with pytest.raises(ValueError, match=message):
            processor.apply_chat_template([{"role": "user", "content": "a"}], tokenize=tokenize, **arguments)

    @pytest.mark.parametrize("tokenize", [True, False])
    def test_a_question_is_to_follow_but_there_is_its_answer(self, tokenize, processor, pairs):
        with pytest.raises(ValueError, match="this one has its answer.*`continue_final_message=True`"):
            processor.apply_chat_template(chat(pairs[0], "a", "b"), tokenize=tokenize, add_generation_prompt=True)

    @pytest.mark.parametrize("name", ["text", "history", "answers"])
    def test_what_comes_from_the_messages(self, name, processor):
        with pytest.raises(ValueError, match=f"`{name}` comes from the messages"):
            processor.apply_chat_template([{"role": "user", "content": "a"}], tokenize=True, **{name: ["b"]})

    def test_tensors_asked_for_among_the_processors_arguments(self, processor):
        messages = [{"role": "user", "content": "a"}]
        inputs = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, processor_kwargs={"return_tensors": "pt"}
        )
        assert isinstance(inputs["input_ids"], torch.Tensor)

    def test_empty(self, processor):
        with pytest.raises(ValueError, match="conversation is empty"):
            processor.apply_chat_template([], tokenize=True)


class TestErrors:
    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({}, "Give `images`, `text` or both"),
            ({"text": ["a", "b", "c"], "images": 2}, "2 image pairs for 3 texts"),
            ({"images": 1, "answers": "yes"}, "`history` and `answers` belong to a `text`"),
            ({"text": ["a", "b"], "answers": ["yes"]}, "1 answers for 2 texts"),
            ({"text": ["a", "b"], "history": [[]]}, "1 histories for 2 texts"),
            ({"text": ["a", "b"], "answers": ["yes", None]}, "Some `answers` are None"),
            ({"text": ["a", 3]}, "`text` must be strings, got int: 3"),
            ({"text": 3}, "`text` must be a string or a list of them, got int: 3"),
            (
                {"text": "a", "history": [("b", None)]},
                "`history` must hold \\(question, answer\\) pairs, got \\('b', None",
            ),
            ({"text": "a", "return_offsets_mapping": True}, "`return_offsets_mapping=True` is not supported"),
            ({"text": "a", "text_kwargs": {"stride": 2}}, "`stride=2` is not supported"),
            ({"text": "a", "add_special_tokens": False}, "`add_special_tokens=False` is not supported"),
            ({"text": "a", "videos": ["a.mp4"]}, "`videos=.* is not supported"),
            ({"text": "a", "history": ["b", "c"]}, "`history` must hold \\(question, answer\\) pairs, got 'b'"),
            ({"text": "a", "history": [{"question": "b", "answer": "c"}]}, "pairs, got {'question'"),
            ({"text": "a", "qformer_prompt": "both"}, "'both', expected one of question, dialogue"),
        ],
        ids=str,
    )
    def test_what_does_not_go_together(self, kwargs, message, processor, pairs):
        if "images" in kwargs:
            kwargs = {**kwargs, "images": pairs[: kwargs["images"]]}
        with pytest.raises(ValueError, match=message):
            processor(**kwargs)

    def test_single_image(self, processor, pairs):
        with pytest.raises(ValueError, match="before"):
            processor(images=pairs[0][0], text="What?")

    def test_tokenizer_without_padding(self, processor):
        class NoPadding(type(processor.tokenizer)):
            pad_token_id = None

        tokenizer = NoPadding.from_pretrained(FIXTURES / "official" / "llm")
        with pytest.raises(ValueError, match="set `tokenizer.pad_token` first"):
            DeltaVLMProcessor(processor.image_processor, tokenizer, processor.qformer_tokenizer)


class TestDamagedFolders:
    @pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
    @pytest.mark.parametrize("content", ["", "{", "null", "[]"])
    def test_the_qformers_tokenizer_is_not_replaced_by_the_other(self, file, content, processor, tmp_path):
        processor.save_pretrained(tmp_path)
        (tmp_path / "qformer_tokenizer" / file).write_text(content)
        with pytest.raises(ValueError, match=f"{tmp_path} cannot be loaded as a DeltaVLMProcessor"):
            DeltaVLMProcessor.from_pretrained(tmp_path)

    @pytest.mark.parametrize("file", ["tokenizer.json", "qformer_tokenizer/tokenizer.json", "processor_config.json"])
    def test_a_file_that_is_gone(self, file, processor, tmp_path):
        processor.save_pretrained(tmp_path)
        (tmp_path / file).unlink()
        with pytest.raises((ValueError, OSError), match=str(tmp_path)):
            DeltaVLMProcessor.from_pretrained(tmp_path)

    def test_a_chat_template_that_is_none(self, processor, tmp_path):
        processor.save_pretrained(tmp_path)
        (tmp_path / "chat_template.jinja").write_text("{% for message in %}")
        with pytest.raises(ValueError, match="TemplateSyntaxError"):
            DeltaVLMProcessor.from_pretrained(tmp_path)

    @pytest.mark.parametrize(
        "settings",
        [{"num_query_tokens": 0}, {"num_query_tokens": "many"}, {"qformer_max_length": 2}, {"qformer_prompt": "both"}],
        ids=str,
    )
    def test_settings_that_cannot_be(self, settings, processor, tmp_path):
        processor.save_pretrained(tmp_path)
        path = tmp_path / "processor_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
        ((name, value),) = settings.items()
        with pytest.raises(ValueError, match=f"{name}.*{value!r}"):
            DeltaVLMProcessor.from_pretrained(tmp_path)


class TestSaving:
    def test_round_trip(self, processor, pairs, tmp_path):
        processor.save_pretrained(tmp_path)
        loaded = DeltaVLMProcessor.from_pretrained(tmp_path)
        for name in ("num_query_tokens", "qformer_prompt", "qformer_max_length", "normalize_text", "chat_template"):
            assert getattr(loaded, name) == getattr(processor, name)
        call = {"images": pairs, "text": ["What?", "Where?"], "history": [[("a", "b")], []], "answers": ["c", "d"]}
        expected = processor(**call, padding=True, return_tensors="pt")
        actual = loaded(**call, padding=True, return_tensors="pt")
        for name in expected:
            assert actual[name].equal(expected[name])

    def test_decoding(self, processor):
        ids = processor.tokenizer("two new roads", add_special_tokens=False)["input_ids"]
        assert processor.batch_decode(np.array([ids])) == ["two new roads"]
