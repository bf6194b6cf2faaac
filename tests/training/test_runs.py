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
from deltavlm_hf.data import load_generated
from deltavlm_hf.data.scenes import generate_scene
from deltavlm_hf.inference import ChangeSession
from deltavlm_hf.training import DeltaVLMTrainingArguments, last_complete_checkpoint
from deltavlm_hf.training.run import DataConfig, TrainingRun

pytestmark = pytest.mark.slow

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
    assert done.stderr.count("Warm-up takes 0 of the 8 steps of this run: not 2, as `warmup_steps` has it") == 1
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
        ("training: {output_dir: out, lerning_rate: 1}", "Did you mean `learning_rate`?"),
        ("training: {output_dir: out}\nfreese: {}", "Did you mean `freeze`?"),
        ("training: {output_dir: out}\nfreeze: {vision_block: 1}", "Did you mean `vision_blocks`?"),
        ("training: {output_dir: out}\nlearning_rate: 1", "`learning_rate` belongs under `training`."),
        ("training: {output_dir: out, vision_blocks: 1}", "`vision_blocks` belongs under `freeze`."),
        ("training: {output_dir: out, load_in_4bit: true}", "`load_in_4bit` belongs at the top of the file."),
        (
            "training: {output_dir: out}\nfreeze: {lora: {lora_alfa: 1}}",
            "The LoRA setting 'lora_alfa' is none of those of PEFT's `LoraConfig`",
        ),
        ("training: {output_dir: out}\ntraining: {output_dir: in}", "`training` is given 2 times"),
        ("training: {output_dir: out, bf16: 'yes'}", "`bf16` is 'yes', expected true or false."),
        ("training: {output_dir: out, learning_rate: fast}", "`learning_rate` is 'fast', expected a number."),
        ("training: {output_dir: out, max_steps: 1.5}", "`max_steps` is 1.5, expected a whole number."),
        ("training: {output_dir: out, learning_rate: null}", "`learning_rate` is None, expected a number."),
        ("training: {output_dir: 2024}", "`output_dir` is 2024, expected text, in quotes."),
        ("training: {output_dir: out}\nrevision: 1234567", "`revision` is 1234567, expected text, in quotes."),
        ("training: {output_dir: out}\nfreeze: 2", "`freeze` is 2, expected fields."),
        ("training: {output_dir: out}\ndata: {tasks: caption}", "`tasks` is 'caption', expected a list."),
        ("training: {output_dir: out}\ndata: {tasks: [captions]}", "`tasks` must list some of"),
        ("training: {output_dir: out}\ndata: {images: here}", "but `source`, whose images they are, is missing"),
        (
            "training: {output_dir: out}\ntask_weights: {grid: much}",
            "`task_weights`, grid is 'much', expected a number",
        ),
        ("training: {output_dir: out}\naugmentation: {crop: 2}", "`augmentation`: `crop` must be at least 0"),
        (
            "training: {output_dir: out, lr_scheduler_type: cosin}",
            "`lr_scheduler_type` is 'cosin', expected one of linear, cosine",
        ),
        (
            "training: {output_dir: out, eval_strategy: steps, eval_steps: 20, save_strategy: steps, save_steps: 30}",
            "`save_steps` is 30 and `eval_steps` 20, but `load_best_model_at_end`, which is on here by default, needs "
            "an evaluation at every checkpoint: make `save_steps` a multiple of `eval_steps`, such as "
            "`save_steps: 40`",
        ),
        (
            "training: {output_dir: out, eval_strategy: steps, save_strategy: steps, save_steps: 15}",
            "`save_steps` is 15 and `eval_steps` 10 (that of `logging_steps`)",
        ),
        (
            "training: {output_dir: out, eval_strategy: steps, eval_steps: 0.1, save_strategy: steps, save_steps: 20}",
            "such as `save_steps: 0.1`",
        ),
        (
            "training: {output_dir: out, eval_strategy: steps, eval_steps: 20}",
            "`save_strategy` is 'epoch' and `eval_strategy` 'steps', but",
        ),
        ("training: {output_dir: out, save_strategy: no}", "`save_strategy` is 'no' and `eval_strategy` 'epoch', but"),
        ("training: {output_dir: out, eval_strategy: no}", "`eval_strategy` is 'no', but `load_best_model_at_end`"),
        (
            "training: {output_dir: out, eval_steps: 20}",
            "`eval_steps: 20`, which has no effect while `eval_strategy` is 'epoch', as by default: add "
            "`eval_strategy: steps`",
        ),
        ("training: {output_dir: out, save_steps: 20}", "`save_steps: 20`, which has no effect"),
        (
            "training: {output_dir: out, eval_strategy: epoch}\ndata: {validation_pairs: 0}",
            "`eval_strategy` needs rows for validation",
        ),
        (
            "training: {output_dir: out}\ndata: {validation_pairs: 0}\nvalidate_answers: 5",
            "`validate_answers` needs rows for validation",
        ),
        (
            "training: {output_dir: out, metric_for_best_model: eval_grid_roads_f1}",
            "Others need `validate_answers`",
        ),
        (
            "training: {output_dir: out, metric_for_best_model: eval_grid_road_f1}\nvalidate_answers: 5",
            "Did you mean `grid_roads_f1`?",
        ),
        ("training: {output_dir: out, vision_cache_dtype: bf16}", "expected one of float32, float16, bfloat16"),
        ("training: {output_dir: out, per_device_train_batch_size: 0}", "must be at least 1, got 0"),
        ("training: {output_dir: out}\ndtype: bf16", "`dtype` is 'bf16', expected 'auto' or a precision"),
        (
            "training: {output_dir: out}\nload_in_4bit: true\nfreeze: {language_model: true}",
            "leave out `load_in_4bit` or `language_model`",
        ),
        ("training: {output_dir: base}\nmodel: base", "`output_dir` is 'base', where the model comes from"),
        (
            "training: {output_dir: out, use_cpu: true}\ndata: {pairs: 1}\ntask_weights: {grids: 2}",
            "`tasks` must list",
        ),
    ],
)
def test_what_is_wrong_with_a_configuration(content, message, tmp_path, monkeypatch, capsys):
    """Told in the words of the file, and before a model is loaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("deltavlm_hf.training.run.AutoModelForImageTextToText", None)
    Path("config.yaml").write_text(content)
    assert main(["train", "config.yaml"]) == 1
    assert message in capsys.readouterr().err


def test_values_as_a_yaml_file_has_them(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "data:\n"
        "freeze: {vision_blocks: '1', lora: {lora_dropout: 1e-1}}\n"
        "task_weights: {grid: 2, caption: 5e-1}\n"
        "training: {output_dir: out, learning_rate: 1e-5, weight_decay: '5e-2', save_strategy: no, eval_steps: 0.25,\n"
        "  max_steps: 1e3, metric_for_best_model: null, report_to: none, logging_first_step: on}\n"
    )
    run = TrainingRun.from_yaml(path)
    assert (run.data, run.freeze.vision_blocks, run.freeze.lora) == (DataConfig(), 1, {"lora_dropout": 0.1})
    assert run.task_weights == {"grid": 2, "caption": 0.5}
    expected = {"learning_rate": 1e-5, "weight_decay": 0.05, "save_strategy": "no", "eval_steps": 0.25}
    assert expected.items() <= run.training.items()
    assert isinstance(run.training["max_steps"], int) and run.training["max_steps"] == 1000
    assert run.training["metric_for_best_model"] is None and run.training["logging_first_step"] is True


def test_fields_that_are_set_beside_the_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("data:\nfreeze: {qformer: false}\ntraining: {output_dir: out, max_steps: 5}\n")
    changes = ["model=tiny", "data.source=my data", "freeze.lora.r=4", "training.learning_rate=1e-4"]
    run = TrainingRun.from_yaml(path, changes)
    assert (run.model, run.data.source, run.freeze.qformer, run.freeze.lora) == ("tiny", "my data", False, {"r": 4})
    assert run.training == {"output_dir": "out", "max_steps": 5, "learning_rate": 1e-4}
    for change in ("training.max_steps", "training.max_steps.more=1"):
        with pytest.raises(
            ValueError, match=f"'{change}' sets no field of .*: expected such as training.max_steps=10"
        ):
            TrainingRun.from_yaml(path, [change])
    with pytest.raises(ValueError, match="Did you mean `learning_rate`"):
        TrainingRun.from_yaml(path, ["training.lerning_rate=1"])


@pytest.mark.parametrize(
    ("settings", "steps", "expected"),
    [
        ({}, 1400, 140),  # 55 pairs: 28 steps an epoch, 50 epochs
        ({}, 100_000, 1000),
        ({}, 10_000, 1000),
        ({"warmup_steps": 0.05}, 1000, 50),
        ({"warmup_steps": 0.5}, 1000, 100),
        ({"warmup_steps": 2}, 8, 0),
        ({"warmup_steps": 0}, 8, 0),
    ],
)
def test_warm_up_takes_a_tenth_of_the_steps_at_most(settings, steps, expected, tmp_path, caplog):
    args = DeltaVLMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **settings)
    asked = args.warmup_steps if args.warmup_steps >= 1 else steps * args.warmup_steps
    assert args.get_warmup_steps(steps) == expected
    told = f"Warm-up takes {expected:,} of the {steps:,} steps of this run: not {asked:,.0f}"
    assert (told in caplog.text) == (expected < asked)


def test_mixed_precision_is_the_users_choice(tmp_path, monkeypatch):
    """The default gives way on a GPU that has bf16, where Transformers would refuse both."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    args = DeltaVLMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, fp16=True)
    assert args.fp16 and not args.bf16
    assert not DeltaVLMTrainingArguments(output_dir=str(tmp_path), use_cpu=True).bf16


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


@pytest.fixture(scope="module")
def mask_vit(tmp_path_factory, make_mask_model) -> Path:
    """A small model of InstructBLIP's ViT, with masks."""
    folder = tmp_path_factory.mktemp("mask_vit") / "model"
    for part in make_mask_model(backbone=False):
        part.save_pretrained(folder)
    return folder


def train_masks(folder: Path, model: Path, training: dict | None = None, **config) -> dict[str, torch.Tensor]:
    """What a short run, in this process, made of the mask decoder, as differences."""
    steps = {"max_steps": 2, "warmup_steps": 0, "save_steps": 2, "save_frozen_weights": True, **(training or {})}
    assert main(["train", str(write_config(folder, steps, model=str(model), **config))]) == 0
    found, start = (load_file(path / "model.safetensors") for path in (folder / "run", model))
    return {name: found[name] - start[name] for name in start if name.startswith("mask_decoder.")}


def test_a_model_with_masks_learns_them(mask_vit, tmp_path):
    validating = {
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": 2,
        "metric_for_best_model": "masks_f1",
    }
    data = {"pairs": 8, "validation_pairs": 2, "tasks": ["binary"]}
    changes = train_masks(
        tmp_path, mask_vit, validating, data=data, validate_answers=2, augmentation={"turns": True, "crop": 0.1}
    )
    assert all(change.any() for change in changes.values())
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    (figures,) = (entry for entry in state["log_history"] if "eval_masks_f1" in entry)
    assert state["best_metric"] == figures["eval_masks_f1"] and 0 <= figures["eval_masks_f1"] <= 1
    assert {"eval_masks_iou", "eval_masks_miou", "eval_binary_accuracy"} <= figures.keys()


def test_a_frozen_mask_decoder_stays_as_it_is(mask_vit, tmp_path):
    assert not any(change.any() for change in train_masks(tmp_path, mask_vit, freeze={"masks": False}).values())


def test_data_without_masks_teach_text_alone(mask_vit, tmp_path):
    rows = load_generated(2, 4_700_000, tasks=["binary"])
    for split in ("train", "val"):
        for number, row in enumerate(rows):
            for date, part in (("before", "A"), ("after", "B")):
                path = tmp_path / "data" / "images" / split / part / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                row[date].save(path)
        texts = [text for turn in rows["turns"] for text in (turn[0]["question"], turn[0]["answer"])]
        items = [
            {
                "id": number,
                "image": [f"{split}/{part}/{number}.png" for part in "AB"],
                "changeflag": 0,
                "conversations": [
                    {"from": who, "value": text} for who, text in zip(("human", "gpt"), pair, strict=True)
                ],
            }
            for number, pair in enumerate(zip(texts[::2], texts[1::2], strict=True))
        ]
        (tmp_path / "data" / f"changechat_105k_{split}.json").write_text(json.dumps(items))
    changes = train_masks(tmp_path, mask_vit, data={"source": str(tmp_path / "data")})
    assert not any(change.any() for change in changes.values())


def test_masks_that_are_not_learnt_choose_no_model(tmp_path, capsys):
    settings = {"metric_for_best_model": "masks_f1"}
    assert main(["train", str(write_config(tmp_path, settings, validate_answers=2))]) == 1
    assert "'masks_f1', and this run learns no masks: it takes a model with `mask_classes`" in capsys.readouterr().err


def test_masks_are_not_made_of_cached_states(mask_vit, tmp_path, capsys):
    cache = {"vision_cache": str(tmp_path / "cache")}
    assert main(["train", str(write_config(tmp_path, cache, model=str(mask_vit)))]) == 1
    assert "`vision_cache` gives states in place of pixels, of which masks are made" in capsys.readouterr().err
    changes = train_masks(tmp_path, mask_vit, cache, freeze={"masks": False, "vision_blocks": 0})
    assert not any(change.any() for change in changes.values())
