"""`ChangeSession`: a conversation about a pair that is encoded once."""

import copy
from itertools import count

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DynamicCache, GenerationConfig, TextStreamer

from deltavlm_hf import ChangeSession, DeltaVLMImageProcessor, ask_pairs
from deltavlm_hf.data import PairCollator
from deltavlm_hf.inference import answer

GREEDY = {"num_beams": 1, "max_new_tokens": 8}


@pytest.fixture
def session(model, processor, pairs):
    return ChangeSession(model, processor, *pairs[0])


def plain_answer(model, processor, pair, question, history) -> str:
    inputs = processor(images=pair, text=question, history=history, return_tensors="pt")
    ids = model.generate(**inputs, **GREEDY)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_answers_equal_plain_generation(session, model, processor, pairs):
    for question in ("What changed?", "Where?", "How many roads?"):
        expected = plain_answer(model, processor, pairs[0], question, list(session.history))
        assert session.ask(question, **GREEDY) == expected
        assert session.history[-1] == (question, expected)


def test_the_pair_is_encoded_once(session, model):
    calls = []
    hook = model.vision_model.register_forward_hook(lambda *call: calls.append(call))
    session.ask("What changed?", **GREEDY)
    session.ask("Where?", **GREEDY)
    hook.remove()
    assert calls == []


def test_streaming_gives_the_answer_in_pieces(session, model, processor, pairs):
    pieces = []
    answer = session.ask("What changed?", stream=pieces.append, max_new_tokens=8)
    assert len(pieces) > 1 and "".join(pieces).strip() == answer
    assert answer == plain_answer(model, processor, pairs[0], "What changed?", [])


def test_questions_asked_apart(session, model, processor, pairs):
    questions = ["What changed?", "Please determine how many roads and buildings have changed?"]
    expected = [plain_answer(model, processor, pairs[0], question, []) for question in questions]
    assert session.ask_apart(questions, **GREEDY) == expected
    assert session.history == []


def test_sessions_do_not_share(model, processor, pairs):
    first, second = (ChangeSession(model, processor, *pair) for pair in pairs)
    first.ask("What changed?", **GREEDY)
    assert second.history == []
    assert not torch.equal(first.pair_features, second.pair_features)


class TestTheFormOfAQuestion:
    """Whoever asks: the model reads what the collator trained it on."""

    QUESTION = "What changed?"

    @pytest.fixture
    def read(self, model):
        """The prompts that the language model reads, one at a time: ids without placeholders."""
        seen = []

        def keep(module, arguments, inputs):
            if inputs["input_ids"].shape[1] > 1:
                seen.extend(inputs["input_ids"][:, 8:].tolist())

        hook = model.register_forward_pre_hook(keep, with_kwargs=True)
        yield seen
        hook.remove()

    @pytest.fixture
    def trained(self, processor, pairs) -> list[int]:
        row = {"before": pairs[0][0], "after": pairs[0][1], "turns": [{"question": self.QUESTION, "answer": "no"}]}
        batch = PairCollator(processor)([row])
        return batch["input_ids"][0][batch["labels"][0] == -100][8:].tolist()

    def test_it_is_a_dialogue_of_one_question(self, processor, trained):
        assert processor.tokenizer.decode(trained, skip_special_tokens=True) == "q what changed?"

    @pytest.mark.parametrize("way", ["answer", "ask_pairs", "ask", "ask, fixed", "ask_apart", "chat"])
    def test_everywhere(self, way, read, trained, model, processor, pairs):
        session = ChangeSession(model, processor, *pairs[0], fixed_change_tokens=way == "ask, fixed")
        if way == "answer":
            answer(model, processor, [self.QUESTION], images=pairs[:1], **GREEDY)
        elif way == "ask_pairs":
            list(ask_pairs(model, processor, pairs[:1], [self.QUESTION], **GREEDY))
        elif way == "ask_apart":
            session.ask_apart([self.QUESTION], **GREEDY)
        elif way == "chat":
            content = [{"type": "image", "image": image} for image in pairs[0]]
            messages = [{"role": "user", "content": [*content, {"type": "text", "text": self.QUESTION}]}]
            inputs = processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            model.generate(**inputs, **GREEDY)
        else:
            session.ask(self.QUESTION, **GREEDY)
        assert read == [trained]

    def test_as_it_stands(self, read, trained, model, processor, pairs):
        answer(model, processor, [self.QUESTION], [None], images=pairs[:1], **GREEDY)
        assert (
            read == processor(text=self.QUESTION)["input_ids"][:1]
            or read[0] == (processor(text=self.QUESTION)["input_ids"][0][8:])
        )


class TestOptionsOfGenerate:
    """They do what they say in every helper, or the helper says that they cannot."""

    QUESTIONS = ("What changed?", "Where are there new houses?")

    def ways(self, model, processor, pairs):
        def session(**kwargs):
            return ChangeSession(model, processor, *pairs[0], **kwargs)

        return {
            "answer": lambda **kwargs: answer(model, processor, self.QUESTIONS, images=pairs, **kwargs),
            "ask_pairs": lambda **kwargs: ask_pairs(model, processor, pairs, self.QUESTIONS, **kwargs),
            "ask": lambda **kwargs: session().ask(self.QUESTIONS[0], **kwargs),
            "ask, fixed": lambda **kwargs: session(fixed_change_tokens=True).ask(self.QUESTIONS[0], **kwargs),
            "ask_apart": lambda **kwargs: session().ask_apart(self.QUESTIONS, **kwargs),
        }

    @pytest.mark.parametrize("way", ["answer", "ask_pairs", "ask", "ask, fixed", "ask_apart"])
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_return_sequences": 2, "do_sample": True}, "`num_return_sequences=2`: .* one answer"),
            (
                {"generation_config": GenerationConfig(num_return_sequences=2, do_sample=True)},
                "`num_return_sequences=2`",
            ),
            ({"return_dict_in_generate": True}, "`return_dict_in_generate`: here answers are text alone"),
            ({"output_scores": True}, "`output_scores`: here answers are text alone"),
            ({"output_hidden_states": True}, "`output_hidden_states`: here"),
            ({"generation_config": GenerationConfig(return_dict_in_generate=True)}, "`return_dict_in_generate`"),
            ({"max_length": 40}, "`max_length` would count the prompt .* say `max_new_tokens`"),
            ({"guidance_scale": 1.5, "num_beams": 2}, "2 beams"),
        ],
        ids=str,
    )
    def test_what_has_no_place(self, way, options, message, model, processor, pairs):
        with pytest.raises(ValueError, match=message):
            self.ways(model, processor, pairs)[way](**options)

    def test_answers_of_the_models_own_defaults(self, model, processor, pairs):
        expected = answer(model, processor, self.QUESTIONS, images=pairs, **GREEDY)
        changed = copy.copy(model)
        changed.generation_config = copy.deepcopy(model.generation_config)
        changed.generation_config.return_dict_in_generate = changed.generation_config.output_scores = True
        assert answer(changed, processor, self.QUESTIONS, images=pairs, **GREEDY) == expected
        changed.generation_config.num_return_sequences = 2
        with pytest.raises(ValueError, match="`num_return_sequences=2`"):
            answer(changed, processor, self.QUESTIONS, images=pairs, **GREEDY)
        assert answer(changed, processor, self.QUESTIONS, images=pairs, num_return_sequences=1, **GREEDY) == expected

    def test_guidance(self, model, processor, pairs):
        """In a batch and from a cache as by `generate` alone, and not as without."""
        options = {**GREEDY, "guidance_scale": 3.0}
        expected = []
        for pair, question in zip(pairs, self.QUESTIONS, strict=True):
            inputs = processor(images=pair, text=question, history=[], return_tensors="pt")
            ids = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
            expected.append(processor.decode(ids, skip_special_tokens=True).strip())
        assert answer(model, processor, self.QUESTIONS, images=pairs, **options) == expected
        assert answer(model, processor, self.QUESTIONS, images=pairs, **GREEDY) != expected
        session = ChangeSession(model, processor, *pairs[0], fixed_change_tokens=True)
        assert model.generation_config.num_beams > 1  # by itself, but not here
        assert session.ask(self.QUESTIONS[0], guidance_scale=3.0, max_new_tokens=8) == expected[0]

    def test_streamers(self, model, processor, pairs, capsys):
        streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        (said,) = answer(model, processor, self.QUESTIONS[:1], images=pairs[:1], streamer=streamer, **GREEDY)
        assert capsys.readouterr().out.strip() == said
        session = ChangeSession(model, processor, *pairs[0])
        for ask, message in (
            (lambda: answer(model, processor, self.QUESTIONS, images=pairs, streamer=streamer), "got 2 questions"),
            (lambda: session.ask_apart(self.QUESTIONS, streamer=streamer), "got 2 questions"),
            (lambda: ask_pairs(model, processor, pairs, self.QUESTIONS, streamer=streamer), "follows one answer"),
            (lambda: session.ask("What?", stream=print, streamer=streamer), "only one of them"),
            (lambda: session.ask("What?", stream=print, num_beams=2), "2 beams choose at the end: take num_beams=1"),
            (lambda: session.ask("What?", stream=print, generation_config=GenerationConfig(num_beams=2)), "2 beams"),
        ):
            with pytest.raises(ValueError, match=message):
                ask()
        assert session.history == []

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_beams": 3}, "`fixed_change_tokens` keeps the cache of one answer, and 3 beams"),
            ({"generation_config": GenerationConfig(num_beams=3)}, "3 beams"),
            ({"cache_implementation": "static"}, "`cache_implementation` does not go with `fixed_change_tokens`"),
            ({"past_key_values": DynamicCache()}, "`past_key_values` does not go"),
        ],
        ids=lambda value: str(value)[:30],
    )
    def test_what_does_not_go_with_fixed_change_tokens(self, options, message, model, processor, pairs):
        session = ChangeSession(model, processor, *pairs[0], fixed_change_tokens=True)
        with pytest.raises(ValueError, match=message):
            session.ask("What?", **options)
        with pytest.raises(ValueError, match="`assistant_model` does not go"):
            session.ask("What?", assistant_model=model)

    @pytest.mark.parametrize("fixed_change_tokens", [False, True])
    def test_a_generation_config_warns_of_nothing(self, fixed_change_tokens, model, processor, pairs, caplog):
        options = {"generation_config": GenerationConfig(num_beams=1, max_new_tokens=8)}
        session = ChangeSession(model, processor, *pairs[0], fixed_change_tokens=fixed_change_tokens)
        assert session.ask("What changed?", stream=lambda piece: None, **options) == plain_answer(
            model, processor, pairs[0], "What changed?", []
        )
        assert caplog.text == ""

    def test_one_question_as_a_string(self, model, processor, pairs):
        for ask in (answer, ask_pairs):
            with pytest.raises(ValueError, match="list of questions, got the string 'What"):
                ask(model, processor, "What changed?", images=pairs) if ask is answer else ask(
                    model, processor, pairs, "What changed?"
                )


class TestAskPairs:
    QUESTIONS = ("How many new buildings are there in the top left?", "Where?", "What changed?")

    @pytest.mark.parametrize("batch_size", [1, 2, 5, 32])
    def test_answers_equal_plain_generation(self, batch_size, model, processor, pairs):
        three = [*pairs, pairs[0][::-1]]
        expected = [
            [plain_answer(model, processor, pair, question, []) for question in self.QUESTIONS] for pair in three
        ]
        assert expected[0] != expected[1]
        assert (
            list(ask_pairs(model, processor, iter(three), self.QUESTIONS, batch_size=batch_size, **GREEDY)) == expected
        )

    def test_each_pair_is_encoded_once_and_fetched_when_needed(self, model, processor, pairs):
        encoded, fetched = [], []
        hook = model.vision_model.register_forward_hook(lambda module, given, output: encoded.append(len(given[0])))

        def fetch():
            for number in range(5):
                fetched.append(number)
                yield pairs[number % 2]

        try:
            answers = ask_pairs(model, processor, fetch(), self.QUESTIONS, batch_size=2, **GREEDY)
            next(answers)
            assert fetched == [0, 1]
            assert len(list(answers)) == 4
        finally:
            hook.remove()
        assert encoded == [4, 4, 2]  # images, two for each pair

    @pytest.fixture
    def broken(self, tmp_path):
        path = tmp_path / "broken.png"
        path.write_bytes(b"no image")
        return path

    @pytest.mark.parametrize("batch_size", [1, 2, 5])
    def test_a_bad_image_comes_after_what_was_answered(self, batch_size, model, processor, pairs, broken):
        five = [*pairs, (pairs[0][0], broken), *pairs]
        answers = ask_pairs(model, processor, five, self.QUESTIONS, batch_size=batch_size, **GREEDY)
        assert [len(next(answers)) for _ in range(2)] == [3, 3]
        with pytest.raises(ValueError, match="^pair 3, after image: cannot read .*broken.png"):
            next(answers)

    @pytest.mark.parametrize("batch_size", [1, 2, 8])
    def test_what_cannot_be_used_costs_its_own_answer(self, batch_size, model, processor, pairs, broken, tmp_path):
        given = [pairs[0], (broken, pairs[0][1]), (pairs[0][0],), pairs[1], None, (tmp_path / "none.png",) * 2, pairs]
        found = list(
            ask_pairs(model, processor, given, self.QUESTIONS, batch_size=batch_size, on_error="yield", **GREEDY)
        )
        expected = list(ask_pairs(model, processor, pairs, self.QUESTIONS, **GREEDY))
        assert [found[0], found[3]] == expected
        errors = [str(found[number]) for number in (1, 2, 4, 5, 6)]
        assert errors[0].startswith("pair 2, before image: cannot read")
        assert errors[1].startswith("pair 3: expected 2 images") and errors[2].startswith("pair 5: expected 2 images")
        assert isinstance(found[5], FileNotFoundError) and "pair 6, before image" in errors[3]
        assert errors[4] == "pair 7: expected one pair of images, got 2 pairs"

    @pytest.mark.parametrize("batch_size", [1, 2, 8])
    def test_what_cannot_be_answered_costs_its_own_answer(self, batch_size, model, processor, pairs):
        """An error of generation, which a whole batch of questions shares."""
        black = (Image.new("RGB", (64, 64)),) * 2
        dark = float(processor(images=black, return_tensors="pt")["pixel_values"].max())

        def fail(where):
            def hook(module, arguments, output):
                if where == "vision_model" and (arguments[0].amax((1, 2, 3)) == dark).any():
                    raise RuntimeError("too dark")
                if where == "difference" and (arguments[0] == arguments[1]).all((1, 2)).any():
                    output[(arguments[0] == arguments[1]).all((1, 2))] = float("nan")

            return getattr(model, where).register_forward_hook(hook)

        expected = list(ask_pairs(model, processor, pairs, self.QUESTIONS, **GREEDY))
        options = {"batch_size": batch_size, **GREEDY}
        for where, message in (("vision_model", "too dark"), ("difference", "pair 2: .*scores are NaN or infinite")):
            hook = fail(where)
            try:
                three = [pairs[0], black, pairs[1]]
                found = list(ask_pairs(model, processor, three, self.QUESTIONS, on_error="yield", **options))
                assert [found[0], found[2]] == expected
                with pytest.raises(Exception, match=message):
                    raise found[1]
                answers = ask_pairs(model, processor, three, self.QUESTIONS, **options)
                assert next(answers) == expected[0]
                with pytest.raises(type(found[1]), match=message):
                    next(answers)
            finally:
                hook.remove()

    def test_what_fails_in_fetching_is_raised_after_what_was_fetched(self, model, processor, pairs):
        def fetch():
            yield from pairs
            raise KeyError("no more")

        for on_error in ("raise", "yield"):
            answers = ask_pairs(model, processor, fetch(), self.QUESTIONS, on_error=on_error, **GREEDY)
            assert [len(next(answers)) for _ in range(2)] == [3, 3]
            with pytest.raises(KeyError, match="no more"):
                next(answers)

    @pytest.mark.parametrize("batch_size", [1, 2, 8])
    def test_pairs_of_every_form(self, batch_size, model, processor, pairs):
        options = {"batch_size": batch_size, **GREEDY}
        expected = list(ask_pairs(model, processor, pairs, self.QUESTIONS, **options))
        stacked = np.stack([np.stack([np.asarray(image) for image in pair]) for pair in pairs])  # (2, 2, H, W, 3)
        channels_first = torch.from_numpy(stacked).permute(0, 1, 4, 2, 3)
        for given in (
            list(stacked),
            iter(stacked),
            stacked,
            channels_first,
            list(channels_first),
            [stacked[0], list(pairs[1])],
            [tuple(channels_first[0]), stacked[1]],
        ):
            assert list(ask_pairs(model, processor, given, self.QUESTIONS, **options)) == expected

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"batch_size": 0}, "`batch_size` must be an integer of at least 1, got 0"),
            ({"batch_size": 2.0}, "`batch_size` must be an integer of at least 1, got 2.0"),
            ({"batch_size": None}, "`batch_size` .* got None"),
            ({"on_error": "skip"}, "`on_error` must be 'raise' or 'yield', got 'skip'"),
            ({"questions": ["What?", 3]}, "`text` must be strings, got int: 3"),
            ({"questions": ["What?", "why " * 3000]}, "text 2: .* tokens, but only"),
            ({"pairs": 3}, "`pairs` must be an iterable of image pairs, got int"),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_arguments_are_checked_before_anything_is_fetched(self, arguments, message, model, processor):
        numbers = count()
        with pytest.raises(ValueError, match=message):
            ask_pairs(model, processor, **{"pairs": numbers, "questions": self.QUESTIONS, **arguments})
        assert next(numbers) == 0

    def test_nothing_to_ask(self, model, processor, pairs):
        assert list(ask_pairs(model, processor, [], self.QUESTIONS)) == []
        assert list(ask_pairs(model, processor, pairs, [])) == [[], []]

    def test_one_question_as_a_string(self, model, processor, pairs):
        with pytest.raises(ValueError, match="list of questions"):
            ask_pairs(model, processor, pairs, "What changed?")


class TestFixedChangeTokens:
    QUESTIONS = ("What changed?", "Where?", "How many roads?", "Are there new buildings?")

    def recomputed(self, model, processor, pair, question, history, tokens) -> str:
        inputs = processor(images=pair, text=question, history=history, return_tensors="pt")
        prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        ids = model.generate(**prompt, mm_encoder_outputs={"image": tokens}, **GREEDY)
        return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    def first_tokens(self, model, processor, pair, question, history=()):
        inputs = processor(images=pair, text=question, history=history, return_tensors="pt")
        wanted = ("pixel_values", "qformer_input_ids", "qformer_attention_mask")
        with torch.no_grad():
            return model.get_image_features(**{name: inputs[name] for name in wanted}, return_dict=True)

    def test_answers_are_those_of_reading_everything_again(self, model, processor, pairs):
        session = ChangeSession(model, processor, *pairs[0], fixed_change_tokens=True)
        tokens = self.first_tokens(model, processor, pairs[0], self.QUESTIONS[0])
        for question in self.QUESTIONS:
            expected = self.recomputed(model, processor, pairs[0], question, list(session.history), tokens)
            assert session.ask(question, **GREEDY) == expected

    def test_later_turns_read_only_what_is_new(self, model, processor, pairs):
        read = []
        hook = model.language_model.register_forward_pre_hook(
            lambda module, arguments, inputs: read.append(inputs["inputs_embeds"].shape[1]), with_kwargs=True
        )
        try:
            session = ChangeSession(model, processor, *pairs[0], fixed_change_tokens=True)
            for turn, question in enumerate(self.QUESTIONS):
                prompt = processor(text=[question], history=[session.history], return_tensors="pt")["input_ids"]
                read.clear()
                session.ask(question, **GREEDY)
                assert read[0] == prompt.shape[1] if turn == 0 else read[0] < prompt.shape[1] - 8  # change tokens
        finally:
            hook.remove()

    def test_a_changed_history_is_read_again(self, model, processor, pairs):
        session = ChangeSession(model, processor, *pairs[0], fixed_change_tokens=True)
        tokens = self.first_tokens(model, processor, pairs[0], self.QUESTIONS[0])
        for question in self.QUESTIONS[:3]:
            session.ask(question, **GREEDY)
        session.history[:] = [("Is it winter?", "no")]
        expected = self.recomputed(model, processor, pairs[0], self.QUESTIONS[3], [("Is it winter?", "no")], tokens)
        assert session.ask(self.QUESTIONS[3], **GREEDY) == expected

    def test_after_an_error_it_goes_on(self, model, processor, pairs):
        session = ChangeSession(model, processor, *pairs[0], fixed_change_tokens=True)
        tokens = self.first_tokens(model, processor, pairs[0], self.QUESTIONS[0])
        session.ask(self.QUESTIONS[0], **GREEDY)
        with pytest.raises(RuntimeError, match="stop here"):

            def fail(piece):
                raise RuntimeError("stop here")

            session.ask(self.QUESTIONS[1], stream=fail, max_new_tokens=8)
        expected = self.recomputed(model, processor, pairs[0], self.QUESTIONS[2], list(session.history), tokens)
        assert session.ask(self.QUESTIONS[2], **GREEDY) == expected


class TestWhatDoesNotFit:
    """A processor of another model, and weights that are no numbers: an error, not an answer."""

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize(
        "name", ["vision_model.post_layernorm.weight", "query_tokens", "language_model.lm_head.weight"]
    )
    @pytest.mark.parametrize("options", [GREEDY, {"num_beams": 2}, {"num_beams": 1, "do_sample": True}], ids=str)
    def test_weights_that_are_no_numbers(self, options, name, value, model, processor, pairs):
        damaged = copy.deepcopy(model)
        damaged.get_parameter(name).data.flatten()[-1] = value
        session = ChangeSession(damaged, processor, *pairs[0])
        with pytest.raises(ValueError, match="scores are NaN or infinite"):
            session.ask("What changed?", **{"max_new_tokens": 2, **options})
        assert session.history == []

    def test_the_check_can_be_left_to_transformers(self, model, processor, pairs):
        damaged = copy.deepcopy(model)
        damaged.language_model.lm_head.weight.data[7] = float("nan")
        session = ChangeSession(damaged, processor, *pairs[0])
        assert isinstance(session.ask("What?", **GREEDY, remove_invalid_values=True), str)

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            ({"num_query_tokens": 4}, "hold \\[4\\] placeholders .* give 8 change tokens"),
            ({"image_token_id": 5}, "hold \\[0\\] placeholders"),
        ],
        ids=str,
    )
    def test_placeholders_of_another_model(self, other, message, model, processor, pairs):
        changed = copy.deepcopy(processor)
        for name, value in other.items():
            setattr(changed, name, value)
        with pytest.raises(ValueError, match=message):
            ChangeSession(model, changed, *pairs[0]).ask("What changed?", **GREEDY)

    @pytest.mark.parametrize("side", [28, 57, 112])
    def test_image_size_of_another_model(self, side, model, processor, pairs):
        changed = copy.deepcopy(processor)
        changed.image_processor = DeltaVLMImageProcessor(size={"height": side, "width": side})
        with pytest.raises(ValueError, match=rf"have the size \({side}, {side}\), expected \(56, 56\)"):
            ChangeSession(model, changed, *pairs[0])

    @pytest.mark.parametrize("name", ["tokenizer", "qformer_tokenizer"])
    def test_tokens_that_the_model_does_not_know(self, name, model, processor, pairs):
        changed = copy.deepcopy(processor)
        getattr(changed, name).add_tokens("houseboat")
        if name == "tokenizer":
            changed.tokenizer.add_tokens("houseboats")  # the first has the id of the placeholder's last row
        with pytest.raises(ValueError, match=f"not in the model's vocabulary of .*`{name}` is another model's"):
            ChangeSession(model, changed, *pairs[0]).ask("Is there a houseboat or are there houseboats", **GREEDY)
