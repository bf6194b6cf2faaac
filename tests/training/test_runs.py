"""Whole runs, as a user starts them: the command line on a YAML file, killed and gone on, in two processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import deltavlm_hf
from deltavlm_hf.cli import main
from deltavlm_hf.data.scenes import generate_scene
from deltavlm_hf.inference import ChangeSession
from deltavlm_hf.training import DeltaVLMTrainingArguments, last_complete_checkpoint

ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
TRAINING = {
    "max_steps": 8,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "load_best_model_at_end": False,
    "report_to": "none",
    "use_cpu": True,
}


def write_config(folder: Path, training: dict | None = None, **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    content = {
        "data": {"pairs": 6, "validation_pairs": 1},
        "training": {"output_dir": str(folder / "run"), **TRAINING, **(training or {})},
        **config,
    }
    path.write_text(yaml.safe_dump(content))
    return path


def command(config: Path, *launcher: str) -> list[str]:
    return [sys.executable, *launcher, "-m", "deltavlm_hf", "train", str(config)]


def run(config: Path, *launcher: str) -> subprocess.CompletedProcess:
    done = subprocess.run(command(config, *launcher), capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def losses(folder: Path) -> list[tuple[int, float]]:
    """Steps and losses, as the last checkpoint has them."""
    state = json.loads((Path(last_complete_checkpoint(folder)) / "trainer_state.json").read_text())
    return [(entry["step"], entry["loss"]) for entry in state["log_history"] if "loss" in entry]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    """A run with everything that is drawn at random: dropout, augmentation, task weights."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    done = run(write_config(folder, augmentation={"turns": True}, task_weights={"grid": 2}))
    assert done.stdout.strip().splitlines()[-1] == str(folder / "run")
    assert "language_model" in done.stderr and "% trained" in done.stderr
    return folder / "run"


def test_a_run_trains_and_its_result_answers(uninterrupted):
    assert [step for step, _ in losses(uninterrupted)] == list(range(1, 9))
    model = AutoModelForImageTextToText.from_pretrained(uninterrupted)
    base = AutoModelForImageTextToText.from_pretrained(deltavlm_hf.tiny())
    assert not torch.equal(model.query_tokens, base.query_tokens)
    frozen = "vision_model.encoder.layers.0.mlp.fc1.weight"
    assert torch.equal(model.get_parameter(frozen), base.get_parameter(frozen))
    assert frozen not in load_file(uninterrupted / "model.safetensors")
    scene = generate_scene(7)
    session = ChangeSession(model, AutoProcessor.from_pretrained(uninterrupted), scene.before, scene.after)
    assert isinstance(session.ask("What changed?", max_new_tokens=4), str)


@pytest.mark.parametrize("moment", ["checkpoint-4", "checkpoint-4/trainer_state.json", "checkpoint-2/optimizer.pt"])
def test_killed_at_any_moment_it_goes_on_as_if_nothing_had_happened(uninterrupted, tmp_path, moment):
    config = write_config(tmp_path, augmentation={"turns": True}, task_weights={"grid": 2})
    process = subprocess.Popen(command(config), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=ENVIRONMENT)
    while not (tmp_path / "run" / moment).exists():
        assert process.poll() is None, process.stdout.read().decode()[-3000:]
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "run" / "model.safetensors").exists()
    run(config)
    assert losses(tmp_path / "run") == losses(uninterrupted)
    weights, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", uninterrupted))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json", "scheduler.pt"]
)
def test_checkpoints_that_were_cut_short_are_passed_over(uninterrupted, tmp_path, file):
    folder = shutil.copytree(uninterrupted, tmp_path / "run")
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-8")
    whole = (folder / "checkpoint-8" / file).read_bytes()
    (folder / "checkpoint-8" / file).write_bytes(whole[: len(whole) // 2])
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-6")
    (folder / "checkpoint-6" / file).unlink()
    assert last_complete_checkpoint(folder) is None
    assert last_complete_checkpoint(tmp_path / "nowhere") is None


@pytest.fixture(scope="module")
def without_dropout(tmp_path_factory) -> Path:
    """The shipped model, but nothing is drawn at random in it."""
    folder = Path(shutil.copytree(deltavlm_hf.tiny(), tmp_path_factory.mktemp("base") / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "difference_dropout": 0.0}))
    return folder


@pytest.fixture(scope="module")
def plain(without_dropout, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    run(write_config(folder, {"save_steps": 8}, model=str(without_dropout)))
    return folder / "run"


def test_two_processes_learn_what_one_does(without_dropout, plain, tmp_path):
    config = write_config(tmp_path, {"per_device_train_batch_size": 2, "save_steps": 8}, model=str(without_dropout))
    run(config, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29531")
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, 9))
    for (_, loss), (_, expected) in zip(losses(tmp_path / "run"), losses(plain), strict=True):
        assert loss == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_a_process_that_dies_ends_the_run(without_dropout, tmp_path):
    config = write_config(tmp_path, {"max_steps": 10_000, "save_strategy": "no"}, model=str(without_dropout))
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29532")
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command(config, *launcher), stdout=log, stderr=log, env=ENVIRONMENT)
        while "'loss'" not in (tmp_path / "log").read_text():
            assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        assert process.wait(timeout=120) != 0
    said = (tmp_path / "log").read_text()
    assert "ChildFailedError" in said and "SIGKILL" in said


@pytest.mark.parametrize(("dtype", "tolerance", "steps"), [("float32", 1e-5, 8), ("bfloat16", 3e-2, 2)])
def test_cached_vision_states_teach_the_same(without_dropout, plain, tmp_path, dtype, tolerance, steps):
    """In 16 bits only until the first update, after which small differences grow."""
    cache = {"vision_cache": str(tmp_path / "cache"), "vision_cache_dtype": dtype, "save_steps": 8}
    run(write_config(tmp_path, cache, model=str(without_dropout)))
    found, expected = losses(tmp_path / "run"), losses(plain)
    assert len(found) == len(expected) == 8
    for (_, loss), (_, right) in zip(found[:steps], expected[:steps], strict=True):
        assert loss == pytest.approx(right, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("training: {output_dir: out, lerning_rate: 1}", "unknown fields lerning_rate"),
        ("training: {output_dir: out}\nfreese: {}", "unknown fields freese; known are: training, model"),
        (
            "training: {output_dir: out}\nfreeze: {vision: 2}",
            "`freeze` has unknown fields vision; known are",
        ),
        ("training: {}", "`output_dir` is missing"),
        ("training: {output_dir: out, hub_token: hf_x}", "which would be kept with the model"),
        ("- 1", "must be a YAML mapping"),
        ("training: [", "is no YAML"),
        (
            "training: {output_dir: out, vision_cache: cache, use_cpu: true}\naugmentation: {turns: true}\n"
            "data: {pairs: 1, validation_pairs: 0}",
            "augmentation makes new images in every epoch",
        ),
    ],
)
def test_what_is_wrong_with_a_configuration(content, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(content)
    assert main(["train", "config.yaml"]) == 1
    assert message in capsys.readouterr().err


def test_the_recipe_is_the_papers(tmp_path):
    args = DeltaVLMTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert (args.learning_rate, args.lr_scheduler_type, args.warmup_steps) == (1e-5, "cosine", 1000)
    assert (args.weight_decay, args.per_device_train_batch_size, args.num_train_epochs) == (0.05, 12, 50)
    assert args.early_stopping_patience == 10 and args.load_best_model_at_end


def test_early_stopping_keeps_the_best(tmp_path):
    """A learning rate that spoils the model: it stops long before the last step and gives back the best weights."""
    training = {
        "max_steps": 40,
        "learning_rate": 0.03,
        "warmup_steps": 0,
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "early_stopping_patience": 2,
        "save_total_limit": 8,
    }
    run(write_config(tmp_path, training))
    state = json.loads((Path(last_complete_checkpoint(tmp_path / "run")) / "trainer_state.json").read_text())
    evaluated = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    best = min(evaluated, key=evaluated.get)
    assert state["global_step"] == best + 4 < 40
    folders = (tmp_path / "run", tmp_path / "run" / f"checkpoint-{best}")
    kept, expected = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(kept[name], expected[name]) for name in expected)
