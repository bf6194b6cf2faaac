"""Conversations about a pair: encoded once, and with fixed change tokens read once."""

import pytest
import torch
from generating import GREEDY, plain_answer

from deltavlm_hf import ChangeSession


@pytest.fixture
def session(model, processor, pairs):
    return ChangeSession(model, processor, *pairs[0])


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
