"""`ChangeSession`: a conversation about a pair that is encoded once."""

import copy

import pytest
import torch

from deltavlm_hf import ChangeSession, DeltaVLMImageProcessor, ask_pairs

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

    def test_a_bad_image_comes_after_what_was_answered(self, model, processor, pairs, tmp_path):
        broken = tmp_path / "broken.png"
        broken.write_bytes(b"no image")
        answers = ask_pairs(model, processor, [pairs[0], (broken, broken)], self.QUESTIONS, batch_size=1, **GREEDY)
        assert len(next(answers)) == 3
        with pytest.raises(ValueError, match="broken.png"):
            next(answers)

    def test_nothing_to_ask(self, model, processor, pairs):
        assert list(ask_pairs(model, processor, [], self.QUESTIONS)) == []
        assert list(ask_pairs(model, processor, pairs, [])) == [[], []]

    def test_one_question_as_a_string(self, model, processor, pairs):
        with pytest.raises(ValueError, match="list of questions"):
            list(ask_pairs(model, processor, pairs, "What changed?"))


@pytest.mark.parametrize("fixed_change_tokens", [False, True])
def test_a_pair_encoded_with_other_weights_is_refused(fixed_change_tokens, model, processor, pairs):
    model = copy.deepcopy(model)
    session = ChangeSession(model, processor, *pairs[0], fixed_change_tokens=fixed_change_tokens)
    session.ask("What changed?", **GREEDY)
    model.vision_model.encoder.layers[0].mlp.fc1.bias.data.add_(0.1)
    with pytest.raises(ValueError, match="made with other weights"):
        session.ask("Where?", **GREEDY)
    assert len(session.history) == 1


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

    @pytest.mark.parametrize("part", ["language_model", "qformer"])
    def test_after_training_nothing_old_is_read(self, part, model, processor, pairs):
        model = copy.deepcopy(model)
        session = ChangeSession(model, processor, *pairs[0], fixed_change_tokens=True)
        session.ask(self.QUESTIONS[0], **GREEDY)
        with torch.no_grad():
            for weight in getattr(model, part).parameters():
                weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
        tokens = self.first_tokens(model, processor, pairs[0], self.QUESTIONS[1], list(session.history))
        expected = self.recomputed(model, processor, pairs[0], self.QUESTIONS[1], list(session.history), tokens)
        assert session.ask(self.QUESTIONS[1], **GREEDY) == expected


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
