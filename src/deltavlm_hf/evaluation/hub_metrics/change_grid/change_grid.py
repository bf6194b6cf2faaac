"""Figures of answers that list the changed cells of a 3x3 grid."""

import datasets
import evaluate

from deltavlm_hf.data.classes import ROADS_AND_BUILDINGS
from deltavlm_hf.data.questions import parse_grid
from deltavlm_hf.evaluation.metrics import score_grids

_DESCRIPTION = """Scores lists of cells of roads and of buildings, see `deltavlm_hf.evaluation.score_grids`.

Args:
    predictions (list of str): the answers; what cannot be read counts as wrong and is counted apart.
    references (list of str): the right answers, such as `roads: [top-left] buildings: []`.
    classes (Classes, optional): others than roads and buildings, see `deltavlm_hf.data.find_classes`.
"""


class ChangeGrid(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_DESCRIPTION,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions, references, classes=ROADS_AND_BUILDINGS):
        listed, truths = ([parse_grid(answer, classes) for answer in answers] for answers in (predictions, references))
        for index, truth in enumerate(truths):
            if truth is None:
                raise ValueError(f"Reference {index} lists no cells: {references[index]!r}.")
        found = {}
        for number, kind in enumerate(classes.plurals):
            predicted = [None if cells is None else cells[number] for cells in listed]
            scores = score_grids(predicted, [truth[number] for truth in truths])
            found |= {f"{kind} {name}": value for name, value in scores.items()}
        return found
