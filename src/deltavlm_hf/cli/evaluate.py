"""`deltavlm evaluate`."""

import argparse
import sys
from pathlib import Path

from .arguments import FAILED, add_command, add_workers, hide_progress_bars, positive_integer

_BASELINES = ("no-change", "majority", "nearest")


def add(subparsers) -> None:
    command = add_command(
        subparsers,
        "evaluate",
        run,
        "Ask a model all questions of a data set and report its figures, and those of its masks; on ChangeChat-105k's "
        "test split, beside the published ones. A run that was stopped goes on; `torchrun` shares it between "
        "processes.",
    )
    add_argument = command.add_argument
    add_argument("model", metavar="MODEL", help="folder or Hub id, `small`, `tiny`, or the name of a baseline")
    add_argument("data", metavar="DATA", nargs="?", help="folder, file or Hub id (default: generated scenes)")
    add_argument("--images", type=Path, metavar="DIR", help="default: `images` in or beside DATA")
    add_argument("--split", default="test", help="default: %(default)s")
    add_argument("--tasks", nargs="+", metavar="TASK", help="default: all six")
    add_argument("--limit", type=positive_integer, metavar="N", help="only the first N records")
    add_argument("--pairs", type=positive_integer, default=100, help="generated (default: %(default)s)")
    add_argument("--seed", type=int, default=5_000_000, help="of the first one (default: %(default)s)")
    add_argument("--output", type=Path, default=Path("evaluation"), metavar="DIR", help="default: %(default)s")
    add_argument("--protocol", default="coco", help="coco, gpt2-ids or levir-words (default: %(default)s)")
    add_argument("--gpt2", metavar="DIR", help="GPT-2's tokenizer, for gpt2-ids (default: from the Hub)")
    add_argument("--train-captions", type=Path, metavar="FILE", help="captions JSON, for levir-words")
    add_argument("--baselines", nargs="+", default=(), choices=_BASELINES, metavar="NAME", help=", ".join(_BASELINES))
    add_argument("--batch-size", type=positive_integer, default=16, metavar="N", help="default: %(default)s")
    add_workers(command)
    add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    add_argument("--dtype", default="auto", help="float32, bfloat16, ... (default: as saved)")
    add_argument("--load-in-4bit", action="store_true", help="quantise the language model (bitsandbytes)")
    add_argument("--max-new-tokens", type=positive_integer, metavar="N", help="default: the model's own")
    add_argument("--num-beams", type=positive_integer, metavar="N", help="default: the model's own")
    add_argument(
        "--right-history", action="store_true", help="put right answers before the next question of a dialogue"
    )
    add_argument(
        "--verbatim-questions",
        action="store_true",
        help="ask single questions as they stand, as the authors' evaluation does, not as in training (`q: ...`)",
    )


def run(args: argparse.Namespace) -> int:
    from ..data import TASKS
    from ..evaluation.run import EvaluationRun, evaluate

    given = {name: value for name, value in vars(args).items() if name not in ("run", "tasks", "load_in_4bit")}
    if args.load_in_4bit:
        from ..training.quantization import four_bit_config

        given["quantization_config"] = four_bit_config()
    hide_progress_bars()
    done = evaluate(EvaluationRun(**given, tasks=args.tasks or TASKS))
    if done is None:  # another process reports
        return 0
    print(done.files[1].read_text(encoding="utf-8"))
    print("\n".join(map(str, done.files)), file=sys.stderr)
    if done.unanswered:
        reasons = f"their reasons are in {args.output}/predictions"
        print(f"{done.unanswered} records have no answer; {reasons}", file=sys.stderr)
    return FAILED if done.unanswered else 0
