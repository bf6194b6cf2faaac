"""
Whether a folder is always the old or the new model, whenever the process that saves to it is killed.

    python benchmarks/kills.py --kills 100
    python benchmarks/kills.py --every-step

Two models with their processors take turns in one folder: of other sizes, vocabularies, templates, one in a single
file and one in shards. A process saves one after the other until SIGKILL comes at a random moment, or, with
`--every-step`, at each of its operations on files in turn; once more while what it left is being finished. Then the
folder is loaded by the Auto classes, and all weights, settings and vocabularies are compared with both.
Linux; less than a second for each kill.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

import deltavlm_hf
from deltavlm_hf import DeltaVLMConfig, DeltaVLMForConditionalGeneration

OPERATIONS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}


class Saved:
    """A model and its processor, and what tells them from others."""

    def __init__(self, model, processor, shards: str = "50GB"):
        self.model, self.processor, self.shards = model, processor, shards

    @classmethod
    def both(cls) -> dict[str, "Saved"]:
        """Two that differ in all they are made of."""
        processors = [AutoProcessor.from_pretrained(deltavlm_hf.tiny()) for _ in range(2)]
        processors[1].num_query_tokens = 16
        processors[1].image_processor.image_mean = [0.1, 0.2, 0.3]
        processors[1].chat_template += " "
        for name in ("tokenizer", "qformer_tokenizer"):
            getattr(processors[1], name).add_tokens(["<new>"])
        torch.manual_seed(0)
        models = [
            DeltaVLMForConditionalGeneration(small_config(difference)).eval() for difference in ("csrm", "concat")
        ]
        return {"old": cls(models[0], processors[0]), "new": cls(models[1], processors[1], shards="100KB")}

    @classmethod
    def load(cls, folder: str | Path, model_first: bool = True) -> "Saved":
        kinds = [AutoModelForImageTextToText, AutoProcessor]
        loaded = [kind.from_pretrained(folder) for kind in (kinds if model_first else kinds[::-1])]
        return cls(*(loaded if model_first else loaded[::-1]))

    def save(self, folder: Path, apart: bool) -> None:
        with nullcontext(folder) if apart else deltavlm_hf.replacing(folder) as place:
            self.model.save_pretrained(place, max_shard_size=self.shards)
            self.processor.save_pretrained(place)

    def is_model_of(self, other: "Saved") -> bool:
        mine, others = self.model.state_dict(), other.model.state_dict()
        same = mine.keys() == others.keys() and all(mine[name].equal(others[name]) for name in mine)
        return same and self.model.config.difference_module == other.model.config.difference_module

    def is_processor_of(self, other: "Saved") -> bool:
        mine, others = self.processor, other.processor
        return (
            mine.num_query_tokens == others.num_query_tokens
            and mine.chat_template == others.chat_template
            and list(mine.image_processor.image_mean) == list(others.image_processor.image_mean)
            and mine.tokenizer.get_vocab() == others.tokenizer.get_vocab()
            and mine.qformer_tokenizer.get_vocab() == others.qformer_tokenizer.get_vocab()
        )


def small_config(difference_module: str) -> DeltaVLMConfig:
    layers = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return DeltaVLMConfig(
        vision_config={"hidden_size": 32, "image_size": 32, "patch_size": 8, **layers},
        qformer_config={"hidden_size": 24, "vocab_size": 500, **layers},
        text_config={"hidden_size": 32, "vocab_size": 500, **layers},
        difference_module=difference_module,
    )


def fork(action: Callable[[], None], die_at: int | None = None) -> int:
    """Another process that does something, or kills itself before so many operations on files; its id."""
    process = os.fork()
    if process:
        return process
    _live(action, die_at)


def _live(action: Callable[[], None], die_at: int | None) -> NoReturn:
    seen = 0

    def count(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event in OPERATIONS:
            seen += 1
            if seen == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        if die_at is not None:
            sys.addaudithook(count)
        action()
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def was_killed(process: int) -> bool:
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    if os.WEXITSTATUS(status):
        raise RuntimeError("the saving process failed")
    return False


def moment(folder: Path) -> str:
    """What the killed process was at."""
    saving = folder / ".saving-new"
    if not saving.exists():
        return "between saves"
    try:
        decisive, *_ = json.loads((saving / "names.json").read_text())
    except (OSError, ValueError):
        return "writing"
    return "writing" if (saving / "files" / decisive).exists() else "renaming"


class Check:
    """Loads what was left and says what it is."""

    def __init__(self, saved: dict[str, Saved], apart: bool):
        self.saved, self.apart = saved, apart
        self.found: Counter[str] = Counter()
        self.moments: Counter[str] = Counter()

    def __call__(self, folder: Path) -> str:
        self.moments[moment(folder)] += 1
        model_first = self.found.total() % 2 == 0
        try:
            loaded = Saved.load(folder, model_first)
        except (OSError, ValueError) as error:
            print(f"refused: {error}", file=sys.stderr)
            self.found["refused"] += 1
            return "refused"
        models = [name for name, each in self.saved.items() if loaded.is_model_of(each)] or ["a mixture"]
        processors = [name for name, each in self.saved.items() if loaded.is_processor_of(each)] or ["a mixture"]
        name = models[0] if models == processors else f"{models[0]}, its processor {processors[0]}"
        self.found[name] += 1
        return name

    @property
    def is_passed(self) -> bool:
        return not any("mixture" in name or (not self.apart and "," in name) for name in self.found)


def at_random(check: Check, folder: Path, kills: int) -> None:
    check.saved["old"].save(folder, check.apart)
    here = "old"
    start = time.perf_counter()
    for name in ("new", "old"):
        check.saved[name].save(folder, check.apart)
    both = time.perf_counter() - start

    def save_over_and_over() -> None:
        names = ["old", "new"] if here == "new" else ["new", "old"]
        while True:
            for name in names:
                check.saved[name].save(folder, check.apart)

    for _ in range(kills):
        process = fork(save_over_and_over)
        time.sleep(random.uniform(0, both))
        os.kill(process, signal.SIGKILL)
        was_killed(process)
        here = check(folder)


def at_every_step(check: Check, folder: Path) -> None:
    whole = {name: folder.with_name(name) for name in check.saved}
    for name, place in whole.items():
        check.saved[name].save(place, check.apart)
    unfinished = folder.with_name("unfinished")

    def kill_at_every_step(start: Path, action: Callable[[], None]) -> None:
        die_at, killed = 0, True
        while killed:
            die_at += 1
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(start, folder)
            killed = was_killed(fork(action, die_at))
            if moment(folder) == "renaming" and not unfinished.exists():
                shutil.copytree(folder, unfinished)
            check(folder)

    for before, after in (("old", "new"), ("new", "old")):
        kill_at_every_step(whole[before], partial(check.saved[after].save, folder, check.apart))
        assert check(folder) == after and not list(folder.glob(".saving*"))
    if unfinished.exists():
        kill_at_every_step(unfinished, lambda: Saved.load(folder) and None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every-step", action="store_true")
    parser.add_argument("--apart", action="store_true", help="model and processor by two saves, each whole in itself")
    args = parser.parse_args()
    random.seed(args.seed)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as root:
        check = Check(Saved.both(), args.apart)
        folder = Path(root) / "model"
        at_every_step(check, folder) if args.every_step else at_random(check, folder, args.kills)
    print(json.dumps({"kills": check.found.total(), "loaded": check.found, "killed while": check.moments}, indent=1))
    sys.exit(0 if check.is_passed else 1)


if __name__ == "__main__":
    main()
