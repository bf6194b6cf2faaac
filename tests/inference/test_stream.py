"""Many pairs, read ahead of the model in other processes: the answers of `ask_pairs`, and what each failure costs."""

import json
import os
import select
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from generating import GREEDY
from processes import run_python

from deltavlm_hf import ChangeSession, ask_pairs, stream_answers
from deltavlm_hf.inference.stream import read_ahead

QUESTIONS = ("How many new buildings are there in the top left?", "What changed?")


@pytest.fixture(scope="module")
def files(pairs, tmp_path_factory) -> list[tuple[Path, Path]]:
    """Five pairs as files; one image of the third is none."""
    folder = tmp_path_factory.mktemp("pairs")
    found = []
    for number in range(5):
        paths = (folder / f"{number}_before.png", folder / f"{number}_after.png")
        for path, image in zip(paths, pairs[number % 2][:: 1 if number < 2 else -1], strict=True):
            image.save(path)
        found.append(paths)
    found[2][1].write_bytes(b"no image")
    return found


@pytest.fixture(scope="module")
def expected(model, processor, files) -> list:
    return list(ask_pairs(model, processor, files, QUESTIONS, on_error="yield", **GREEDY))


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 1), (2, 0), (2, 2), (32, 1)])
def test_answers_are_those_of_ask_pairs(batch_size, num_workers, model, processor, files, expected):
    assert not list(stream_answers(model, processor, files, QUESTIONS, indices=[], num_workers=num_workers))
    order = [4, 2, 0, 3]
    options = {"batch_size": batch_size, "num_workers": num_workers, **GREEDY}
    found = list(stream_answers(model, processor, files, QUESTIONS, indices=order, **options))
    assert [each.index for each in found] == order
    assert [each.answers for each in found] == [expected[4], None, expected[0], expected[3]]
    assert str(found[1].error).startswith("after image: cannot read ") and expected[0] != expected[1]
    assert all(each.error is None for each in found if each.index != 2)


class Troubled:
    """Pairs of which some cannot be fetched; says in a file which were."""

    class Strange(Exception):
        def __init__(self, one, other):
            super().__init__(f"{one} and {other}")

    def __init__(self, pairs, log: Path, deadly: int | None = None):
        self.pairs, self.log, self.deadly = pairs, log, deadly

    def __len__(self):
        return 12

    def __getitem__(self, index):
        with self.log.open("a") as file:
            file.write(f"{index}\n")
        if index == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 1:
            raise self.Strange("this", "that")  # cannot be unpickled
        return self.pairs[index % 2]

    def fetched(self) -> list[int]:
        return [int(line) for line in self.log.read_text().split()]


def test_pairs_that_cannot_be_fetched(model, processor, pairs, tmp_path):
    troubled = Troubled(pairs, tmp_path / "log")
    state = torch.get_rng_state()
    found = [each.error for each in stream_answers(model, processor, troubled, ["What?"], **GREEDY)]
    assert [str(error) for error in found if error] == ["Strange: this and that"] and found[1]
    assert torch.equal(torch.get_rng_state(), state)  # sampled answers do not depend on who reads


def test_no_more_is_read_than_the_model_will_need_soon(model, processor, pairs, tmp_path):
    troubled = Troubled(pairs, tmp_path / "log")
    answers = stream_answers(model, processor, troubled, ["What?"], batch_size=2, **GREEDY)
    assert not troubled.log.exists()
    next(answers)
    next(answers)
    next(answers)  # the second two, while whose answers were made others came
    read = len(troubled.fetched())
    answers.close()
    assert 4 < read <= 8


def test_a_process_that_dies(model, processor, pairs, tmp_path):
    answers = stream_answers(model, processor, Troubled(pairs, tmp_path / "log", deadly=3), ["What?"], **GREEDY)
    with pytest.raises(OSError, match="process that reads images has died"):
        list(answers)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_cannot_be_answered_costs_its_own_answer(num_workers, model, processor, pairs, files, expected):
    """Scores that are no numbers, in a batch with sound ones."""
    same = (pairs[0][0],) * 2

    def spoil(module, arguments, output):
        output[(arguments[0] == arguments[1]).all((1, 2))] = float("nan")

    hook = model.difference.register_forward_hook(spoil)
    try:
        options = {"num_workers": num_workers, **GREEDY}
        found = list(stream_answers(model, processor, [files[0], same, files[1]], QUESTIONS, **options))
    finally:
        hook.remove()
    assert [each.answers for each in found] == [expected[0], None, expected[1]]
    assert "scores are NaN or infinite" in str(found[1].error)


def test_a_dialogue_is_that_of_a_session(tiny_model, tiny_processor, files):
    turns = ["Have any roads been built?", "How many new roads are there?", "What changed?"]
    found = list(stream_answers(tiny_model, tiny_processor, files[:2], [*QUESTIONS, turns], num_workers=0))
    for pair, each in zip(files, found, strict=False):
        session = ChangeSession(tiny_model, tiny_processor, *pair)
        assert each.answers == [*session.ask_apart(QUESTIONS), *(session.ask(turn) for turn in turns)]


@pytest.mark.parametrize("backbone", [False, True])
def test_masks_come_with_the_words(backbone, make_mask_model, files):
    model, processor = make_mask_model(backbone)
    encoded = []
    hook = model.vision_model.register_forward_hook(lambda module, given, output: encoded.append(len(given[0])))
    try:
        options = {"masks": True, "num_workers": 0, **GREEDY}
        found = list(stream_answers(model, processor, files[:3], QUESTIONS, **options))
    finally:
        hook.remove()
    assert encoded == [4]  # both images of two pairs, once
    pixel_values = processor(images=files[:2], return_tensors="pt")["pixel_values"]
    masks = [each.mask for each in found[:2]]
    assert np.allclose(masks, model.segment(pixel_values=pixel_values), atol=1e-6)
    assert masks[0].dtype == np.float32 and not np.array_equal(*masks)
    assert [each.answers for each in found[:2]] == list(ask_pairs(model, processor, files[:2], QUESTIONS, **GREEDY))
    assert found[2].mask is None and "cannot read" in str(found[2].error)


def read_much(index: int):
    """More than a pipe holds; says which process it was."""
    return os.getpid(), np.zeros(10**6)


def test_no_process_outlives_a_run_that_was_killed():
    """Nor what they hold open, for which whoever started the run may wait."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        items = read_ahead(read_much, range(20), 2)
        os.write(writer, json.dumps([next(items)[0], next(items)[0]]).encode())
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(writer)
    said, part = b"", b"some"
    while part:
        assert select.select([reader], [], [], 60)[0], "a process still holds the pipe"
        part = os.read(reader, 4096)  # in the end nothing: the last process has closed it
        said += part
    os.close(reader)
    os.waitpid(child, 0)
    assert len(set(json.loads(said))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_ways_to_start_processes(method, files, tiny_model, tiny_processor):
    """Also after tokenizers have used their threads; and nothing is said of forks."""
    code = """
    import multiprocessing, os, sys
    import deltavlm_hf
    from transformers import AutoModelForImageTextToText, AutoProcessor
    multiprocessing.set_start_method(sys.argv[1])
    model = AutoModelForImageTextToText.from_pretrained(deltavlm_hf.tiny())
    processor = AutoProcessor.from_pretrained(deltavlm_hf.tiny())
    processor(text=["What?"] * 64, padding=True)
    pairs = [(sys.argv[2], sys.argv[3])] * 3
    os.dup2(1, 2)
    for each in deltavlm_hf.stream_answers(model, processor, pairs, ["What changed?"]):
        print(each.answers[0])
    """
    said = run_python(code, method, *files[0], timeout=120)
    ((expected,),) = ask_pairs(tiny_model, tiny_processor, files[:1], ["What changed?"])
    assert said.splitlines() == [expected] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"questions": "What?"}, "list of questions, got the string"),
        ({"questions": ["What?", []]}, "A dialogue needs a question"),
        ({"questions": [["What?", 3]]}, "`text` must be strings, got int: 3"),
        ({"batch_size": 0}, "`batch_size` must be an integer of at least 1"),
        ({"num_workers": -1}, "`num_workers` must be an integer of at least 0, got -1"),
        ({"masks": True}, "This model makes no masks"),
        ({"num_return_sequences": 2, "do_sample": True}, "each question has one answer"),
    ],
    ids=str,
)
def test_arguments_are_checked_at_once(arguments, message, model, processor, pairs, tmp_path):
    troubled = Troubled(pairs, tmp_path / "log")
    with pytest.raises(ValueError, match=message):
        stream_answers(model, processor, troubled, **{"questions": QUESTIONS, **arguments})
