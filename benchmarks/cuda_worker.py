"""
The checks of `cuda_check.py`, which runs this file in a process of its own: see there.

Each function of `CHECKS` is one check. It tells what it found through [`Run`], row by row; each row is out before the
next one is begun. A check fails when it raises or when one of its rows is not as it must be.
"""

import argparse
import contextlib
import datetime
import gc
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import speed
import torch
import transformers
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, CompileConfig
from transformers.utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_flash_attn_4_available,
    is_torch_flex_attn_available,
)

import deltavlm_hf
from deltavlm_hf import DeltaVLMForConditionalGeneration, convert_original_checkpoint
from deltavlm_hf.cli import main as deltavlm
from deltavlm_hf.data import PairCollator, load_generated
from deltavlm_hf.training import FreezePolicy, estimate_memory, freeze, last_complete_checkpoint
from deltavlm_hf.training.quantization import four_bit_config

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from official import OFFICIAL, official_config, official_sources  # noqa: E402

GIB = 2**30
# What bf16, with 8 bits of a number, may differ from float32: of a tensor's length, and of a loss.
BF16_TENSOR, BF16_LOSS = 0.05, 0.02
ROOM = 0.2  # the part of its memory that docs/training.md asks to leave free


class NotRun(Exception):
    """Why a check could not be run here."""


@dataclass(frozen=True)
class Sizes:
    """How large things are: on a card, or where the code is only rehearsed."""

    factor: int  # widths of the large model, the paper's divided by this
    depth_factor: int
    wide_factor: int  # of the model with few layers
    rounds: int
    turns_tokens: tuple[int, ...]
    pairs: int
    answers: tuple[tuple[int, int], ...]  # tokens, and how often the two ways take turns
    decoded: int
    batch_size: int  # of the step whose memory is measured
    pairs_to_train: int
    rows: int  # of a training step
    steps: int
    save_steps: int
    patience: int  # seconds, for two processes


FULL = Sizes(
    factor=1,
    depth_factor=1,
    wide_factor=1,
    rounds=5,
    turns_tokens=(2, 8),
    pairs=32,
    answers=((4, 3), (16, 1)),
    decoded=64,
    batch_size=12,
    pairs_to_train=64,
    rows=8,
    steps=60,
    save_steps=20,
    patience=90,
)
SMALL = Sizes(
    factor=64,
    depth_factor=12,
    wide_factor=32,
    rounds=1,
    turns_tokens=(2,),
    pairs=2,
    answers=((2, 1),),
    decoded=4,
    batch_size=2,
    pairs_to_train=2,
    rows=2,
    steps=3,
    save_steps=1,
    patience=450,
)


class Run:
    """
    What a check is given, and how it tells what it found.

    Attributes:
        device (`str`): the card, or the CPU in a rehearsal.
        dtype (`torch.dtype`): of the large model, and of what is computed in training; bf16 but for a rehearsal, as
            CPUs are slow at it.
        rehearsal (`bool`): sizes are small, and no figure means anything.
        folder (`Path`): where files may lie, for later checks too.
    """

    def __init__(self, folder: Path, rehearsal: str | None, emit: Callable[[dict], None]):
        self.folder = folder
        self.rehearsal = rehearsal is not None
        self.device = "cpu" if self.rehearsal else "cuda:0"
        self.dtype = getattr(torch, rehearsal) if rehearsal else torch.bfloat16
        self.sizes = SMALL if self.rehearsal else FULL
        self.emit = emit
        self.failures: list[str] = []
        self._benches: dict[str, speed.Bench] = {}

    def row(
        self, what: str, value: float | str, unit: str = "", must: str = "", ok: bool | None = None, **more
    ) -> None:
        """A line of the table; `ok` is None where nothing is asked of the value."""
        if isinstance(value, float) and not math.isfinite(value):
            value = str(value)  # which JSON has no number for
        self.emit({"row": {"what": what, "value": value, "unit": unit, "must": must, "ok": ok, **more}})
        print(f"  {what}: {value} {unit}", flush=True)
        if ok is False:
            self.failures.append(f"{what} is {shown(value)}, must be {must}")

    def at_most(self, what: str, value: float, most: float, unit: str = "") -> None:
        self.row(what, value, unit, f"at most {most:g}", value <= most)

    def below(self, what: str, value: float, limit: float) -> None:
        self.row(what, value, must=f"below {limit:g}", ok=value < limit)

    def equal(self, what: str, value: float, must: float) -> None:
        self.row(what, value, must=f"{must:g}", ok=value == must)

    def same(self, what: str, ok: bool, otherwise: str = "another") -> None:
        self.row(what, "the same" if ok else otherwise, must="the same", ok=ok)

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """An error here fails the check, which goes on all the same."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.row(what, told(error), must="no error", ok=False)

    @property
    def large(self) -> speed.Bench:
        """The paper's sizes, in 16 bits."""
        return self._bench("large", self.sizes.factor, self.sizes.depth_factor, self.dtype)

    @property
    def wide(self) -> speed.Bench:
        """The paper's widths and few layers, in float32."""
        return self._bench("wide", self.sizes.wide_factor, max(6, self.sizes.depth_factor), torch.float32)

    def _bench(self, name: str, factor: int, depth_factor: int, dtype: torch.dtype) -> speed.Bench:
        if name not in self._benches:
            self.drop()  # there is room for one of them
            where = {"depth_factor": depth_factor, "device": self.device, "dtype": dtype}
            self._benches[name] = speed.Bench(factor, self.sizes.rounds, **where)
        return self._benches[name]

    def drop(self) -> None:
        """Lets go of the models."""
        self._benches.clear()
        self.collect()

    def collect(self) -> None:
        gc.collect()
        if not self.rehearsal:
            torch.cuda.empty_cache()

    def held(self) -> int:
        """Bytes on the card."""
        return 0 if self.rehearsal else torch.cuda.memory_allocated()

    def peak(self) -> int:
        """The most bytes on the card since `forget_peak`."""
        return 0 if self.rehearsal else torch.cuda.max_memory_allocated()

    def forget_peak(self) -> None:
        if not self.rehearsal:
            torch.cuda.reset_peak_memory_stats()

    def ratios(self, bench: speed.Bench) -> None:
        """Rows of what a group of `speed.py` found."""
        for found in bench.results:
            more = {key: value for key, value in found.items() if key not in ("what", "over", "ours", "ratio")}
            self.row(f"{found['what']}: {found['over']} / {found['ours']}", found["ratio"], "times", **more)
        bench.results = []

    def tiny(self, dtype: torch.dtype = torch.float32, **kwargs) -> DeltaVLMForConditionalGeneration:
        """The model inside the package."""
        where = {"device_map": {"": self.device}}
        return AutoModelForImageTextToText.from_pretrained(deltavlm_hf.tiny(), dtype=dtype, **where, **kwargs)

    def rows(self, pairs: int):
        return load_generated(pairs, 4_700_000, unroll=True)


def shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def told(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text}"[:600] if text else type(error).__name__


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """How far from what is expected, as a part of its length; NaN for NaN."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm())


def largest(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float((found.detach().double().cpu() - expected.double()).abs().max())


# What the authors' code computed


def recorded() -> dict[str, torch.Tensor]:
    return load_file(OFFICIAL / "io.safetensors")


def official_model(run: Run, path: str, dtype: torch.dtype):
    """The authors' small model, converted, with the random row that `[PAD]` has in their run."""
    folder = run.folder / f"official_{path}"
    if not folder.exists():
        convert_original_checkpoint(**official_sources(), output_dir=folder, config=official_config(path))
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, device_map={"": run.device})
    rows = load_file(OFFICIAL / "pad_row.safetensors")
    with torch.no_grad():
        model.get_input_embeddings().weight[1000] = rows["embed_tokens"]
        model.get_output_embeddings().weight[1000] = rows["lm_head"]
    return model, AutoProcessor.from_pretrained(folder)


@torch.inference_mode()
def computed(model, path: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the model makes of the recorded inputs, by the names of what was recorded."""
    pixel_values = torch.stack([tensors["image_A"], tensors["image_B"]], dim=1).to(model.device, model.dtype)
    queries = model.config.num_query_tokens
    placeholders = torch.full((2, queries), model.config.image_token_id)
    inputs = {
        "input_ids": torch.cat([placeholders, tensors["train_text_input_ids"]], dim=1),
        "attention_mask": tensors["train_attention_mask"],
        "labels": tensors["train_labels"],
        "qformer_input_ids": tensors["qformer_input_ids"],
        "qformer_attention_mask": tensors["qformer_attention_mask"],
    }
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    blocks: list[torch.Tensor] = []
    hook = model.vision_model.encoder.layers[-1].register_forward_hook(lambda *call: blocks.append(call[-1]))
    outputs = model(**inputs, pixel_values=pixel_values)
    hook.remove()
    before_norm = blocks[0].unflatten(0, (2, 2))
    after_norm = outputs.vision_outputs.last_hidden_state.unflatten(0, (2, 2))
    found = {
        "vit_A": before_norm[:, 0],
        "vit_B": before_norm[:, 1],
        "ln_vision_A": after_norm[:, 0],
        "ln_vision_B": after_norm[:, 1],
        f"{path}_qformer_queries": outputs.qformer_outputs.last_hidden_state[:, :queries],
        f"{path}_change_tokens": outputs.image_hidden_states,
        f"{path}_train_logits": outputs.logits,
        f"{path}_loss": outputs.loss.reshape(1),
    }
    if path == "csrm":
        found["csrm_pair_features"] = model.encode_pair(pixel_values)
    return found


def generated(run: Run, model, processor, tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, list, list]]:
    """The recorded generations: their names, the ids that were found, those that were recorded."""
    official = json.loads((OFFICIAL / "io.json").read_text())
    pixel_values = torch.stack([tensors["image_A"], tensors["image_B"]], dim=1).to(run.device, model.dtype)
    inputs = processor(text=official["prompts"], normalize_text=False, padding=True, return_tensors="pt")
    inputs = inputs.to(run.device)
    for name, record in official["generate"].items():
        kwargs = dict(record["kwargs"])
        kwargs["max_new_tokens"] = kwargs.pop("max_length") - 1  # the old library counted an id that is not there
        ids = model.generate(**inputs, pixel_values=pixel_values, **kwargs)
        yield name, ids[:, inputs["input_ids"].shape[1] :].tolist(), [row[1:] for row in record["ids"]]


def parity_float32(run: Run) -> None:
    """What the authors' code recorded, in float32 without TF32: largest differences, identical ids."""
    tensors = recorded()
    for path in ("csrm", "concat"):
        model, processor = official_model(run, path, torch.float32)
        for attention in ("sdpa", "eager"):
            model.set_attn_implementation(attention)
            for name, found in computed(model, path, tensors).items():
                what = f"{name.removeprefix(f'{path}_')}, {path}, {attention}"
                if name.endswith("_loss"):
                    expected = tensors[name].item()
                    run.at_most(f"{what}, relative", abs(found.item() / expected - 1), 1e-5)
                else:
                    run.at_most(what, largest(found, tensors[name]), 1e-4 if "logits" in name else 2e-5)
        model.set_attn_implementation("sdpa")
        if path == "csrm":
            for name, ids, expected in generated(run, model, processor, tensors):
                run.same(f"ids of {name}", ids == expected, f"{ids}, recorded {expected}")
            allow_tf32(True)
            found = computed(model, path, tensors)["csrm_train_logits"]
            allow_tf32(False)
            run.row("train_logits, csrm, sdpa, with TF32", largest(found, tensors["csrm_train_logits"]))


def allow_tf32(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def parity_bfloat16(run: Run) -> None:
    """The same in bf16: distances as a part of a tensor's length; ids need not be the same."""
    tensors = recorded()
    for path in ("csrm", "concat"):
        model, processor = official_model(run, path, torch.bfloat16)
        for name, found in computed(model, path, tensors).items():
            what = f"{name.removeprefix(f'{path}_')}, {path}"
            most = BF16_LOSS if name.endswith("_loss") else BF16_TENSOR
            run.at_most(what, distance(found, tensors[name]), most)
        if path == "csrm":
            for name, ids, expected in generated(run, model, processor, tensors):
                run.row(f"ids of {name} that are as recorded", speed.share_equal(sum(ids, []), sum(expected, [])))


# What the model computes with


def two_questions(bench: speed.Bench) -> dict[str, torch.Tensor]:
    """Of different length, padded on the left."""
    texts = ["What changed?", "How many buildings were built in the top left of the later image?"]
    inputs = bench.processor(images=bench.images(2), text=texts, padding=True, return_tensors="pt")
    return dict(inputs.to(bench.device))


@torch.no_grad()
def logits(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of what is not padding."""
    inputs = {**inputs, "pixel_values": inputs["pixel_values"].to(model.dtype)}
    return model(**inputs).logits[inputs["attention_mask"].bool()].float()


def attention(run: Run) -> None:
    """Every attention implementation that is here, at the paper's widths with few layers, against eager in float32."""
    bench = run.wide
    inputs = two_questions(bench)
    with bench.device:
        halved = AutoModelForImageTextToText.from_config(bench.config, dtype=torch.bfloat16).eval()
    halved.load_state_dict(bench.model.state_dict())
    bench.model.set_attn_implementation("eager")
    halved.set_attn_implementation("eager")
    expected = logits(bench.model, inputs)
    eager = distance(logits(halved, inputs), expected)
    run.row("eager, bf16: distance of logits from float32", eager)
    here = {
        "sdpa": True,
        "flash_attention_2": is_flash_attn_2_available(),
        "flash_attention_3": is_flash_attn_3_available(),
        "flash_attention_4": is_flash_attn_4_available(),
        "flex_attention": is_torch_flex_attn_available() and not run.rehearsal,  # compiled for minutes on a CPU
    }
    for name, available in here.items():
        if not available:
            run.row(name, "not here")
            continue
        for model in (bench.model, halved):
            if name.startswith("flash") and model is bench.model:
                continue  # these know 16 bits only
            bits = str(model.dtype).removeprefix("torch.")
            with run.attempt(f"{name}, {bits}"):
                model.set_attn_implementation(name)
                used = {part.config._attn_implementation for part in model.modules() if hasattr(part, "config")}
                if used != {name}:
                    run.row(f"{name}, {bits}: the parts compute with", ", ".join(sorted(used)))
                found = distance(logits(model, inputs), expected)
                if model is bench.model:
                    run.at_most(f"{name}, {bits}: distance of logits from eager", found, 1e-4)
                else:
                    run.at_most(f"{name}, {bits}: distance of logits from eager in float32", found, 1.5 * eager + 1e-4)
    bench.model.set_attn_implementation("sdpa")


def compile_settings(run: Run) -> CompileConfig:
    """For `generate`: its own on a card; in a rehearsal the graphs are found, but no code is made of them."""
    if not run.rehearsal:
        return CompileConfig()
    settings = CompileConfig(backend="eager", mode=None)
    settings._compile_all_devices = True
    return settings


def compiling(run: Run) -> None:
    """`torch.compile` of the forward pass and of decoding with a static cache: graph breaks, agreement."""
    bench = run.wide
    model, inputs = bench.model, two_questions(bench)
    with torch.no_grad():
        found = torch._dynamo.explain(model)(**inputs)
    run.at_most("forward: graph breaks", found.graph_break_count, 0)
    torch._dynamo.reset()
    backend = {"backend": "eager"} if run.rehearsal else {}
    compiled = torch.compile(model, fullgraph=True, **backend)
    with torch.no_grad():
        apart = distance(compiled(**inputs).logits, model(**inputs).logits)
        run.at_most("forward, float32: distance of logits from not compiled", apart, 1e-4)
        ways = ("not compiled", partial(model, **inputs)), ("compiled", partial(compiled, **inputs))
        bench.compare("forward, float32", *ways, same=False)
    torch._dynamo.reset()
    fixed = {**bench.greedy(run.sizes.decoded), "eos_token_id": None}
    expected = model.generate(**inputs, **fixed).tolist()
    static = {"cache_implementation": "static", "compile_config": compile_settings(run)}
    for time_ in ("first", "second"):
        ids = model.generate(**inputs, **fixed, **static).tolist()
        run.same(f"ids of {run.sizes.decoded} tokens with a static cache, compiled, {time_} time", ids == expected)
    run.ratios(bench)
    torch._dynamo.reset()


def compiled_decoding(run: Run) -> None:
    """One question at full size: decoding with a static cache, compiled, against the default cache."""
    bench = run.large
    bench.model.eval()
    inputs = bench.processor(images=bench.images(1), text=speed.QUESTIONS[:1], return_tensors="pt")
    inputs = inputs.to(bench.device, bench.dtype)
    tokens = bench.greedy(run.sizes.decoded)
    static = {"cache_implementation": "static", "compile_config": compile_settings(run)}

    def answer(**kwargs) -> list:
        return bench.model.generate(**inputs, **tokens, **kwargs)[0, inputs["input_ids"].shape[1] :].tolist()

    for _ in range(2):  # compiles, records
        answer(**static)
    ways = ("the default cache", answer), ("a static cache, compiled", partial(answer, **static))
    bench.compare(f"one question, {run.sizes.decoded} tokens of answer", *ways)
    run.ratios(bench)
    torch._dynamo.reset()


# Training


def four_bit(run: Run) -> None:
    """The shipped model with its language model in 4-bit against a dequantised copy: answers, gradients, a step."""
    need_bitsandbytes(run)
    import bitsandbytes
    from bitsandbytes.functional import dequantize_4bit

    processor = AutoProcessor.from_pretrained(deltavlm_hf.tiny())
    rows = run.rows(2)
    batch = PairCollator(processor)([rows[index] for index in range(run.sizes.rows)]).to(run.device)
    for compute in dict.fromkeys((torch.float32, run.dtype)):
        most = 1e-4 if compute == torch.float32 else BF16_TENSOR
        bits = str(compute).removeprefix("torch.")
        autocast = partial(torch.autocast, run.device.split(":")[0], compute, enabled=compute != torch.float32)
        quantised, plain = run.tiny(quantization_config=four_bit_config(compute)), run.tiny()
        for name, module in quantised.named_modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
                plain.get_submodule(name).weight.data = weight.to(torch.float32)
        quantised.eval()
        plain.eval()
        for size in (1, run.sizes.rows):  # kernels differ
            few = {name: value[:size] for name, value in batch.items()}
            with torch.no_grad(), autocast():
                pairs = [model(**few).logits.float() for model in (quantised, plain)]
            run.at_most(f"{bits}, {size} rows: distance of logits from a dequantised copy", distance(*pairs), most)
        if compute == torch.float32:
            asked = {name: value for name, value in batch.items() if name != "labels"}
            answers = [model.generate(**asked, max_new_tokens=8).tolist() for model in (quantised, plain)]
            run.same(f"{bits}: ids of 8 tokens of answer", answers[0] == answers[1])
        for model in (quantised, plain):
            freeze(model, FreezePolicy(vision_blocks=2))
            model.eval()  # nothing drops out
        for size in (1, run.sizes.rows):
            few = {name: value[:size] for name, value in batch.items()}
            gradients = []
            for model in (quantised, plain):
                model.zero_grad()
                with autocast():
                    loss = model(**few).loss
                loss.backward()
                trained = [weight.grad for weight in model.parameters() if weight.requires_grad]
                gradients.append(torch.cat([grad.flatten() for grad in trained if grad is not None]))
            apart = distance(*gradients)
            run.at_most(f"{bits}, {size} rows: distance of gradients from a dequantised copy", apart, most)
        weights = [weight for weight in quantised.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=1e-4)
        losses = []
        for _ in range(2):
            optimizer.zero_grad()
            with autocast():
                loss = quantised(**batch).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        run.below(f"{bits}: loss after a step, as a part of that before", losses[-1] / losses[0], 1)


def need_bitsandbytes(run: Run) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise NotRun("bitsandbytes is not here: not run")
    if run.rehearsal:
        import bitsandbytes.nn.modules

        # On some CPUs it computes in bf16 whatever is asked for, and only widths that are multiples of 32.
        bitsandbytes.nn.modules.has_avx512bf16 = lambda: False


def to_train(run: Run, name: str, **training) -> tuple[Path, Path]:
    """Settings of a run of `deltavlm train`, and its output folder."""
    start = run.folder / "start"
    if not start.exists():  # the shipped model, which has its change tokens still to learn
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_pretrained(deltavlm_hf.tiny())
        torch.nn.init.normal_(model.query_tokens, std=0.02)
        model.language_projection.reset_parameters()
        model.save_pretrained(start)
        AutoProcessor.from_pretrained(deltavlm_hf.tiny()).save_pretrained(start)
    output = run.folder / name
    shutil.rmtree(output, ignore_errors=True)
    sizes = run.sizes
    settings = {
        "model": str(start),
        "data": {"pairs": sizes.pairs_to_train, "validation_pairs": 0},
        "training": {
            "output_dir": str(output),
            "max_steps": sizes.steps,
            "per_device_train_batch_size": sizes.rows,
            "learning_rate": 1e-3,
            "warmup_steps": 2,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": sizes.save_steps,
            "save_total_limit": 10,
            "bf16": run.dtype == torch.bfloat16,
            "gradient_checkpointing": True,
            "report_to": "none",
            "use_cpu": run.rehearsal,
            **training,
        },
    }
    config = run.folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump(settings))
    return config, output


def losses(output: Path) -> list[float]:
    """Of the steps, as the last checkpoint has them."""
    checkpoint = last_complete_checkpoint(output)
    assert checkpoint, f"{output} has no complete checkpoint"
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def training(run: Run) -> None:
    """`deltavlm train` in bf16 with gradient checkpointing; killed and gone on, it ends where it would have ended."""
    config, whole = to_train(run, "whole")
    assert deltavlm(["train", str(config)]) == 0, "`deltavlm train` failed"
    steps = losses(whole)
    some = max(1, len(steps) // 6)
    first, last = (sum(part) / some for part in (steps[:some], steps[-some:]))
    run.equal("steps made", len(steps), run.sizes.steps)
    run.below("loss of the last steps, as a part of the first steps' loss", last / first, 0.9)

    config, resumed = to_train(run, "resumed")
    kill_after(resumed / f"checkpoint-{run.sizes.save_steps}" / "trainer_state.json", config)
    run.same("a checkpoint is there, no result", not (resumed / "model.safetensors").exists(), "the run had ended")
    assert deltavlm(["train", str(config)]) == 0, "`deltavlm train` failed when it went on"
    folders = run.folder / "start", whole, resumed
    start, expected, found = (load_file(folder / "model.safetensors") for folder in folders)
    moved = sum(float((expected[name] - start[name]).double().norm() ** 2) for name in expected) ** 0.5
    apart = sum(float((expected[name] - found[name]).double().norm() ** 2) for name in expected) ** 0.5
    what = "resumed: distance of weights from those of a whole run, as a part of what training moved"
    run.at_most(what, apart / moved, 0.02)


def kill_after(file: Path, config: Path) -> None:
    """Starts a run, and kills it when the file is there."""
    command = [sys.executable, "-m", "deltavlm_hf", "train", str(config)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            while not file.exists():
                if process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(f"`deltavlm train` ended before {file} was there: {log.read()[-1500:]}")
                time.sleep(0.005)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()


def two_processes(run: Run) -> None:
    """Two processes on one card: they work or are refused, and never hang."""
    config, _ = to_train(run, "two", max_steps=2, save_strategy="no", per_device_train_batch_size=2)
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    command = [sys.executable, *launcher, "-m", "deltavlm_hf", "train", str(config)]
    started = time.monotonic()
    code, said = ended_in(command, run.sizes.patience)
    what = "`torchrun --nproc_per_node=2 -m deltavlm_hf train`"
    run.row(f"{what} ended after", time.monotonic() - started, "s", "ended", code is not None)
    if code:
        reasons = re.findall(r"((?:[\w.]*Error|deltavlm: error): .+)", said)
        reason = reasons[0][:400] if reasons else said[-400:]
        run.row(f"{what} is refused", reason, must="with a reason", ok=bool(reasons))
    elif code == 0:
        run.row(what, "works")

    result = run.folder / "gloo.json"
    arguments = (free_port(), run.device, str(result))
    context = torch.multiprocessing.spawn(gloo_process, arguments, nprocs=2, join=False)
    until = time.monotonic() + run.sizes.patience
    try:
        while not context.join(timeout=1):
            if time.monotonic() > until:
                raise TimeoutError(f"two processes with gloo did not end in {run.sizes.patience} s")
    finally:
        for process in context.processes:
            process.kill()
    run.at_most("gloo: distance of gradients from those of one process", json.loads(result.read_text()), 1e-4)


def ended_in(command: list[str], seconds: float) -> tuple[int | None, str]:
    """The exit code, None where a command had to be ended, and what it said."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
            process.terminate()  # the launcher ends its processes
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        said = log.read()
    print(said[-3000:], flush=True)
    return code, said


def gloo_process(rank: int, port: int, device: str, result: str) -> None:
    """One of two: its gradients, averaged with the other's, against those of both halves here."""
    allow_tf32(False)
    address = f"tcp://127.0.0.1:{port}"
    limit = datetime.timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=limit)
    model, alone = (AutoModelForImageTextToText.from_pretrained(deltavlm_hf.tiny()).to(device) for _ in range(2))
    for each in (model, alone):
        freeze(each)
        each.eval()  # nothing drops out
    processor = AutoProcessor.from_pretrained(deltavlm_hf.tiny())
    rows = load_generated(2, 4_700_000, unroll=True)
    collate = PairCollator(processor)
    halves = [collate([rows[index] for index in part]).to(device) for part in (range(3), range(3, 6))]
    shared = torch.nn.parallel.DistributedDataParallel(model)  # averages for as long as it is held
    shared(**halves[rank]).loss.backward()
    if rank == 0:
        sum(alone(**half).loss for half in halves).div(2).backward()
        found, expected = (
            torch.cat([weight.grad.flatten() for weight in each.parameters() if weight.grad is not None])
            for each in (model, alone)
        )
        Path(result).write_text(json.dumps(distance(found, expected)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return some.getsockname()[1]


# At full size


def large_model(run: Run) -> None:
    """A model of the paper's sizes with random weights, made on the card: its memory; one answer."""
    run.drop()
    bench = run.large
    before = run.held()
    run.forget_peak()
    started = time.monotonic()
    model = bench.make(bench.config)
    speed.finish()
    size = sum(weight.nbytes for weight in (*model.parameters(), *model.buffers()))
    run.row("made in", time.monotonic() - started, "s")
    run.row("parameters", sum(weight.numel() for weight in model.parameters()) / 1e9, "billion")
    run.row("weights", size / GIB, "GiB")
    run.at_most("peak memory over the weights", (run.peak() - before) / size, 1.1, "times")
    del model
    run.row("arithmetic reached", bench.card.flops_per_second / 1e12, "TFLOP/s")
    run.row("reading of weights reached", bench.card.bytes_per_second / 1e12, "TB/s")
    pixel_values = bench.pixels(bench.images(1))
    tokens = run.sizes.decoded
    run.forget_peak()
    (said,) = bench.our_answers(pixel_values, speed.QUESTIONS[:1], **bench.greedy(tokens))
    run.equal(f"words of an answer of {tokens} tokens", len(said.split()), tokens)
    run.row("peak memory of the answer", run.peak() / GIB, "GiB")


def many_questions(run: Run) -> None:
    """Eight questions about each of 32 pairs at full size: `ask_pairs` against the authors' way, in batches of 4."""
    bench = run.large
    for tokens, rounds in run.sizes.answers:
        speed.all_answers(bench, tokens, number=run.sizes.pairs, rounds=rounds)
        run.ratios(bench)


def dialogue(run: Run) -> None:
    """Six turns about one pair at full size: `ChangeSession` against the authors' way."""
    bench = run.large
    for tokens in run.sizes.turns_tokens:
        speed.six_turns(bench, tokens, aim=1.5)
        run.ratios(bench)


def training_step(run: Run) -> None:
    """A training step at full size: cached vision states and logits of answers against the authors' way."""
    bench = run.large
    speed.training_step(bench, 32_000)
    run.ratios(bench)


def training_memory(run: Run) -> None:
    """A training step of 12 rows at full size: what it takes against `estimate_memory`."""
    model = run.large.model
    step_memory(run, model, "16 bits" if run.dtype.itemsize == 2 else "32 bits")
    model.gradient_checkpointing_enable()
    step_memory(run, model, "gradient checkpointing", gradient_checkpointing=True)
    del model
    run.drop()  # what trains is in float32 now


def step_memory(run: Run, model, what: str, **settings) -> None:
    """Memory of the second of two steps of AdamW, whose moments are there by then."""
    config, batch_size, prompt, answer = model.config, run.sizes.batch_size, 64, 32
    lengths = {"prompt_tokens": prompt, "answer_tokens": answer}
    estimate = estimate_memory(config, batch_size=batch_size, dtype=run.dtype, **lengths, **settings)
    freeze(model)
    model.train()
    side = config.vision_config.image_size
    placeholders = torch.full((batch_size, config.num_query_tokens), config.image_token_id)
    input_ids = torch.cat([placeholders, torch.ones(batch_size, prompt + answer, dtype=torch.long)], dim=1)
    inputs = {
        "pixel_values": torch.randn(batch_size, 2, 3, side, side, dtype=run.dtype),
        "qformer_input_ids": torch.ones(batch_size, prompt, dtype=torch.long),
        "input_ids": input_ids,
        "labels": input_ids.masked_fill(input_ids == config.image_token_id, -100),
    }
    inputs = {name: value.to(run.device) for name, value in inputs.items()}
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-6)
    for _ in range(2):
        optimizer.zero_grad()
        run.forget_peak()
        before = run.held()
        with torch.autocast(run.device.split(":")[0], run.dtype, enabled=run.dtype.itemsize == 2):
            loss = model(**inputs).loss
        activations = run.held() - before
        loss.backward()
        optimizer.step()
    assert loss.isfinite(), f"the loss is {loss.item()}"
    del optimizer
    model.zero_grad()
    run.row(f"{what}: activations, estimated", estimate.activations / GIB, "GiB")
    run.row(f"{what}: activations, measured", activations / GIB, "GiB")
    run.row(f"{what}: peak, estimated", estimate.total / GIB, "GiB")
    run.row(f"{what}: peak, measured", run.peak() / GIB, "GiB")
    run.at_most(f"{what}: measured peak over the estimate", run.peak() / estimate.total, 1 / (1 - ROOM), "times")


def from_pretrained(run: Run) -> None:
    """The full-size model through `save_pretrained` and `from_pretrained` onto the card: time, memory, weights."""
    bench = run.large
    size = sum(weight.nbytes for weight in bench.model.parameters())
    folder = run.folder / "large"
    free = shutil.disk_usage(run.folder).free
    if free < 1.2 * size:
        raise NotRun(f"{run.folder} has {free / GIB:.0f} GiB free, the model takes {size / GIB:.0f}: not run")
    started = time.monotonic()
    bench.model.save_pretrained(folder, max_shard_size="4GB")
    bench.processor.save_pretrained(folder)
    run.row("saved in", time.monotonic() - started, "s")
    before = run.held()
    run.forget_peak()
    started = time.monotonic()
    loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", device_map={"": run.device})
    speed.finish()
    run.row("loaded in", time.monotonic() - started, "s")
    run.at_most("peak memory of loading over the weights", (run.peak() - before) / size, 1.2, "times")
    places = {weight.device.type for weight in loaded.parameters()}
    run.row("weights are on", ", ".join(sorted(places)), must=run.device, ok=places == {run.device.split(":")[0]})
    pairs = zip(bench.model.parameters(), loaded.parameters(), strict=True)
    run.same("weights", all(torch.equal(one, other) for one, other in pairs))


def four_bit_large(run: Run) -> None:
    """The full-size model from its folder with its language model in 4-bit: an answer, a step, memory."""
    need_bitsandbytes(run)
    run.drop()
    folder = run.folder / "large"
    if not (folder / "config.json").exists():
        raise NotRun("there is no folder of the full-size model, which from_pretrained leaves: not run")
    started = time.monotonic()
    settings = {"quantization_config": four_bit_config(run.dtype), "dtype": run.dtype, "device_map": {"": run.device}}
    run.forget_peak()
    model = AutoModelForImageTextToText.from_pretrained(folder, **settings)
    speed.finish()
    run.row("loaded in", time.monotonic() - started, "s")
    run.row("peak memory of loading", run.peak() / GIB, "GiB")
    run.row("memory of the model", run.held() / GIB, "GiB")
    processor = AutoProcessor.from_pretrained(folder)
    image = torch.randint(0, 256, (3, 224, 224), dtype=torch.uint8)
    inputs = processor(images=(image, image.flip(-1)), text="What changed?", return_tensors="pt")
    ids = model.generate(**inputs.to(run.device, run.dtype), max_new_tokens=8, min_new_tokens=8)
    run.equal("new tokens", ids.shape[1] - inputs["input_ids"].shape[1], 8)
    step_memory(run, model, "4-bit", load_in_4bit=True)


CHECKS = {
    check.__name__: check
    for check in (
        parity_float32,
        parity_bfloat16,
        attention,
        training,
        four_bit,
        large_model,
        many_questions,
        dialogue,
        training_step,
        training_memory,
        from_pretrained,
        four_bit_large,
        compiling,
        two_processes,
        compiled_decoding,
    )
}


def perform(run: Run, name: str, check: Callable[[Run], None]) -> bool:
    """Runs one check and tells how it ended; whether it passed."""
    print(f"{name}: {check.__doc__}", flush=True)
    run.failures = []
    run.emit({"start": name, "what": (check.__doc__ or "").strip()})
    run.collect()
    run.forget_peak()
    started = time.monotonic()
    end: dict[str, Any] = {"status": "passed"}  # for `Report.end`
    try:
        torch.manual_seed(0)
        check(run)
        speed.finish()
        if run.failures:
            end = {"status": "failed", "reason": "; ".join(run.failures)[:2000]}
    except NotRun as reason:
        end = {"status": "not run", "reason": str(reason)}
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        end = {"status": "failed", "reason": told(error), "traceback": traceback.format_exc()[-3000:]}
    end["seconds"] = time.monotonic() - started
    run.emit({"end": end})
    print(f"{name}: {end['status']} {end.get('reason', '')}", flush=True)
    return end["status"] != "failed"


def machine(run: Run) -> dict[str, Any]:
    """What a reader needs to judge the figures."""
    found: dict[str, Any] = {
        "processor": speed.processor_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "deltavlm_hf": deltavlm_hf.__version__,
    }
    if not run.rehearsal:
        card = torch.cuda.get_device_properties(0)
        found["card"] = card.name
        found["memory"] = f"{card.total_memory / GIB:.0f} GiB"
        found["capability"] = f"{card.major}.{card.minor}"
        found["CUDA"] = torch.version.cuda
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=CHECKS)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--events", type=Path, required=True)
    parser.add_argument("--rehearse")
    args = parser.parse_args()

    def emit(event: dict) -> None:
        with args.events.open("a") as file:
            file.write(json.dumps(event) + "\n")

    allow_tf32(False)
    run = Run(args.folder, args.rehearse, emit)
    run.emit({"machine": machine(run)})
    parent = os.getppid()
    for name in args.names:
        if os.getppid() != parent:
            break  # nobody listens any more
        if not perform(run, name, CHECKS[name]):
            break  # what an error left behind on a card is no ground for the next check: another process goes on


if __name__ == "__main__":
    main()
