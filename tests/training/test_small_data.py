"""What a run on few pairs chooses by itself."""

import json
import shutil
from pathlib import Path

import datasets
import pytest
import yaml

from deltavlm_hf.cli import main
from deltavlm_hf.training import DeltaVLMTrainingArguments, last_complete_checkpoint
from deltavlm_hf.training.small_data import choose


def make_rows(pairs: int, questions: int = 6) -> datasets.Dataset:
    """Rows whose images are never looked at."""
    images = {date: [f"{date}/{pair}.png" for pair in range(pairs) for _ in range(questions)] for date in ("a", "b")}
    features = datasets.Features(before=datasets.Image(), after=datasets.Image())
    return datasets.Dataset.from_dict({"before": images["a"], "after": images["b"]}, features)


def every(steps: int) -> dict:
    return {"save_strategy": "steps", "save_steps": steps, "eval_strategy": "steps", "eval_steps": steps}


@pytest.mark.parametrize(
    ("pairs", "stated", "expected", "told"),
    [
        (
            60,
            {},
            {"num_train_epochs": 33, "warmup_steps": 99, **every(50), "logging_steps": 10},
            "60 pairs, 360 questions: 33 epochs, 990 steps, 99 of warm-up, evaluated and saved every 50, logged "
            "every 10. Chosen, as `training` does not state them: `num_train_epochs`, ",
        ),
        (
            3,
            {},
            {"num_train_epochs": 50, "warmup_steps": 10, **every(5), "logging_steps": 5},
            "3 pairs, 18 questions: 50 epochs, 100 steps",
        ),
        (
            499,
            {},
            {"num_train_epochs": 5, "warmup_steps": 125, **every(63), "logging_steps": 10},
            "499 pairs, 2994 questions: 5 epochs, 1250 steps",
        ),
        (500, {}, {}, ""),
        (
            60,
            {"max_steps": 40},
            {"warmup_steps": 4, **every(2), "logging_steps": 2},
            "60 pairs, 360 questions: 40 steps, 4 of warm-up, evaluated and saved every 2",
        ),
        (
            60,
            {"num_train_epochs": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3},
            {"warmup_steps": 6, **every(3), "logging_steps": 3},
            "60 pairs, 360 questions: 60 steps, 6 of warm-up",
        ),
        (
            60,
            {"warmup_steps": 0, "eval_strategy": "epoch", "logging_steps": 1},
            {"num_train_epochs": 33},
            "60 pairs, 360 questions: 33 epochs, 990 steps. Chosen, as `training` does not state them: "
            "`num_train_epochs`.",
        ),
        (60, {"max_steps": 9, "warmup_steps": 1, "save_strategy": "epoch", "logging_strategy": "epoch"}, {}, ""),
    ],
)
def test_what_is_chosen_follows_from_rows_and_batch(pairs, stated, expected, told, tmp_path):
    args = DeltaVLMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **stated)
    chosen, line = choose(stated, args, make_rows(pairs))
    assert chosen == expected
    assert line.startswith(told) and bool(line) == bool(told)
    DeltaVLMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **stated, **chosen)  # they go together


def test_without_validation_nothing_is_evaluated(tmp_path):
    settings = {"eval_strategy": "no", "load_best_model_at_end": False}
    args = DeltaVLMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **settings)
    chosen, line = choose({}, args, make_rows(60))
    assert chosen["save_steps"] == 50 and "eval_strategy" not in chosen
    assert ", saved every 50," in line


@pytest.mark.slow
def test_a_run_keeps_what_it_chose_and_goes_on_with_it(tmp_path, capsys):
    run, config = tmp_path / "run", tmp_path / "config.yaml"
    training = {"output_dir": str(run), "num_train_epochs": 4, "use_cpu": True, "report_to": "none", "max_steps": -1}
    data = {"pairs": 1, "validation_pairs": 1, "tasks": ["binary"]}
    config.write_text(yaml.safe_dump({"data": data, "training": training}))

    def state() -> tuple[dict, dict]:
        found = json.loads((Path(last_complete_checkpoint(run)) / "trainer_state.json").read_text())
        losses = {entry["step"]: entry["loss"] for entry in found["log_history"] if "loss" in entry}
        return {name: found[name] for name in ("max_steps", "eval_steps", "save_steps", "logging_steps")}, losses

    assert main(["train", str(config)]) == 0
    line = "1 pairs, 1 questions: 4 steps, 0 of warm-up, evaluated and saved every 1, logged every 1."
    assert line in capsys.readouterr().err
    record = json.loads((run / "training_run.json").read_text())["training"]
    assert record == {**training, "warmup_steps": 0, **every(1), "logging_steps": 1}
    before = state()
    assert before[0] == {"max_steps": 4, "eval_steps": 1, "save_steps": 1, "logging_steps": 1}
    shutil.rmtree(run / "checkpoint-4")
    assert main(["train", str(config)]) == 0
    assert line in capsys.readouterr().err and state() == before
