"""
Speed, as ratios of two ways that take turns in one process.

    python benchmarks/speed.py --output docs/benchmarks

writes `speed.json` and `speed.md` there; `--only dialogue` runs one group, and leaves the figures of the others that
are there. Each figure is the ratio of median times. Beside it stands what arithmetic and memory traffic allow at these
sizes on this machine: the same ratio from `deltavlm_hf.cost`, with the arithmetic and bandwidth that this machine
reached a moment before.

The model keeps the paper's proportions: widths divided by one factor, depths as they are (39 vision blocks, 12
Q-Former layers, 32 layers of the language model). Weights are random; answers are words, of a fixed number. Compared
are

- the authors' way: for each question and turn both images are encoded again, by two calls of the vision encoder;
- InstructBLIP of Transformers at the same sizes, fed both dates as one wide image, or as two images of a batch;
- for training and loading, the plain way that each row names.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    LlamaConfig,
)

import deltavlm_hf
from deltavlm_hf import ChangeSession, DeltaVLMConfig, DeltaVLMForConditionalGeneration, DeltaVLMModel
from deltavlm_hf.cost import Card, Part, estimate_cost
from deltavlm_hf.inference import answer, ask_pairs
from deltavlm_hf.training import FreezePolicy, freeze
from deltavlm_hf.training.prefix_cache import encode_vision_prefix, take_vision_states

HEADS = {"vision": 16, "qformer": 12, "language": 32}
QUESTIONS = [
    "Has anything changed between the two images?",
    "How many buildings were built?",
    "How many roads were built?",
    "Where are the new buildings?",
    "Are there new buildings in the center?",
    "Is there a new road in the top left?",
    "Describe the change.",
    "What is the main change?",
]


def scaled(width: int, factor: int, heads: int) -> int:
    """A width that divides among its heads, with an even part for each."""
    return max(2 * heads, round(width / factor / (2 * heads)) * 2 * heads)


def config_parts(factor: int, processor, depth_factor: int = 1) -> dict[str, dict]:
    """
    The paper's sizes, widths divided by `factor` and depths by `depth_factor`, with vocabularies of the shipped
    tokenizers; at factor 1 the paper's vocabularies too.
    """
    vocabularies = len(processor.qformer_tokenizer), len(processor.tokenizer)
    qformer_vocabulary, vocabulary = (30_523, 32_000) if factor == 1 else vocabularies
    return {
        "vision_config": {
            "hidden_size": scaled(1408, factor, HEADS["vision"]),
            "intermediate_size": 6144 // factor,
            "num_attention_heads": HEADS["vision"],
            "num_hidden_layers": 39 // depth_factor,
        },
        "qformer_config": {
            "vocab_size": qformer_vocabulary,
            "hidden_size": scaled(768, factor, HEADS["qformer"]),
            "intermediate_size": 3072 // factor,
            "num_attention_heads": HEADS["qformer"],
            "num_hidden_layers": 12 // depth_factor,
            "encoder_hidden_size": scaled(1408, factor, HEADS["vision"]),
        },
        "text_config": LlamaConfig(
            hidden_size=scaled(4096, factor, HEADS["language"]),
            intermediate_size=11008 // factor,
            num_attention_heads=HEADS["language"],
            num_hidden_layers=32 // depth_factor,
            vocab_size=vocabulary,
            pad_token_id=processor.tokenizer.pad_token_id,
        ),
    }


Way = Callable[[Callable[..., list[Part]]], list[Part]]  # from `estimate_cost` at some size to the parts of some way


def least_seconds(parts: list[Part], card: Card) -> float:
    return sum(part.seconds(card.flops_per_second, card.bytes_per_second) for part in parts)


class Bench:
    """What all groups share: sizes, models, the way of timing, results."""

    def __init__(
        self,
        factor: int,
        rounds: int,
        *,
        depth_factor: int = 1,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.parts = partial(config_parts, factor, depth_factor=depth_factor)
        self.factor = factor
        self.rounds = rounds
        self.device = torch.device(device)
        self.dtype = dtype
        self.results: list[dict[str, Any]] = []
        self.processor = AutoProcessor.from_pretrained(deltavlm_hf.tiny())
        self.processor.image_processor.size = {"height": 224, "width": 224}
        self.processor.num_query_tokens = 32
        torch.manual_seed(0)
        self.config = DeltaVLMConfig(
            **self.parts(self.processor), num_query_tokens=32, image_token_id=self.processor.image_token_id
        )
        self.model = self.make(self.config).eval()
        self.card = self._measure_machine()
        vocabulary = self.processor.tokenizer.get_vocab()
        words = [text for text in vocabulary if text.startswith("Ġ") and text[1:].isalpha()]
        ids = range(self.config.text_config.vocab_size)
        self.no_words = sorted(set(ids) - {vocabulary[word] for word in words})

    def make(self, config: DeltaVLMConfig) -> DeltaVLMForConditionalGeneration:
        """A model with random weights, made where it stays."""
        with self.device:
            return AutoModelForImageTextToText.from_config(config, dtype=self.dtype)

    def autocast(self) -> torch.autocast:
        """For training in 16 bits: what trains is kept in float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def greedy(self, tokens: int) -> dict[str, Any]:
        """For `generate`: so many tokens, each a word, which stays one token in the history of a dialogue."""
        length = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        return {**length, "num_beams": 1, "suppress_tokens": self.no_words, "repetition_penalty": 2.0}

    def _measure_machine(self) -> Card:
        """What a matrix product and the reading of weights reach here, at the sizes of the language model."""
        width, inner = self.config.text_config.hidden_size, self.config.text_config.intermediate_size
        shapes = (1024, width), (32, 3, inner, width)
        many, weight = (torch.randn(shape, device=self.device, dtype=self.dtype) for shape in shapes)
        one = many[:1]

        def products() -> None:
            for layer in weight[:8].flatten(0, 1):
                many @ layer.T

        def reading() -> None:
            for layer in weight.flatten(0, 1):
                one @ layer.T

        times = {"products": [], "reading": []}
        for _ in range(5):
            times["products"].append(seconds(products))
            times["reading"].append(seconds(reading))
        flops = 2 * 1024 * weight[:8].numel() / min(times["products"])
        return Card("this machine", flops, weight.nbytes / min(times["reading"]))

    def images(self, number: int) -> list[tuple[Image.Image, Image.Image]]:
        pixels = torch.randint(0, 256, (number, 2, 224, 224, 3), dtype=torch.uint8).numpy()
        return [(Image.fromarray(before), Image.fromarray(after)) for before, after in pixels]

    def pixels(self, pairs: list) -> torch.Tensor:
        return self.processor(images=pairs, return_tensors="pt")["pixel_values"].to(self.device, self.dtype)

    def lengths(self, questions: list[str], histories: list | None = None) -> tuple[int, int]:
        """Tokens of the longest prompt without placeholders, and of the longest instruction."""
        histories = histories or [[] for _ in questions]
        inputs = self.processor(text=questions, history=histories, padding=True, return_tensors="pt")
        return inputs["input_ids"].shape[1] - 32, inputs["qformer_input_ids"].shape[1]

    def their_answers(self, pixel_values, questions, histories=None, **kwargs) -> list[str]:
        """The authors' way: the images are encoded again for every call."""
        pair_features = encode_apart(self.model, pixel_values)
        return answer(self.model, self.processor, questions, histories, pair_features=pair_features, **kwargs)

    def our_answers(self, pixel_values, questions, **kwargs) -> list[str]:
        with torch.inference_mode():
            pair_features = self.model.encode_pair(pixel_values)
        return answer(self.model, self.processor, questions, pair_features=pair_features, **kwargs)

    def gains(self, theirs: Way, ours: Way) -> dict[str, float]:
        """What arithmetic and memory traffic allow, here and at full size in 16 bits on an H100."""
        here = partial(estimate_cost, self.config, weight_bytes=self.dtype.itemsize), self.card
        full = partial(estimate_cost, DeltaVLMConfig(), weight_bytes=2), Card()
        return {
            name: least_seconds(theirs(estimate), card) / least_seconds(ours(estimate), card)
            for name, (estimate, card) in {"allowed": here, "full_size": full}.items()
        }

    def compare(
        self,
        what: str,
        slow: tuple[str, Callable],
        fast: tuple[str, Callable],
        *,
        same: bool = True,
        aim: float | None = None,
        rounds: int | None = None,
        **more: Any,
    ) -> None:
        """
        Times two ways by turns and notes the ratio of their medians. `same`: answers must be equal; in 16 bits, where
        words of like scores change places, the share of those that are is noted.
        """
        outcomes, peaks = [], {}
        for name, run in (slow, fast):  # both are warm after this
            start = memory_peak(self.device)
            outcomes.append(run())
            if start is not None:
                peaks[name] = memory_peak(self.device)
        if same and self.dtype != torch.float32:
            more["equal_answers"] = share_equal(*outcomes)
        elif same and outcomes[0] != outcomes[1]:
            raise SystemExit(f"{what}: the two ways answer differently.")
        if peaks:
            more["peak_bytes"] = peaks
        times: dict[str, list[float]] = {slow[0]: [], fast[0]: []}
        for _ in range(rounds or self.rounds):
            for name, run in (slow, fast):
                times[name].append(seconds(run))
        medians = {name: statistics.median(values) for name, values in times.items()}
        by_round = [a / b for a, b in zip(times[slow[0]], times[fast[0]], strict=True)]
        ratio = medians[slow[0]] / medians[fast[0]]
        self.note(what, slow[0], fast[0], ratio, aim, seconds=medians, by_round=by_round, **more)

    def note(self, what: str, peer: str, ours: str, ratio: float, aim: float | None = None, **more) -> None:
        self.results.append({"what": what, "over": peer, "ours": ours, "ratio": ratio, "aim": aim, **more})
        print(f"{what}: {peer} / {ours} = {ratio:.2f}", flush=True)


def seconds(run: Callable) -> float:
    finish()
    start = time.perf_counter()
    run()
    finish()
    return time.perf_counter() - start


def finish() -> None:
    """Waits for a card to end what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def memory_peak(device: torch.device) -> int | None:
    """The most bytes that a card held since this was asked last; None on a CPU."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def share_equal(first: list, second: list) -> float:
    """How many answers of two ways are the same, of all; lists of answers, or of lists of them."""
    if first and isinstance(first[0], list):
        first, second = sum(first, []), sum(second, [])
    return statistics.mean(one == other for one, other in zip(first, second, strict=True))


@torch.inference_mode()
def encode_apart(model: DeltaVLMModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Pair features as the authors make them: a call of the vision encoder for each date."""
    before, after = (model.vision_model(pixel_values[:, date]).last_hidden_state for date in (0, 1))
    return model.difference(before, after)


def one_question(bench: Bench) -> None:
    """One question about one pair, against both peers."""
    parts = bench.parts(bench.processor)
    parts["text_config"].vocab_size = max(parts["text_config"].vocab_size, bench.processor.image_token_id + 1)
    config = InstructBlipConfig(**parts, num_query_tokens=32, image_token_index=bench.processor.image_token_id)
    with bench.device:
        peer = InstructBlipForConditionalGeneration._from_config(config, dtype=bench.dtype).eval()
    inputs = bench.processor(images=bench.images(1), text=QUESTIONS[:1], history=[[]], return_tensors="pt")
    inputs = inputs.to(bench.device, bench.dtype)
    pixel_values = inputs["pixel_values"]
    wide = {**inputs, "pixel_values": torch.cat([pixel_values[:, 0], pixel_values[:, 1]], dim=-1)}
    two = {name: value.expand(2, *value.shape[1:]) for name, value in inputs.items()}
    two["pixel_values"] = pixel_values[0]
    wide["interpolate_pos_encoding"] = True

    for tokens in (8, 64):
        what = f"one question, {tokens} tokens of answer"
        kwargs = bench.greedy(tokens)
        ours = ("`generate`", partial(bench.model.generate, **inputs, **kwargs))
        for name, given in (("InstructBLIP, one wide image", wide), ("InstructBLIP, two images", two)):
            with torch.inference_mode():
                bench.compare(what, (name, partial(peer.generate, **given, **kwargs)), ours, same=False, aim=1)
        theirs = partial(bench.their_answers, pixel_values, QUESTIONS[:1], **kwargs)
        with_pixels = partial(bench.our_answers, pixel_values, QUESTIONS[:1], **kwargs)
        bench.compare(what, ("the authors' way", theirs), ("both dates in one call", with_pixels), allowed=1)


def dialogue(bench: Bench) -> None:
    """Six turns about one pair."""
    for tokens, aim in ((2, 1.5), (8, 1.5), (64, 1.0)):
        six_turns(bench, tokens, aim)


def six_turns(bench: Bench, tokens: int, aim: float) -> None:
    pair = bench.images(1)[0]
    pixel_values = bench.pixels([pair])
    turns = QUESTIONS[:6]

    def session(**kwargs) -> list[str]:
        conversation = ChangeSession(bench.model, bench.processor, *pair, **kwargs)
        return [conversation.ask(question, **bench.greedy(tokens)) for question in turns]

    def theirs() -> list[str]:
        history: list[tuple[str, str]] = []
        for question in turns:
            (reply,) = bench.their_answers(pixel_values, [question], [history], **bench.greedy(tokens))
            history.append((question, reply))
        return [reply for _, reply in history]

    replies = theirs()
    dialogues = [list(zip(turns[:turn], replies[:turn], strict=True)) for turn in range(len(turns))]
    lengths = [bench.lengths([question], [history]) for question, history in zip(turns, dialogues, strict=True)]
    prompts = [
        {"text_tokens": text, "instruction_tokens": instruction, "answer_tokens": tokens}
        for text, instruction in lengths
    ]
    known = [0, *(32 + text + tokens - 1 for text, _ in lengths[:-1])]

    def their_parts(estimate) -> list[Part]:
        return [part for prompt in prompts for part in estimate(**prompt)]

    def our_parts(estimate) -> list[Part]:
        return estimate()[:2] + [part for prompt in prompts for part in estimate(**prompt)[2:]]

    def fixed_parts(estimate) -> list[Part]:
        read = [estimate(**prompt, known_tokens=number)[3:] for prompt, number in zip(prompts, known, strict=True)]
        return estimate(**prompts[0])[:3] + [part for parts in read for part in parts]

    what = f"dialogue of six turns, {tokens} tokens of answer"
    peer = ("the authors' way", theirs)
    bench.compare(what, peer, ("`ChangeSession`", session), aim=aim, **bench.gains(their_parts, our_parts))
    bench.compare(
        what,
        peer,
        ("`ChangeSession(fixed_change_tokens=True)`", partial(session, fixed_change_tokens=True)),
        same=False,  # later turns keep the first question's change tokens
        **bench.gains(their_parts, fixed_parts),
    )


def many_questions(bench: Bench) -> None:
    """Eight questions about each of 32 pairs."""
    all_answers(bench, 4, alone=True)
    all_answers(bench, 16)


def all_answers(
    bench: Bench, tokens: int, *, number: int = 32, alone: bool = False, rounds: int | None = None
) -> None:
    """Of so many pairs; `alone`: also against one question at a time."""
    pairs = bench.images(number)
    pixel_values = bench.pixels(pairs)
    text, instruction = bench.lengths(QUESTIONS)
    length = {"text_tokens": text, "instruction_tokens": instruction, "answer_tokens": tokens}

    def batches_of_four() -> list[list[str]]:
        rows = [(pair, question) for pair in range(number) for question in QUESTIONS]
        said: list[str] = []
        for start in range(0, len(rows), 4):
            numbers, questions = zip(*rows[start : start + 4], strict=True)
            said += bench.their_answers(pixel_values[list(numbers)], questions, **bench.greedy(tokens))
        return [said[start : start + 8] for start in range(0, len(said), 8)]

    def one_at_a_time() -> list[list[str]]:
        one = partial(bench.their_answers, **bench.greedy(tokens))
        return [[one(pixel_values[[pair]], [question])[0] for question in QUESTIONS] for pair in range(number)]

    def ours() -> list[list[str]]:
        return list(ask_pairs(bench.model, bench.processor, pairs, QUESTIONS, batch_size=64, **bench.greedy(tokens)))

    def our_parts(estimate) -> list[Part]:
        questions = 8 * number
        return estimate(pairs=number)[:2] + -(-questions // 64) * estimate(questions=min(questions, 64), **length)[2:]

    what = f"8 questions about each of {number} pairs, {tokens} tokens of answer"
    ways = [(4, "the authors' way, batches of 4", batches_of_four)]
    if alone:
        ways.append((1, "the authors' way, one at a time", one_at_a_time))
    for size, name, theirs in ways:

        def their_parts(estimate, size=size) -> list[Part]:
            return 8 * number // size * estimate(pairs=size, questions=size, **length)

        bench.compare(
            what,
            (name, theirs),
            ("`ask_pairs`", ours),
            aim=4 if size == 4 else None,
            rounds=rounds or (max(1, bench.rounds // 3) if size == 4 else 1),
            **bench.gains(their_parts, our_parts),
        )


def full_size_eyes(bench: Bench) -> None:
    """Vision encoder, difference and Q-Former at full size: eight questions about one pair."""
    language = LlamaConfig(hidden_size=64, intermediate_size=64, num_attention_heads=4, num_hidden_layers=1)
    config = DeltaVLMConfig(text_config=language, image_token_id=32000)
    with bench.device:
        model = DeltaVLMModel._from_config(config, dtype=bench.dtype).eval()
    inputs = bench.processor(text=QUESTIONS, padding=True, return_tensors="pt").to(bench.device)
    instructions = {name: inputs[name] for name in ("qformer_input_ids", "qformer_attention_mask")}
    pixel_values = torch.randn(1, 2, 3, 224, 224, device=bench.device, dtype=bench.dtype)

    @torch.inference_mode()
    def again_for_each() -> None:
        for number in range(len(QUESTIONS)):
            one = {name: value[number : number + 1] for name, value in instructions.items()}
            model(**one, pair_features=encode_apart(model, pixel_values))

    @torch.inference_mode()
    def once() -> None:
        model(**instructions, pair_features=model.encode_pair(pixel_values))

    instruction = inputs["qformer_input_ids"].shape[1]
    estimate = partial(estimate_cost, config, instruction_tokens=instruction, weight_bytes=bench.dtype.itemsize)
    allowed = 8 * least_seconds(estimate()[:3], bench.card) / least_seconds(estimate(questions=8)[:3], bench.card)
    bench.compare(
        "vision, difference and Q-Former at full size, 8 questions about one pair",
        ("the authors' way", again_for_each),
        ("encoded once", once),
        same=False,  # change tokens, not answers; tests compare them
        rounds=1,
        allowed=allowed,
    )


def training(bench: Bench) -> None:
    """A step that trains two vision blocks, the difference module and the Q-Former, of four rows."""
    training_step(bench, 32_000)  # as Vicuna
    training_step(bench, 128_256)  # as Llama 3


def training_step(bench: Bench, full_vocabulary: int) -> None:
    torch.manual_seed(0)
    vocabulary = full_vocabulary // bench.factor  # the head keeps its share
    text = LlamaConfig(**{**bench.config.text_config.to_dict(), "vocab_size": vocabulary})
    config = DeltaVLMConfig(**{**bench.parts(bench.processor), "text_config": text}, image_token_id=vocabulary)
    model = bench.make(config).train()
    freeze(model, FreezePolicy(vision_blocks=2))
    blocks = config.vision_config.num_hidden_layers - 2
    pixel_values = torch.randn(4, 2, 3, 224, 224, device=bench.device, dtype=bench.dtype)
    with torch.no_grad(), bench.autocast():
        states = encode_vision_prefix(model, pixel_values.flatten(0, 1), blocks).unflatten(0, (-1, 2))
    placeholders = torch.full((4, 32), vocabulary)
    input_ids = torch.cat([placeholders, torch.randint(3, vocabulary, (4, 96))], dim=1)
    labels = input_ids.masked_fill(torch.arange(128) < 112, -100)  # the last 16 tokens are the answer
    inputs = {"input_ids": input_ids, "labels": labels, "qformer_input_ids": torch.randint(3, 1000, (4, 32))}
    inputs["qformer_input_ids"] %= len(bench.processor.qformer_tokenizer)
    inputs = {name: value.to(bench.device) for name, value in inputs.items()}
    take_vision_states(model)
    cached = {"vision_states": states, "vision_states_block": blocks}
    plain, cache = "images encoded, all logits", "cached vision states"
    both = f"{cache}, logits of answers"
    answers = {"logits_to_keep": torch.arange(111, 127, device=bench.device)}
    ways = {plain: {"pixel_values": pixel_values}, cache: cached, both: {**cached, **answers}}

    def loss(way: str) -> torch.Tensor:
        model.zero_grad()
        with bench.autocast():
            return model(**inputs, **ways[way]).loss

    def step(way: str) -> None:
        loss(way).backward()

    flops = {}
    model.set_attn_implementation("eager")  # the fused kernels of a CPU are not counted
    for way in ways:
        with FlopCounterMode(display=False) as counter:
            step(way)
        flops[way] = counter.get_total_flops()
    model.set_attn_implementation("sdpa")
    what = f"training step, vocabulary of {full_vocabulary:,}"
    for slow, fast, aim in ((plain, cache, 1.25), (plain, both, 1.25), (cache, both, None)):
        runs = [(way, partial(step, way)) for way in (slow, fast)]
        bench.compare(what, *runs, same=False, aim=aim, allowed=flops[slow] / flops[fast])
    kept = {way: bytes_for_backward(partial(loss, way)) for way in ways}
    what = f"memory kept for the backward pass, vocabulary of {full_vocabulary:,}"
    bench.note(what, plain, both, kept[plain] / kept[both])
    bench.note(what, cache, both, kept[cache] / kept[both])
    model.requires_grad_(True)
    everything = bytes_for_backward(partial(loss, plain))
    bench.note(what, "nothing frozen", "frozen as in the recipe", everything / kept[plain])


def bytes_for_backward(forward: Callable[[], torch.Tensor]) -> int:
    """Bytes of what autograd keeps, each storage once, without the weights."""
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter) and not isinstance(tensor._base, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward()
    del loss
    return sum(sizes.values())


LOAD = """
import json, sys, time
import torch
from deltavlm_hf import DeltaVLMConfig, DeltaVLMForConditionalGeneration

def memory(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return 1024 * int(line.split()[1])

way, folder, legacy = sys.argv[1:]
before = memory("VmRSS")
start = time.perf_counter()
if way == "ours":
    model = DeltaVLMForConditionalGeneration.from_pretrained(folder)
else:
    model = DeltaVLMForConditionalGeneration(DeltaVLMConfig.from_pretrained(folder))
    model.load_state_dict(torch.load(legacy, map_location="cpu", weights_only=True)["model"])
loaded = time.perf_counter() - start
total = sum(float(weight.sum()) for weight in model.parameters())  # what is mapped from the file is read now
read = time.perf_counter() - start
weights = sum(weight.nbytes for weight in model.parameters())
print(json.dumps({"loaded": loaded, "read": read, "peak": (memory("VmHWM") - before) / weights, "total": total}))
"""


def loading(bench: Bench) -> None:
    """Time and memory of `from_pretrained` against `torch.load` into a model that was built first."""
    with tempfile.TemporaryDirectory() as folder:
        bench.model.save_pretrained(folder)
        legacy = Path(folder, "checkpoint.pth")
        torch.save({"model": bench.model.state_dict()}, legacy)
        found: dict[str, list[dict]] = {"theirs": [], "ours": []}
        for _ in range(bench.rounds):
            for way, runs in found.items():
                child = [sys.executable, "-c", LOAD, way, folder, str(legacy)]
                runs.append(json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout))
    if len({run["total"] for runs in found.values() for run in runs}) != 1:
        raise SystemExit("The two ways load different weights.")
    middle = {
        way: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for way, runs in found.items()
    }
    theirs, ours = middle["theirs"], middle["ours"]
    names = ("model built, `torch.load`, `load_state_dict`", "`from_pretrained`")
    bench.note("loading, until the model is there", *names, theirs["loaded"] / ours["loaded"])
    bench.note("loading, until every weight has been read", *names, theirs["read"] / ours["read"])
    bench.note("peak memory of loading", "`from_pretrained`", "the weights", ours["peak"], aim=1.2)
    bench.note("peak memory of loading", names[0], "the weights", theirs["peak"])


def importing(bench: Bench) -> None:
    """Importing in a fresh interpreter, against Transformers."""
    pairs = [
        ("import deltavlm_hf", "import transformers"),
        (
            "from deltavlm_hf import DeltaVLMForConditionalGeneration, DeltaVLMProcessor",
            "from transformers import InstructBlipForConditionalGeneration, InstructBlipProcessor",
        ),
    ]
    for lines in pairs:
        runs = [(f"`{line}`", partial(subprocess.run, [sys.executable, "-c", line], check=True)) for line in lines]
        bench.compare("importing (smaller is better)", *runs, same=False, aim=1.5)


GROUPS = (one_question, dialogue, many_questions, training, loading, importing, full_size_eyes)


def setting(bench: Bench, command: str) -> dict[str, Any]:
    """What a reader needs to judge the figures."""
    counts = {name: sum(w.numel() for w in part.parameters()) for name, part in bench.model.named_children()}
    return {
        "command": command,
        "machine": {
            "processor": processor_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "system": platform.system(),
            "GFLOP/s": round(bench.card.flops_per_second / 1e9, 1),
            "GB/s": round(bench.card.bytes_per_second / 1e9, 1),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "deltavlm_hf": deltavlm_hf.__version__,
        },
        "sizes": {
            "widths divided by": bench.factor,
            "precision": "float32",
            "parameters": counts,
            "rounds": bench.rounds,
        },
    }


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def table(setting: dict[str, Any], results: list[dict[str, Any]]) -> str:
    machine, versions, sizes = setting["machine"], setting["versions"], setting["sizes"]
    counts = ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in sizes["parameters"].items())
    lines = [
        "# Speed: measured ratios",
        "",
        f"Written by `{setting['command']}`. {machine['processor']}, {machine['cores']} cores, {machine['threads']} "
        f"threads; {machine['GFLOP/s']} GFLOP/s and {machine['GB/s']} GB/s reached. "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f". The paper's widths divided by {sizes['widths divided by']}, its depths ({counts}), "
        f"{sizes['precision']}. Medians of {sizes['rounds']} rounds, fewer for the long ones; weights are random.",
        "",
        "`allowed` is the ratio of the least times that arithmetic and memory traffic take, at these sizes on this",
        "machine, `reached` the share of it. `full size` is the same for the paper's sizes on an H100: computed, not",
        "run.",
        "",
        "| what | of | over | ratio | allowed | reached | full size | aim |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in results:
        allowed = row.get("allowed")
        cells = [
            *(row[key] for key in ("what", "over", "ours")),
            f"{row['ratio']:.2f}",
            *((f"{allowed:.2f}", f"{row['ratio'] / allowed:.2f}") if allowed else ("", "")),
            f"{row['full_size']:.2f}" if "full_size" in row else "",
            f"{row['aim']:g}" if row["aim"] else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factor", type=int, default=8, help="by which widths are smaller than the paper's")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=[group.__name__ for group in GROUPS], metavar="GROUP")
    parser.add_argument("--output", type=Path, help="folder for speed.json and speed.md")
    args = parser.parse_args()
    bench = Bench(args.factor, args.rounds)
    found = setting(bench, " ".join(["python", *sys.argv]))
    results: dict[str, list[dict[str, Any]]] = {}
    file = args.output and args.output / "speed.json"
    if file and file.exists() and args.only:
        earlier = json.loads(file.read_text())
        if any(earlier[key] != found[key] for key in ("versions", "sizes")):
            parser.error(f"{file} has figures of other versions or sizes: measure all groups again.")
        found, results = {key: earlier[key] for key in found}, earlier["results"]
    for group in GROUPS:
        if not args.only or group.__name__ in args.only:
            bench.results = results[group.__name__] = []
            group(bench)
    text = table(found, [row for group in GROUPS for row in results.get(group.__name__, ())])
    if file:
        args.output.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**found, "results": results}, indent=1) + "\n")
        file.with_suffix(".md").write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
