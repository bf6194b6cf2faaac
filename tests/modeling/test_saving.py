"""Saving over what is there, by processes that are killed, by several at once, and while others read."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainingArguments

import deltavlm_hf
from deltavlm_hf import DeltaVLMForConditionalGeneration, DeltaVLMModel, DeltaVLMProcessor, replacing
from deltavlm_hf.modeling import saving
from deltavlm_hf.modeling.weight_sources import find_files
from deltavlm_hf.training import DeltaVLMTrainer

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "kills.py"


@pytest.fixture
def models(small_config) -> list[DeltaVLMForConditionalGeneration]:
    """Two whose shapes agree and whose settings do not: a mixture of them would load."""
    torch.manual_seed(0)
    return [
        DeltaVLMForConditionalGeneration(small_config(post_layernorm_eps=eps, difference_dropout=eps)).eval()
        for eps in (0.1, 0.2)
    ]


def is_whole(loaded, model) -> bool:
    same = all(a.equal(b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    return same and loaded.config.post_layernorm_eps == model.config.post_layernorm_eps


def kill_after_renaming(number: int, save: Callable[[], object], folder: Path) -> None:
    """A process that saves, killed when so many files have been renamed into the folder."""
    process = os.fork()
    if not process:
        renamed = 0

        def count(event: str, arguments: tuple) -> None:
            nonlocal renamed
            if event == "os.rename" and Path(arguments[1]).parent == folder:
                if renamed == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                renamed += 1

        sys.addaudithook(count)
        save()
        os._exit(0)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("kills", [["--every-step"], ["--kills", "15"]], ids=str)
def test_whenever_it_is_killed_the_old_or_the_new_one_loads(kills):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(BENCHMARK), *kills], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert set(found["loaded"]) <= {"old", "new"}  # none refused
    if kills == ["--every-step"]:
        assert set(found["killed while"]) == {"writing", "renaming", "between saves"}


@pytest.mark.parametrize("shards", [("50GB", "50GB"), ("50GB", "50KB"), ("50KB", "50GB"), ("50KB", "20KB")])
def test_a_save_cut_short_is_finished_by_who_loads_it(shards, models, tmp_path):
    old, new = models
    old.save_pretrained(tmp_path, max_shard_size=shards[0])
    kill_after_renaming(0, lambda: new.save_pretrained(tmp_path, max_shard_size=shards[1]), tmp_path)
    assert is_whole(AutoModelForImageTextToText.from_pretrained(tmp_path), old)
    for renamed in (1, 2):
        old.save_pretrained(tmp_path, max_shard_size=shards[0])
        kill_after_renaming(renamed, lambda: new.save_pretrained(tmp_path, max_shard_size=shards[1]), tmp_path)
        assert is_whole(AutoModelForImageTextToText.from_pretrained(tmp_path), new)
        assert not list(tmp_path.glob(".saving*"))
    new.save_pretrained(tmp_path / "alone", max_shard_size=shards[1])
    names = {path.name for path in (tmp_path / "alone").iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == names | {"alone"}


def test_whatever_reads_weights_finishes_it(models, tmp_path):
    for read in (
        DeltaVLMModel.from_pretrained,
        lambda folder: find_files({"name_or_path": str(folder)}),
        models[1].save_pretrained,
    ):
        models[0].save_pretrained(tmp_path)
        kill_after_renaming(1, lambda: models[1].save_pretrained(tmp_path), tmp_path)
        read(tmp_path)
        assert not list(tmp_path.glob(".saving*"))
        assert is_whole(DeltaVLMForConditionalGeneration.from_pretrained(tmp_path), models[1])


def test_a_processor_is_finished_too(tmp_path):
    old, new = (AutoProcessor.from_pretrained(deltavlm_hf.tiny()) for _ in range(2))
    new.qformer_max_length = 7
    for tokenizer in (new.tokenizer, new.qformer_tokenizer):
        tokenizer.add_tokens(["<more>"])
    old.save_pretrained(tmp_path)
    for renamed, expected in ((0, old), (1, new)):
        kill_after_renaming(renamed, lambda: new.save_pretrained(tmp_path), tmp_path)
        found = DeltaVLMProcessor.from_pretrained(tmp_path)
        assert found.qformer_max_length == expected.qformer_max_length
        for name in ("tokenizer", "qformer_tokenizer"):
            assert getattr(found, name).get_vocab() == getattr(expected, name).get_vocab()
    assert new.save_pretrained(tmp_path) == [str(tmp_path / "processor_config.json")]


def test_model_and_processor_together(models, tmp_path):
    processor = DeltaVLMProcessor.from_pretrained(deltavlm_hf.tiny())

    def save(model) -> None:
        processor.qformer_max_length = int(model.config.post_layernorm_eps * 100)
        with replacing(tmp_path) as new:
            model.save_pretrained(new)
            processor.save_pretrained(new)

    save(models[0])
    with pytest.raises(RuntimeError), replacing(tmp_path) as new:
        models[1].save_pretrained(new)
        raise RuntimeError("before the processor was saved")
    assert is_whole(AutoModelForImageTextToText.from_pretrained(tmp_path), models[0])
    kill_after_renaming(1, lambda: save(models[1]), tmp_path)
    assert DeltaVLMProcessor.from_pretrained(tmp_path).qformer_max_length == 20  # finishes the model as well
    assert not list(tmp_path.glob(".saving*"))
    assert is_whole(AutoModelForImageTextToText.from_pretrained(tmp_path), models[1])


def test_the_trainer_saves_both_at_once(models, tmp_path):
    processor = DeltaVLMProcessor.from_pretrained(deltavlm_hf.tiny())

    def save(model, length: int) -> None:
        processor.qformer_max_length = length
        arguments = deltavlm_hf.training.DeltaVLMTrainingArguments(
            str(tmp_path), use_cpu=True, report_to="none", save_frozen_weights=True, eval_strategy="no",
            load_best_model_at_end=False,
        )  # fmt: skip
        DeltaVLMTrainer(model, arguments, train_dataset=[], processing_class=processor).save_model()

    save(models[0], 10)
    kill_after_renaming(1, lambda: save(models[1], 20), tmp_path)
    assert is_whole(AutoModelForImageTextToText.from_pretrained(tmp_path), models[1])
    assert DeltaVLMProcessor.from_pretrained(tmp_path).qformer_max_length == 20
    assert isinstance(torch.load(tmp_path / "training_args.bin", weights_only=False), TrainingArguments)


def test_what_killed_processes_left_is_cleaned(models, tmp_path):
    models[0].save_pretrained(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    for left in (".saving-new/files", ".saving-k2j4_x", ".saving-new"):  # the second one as earlier versions did
        (tmp_path / left).mkdir(parents=True, exist_ok=True)
        (tmp_path / left / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".saving-new" / "names.json").write_text('["config.json", "mod')
    assert is_whole(DeltaVLMForConditionalGeneration.from_pretrained(tmp_path), models[0])
    models[1].save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert is_whole(DeltaVLMForConditionalGeneration.from_pretrained(tmp_path), models[1])


def test_all_else_in_the_folder_stays(models, tmp_path):
    place = tmp_path / "on another disk"
    for name in ("README.md", ".git/config", "checkpoint-3/model.safetensors", "model.py", "models.safetensors"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("mine")
    (tmp_path / "link").symlink_to(place)
    inode = place.stat().st_ino
    for model in models:
        model.save_pretrained(tmp_path / "link", max_shard_size="50KB")
    assert (tmp_path / "link").is_symlink() and place.stat().st_ino == inode
    for name in ("README.md", ".git/config", "checkpoint-3/model.safetensors", "model.py", "models.safetensors"):
        assert (place / name).read_text() == "mine"
    assert is_whole(DeltaVLMForConditionalGeneration.from_pretrained(place), models[1])


def test_variants_are_kept_apart(models, tmp_path):
    models[0].save_pretrained(tmp_path, max_shard_size="50KB")
    models[1].save_pretrained(tmp_path, variant="fp16", max_shard_size="50KB")
    models[0].query_tokens.data += 1
    models[0].save_pretrained(tmp_path, variant="fp16")
    assert [path.name for path in tmp_path.glob("*fp16*")] == ["model.fp16.safetensors"]
    assert (tmp_path / "model.safetensors.index.json").exists()
    loaded = DeltaVLMForConditionalGeneration.from_pretrained(tmp_path, variant="fp16")
    assert loaded.query_tokens.equal(models[0].query_tokens)


def test_two_at_once(models, tmp_path):
    """In threads: locks of one process stand against each other as those of two do."""

    def save(model) -> None:
        for shards in ("50GB", "50KB") * 3:
            model.save_pretrained(tmp_path, max_shard_size=shards)

    threads = [threading.Thread(target=save, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    loaded = DeltaVLMForConditionalGeneration.from_pretrained(tmp_path)
    assert any(is_whole(loaded, model) for model in models)
    assert not list(tmp_path.glob(".saving*"))


def test_a_live_save_is_waited_for(models, tmp_path):
    entered, leave = threading.Event(), threading.Event()

    def save_slowly() -> None:
        with replacing(tmp_path) as new:
            models[0].save_pretrained(new)
            entered.set()
            leave.wait(60)

    slow = threading.Thread(target=save_slowly)
    other = threading.Thread(target=models[1].save_pretrained, args=(tmp_path,))
    slow.start()
    entered.wait(60)
    other.start()
    other.join(1.5)
    assert other.is_alive() and list(tmp_path.glob(".saving-new/files/model.safetensors"))
    leave.set()
    slow.join(60)
    other.join(60)
    assert is_whole(DeltaVLMForConditionalGeneration.from_pretrained(tmp_path), models[1])


def test_saved_anew_while_it_is_loaded(models, tmp_path, monkeypatch):
    models[0].save_pretrained(tmp_path)
    read_weights = DeltaVLMForConditionalGeneration._load_pretrained_model

    def save_before(*arguments):
        models[1].save_pretrained(tmp_path)
        return read_weights(*arguments)

    monkeypatch.setattr(DeltaVLMForConditionalGeneration, "_load_pretrained_model", staticmethod(save_before))
    with pytest.raises(OSError, match=f"'{tmp_path}' was saved anew while it was being loaded: load it once more"):
        DeltaVLMForConditionalGeneration.from_pretrained(tmp_path)
    monkeypatch.undo()
    assert is_whole(DeltaVLMForConditionalGeneration.from_pretrained(tmp_path), models[1])


def test_where_it_cannot_be_finished(models, tmp_path):
    """On a file system that is mounted for reading only."""
    folder = tmp_path / "model"
    models[0].save_pretrained(folder)
    kill_after_renaming(1, lambda: models[1].save_pretrained(folder), folder)
    mount = ["mount", "--bind", "-o", "ro", str(folder), str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        with pytest.raises(OSError, match=f"A save to '{folder}' was cut short: .* Load it once where"):
            AutoModelForImageTextToText.from_pretrained(folder)
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    assert is_whole(AutoModelForImageTextToText.from_pretrained(folder), models[1])


class TestStrangers:
    """Folders that someone else made."""

    def pretend(self, folder: Path, names: list, *files: str) -> None:
        for name in files:
            (folder / ".saving-new" / "files" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / ".saving-new" / "files" / name).write_text("theirs")
        (folder / ".saving-new" / "names.json").write_text(json.dumps(names))

    @pytest.mark.parametrize("name", ["../../mine", "qformer_tokenizer/mine"])
    def test_nothing_outside_is_touched(self, name, models, tmp_path):
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "mine").write_text("mine")
        (tmp_path / "mine").write_text("mine")
        folder = tmp_path / "model"
        models[0].save_pretrained(folder)
        (folder / "qformer_tokenizer").symlink_to(tmp_path / "home")
        self.pretend(folder, ["config.json", name], "qformer_tokenizer/mine")
        with pytest.raises(OSError, match="qformer_tokenizer' leads out of the folder"):
            DeltaVLMForConditionalGeneration.from_pretrained(folder)
        assert (tmp_path / "home" / "mine").read_text() == (tmp_path / "mine").read_text() == "mine"

    @pytest.mark.parametrize("names", [None, 3, [], [3], {"config.json": 1}, ["/etc/hostname"], "names"])
    def test_odd_names(self, names, models, tmp_path):
        models[0].save_pretrained(tmp_path)
        self.pretend(tmp_path, names, "README.md")
        assert is_whole(DeltaVLMForConditionalGeneration.from_pretrained(tmp_path), models[0])

    def test_a_link_in_place_of_our_folder(self, models, tmp_path):
        (tmp_path / "home" / "files").mkdir(parents=True)
        (tmp_path / "home" / "files" / "mine").write_text("mine")
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / ".saving-new").symlink_to(tmp_path / "home")
        models[0].save_pretrained(tmp_path / "model")
        assert (tmp_path / "home" / "files" / "mine").read_text() == "mine"


def test_what_cannot_be_replaced_is_told_before_anything_is(models, tmp_path):
    models[0].save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "generation_config.json").mkdir()
    with pytest.raises(IsADirectoryError, match="generation_config.json' is a folder"):
        models[1].save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "generation_config.json")
    assert is_whole(DeltaVLMForConditionalGeneration.from_pretrained(tmp_path), models[0])


def test_the_code_that_travels_is_one(models, tmp_path):
    with replacing(tmp_path / "both") as new:
        models[0].save_pretrained(new)
        DeltaVLMProcessor.from_pretrained(deltavlm_hf.tiny()).save_pretrained(new)
    DeltaVLMProcessor.from_pretrained(deltavlm_hf.tiny()).save_pretrained(tmp_path / "alone")
    for folder in ("both", "alone"):
        assert (tmp_path / folder / "saving.py").read_bytes() == Path(saving.__file__).read_bytes()
