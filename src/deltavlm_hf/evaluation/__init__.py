"""Figures for all six tasks, by named protocols, from a model, a baseline or anyone's answers."""

from pathlib import Path

from ..lazy import lazy_names

_MODULES = {
    "AnswerMetrics": "callback",
    "CaptionScores": "captions",
    "ModelAnswerer": "answering",
    "PROTOCOLS": "captions",
    "Protocol": "captions",
    "bootstrap_interval": "metrics",
    "evaluate_predictions": "score",
    "make_baseline": "baselines",
    "make_tables": "tables",
    "make_vocabulary": "captions",
    "predict": "answering",
    "published_tasks": "published",
    "score_by_change": "captions",
    "score_captions": "captions",
    "score_counts": "metrics",
    "score_dialogues": "metrics",
    "score_grids": "metrics",
    "score_yes_no": "metrics",
    "write_report": "report",
}

__all__ = [*_MODULES, "metric_path"]

__getattr__, __dir__ = lazy_names(__name__, _MODULES)


def metric_path(name: str) -> str:
    """
    The folder of a metric for `evaluate.load`: `change_captions`, `change_yes_no`, `change_counts` or `change_grid`.

    Raises:
        ValueError: for an unknown name.
    """
    folder = Path(__file__).parent / "hub_metrics"
    known = sorted(path.name for path in folder.iterdir() if (path / f"{path.name}.py").is_file())
    if name not in known:
        raise ValueError(f"Unknown metric {name!r}, expected one of {', '.join(known)}.")
    return str(folder / name)
