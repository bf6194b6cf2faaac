"""
The figures of the paper's tables (Deng, Zhou, Wu: DeltaVLM, Remote Sensing 2026, 18(4), 541; first arXiv version,
2507.22346), and what they may stand beside. Nobody here has reproduced them; show them as published. In percent, but
for counts.
"""

from pathlib import Path, PurePath

import datasets

from ..data.changechat import find_annotations
from ..data.check import OFFICIAL, PUBLISHED
from ..data.rows import undecoded

SOURCE = "published (arXiv 2507.22346)"  # of ChangeChat-105k's test split
SPLIT = "test"

CAPTION_COLUMNS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")
CAPTION = {
    "GPT-4o": (46.03, 33.09, 24.66, 18.05, 22.50, 56.49, 90.92),
    "Qwen-VL-Plus": (41.31, 33.19, 27.96, 22.95, 18.04, 51.24, 92.99),
    "GLM-4V-Plus": (35.59, 24.26, 18.54, 13.85, 20.13, 54.39, 93.16),
    "Gemini-1.5-Pro": (45.68, 33.59, 25.53, 19.01, 22.64, 56.25, 91.37),
    "RSICCFormer": (84.72, 76.27, 68.87, 62.77, 39.61, 74.12, 134.12),
    "PromptCC": (83.66, 75.73, 69.10, 63.54, 38.82, 73.72, 136.44),
    "PSNet": (83.86, 75.13, 67.89, 62.11, 38.80, 73.60, 132.62),
    "SFT": (84.56, 75.87, 68.64, 62.87, 39.93, 74.69, 137.05),
    "DeltaVLM": (85.78, 77.15, 69.24, 62.51, 39.47, 75.01, 136.72),
}

YES_NO_COLUMNS = ("accuracy", "precision", "recall", "f1")
YES_NO = {
    "GPT-4o": (84.81, 83.58, 86.62, 85.07),
    "Qwen-VL-Plus": (58.22, 73.65, 25.52, 37.90),
    "GLM-4V-Plus": (79.83, 88.38, 68.67, 77.29),
    "Gemini-1.5-Pro": (83.83, 84.03, 83.51, 83.77),
    "DeltaVLM": (93.99, 96.29, 91.49, 93.83),
}

COUNT = {  # mae and rmse of roads, then of buildings
    "GPT-4o": (0.49, 1.00, 1.86, 4.57),
    "Qwen-VL-Plus": (0.90, 1.50, 4.41, 9.03),
    "GLM-4V-Plus": (0.82, 1.62, 2.05, 4.61),
    "Gemini-1.5-Pro": (0.58, 1.25, 2.56, 8.71),
    "DeltaVLM": (0.24, 0.70, 1.32, 2.89),
}

GRID_COLUMNS = ("precision", "recall", "f1", "jaccard", "subset_accuracy")
GRID = {
    "roads": {
        "GPT-4o": (30.44, 27.01, 28.62, 7.80, 33.85),
        "Gemini-1.5-Pro": (43.01, 40.55, 41.74, 9.62, 48.63),
        "DeltaVLM": (69.63, 66.32, 67.94, 14.00, 70.92),
    },
    "buildings": {
        "GPT-4o": (55.63, 33.70, 41.98, 14.09, 41.47),
        "Gemini-1.5-Pro": (65.71, 51.75, 57.90, 18.62, 45.62),
        "DeltaVLM": (77.79, 80.22, 78.99, 23.15, 65.53),
    },
}

OPEN = {
    "GPT-4o": (33.08, 21.08, 14.06, 9.68, 22.24, 35.53, 72.58),
    "Gemini-1.5-Pro": (32.90, 20.44, 13.38, 9.06, 21.85, 35.19, 68.64),
    "DeltaVLM": (36.67, 27.09, 20.62, 16.21, 17.85, 32.60, 127.38),
}

# F1 of pixels, in percent, on another data set: LEVIR-CD's official test split.
LEVIR_CD = {
    "BIT": (89.31, "published, LEVIR-CD (arXiv 2103.00208)"),
    "ChangeFormer": (90.40, "published, LEVIR-CD (arXiv 2201.01293)"),
    "TinyCD": (91.05, "published, LEVIR-CD (arXiv 2207.13159)"),
}


def published_tasks(rows: datasets.Dataset, source: str | Path, split: str) -> list[str]:
    """
    The tasks of which these rows are ChangeChat-105k's whole test split, so that published figures compare.

    That is told by names and numbers, not by content: the annotations lie in files named as the official ones,
    `changechat_105k_test*.json`; there are as many records of the task as the paper has; they are about LEVIR-CC's
    test images, each about another pair (but for open questions, of which a pair has several).

    Args:
        rows (`Dataset`): what was asked, see [`load_changechat`].
        source (`str` or `Path`), split (`str`): where they were loaded from.

    Returns:
        `list[str]`: such tasks; none for a part of the split, another split or other data.
    """
    files = [file for file in find_annotations(source) if file.split == SPLIT]
    if split != SPLIT or not all(file.path.name.startswith(OFFICIAL) for file in files):
        return []
    pairs: dict[str, list[str]] = {}
    for row in undecoded(rows).select_columns(["task", "before"]):
        pairs.setdefault(row["task"], []).append(PurePath(row["before"]["path"] or "").stem)
    return [
        task
        for task, names in pairs.items()
        if len(names) == PUBLISHED[SPLIT][task]
        and (task == "open" or len(set(names)) == len(names))
        and all(name.startswith(f"{SPLIT}_") for name in names)
    ]
