"""What a client reads of an answer as it comes: pieces of the text that it will be, and nothing else."""

from hypothesis import given, settings
from hypothesis import strategies as st

from deltavlm_hf.serving.pairs import Pair
from deltavlm_hf.serving.rows import Row

WORDS = st.text("abrod  ,\n", min_size=1, max_size=40)


def follow(processor, text: str, end: bool, **options) -> tuple[Row, list]:
    """The row that a model's tokens for a text make, and what was told of it."""
    told = []
    row = Row(Pair("pair", None), "q", [], 0, tell=told.append, **{"max_tokens": 1000, **options})
    row.begin()
    tokenizer = processor.tokenizer
    for token in [*tokenizer(text, add_special_tokens=False)["input_ids"], *[tokenizer.eos_token_id] * end]:
        if row.take(token, [tokenizer.eos_token_id], processor):
            break
    return row, told


@settings(max_examples=40)
@given(WORDS, st.lists(st.text("abrod ", min_size=1, max_size=5), max_size=4).map(tuple))
def test_pieces_are_the_answer_cut_before_a_stop(tiny_processor, text, stop):
    ids = tiny_processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    decoded = tiny_processor.batch_decode([ids], skip_special_tokens=True)[0].lstrip()
    streamed, told = follow(tiny_processor, text, True, stop=stop, stream=True)
    whole, end = follow(tiny_processor, text, True, stop=stop)
    assert streamed.text == whole.text == streamed.text.rstrip()
    assert streamed.finish_reason == "stop"
    assert told[-1] is None and end == [None]
    assert all(told[:-1]) and "".join(told[:-1]) == streamed.text

    assert decoded.startswith(streamed.text) and not any(each in streamed.text for each in stop)
    if len(stop) < 2:  # of several the one that is whole first ends it
        assert streamed.text == decoded.partition(*stop or ["\0"])[0].rstrip()


@settings(max_examples=40)
@given(WORDS, st.integers(1, 10))
def test_an_answer_is_as_long_as_was_asked_for(tiny_processor, text, most):
    row, told = follow(tiny_processor, text, False, max_tokens=most, stream=True)
    ids = tiny_processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert row.ids == ids[:most]
    assert row.finish_reason == ("length" if len(ids) >= most else None)
    if row.finish_reason:
        assert "".join(told[:-1]) == row.text


def test_pieces_come_before_the_end(tiny_processor):
    _, told = follow(tiny_processor, "a road and a house are built", True, stream=True)
    assert len(told) > 4
