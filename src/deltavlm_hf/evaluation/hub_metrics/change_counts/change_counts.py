"""Errors of answers to how many roads and buildings changed."""

import datasets
import evaluate

from deltavlm_hf.data.classes import ROADS_AND_BUILDINGS
from deltavlm_hf.data.questions import parse_count
from deltavlm_hf.evaluation.metrics import score_counts

_DESCRIPTION = """Scores counts of roads and of buildings, see `deltavlm_hf.evaluation.score_counts`.

Args:
    predictions (list of str): the answers; what cannot be read counts as wrong and is counted apart.
    references (list of list of int): the right numbers of roads and buildings.
    classes (Classes, optional): others than roads and buildings, see `deltavlm_hf.data.find_classes`.
"""


class ChangeCounts(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("int64"))}
            ),
        )

    def _compute(self, predictions, references, classes=ROADS_AND_BUILDINGS):
        counts = [parse_count(answer, classes) for answer in predictions]
        found = {}
        for number, kind in enumerate(classes.plurals):
            predicted = [None if count is None else count[number] for count in counts]
            scores = score_counts(predicted, [truth[number] for truth in references])
            found |= {f"{kind} {name}": value for name, value in scores.items()}
        return found
