"""`ChangeSession`: a conversation about a pair that is encoded once."""

import pytest
import torch

from deltavlm_hf import ChangeSession

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
