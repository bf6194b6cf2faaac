"""Caption scores against pycocoevalcap called by hand, on real captions where they are at hand."""

import json
import os
import signal
import subprocess
import sys

import evaluate
import numpy as np
import pytest
from paths import SHARED
from processes import run_python
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
from transformers import GPT2Tokenizer

from deltavlm_hf.evaluation import (
    Protocol,
    evaluate_predictions,
    make_vocabulary,
    metric_path,
    score_by_change,
    score_captions,
)

MADE = {
    "a": ["Two houses are built beside the road.", "a road, with houses", "some houses appear"],
    "b": ["there is no difference", "the two scenes seem identical", "no change has occurred"],
    "c": ["A t-shaped road appears; trees don't.", "trees are replaced by a road", "a road is built"],
    "d": ["there is no difference", "the two scenes seem identical", "no change has occurred"],
}
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the real captions are not beside the repository")


METEOR = Meteor()  # a process of its own, which takes seconds to start


def by_hand(said: dict, right: dict) -> dict:
    bleu, _ = Bleu(4).compute_score(right, said, verbose=0)
    found = {f"BLEU-{n}": value for n, value in enumerate(bleu, start=1)}
    return found | {
        "METEOR": METEOR.compute_score(right, said)[0],
        "ROUGE-L": Rouge().compute_score(right, said)[0],
        "CIDEr": Cider().compute_score(right, said)[0],
    }


@pytest.fixture(scope="module", params=["made", pytest.param("real", marks=[needs_shared, pytest.mark.slow])])
def captions(request):
    """The first caption of each pair as an answer, the others as references."""
    content = MADE if request.param == "made" else json.loads((SHARED / "captions" / "val.json").read_text())
    return [texts[0] for texts in content.values()], [texts[1:] for texts in content.values()]


def test_words_as_coco(captions):
    predictions, references = captions
    split = PTBTokenizer()
    said = split.tokenize({i: [{"caption": text}] for i, text in enumerate(predictions)})
    right = split.tokenize({i: [{"caption": text} for text in texts] for i, texts in enumerate(references)})
    assert score_captions(predictions, references).overall == pytest.approx(by_hand(said, right), abs=1e-6)


@needs_shared
def test_gpt2_ids(captions):
    predictions, references = captions
    folder = SHARED / "tokenizers" / "gpt2"
    tokenizer = GPT2Tokenizer.from_pretrained(folder)

    def ids(text: str) -> str:
        return " ".join(map(str, tokenizer.encode(text)))

    said = {i: [ids(text.replace(".", ""))] for i, text in enumerate(predictions)}
    right = {i: [ids(text.replace(" .", "").strip()) for text in texts] for i, texts in enumerate(references)}
    protocol = Protocol("gpt2-ids", tokenizer=str(folder))
    assert score_captions(predictions, references, protocol).overall == pytest.approx(by_hand(said, right), abs=1e-6)


def test_levir_words(captions):
    predictions, references = captions
    vocabulary = make_vocabulary((text for texts in references for text in texts), min_count=2)

    def ids(text: str) -> str:
        return " ".join(str(vocabulary.get(word, 0)) for word in text.split())

    said = {i: [ids(text.replace(".", ""))] for i, text in enumerate(predictions)}
    right = {i: [ids(text.replace(" .", "").strip()) for text in texts] for i, texts in enumerate(references)}
    protocol = Protocol("levir-words", vocabulary=vocabulary)
    assert score_captions(predictions, references, protocol).overall == pytest.approx(by_hand(said, right), abs=1e-6)


def test_the_vocabulary_has_no_rare_words():
    captions = ["a road is built", "a road", "a house", "a a"]
    assert make_vocabulary(captions, min_count=2) == {"a": 1, "road": 2}
    assert make_vocabulary(captions) == {"a": 1}


def test_subsets_are_scored_as_sets_of_their_own():
    predictions, references = [MADE[name][1] for name in "abcd"], [MADE[name] for name in "abcd"]
    found = score_by_change(predictions, references, [True, False, True, None])
    assert found["changed"].overall == score_captions(predictions[::2], references[::2]).overall
    assert found["unchanged"].overall == score_captions(predictions[1:2], references[1:2]).overall
    assert len(found["all"].each["CIDEr"]) == 4
    assert set(score_by_change(predictions, references, [None] * 4)) == {"all"}


@pytest.mark.parametrize("flags", [[1, 0, 1], np.array([True, False, True])], ids=["numbers", "numpy"])
def test_flags_of_any_kind_make_subsets(flags):
    predictions, references = [MADE[name][1] for name in "abc"], [MADE[name] for name in "abc"]
    assert score_by_change(predictions, references, flags) == score_by_change(
        predictions, references, [True, False, True]
    )
    assert set(score_by_change(predictions, references, flags)) == {"all", "changed", "unchanged"}


def test_cider_says_nothing_where_references_are_alike():
    answers = ["there is no difference", "a road is built"]
    scores = score_captions(answers, [MADE["b"], MADE["d"]])
    assert scores.overall["CIDEr"] == 0 and scores.each["CIDEr"] == [0, 0]
    assert scores.each["ROUGE-L"][0] == pytest.approx(1)


def test_empty_and_odd_answers_are_scored():
    odd = ["", "\n", "...", "a road ||| is\nbuilt", "道路"]
    scores = score_captions(odd, [["a road is built"]] * len(odd))
    assert [round(value, 2) for value in scores.each["ROUGE-L"][:3]] == [0, 0, 0]
    assert len(scores.each["METEOR"]) == len(odd) and scores.overall["METEOR"] < 1


def test_pairs_without_any_word():
    scores = score_by_change(["", "a road"], [["."], ["a road", "a house"]], [True, False])
    assert scores["changed"].overall["CIDEr"] == 0 and scores["changed"].each["CIDEr"] == [0]
    assert scores["unchanged"].overall["ROUGE-L"] == pytest.approx(1)


def test_a_word_map_has_its_own_id_for_rare_words():
    words = {"a": 7, "road": 3, "<unk>": 9, "<pad>": 0}
    said, right = Protocol("levir-words", vocabulary=words).encode(["a lane"], [["a road ."]])
    assert (said, right) == (["7 9"], [["7 3"]])


@needs_shared
def test_gpt2_ids_have_no_leading_space():
    protocol = Protocol("gpt2-ids", tokenizer=str(SHARED / "tokenizers" / "gpt2"))
    said, right = protocol.encode(["a road."], [["a road ."]])
    vocabulary = json.loads((SHARED / "tokenizers" / "gpt2" / "vocab.json").read_text())
    assert said == [f"{vocabulary['a']} {vocabulary['Ġroad']}"] and right == [said]


@pytest.mark.slow
def test_meteor_in_a_forked_process_and_after_the_end():
    """A forked process has a METEOR of its own, though its parent's runs, and none outlives its process."""
    code = """
import multiprocessing
import os
from deltavlm_hf.evaluation import Protocol, captions, score_captions

protocol = Protocol("levir-words", vocabulary={"a": 1, "road": 2, "house": 3})
captions_of = [["a road", "a house"], ["a house a road", "a road"], ["road", "a"], ["a a", "a road a"]] * 25

def score(number):
    said, right = [captions_of[number][0]] * 100, [[captions_of[(number + i) % 100][1]] for i in range(100)]
    return score_captions(said, right, protocol).each["METEOR"]

expected = [score(number) for number in range(4)]
assert len(set(map(tuple, expected))) == 4
with multiprocessing.get_context("fork").Pool(1) as pool:
    theirs = pool.map_async(score, range(4), 1)
    while not theirs.ready():
        assert [score(number) for number in range(4)] == expected
    assert theirs.get() == expected
print(captions._meteor(os.getpid()).meteor_p.pid)
"""
    pid = int(run_python(code, timeout=120))
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_which_scores_are_means():
    references = [["a road is built beside the houses"], ["there is no difference"], ["trees are replaced by a road"]]
    scores = score_captions(["a road is built", "there is no difference", "a road is built by the trees"], references)
    means = {name: sum(values) / 3 for name, values in scores.each.items()}
    alike = {name for name, value in scores.overall.items() if abs(means[name] - value) < 1e-6}
    assert alike == {"ROUGE-L", "CIDEr"}


def test_intervals_are_of_the_figures_beside_them():
    """Of all that captions add to: not of METEOR."""
    texts = [MADE[name] for name in "abc"] * 5
    question = "Describe the changes."
    rows = [
        {
            "id": str(index),
            "task": "caption",
            "turns": [{"question": question, "answer": right}],
            "captions": [right],
            "changed": True,
        }
        for index, (right, _, _) in enumerate(texts)
    ]
    results, _ = evaluate_predictions(rows, [{"answers": [said]} for _, said, _ in texts])
    found = results["caption"]
    assert set(found["intervals"]) == {"BLEU-4", "ROUGE-L", "CIDEr"}
    for name, (low, high) in found["intervals"].items():
        assert low < found["all"][name] < high


def test_without_java(tmp_path):
    code = (
        "import logging; logging.basicConfig(); from deltavlm_hf.evaluation import score_captions\n"
        "scores = score_captions(['A road, is built.'], [['a road is built', 'b']])\n"
        "print(scores.overall['METEOR'], round(scores.overall['BLEU-4'], 3))"
    )
    environment = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["None", "1.0"], done.stderr
    assert "METEOR is left out: Java is not installed" in done.stderr
    assert "not by the Penn Treebank tokenizer: Java is not installed" in done.stderr


def test_java_that_does_not_start(tmp_path):
    """As on a Mac without a runtime: neither an obscure error nor an endless wait."""
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho Unable to locate a Java Runtime. >&2\nexit 1\n")
    java.chmod(0o755)
    code = (
        "from deltavlm_hf.evaluation import score_captions\n"
        "print(score_captions(['a b'], [['a b']]).overall['METEOR'])"
    )
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.defpath}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert done.stdout.split() == ["None"], done.stderr
    assert "METEOR is left out: `java -Xmx2G -version` fails: Unable to locate a Java Runtime." in done.stderr


def test_without_the_package_pycocoevalcap():
    code = "import sys; sys.modules['pycocoevalcap.bleu.bleu_scorer'] = None; import deltavlm_hf.evaluation.captions"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'pip install "deltavlm-hf[eval]", or in a checkout pip install -e ".[eval]"' in done.stderr


def test_wrong_input():
    with pytest.raises(ValueError, match="Unknown protocol 'words', expected one of coco, gpt2-ids, levir-words"):
        Protocol("words")
    with pytest.raises(ValueError, match=r"vocabulary=make_vocabulary\(captions\)"):
        Protocol("levir-words")
    with pytest.raises(ValueError, match="got 1 and 2"):
        score_captions(["a"], [["a"], ["b"]])
    with pytest.raises(ValueError, match="Pair 1 must have a list of at least one reference, got 'b'"):
        score_captions(["a", "b"], [["a"], "b"])
    with pytest.raises(ValueError, match="a flag in `changed` for each of 2 pairs, got 1"):
        score_by_change(["a", "b"], [["a"], ["b"]], [True])


def test_when_java_dies():
    """In a process of its own, since a hang is what must not be."""
    code = """
import os
from deltavlm_hf.evaluation import Protocol, captions, score_captions
words = Protocol("levir-words", vocabulary={"a": 1, "b": 2})
first = score_captions(["a b"], [["a b a"]], words).overall["METEOR"]
os.kill(captions._meteor(os.getpid()).meteor_p.pid, 9)
assert score_captions(["a b"], [["a b a"]], words).overall["METEOR"] == first
"""
    run_python(code, timeout=120)


def test_ctrl_c_while_java_works():
    """METEOR's lock is held then, which its end would wait for."""
    code = """
import os, signal, threading
from deltavlm_hf.evaluation import Protocol, captions, score_captions
words = Protocol("levir-words", vocabulary={"a": 1, "b": 2})
score_captions(["a b"], [["a b a"]], words)
meteor = captions._meteor(os.getpid()).meteor_p
os.kill(meteor.pid, signal.SIGSTOP)
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
score_captions(["a b"], [["a b a"]], words)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert done.returncode == -signal.SIGINT and "KeyboardInterrupt" in done.stderr


def test_metric_for_the_package_evaluate():
    predictions, references = [MADE[name][1] for name in "abc"], [MADE[name] for name in "abc"]
    metric = evaluate.load(metric_path("change_captions"))
    found = metric.compute(predictions=predictions, references=references, changed=[True, False, True])
    scores = score_by_change(predictions, references, [True, False, True])
    assert found == {
        **scores["all"].overall,
        **{
            f"{part} {name}": value
            for part in ("changed", "unchanged")
            for name, value in scores[part].overall.items()
        },
    }
