"""Whoever adds a task: every table that is kept by task has it, or is named here."""

import numpy as np
import pytest

from deltavlm_hf.data import TASKS
from deltavlm_hf.data.build import FILE_SUFFIX, RULE_TASKS
from deltavlm_hf.data.changechat import find_annotations
from deltavlm_hf.data.questions import INSTRUCTIONS, PARAPHRASES, make_turns
from deltavlm_hf.data.rules import LEVIR, read_facts
from deltavlm_hf.data.writing import WRITTEN_TASKS
from deltavlm_hf.evaluation.baselines import no_change_answers
from deltavlm_hf.evaluation.callback import FIGURES
from deltavlm_hf.evaluation.published import PUBLISHED
from deltavlm_hf.evaluation.score import SCORERS
from deltavlm_hf.hub import card

FREE = {"open", "dialogue"}  # without one fixed instruction
TABLES = {
    "PARAPHRASES in data/questions.py": {*PARAPHRASES} | FREE,
    "INSTRUCTIONS in data/questions.py": {*INSTRUCTIONS} | FREE,
    "FILE_SUFFIX in data/build.py": {*FILE_SUFFIX},
    "RULE_TASKS in data/build.py, or WRITTEN_TASKS in data/writing/prompts.py": {*RULE_TASKS, *WRITTEN_TASKS},
    "SCORERS in evaluation/score.py": {*SCORERS},
    "FIGURES in evaluation/callback.py": {*FIGURES},
    "FIGURES in hub/card.py": {task for task, *_ in card.FIGURES},
    "no_change_answers in evaluation/baselines.py": {*no_change_answers()} | {"dialogue"},
    "PUBLISHED in evaluation/published.py": {task for tasks in PUBLISHED.values() for task in tasks},
}


@pytest.mark.parametrize("table", TABLES)
def test_every_task_is_there(table):
    assert TABLES[table] == {*TASKS}


def test_the_order_of_tasks_stays():
    """Generated data are drawn by a task's number: a new one goes to the end."""
    assert TASKS[:6] == ("caption", "binary", "count", "grid", "open", "dialogue")


@pytest.mark.parametrize("task", TASKS)
def test_turns_are_made(task):
    assert make_turns(task, read_facts(np.zeros((9, 9), np.uint8), LEVIR), np.random.default_rng(0))


@pytest.mark.parametrize("task", [task for task in TASKS if FILE_SUFFIX[task]])
def test_files_of_one_task_are_found(task, tmp_path):
    (tmp_path / f"test{FILE_SUFFIX[task]}.json").write_text("[]")
    assert [(file.split, file.task) for file in find_annotations(tmp_path)] == [("test", task)]
