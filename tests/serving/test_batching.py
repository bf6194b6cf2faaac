"""Many clients at once: questions share batches, and nobody's answer is changed by that."""

import gc
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import torch
from api_server import SECONDS, as_file, ask_about, make_pair, serving, until
from transformers import AutoModelForImageTextToText, AutoProcessor

import deltavlm_hf
from deltavlm_hf import ChangeSession, ask_pairs
from deltavlm_hf.data.questions import INSTRUCTIONS
from deltavlm_hf.serving.rows import Row

BINARY, COUNT, GRID = (INSTRUCTIONS[task] for task in ("binary", "count", "grid"))
QUESTIONS = [*INSTRUCTIONS.values(), "How many buildings were built?", "Where are the new buildings?"]


@pytest.fixture
def model():
    """One of its own: what it does can be watched and held up."""
    return AutoModelForImageTextToText.from_pretrained(deltavlm_hf.tiny())


class Work:
    """What the model is asked to do, and when."""

    def __init__(self, model):
        self.encoded = self.steps = 0
        self.rows: list[int] = []  # of each batch
        self.goes_on = threading.Event()
        self.goes_on.set()
        model.vision_model.register_forward_pre_hook(self.encodes, with_kwargs=True)
        model.qformer.register_forward_pre_hook(self.begins, with_kwargs=True)
        model.language_model.register_forward_pre_hook(self.steps_on)

    def encodes(self, module, arguments, inputs) -> None:
        self.encoded += len(arguments[0] if arguments else inputs["pixel_values"]) // 2

    def begins(self, module, arguments, inputs) -> None:
        self.rows.append(len(inputs["query_embeds"] if "query_embeds" in inputs else arguments[0]))

    def steps_on(self, *_) -> None:
        self.steps += 1
        self.goes_on.wait(SECONDS)


@pytest.fixture
def work(model):
    work = Work(model)
    yield work
    work.goes_on.set()


@pytest.fixture(scope="module")
def pairs():
    return [make_pair(seed) for seed in range(6)]


@pytest.fixture(scope="module")
def files(pairs):
    return [[as_file(image) for image in pair] for pair in pairs]


def complete(address: str, messages: list[dict], **options) -> httpx.Response:
    body = {"model": "tiny", "messages": messages, **options}
    return httpx.post(f"{address}/v1/chat/completions", json=body, timeout=SECONDS)


def text_of(reply: httpx.Response) -> str:
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"]


def metric(address: str, name: str) -> float:
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"deltavlm_{name} "))


@pytest.fixture
def clients():
    with ThreadPoolExecutor(16) as clients:
        yield clients


def test_everybody_has_the_answer_to_the_own_question(model, tiny_processor, pairs, files, clients):
    """With images or an id, streamed or whole, alone or after turns of conversation."""
    expected = list(ask_pairs(model, tiny_processor, pairs, QUESTIONS))
    session = ChangeSession(model, tiny_processor, *pairs[0])
    turns = [(question, session.ask(question)) for question in (BINARY, COUNT, GRID)]

    with serving(model, tiny_processor, batch_size=8) as address:

        def ask(number: int) -> None:
            pair, question = number % len(pairs), number // len(pairs) % len(QUESTIONS)
            options = {"seed": number}
            if number % 5 == 0:
                messages = ask_about(files[0], GRID, *turns[:2])
                assert text_of(complete(address, messages)) == turns[2][1]
            reply = complete(address, ask_about(files[pair], QUESTIONS[question]), **options)
            assert text_of(reply) == expected[pair][question]
            if number % 3 == 0:  # a neighbour that samples
                again = [{"role": "user", "content": QUESTIONS[question]}]
                complete(address, again, pair_id=reply.json()["pair_id"], temperature=1.5, max_tokens=4)
            if number % 4 == 0:
                reply = complete(address, ask_about(files[pair], QUESTIONS[question]), stream=True, max_tokens=3)
                pieces = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
                text = "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces)
                assert expected[pair][question].startswith(text) and text

        list(clients.map(ask, range(40)))
        assert metric(address, "pairs_encoded_total") == len(pairs)
        assert metric(address, "waiting") == 0
        gc.collect()
        assert sum(type(each) is Row for each in gc.get_objects()) <= 8  # of the last batch


def test_what_comes_while_the_model_is_at_work_shares_a_batch(model, tiny_processor, work, files, clients):
    with serving(model, tiny_processor, batch_size=4, wait_ms=0) as address:
        work.goes_on.clear()
        first = clients.submit(complete, address, ask_about(files[0], BINARY))
        until(lambda: work.rows == [1])
        others = [clients.submit(complete, address, ask_about(files[1], BINARY)) for _ in range(3)]
        longer = [clients.submit(complete, address, ask_about(files[2], GRID)) for _ in range(3)]
        until(lambda: metric(address, "waiting") == 6)
        work.goes_on.set()
        for each in (first, *others, *longer):
            text_of(each.result())
    assert work.rows[:2] == [1, 4] and sum(work.rows) == 7
    assert work.encoded == 3


def test_a_question_waits_a_little_for_others(model, tiny_processor, work, files, clients):
    with serving(model, tiny_processor, batch_size=3, wait_ms=SECONDS * 1000) as address:
        for reply in clients.map(lambda number: complete(address, ask_about(files[number], BINARY)), range(3)):
            text_of(reply)
    assert work.rows == [3]


def test_neighbours_do_not_change_a_draw(model, tiny_processor, work, files, clients):
    options = {"temperature": 1.5, "seed": 11, "stop": ["zzz"], "max_tokens": 30}
    with serving(model, tiny_processor, wait_ms=0) as address:
        messages = ask_about(files[0], GRID)
        alone = text_of(complete(address, messages, **options))
        work.goes_on.clear()
        others = [clients.submit(complete, address, ask_about(files[1], BINARY))]
        until(lambda: len(work.rows) == 2)
        others += [
            clients.submit(complete, address, ask_about(files[number], COUNT), temperature=number % 3, seed=number)
            for number in range(6)
        ]
        again = clients.submit(complete, address, messages, **options)
        until(lambda: metric(address, "waiting") == 7)
        work.goes_on.set()
        assert text_of(again.result()) == alone
        assert [text_of(each.result()) for each in others]
    assert work.rows == [1, 1, 7]


def test_a_full_queue_says_when_to_come_back(model, tiny_processor, work, files, clients):
    with serving(model, tiny_processor, wait_ms=0, max_waiting=2) as address:
        work.goes_on.clear()
        asked = [clients.submit(complete, address, ask_about(files[0], BINARY))]
        until(lambda: work.rows)
        assert complete(address, ask_about(files[0], BINARY), n=3).status_code == 429  # all or none
        asked += [clients.submit(complete, address, ask_about(files[0], BINARY)) for _ in range(2)]
        until(lambda: metric(address, "waiting") == 2)
        refused = complete(address, ask_about(files[0], BINARY))
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
        assert refused.json()["error"]["code"] == "queue_full"
        work.goes_on.set()
        assert {text_of(each.result()) for each in asked} <= {"yes", "no"}


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_frees_the_place(model, tiny_processor, work, files, clients, stream):
    with serving(model, tiny_processor, wait_ms=0, max_waiting=1) as address:
        work.goes_on.clear()
        first = clients.submit(complete, address, ask_about(files[0], BINARY))
        until(lambda: work.rows)
        with pytest.raises(httpx.TimeoutException):
            body = {"model": "tiny", "messages": ask_about(files[1], BINARY), "stream": stream}
            with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=1) as reply:
                reply.read()
        until(lambda: metric(address, "waiting") == 0)
        next = clients.submit(complete, address, ask_about(files[2], BINARY))
        until(lambda: metric(address, "waiting") == 1)
        work.goes_on.set()
        assert {text_of(each.result()) for each in (first, next)} <= {"yes", "no"}
        assert metric(address, "disconnects_total") == 1
    assert work.rows == [1, 1]


def test_an_answer_that_nobody_reads_ends(model, tiny_processor, work, files):
    model.generation_config.eos_token_id = None  # it would go on for 400 tokens
    with serving(model, tiny_processor, wait_ms=0) as address:
        body = {"model": "tiny", "messages": ask_about(files[0], COUNT), "stream": True, "max_tokens": 400}
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=SECONDS) as reply:
            next(line for line in reply.iter_lines() if '"content": "' in line and '"content": ""' not in line)
            work.goes_on.clear()
        until(lambda: metric(address, "disconnects_total") == 1)
        steps = work.steps
        work.goes_on.set()
        text_of(complete(address, ask_about(files[0], BINARY), max_tokens=2))
    assert work.steps - steps < 6


def test_a_batch_that_fails_is_asked_row_by_row(model, tiny_processor, work, files, clients):
    """As where memory is enough for a few rows only; and a row that fails is nobody else's loss."""

    def fail(module, arguments, inputs) -> None:
        ids = inputs["inputs_embeds"]
        if len(ids) > 1 or torch.isnan(ids).any():
            raise RuntimeError("/tmp/secret is out of memory")

    model.language_model.register_forward_pre_hook(fail, with_kwargs=True)
    with serving(model, tiny_processor, batch_size=3, wait_ms=SECONDS * 1000) as address:
        replies = list(clients.map(lambda number: complete(address, ask_about(files[number], BINARY)), range(3)))
        assert [text_of(reply) in ("yes", "no") for reply in replies] == [True] * 3
    with serving(model, tiny_processor, wait_ms=0) as address:
        model.language_model.register_forward_pre_hook(lambda *_: 1 / 0)
        for stream in (False, True):
            reply = complete(address, ask_about(files[0], BINARY), stream=stream)
            assert reply.status_code == (200 if stream else 500)
            assert "Something went wrong here" in reply.text and "division" not in reply.text
            assert "[DONE]" not in reply.text
        assert httpx.get(f"{address}/health").status_code == 200


def test_pairs_are_forgotten(model, tiny_processor, files):
    with serving(model, tiny_processor, wait_ms=0, keep_pairs=2) as address:
        ids = [complete(address, ask_about(each, BINARY)).json()["pair_id"] for each in files[:3]]
        again = [complete(address, [{"role": "user", "content": COUNT}], pair_id=id).status_code for id in ids]
        assert again == [404, 200, 200]
        assert metric(address, "pairs_kept") == 2
    with serving(model, tiny_processor, wait_ms=0, keep_minutes=0) as address:
        id = complete(address, ask_about(files[0], BINARY)).json()["pair_id"]
        assert complete(address, [{"role": "user", "content": COUNT}], pair_id=id).status_code == 404


def test_ids_differ_from_server_to_server(model, tiny_processor, files):
    ids = set()
    for _ in range(2):
        with serving(model, tiny_processor, wait_ms=0) as address:
            ids.add(complete(address, ask_about(files[0], BINARY)).json()["pair_id"])
    assert len(ids) == 2


class TestBeams:
    """A converted model, which takes 5 beams and penalises repetition, as `ask_pairs` does with it."""

    def test_they_answer_as_they_do_elsewhere(self, converted, clients):
        model = AutoModelForImageTextToText.from_pretrained(converted)
        processor = AutoProcessor.from_pretrained(converted)
        rng = np.random.default_rng(0)
        pairs = [[rng.integers(0, 256, (56, 56, 3), np.uint8) for _ in range(2)] for _ in range(4)]
        options = {"max_new_tokens": 6}
        expected = [text for (text,) in ask_pairs(model, processor, pairs, ["What changed?"], **options)]
        shorter = [text for (text,) in ask_pairs(model, processor, pairs, ["What changed?"], max_new_tokens=3)]
        with serving(model, processor) as address:

            def ask(number: int) -> list[str]:
                messages = ask_about([as_file(image) for image in pairs[number]], "What changed?")
                stream = complete(address, messages, max_tokens=6, stream=True)
                pieces = [json.loads(line[6:]) for line in stream.text.splitlines() if line.startswith("data: {")]
                text = "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces)
                whole = [text_of(complete(address, messages, max_tokens=most)) for most in (6, 3)]
                complete(address, messages, temperature=1, max_tokens=4)
                return [text, *whole]

            found = list(clients.map(ask, range(4)))
        assert found == [[text, text, short] for text, short in zip(expected, shorter, strict=True)]
