"""`deltavlm predict`."""

import argparse
import sys
from pathlib import Path

from .arguments import (
    FAILED,
    add_command,
    add_engine,
    add_llm_url,
    add_model,
    add_workers,
    hide_progress_bars,
    positive_integer,
    tell_note,
)


def add(subparsers) -> None:
    command = add_command(
        subparsers,
        "predict",
        run,
        "Ask the same questions about many pairs and write the answers to a file. A run that was stopped goes on; "
        "`torchrun` shares it between processes.",
    )
    add_argument = command.add_argument
    add_argument(
        "pairs",
        metavar="PAIRS",
        type=Path,
        help="a table (.csv, .jsonl, .parquet) with columns `before` and `after`; or a folder with such a table named "
        "`metadata`, with A and B, or with images named x_pre and x_post",
    )
    questions = command.add_mutually_exclusive_group(required=True)
    questions.add_argument(
        "--questions",
        nargs="+",
        metavar="QUESTION",
        help="questions, or names of tasks for their instructions: caption, binary, count, grid, dialogue",
    )
    questions.add_argument("--questions-file", type=Path, metavar="FILE", help="the same, one a line")
    add_argument("--output", type=Path, required=True, metavar="FILE", help=".jsonl, .csv or .parquet")
    add_argument("--limit", type=positive_integer, metavar="N", help="only the first N pairs")
    add_argument(
        "--batch-size",
        type=positive_integer,
        default=32,
        metavar="N",
        help="pairs, and then questions, answered at once (default: %(default)s)",
    )
    add_workers(command)
    add_engine(command)
    add_llm_url(command)
    add_argument(
        "--keep-going", action="store_true", help="exit with 0 although pairs failed, and do not keep them for later"
    )
    add_model(command)


def run(args: argparse.Namespace) -> int:
    from ..inference.predicting import PredictionRun, predict_pairs

    given = {name: value for name, value in vars(args).items() if name not in ("run", "questions_file")}
    if args.questions_file is not None:
        lines = args.questions_file.read_text(encoding="utf-8-sig").splitlines()
        given["questions"] = [line for line in lines if line.strip()]
    hide_progress_bars()
    done = predict_pairs(PredictionRun(**given))
    if done is None:  # another process reports
        return 0
    tell_note(args.model)
    print(f"{args.output}: {done.pairs} pairs", file=sys.stderr)
    if not done.failed:
        return 0
    again = "" if args.keep_going else "; the same command asks these again"
    print(f"{done.failed} of them have no answers, the column `error` says why{again}", file=sys.stderr)
    return 0 if args.keep_going else FAILED
