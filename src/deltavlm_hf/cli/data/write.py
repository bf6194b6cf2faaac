"""`deltavlm data write`."""

import argparse
import json

from ..arguments import FAILED, INTERRUPTED, add_command, positive_integer
from .arguments import add_pairs, build_kwargs, find_pairs_of

_NUMBERS = {
    "questions": "open questions for each pair",
    "turns": "of a dialogue, at most",
    "attempts": "to get a usable answer before the pair is set aside",
    "retries": "after 429, 5xx, a time-out or a lost connection",
    "concurrency": "requests under way at once",
    "max_answer_tokens": "for one answer",
}


def add(subparsers) -> None:
    command = add_command(
        subparsers,
        "write",
        run,
        "Have a chat model write open questions and dialogues from captions and change masks. The key, where the "
        "endpoint wants one, comes from the environment variable OPENAI_API_KEY.",
    )
    add_pairs(command, name="written")
    add_argument = command.add_argument
    add_argument("--model", required=True, help="the model's name at the endpoint")
    add_argument("--base-url", metavar="URL", help="such as http://localhost:8000/v1 (default: OPENAI_BASE_URL)")
    add_argument("--tasks", nargs="+", metavar="TASK", help="default: open dialogue")
    for name, help in _NUMBERS.items():
        add_argument(f"--{name.replace('_', '-')}", type=positive_integer, metavar="N", help=help)
    add_argument("--timeout", type=float, metavar="SECONDS", help="for one request")
    add_argument("--temperature", type=float)
    add_argument("--max-tokens", type=positive_integer, metavar="N", help="budget of this run (default: none)")
    add_argument("--no-json-schema", action="store_true", help="for endpoints that refuse `response_format`")
    add_argument("--retry-set-aside", action="store_true", help="ask again what was set aside")


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ...data.writing import WRITTEN_TASKS, Settings, write_dataset

    names = (*_NUMBERS, "timeout", "temperature")
    given = {name: value for name, value in vars(args).items() if name in names and value is not None}
    settings = Settings(args.model, json_schema=not args.no_json_schema, **given)
    with tqdm(desc="written", disable=None) as bar:

        def show_progress(finished: int, total: int) -> None:
            bar.total = total
            bar.update(finished - bar.n)

        summary = write_dataset(
            find_pairs_of(args),
            split=args.split,
            **build_kwargs(args),
            settings=settings,
            base_url=args.base_url,
            tasks=args.tasks or WRITTEN_TASKS,
            max_tokens=args.max_tokens,
            retry_set_aside=args.retry_set_aside,
            progress=show_progress,
        )
    print(json.dumps(vars(summary), indent=1, ensure_ascii=False))
    if summary.stopped_by == "interrupt":
        return INTERRUPTED
    return FAILED if summary.failed else 0
