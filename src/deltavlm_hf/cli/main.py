"""The command line, `deltavlm COMMAND`. Results go to stdout, all else to stderr."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import __version__, tiny

FAILED, INTERRUPTED = 1, 130

_BASELINES = ("no-change", "majority", "nearest")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Exit codes: 0 done, 1 failed with a message, 2 wrong usage, 130 interrupted."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (OSError, ValueError, ImportError) as error:
        print(f"deltavlm: error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="deltavlm", description="Ask what changed between two images of one place.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    ask = _add(commands, "ask", _ask, "Ask one question about a pair of images.")
    chat = _add(
        commands, "chat", _chat, "Talk about a pair of images: one question a line, an empty line or Ctrl-D ends."
    )
    demo = _add(commands, "demo", _demo, "Show a generated pair, with answers of a model, as text and as a picture.")
    evaluate = _add(
        commands,
        "evaluate",
        _evaluate,
        "Ask a model all questions of a data set and report its figures; on ChangeChat-105k's test split, beside the "
        "published ones. A run that was stopped goes on; `torchrun` shares it between processes.",
    )
    train = _add(
        commands,
        "train",
        _train,
        "Fine-tune a model as a YAML file says, see docs/training.md. A run that was stopped goes on from its last "
        "checkpoint; `torchrun` or `accelerate launch` spread it over processes.",
    )
    convert = _add(
        commands, "convert", _convert, "Convert a checkpoint of the authors' release to a folder for from_pretrained."
    )
    publish = _add(commands, "publish", _publish, "Put a model on the Hub, with its card.")
    data = commands.add_parser("data", help="Check, build and look at data of ChangeChat-105k's form.")
    _add_data_commands(data.add_subparsers(title="commands", required=True, metavar="COMMAND"))

    for command in (ask, chat):
        command.add_argument("before", metavar="BEFORE", help="image of the first date: a path or a URL")
        command.add_argument("after", metavar="AFTER", help="image of the second date")
    ask.add_argument("question", metavar="QUESTION")
    ask.add_argument("--json", action="store_true", help="print the answer as a JSON object")
    for command in (ask, chat, demo):
        command.add_argument("--model", help="folder or Hub id (default: the small model inside the package)")
        command.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
        command.add_argument("--max-new-tokens", type=_positive_integer, metavar="N", help="default: the model's own")

    _add_evaluate_arguments(evaluate)
    train.add_argument("config", type=Path, metavar="CONFIG", help="YAML file, such as examples/finetune.yaml")

    demo.add_argument("--seed", type=int, default=18, help="which pair to show (default: %(default)s)")
    demo.add_argument("--output", type=Path, default=Path("deltavlm_demo.png"), help="default: %(default)s")
    demo.add_argument("--web", action="store_true", help="serve a page to drop images on and talk about them")
    demo.add_argument("--host", default="127.0.0.1", help="of the page (default: %(default)s)")
    demo.add_argument("--port", type=int, help="of the page (default: the first free one from 7860)")
    demo.add_argument("--share", action="store_true", help="a public link to the page, through gradio's servers")

    publish.add_argument("folder", type=Path, metavar="FOLDER", help="a saved model")
    publish.add_argument("repo_id", metavar="REPO", help="owner/name on the Hub")
    publish.add_argument(
        "--dry-run", action="store_true", help="show what would go up, the card included; send nothing"
    )
    publish.add_argument(
        "--report", type=Path, metavar="FILE", help="report.json of `deltavlm evaluate`, for the card"
    )
    publish.add_argument("--license", default="other", help="of the weights (default: %(default)s)")
    publish.add_argument("--base-model", nargs="+", default=(), metavar="ID", help="what the model was made from")
    publish.add_argument("--private", action="store_true", help="make a new repository private")
    publish.add_argument("--revision", help="branch to publish to (default: main)")

    convert.add_argument("output_dir", type=Path, metavar="OUT", help="the folder to make")
    convert.set_defaults(error=convert.error)
    start = convert.add_mutually_exclusive_group(required=True)
    start.add_argument("--checkpoint", type=Path, help="the authors' checkpoint_best.pth")
    start.add_argument("--instructblip", help="folder or Hub id: a model to train, from InstructBLIP alone")
    convert.add_argument("--vision", help="EVA-ViT file, or folder or Hub id of InstructBLIP")
    convert.add_argument("--language-model", help="folder or Hub id, such as lmsys/vicuna-7b-v1.5")
    convert.add_argument("--qformer-tokenizer", help="bert-base-uncased: folder, Hub id or vocab.txt")
    convert.add_argument("--config", type=Path, help="config.json with the sizes (default: the paper's)")
    convert.add_argument("--small", action="store_true", help="point to the weights of the bases, do not copy them")
    convert.add_argument("--max-shard-size", default="2GB", metavar="SIZE", help="default: %(default)s")
    return parser


def _add(commands, name: str, run, help: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=help, description=help)
    command.set_defaults(run=run)
    return command


def _add_evaluate_arguments(evaluate: argparse.ArgumentParser) -> None:
    evaluate.add_argument("model", metavar="MODEL", help="folder or Hub id, `tiny`, or the name of a baseline")
    evaluate.add_argument("data", metavar="DATA", nargs="?", help="folder, file or Hub id (default: generated scenes)")
    evaluate.add_argument("--images", type=Path, metavar="DIR", help="default: `images` in or beside DATA")
    evaluate.add_argument("--split", default="test", help="default: %(default)s")
    evaluate.add_argument("--tasks", nargs="+", metavar="TASK", help="default: all six")
    evaluate.add_argument("--limit", type=_positive_integer, metavar="N", help="only the first N records")
    evaluate.add_argument("--pairs", type=_positive_integer, default=100, help="generated (default: %(default)s)")
    evaluate.add_argument("--seed", type=int, default=5_000_000, help="of the first one (default: %(default)s)")
    evaluate.add_argument(
        "--output", type=Path, default=Path("evaluation"), metavar="DIR", help="default: %(default)s"
    )
    evaluate.add_argument("--protocol", default="coco", help="coco, gpt2-ids or levir-words (default: %(default)s)")
    evaluate.add_argument("--gpt2", metavar="DIR", help="GPT-2's tokenizer, for gpt2-ids (default: from the Hub)")
    evaluate.add_argument("--train-captions", type=Path, metavar="FILE", help="captions JSON, for levir-words")
    evaluate.add_argument(
        "--baselines", nargs="+", default=(), choices=_BASELINES, metavar="NAME", help=", ".join(_BASELINES)
    )
    evaluate.add_argument("--batch-size", type=_positive_integer, default=16, metavar="N", help="default: %(default)s")
    evaluate.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    evaluate.add_argument("--dtype", default="auto", help="float32, bfloat16, ... (default: as saved)")
    evaluate.add_argument("--load-in-4bit", action="store_true", help="quantise the language model (bitsandbytes)")
    evaluate.add_argument("--max-new-tokens", type=_positive_integer, metavar="N", help="default: the model's own")
    evaluate.add_argument("--num-beams", type=_positive_integer, metavar="N", help="default: the model's own")
    evaluate.add_argument(
        "--right-history", action="store_true", help="put right answers before the next question of a dialogue"
    )
    evaluate.add_argument(
        "--verbatim-questions",
        action="store_true",
        help="ask single questions as they stand, as the authors' evaluation does, not as in training (`q: ...`)",
    )


def _add_data_commands(commands) -> None:
    check = _add(
        commands, "check", _check_data, "Say what is missing, broken or contradictory. Exit code 1 if anything is."
    )
    build = _add(commands, "build", _build_data, "Build annotations by rule from captions and change masks.")
    write = _add(
        commands,
        "write",
        _write_data,
        "Have a chat model write open questions and dialogues from captions and change masks. The key, where the "
        "endpoint wants one, comes from the environment variable OPENAI_API_KEY.",
    )
    show = _add(commands, "show", _show_data, "Write records with their images to an HTML page.")

    check.add_argument("source", metavar="DATA", help="folder, file or Hub id, such as hlwu/changechat-105k")
    show.add_argument(
        "source",
        metavar="DATA",
        nargs="?",
        help="folder, file or Hub id (default: generated scenes, by the same rules)",
    )
    for command in (check, show):
        command.add_argument("--images", type=Path, metavar="DIR", help="default: `images` in or beside DATA")
        command.add_argument("--revision", help="branch, tag or commit of the Hub's data set")
    check.add_argument("--no-images", action="store_true", help="look at annotations alone")
    check.add_argument("--json", type=Path, metavar="FILE", help="write the whole report there")

    for command in (build, write):
        command.add_argument("--images", type=Path, required=True, metavar="DIR", help="with [SPLIT/]A and [SPLIT/]B")
        command.add_argument("--captions", type=Path, metavar="FILE", help='{"name.png": [captions]}, or LEVIR-CC\'s')
        command.add_argument("--masks", type=Path, metavar="DIR", help="default: `label` beside A")
        command.add_argument("--binary-masks", action="store_true", help="masks have one class, taken for buildings")
        command.add_argument("--min-area", type=_positive_integer, metavar="PIXELS", help="of what is counted")
        command.add_argument("--min-cell-area", type=_positive_integer, metavar="PIXELS", help="of change in a cell")
        command.add_argument("--output", type=Path, required=True, metavar="DIR", help="where annotations go")
        command.add_argument("--split", default="train", choices=("train", "val", "test"), help="default: %(default)s")
    for command, name in ((build, "changechat"), (write, "written")):
        command.add_argument("--name", default=name, help="how file names begin (default: %(default)s)")
    build.add_argument("--tasks", nargs="+", metavar="TASK", help="default: caption binary count grid dialogue")
    build.add_argument("--paraphrase", type=float, default=0.0, help="share of instructions in other words, 0 to 1")
    build.add_argument("--seed", type=int, default=0, help="chooses paraphrases (default: %(default)s)")
    build.add_argument("--overwrite", action="store_true", help="replace files that are there")

    write.add_argument("--model", required=True, help="the model's name at the endpoint")
    write.add_argument("--base-url", metavar="URL", help="such as http://localhost:8000/v1 (default: OPENAI_BASE_URL)")
    write.add_argument("--tasks", nargs="+", metavar="TASK", help="default: open dialogue")
    for option, text in (
        ("questions", "open questions for each pair"),
        ("turns", "of a dialogue, at most"),
        ("attempts", "to get a usable answer before the pair is set aside"),
        ("retries", "after 429, 5xx, a time-out or a lost connection"),
        ("concurrency", "requests under way at once"),
        ("max-answer-tokens", "for one answer"),
    ):
        write.add_argument(f"--{option}", type=_positive_integer, metavar="N", help=text)
    write.add_argument("--timeout", type=float, metavar="SECONDS", help="for one request")
    write.add_argument("--temperature", type=float)
    write.add_argument("--max-tokens", type=_positive_integer, metavar="N", help="budget of this run (default: none)")
    write.add_argument("--no-json-schema", action="store_true", help="for endpoints that refuse `response_format`")
    write.add_argument("--retry-set-aside", action="store_true", help="ask again what was set aside")

    show.add_argument("--output", type=Path, default=Path("records.html"), metavar="FILE", help="default: %(default)s")
    show.add_argument("--split", default="train", help="of DATA (default: %(default)s)")
    show.add_argument("--task", help="of this task only")
    show.add_argument("--number", type=_positive_integer, default=24, metavar="N", help="default: %(default)s")
    show.add_argument("--seed", type=int, default=0, help="chooses the records (default: %(default)s)")


def _positive_integer(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def _limit(args: argparse.Namespace) -> dict[str, int]:
    return {} if args.max_new_tokens is None else {"max_new_tokens": args.max_new_tokens}


def _load(args: argparse.Namespace, dtype: str = "auto", load_in_4bit: bool = False):
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging
    from transformers.utils.hub import resolve_revision

    from .auto_classes import MODEL_TYPE

    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: no CUDA device is available; use --device cpu")
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    source = tiny() if args.model in (None, "tiny") else args.model
    options: dict[str, Any] = {"dtype": dtype}
    if load_in_4bit:
        from .quantization import four_bit_config

        options["quantization_config"] = four_bit_config()
    try:
        revision = resolve_revision(source)  # of a Hub id: one commit for all
        model_type = AutoConfig.from_pretrained(source, revision=revision).model_type
        if model_type != MODEL_TYPE:
            raise ValueError(f"expected a {MODEL_TYPE} model, got {model_type}")
        processor = AutoProcessor.from_pretrained(source, revision=revision)
        options["revision"] = revision
        model = AutoModelForImageTextToText.from_pretrained(source, device_map=args.device, **options)
    except Exception as error:  # transformers raises all kinds, and does not always name what it looked for
        reason = str(error) if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"
        raise ValueError(f"--model {source}: {reason}") from error
    return model, processor


def _open_session(args: argparse.Namespace):
    from .inference import ChangeSession
    from .processing import DeltaVLMImageProcessor

    ((before, after),) = DeltaVLMImageProcessor().fetch_images((args.before, args.after))
    model, processor = _load(args)  # takes its time: after what can go wrong with images
    return ChangeSession(model, processor, before, after)


def _ask(args: argparse.Namespace) -> int:
    answer = _open_session(args).ask(args.question, **_limit(args))
    if args.json:
        asked = {"before": args.before, "after": args.after, "question": args.question}
        print(json.dumps({**asked, "answer": answer, "model": args.model or "tiny"}, ensure_ascii=False))
    else:
        print(answer)
    return 0


def _chat(args: argparse.Namespace) -> int:
    session = _open_session(args)
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        question = sys.stdin.readline().strip()
        if not question:
            return 0
        session.ask(question, stream=_print_piece, **_limit(args))
        print()


def _print_piece(text: str) -> None:
    print(text, end="", flush=True)


def _demo(args: argparse.Namespace) -> int:
    model, processor = _load(args)
    if args.web:
        from .web import build, launch

        launch(build(model, processor), server_name=args.host, server_port=args.port, share=args.share)
        return 0
    from .demo import run

    run(model, processor, seed=args.seed, output=args.output, **_limit(args))
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from .data import TASKS, load_changechat, load_generated
    from .data.build import read_captions
    from .evaluation.answering import ModelAnswerer, alone, digest_rows, identify, predict, process_state
    from .evaluation.baselines import BASELINES, make_baseline
    from .evaluation.captions import Protocol, has_java, make_vocabulary
    from .evaluation.published import published_tasks
    from .evaluation.report import write_report
    from .evaluation.score import evaluate_predictions

    vocabulary = None
    if args.protocol == "levir-words" and not args.train_captions:
        raise ValueError("--protocol levir-words needs the words of the training captions: --train-captions FILE")
    if args.train_captions:
        vocabulary = make_vocabulary(
            text for texts in read_captions(args.train_captions, "train").values() for text in texts
        )
    protocol = Protocol(args.protocol, tokenizer=args.gpt2, vocabulary=vocabulary)
    tasks = args.tasks or TASKS
    training = None
    needs_training = {"majority", "nearest"} & {args.model, *args.baselines}
    state = process_state()
    if args.device == "auto" and state.num_processes > 1:
        args.device = str(state.device)  # a whole model for each process
    with state.main_process_first():  # the others find its Arrow tables
        if args.data:
            rows = load_changechat(args.data, args.images, split=args.split, tasks=tasks)
            training = load_changechat(args.data, args.images, split="train") if needs_training else None
        else:
            rows = load_generated(args.pairs, args.seed, tasks=tasks)
            training = load_generated(args.pairs, args.seed + args.pairs) if needs_training else None
    rows = rows.select(range(min(args.limit or len(rows), len(rows))))

    generate_kwargs = {"max_new_tokens": args.max_new_tokens, "num_beams": args.num_beams}
    generate_kwargs = {name: value for name, value in generate_kwargs.items() if value is not None}
    settings = {
        "data": f"{args.data}, {args.split}"
        if args.data
        else f"generated, seeds from {args.seed}, {args.pairs} pairs",
        "tasks": list(tasks),
        "limit": args.limit,
        "dtype": args.dtype,
        "load_in_4bit": args.load_in_4bit,
        "generate": generate_kwargs,
        "history": "right answers" if args.right_history else "own answers",
        "questions": "verbatim, as in the authors' evaluation"
        if args.verbatim_questions
        else "as in training, q: ...",
    }
    systems = {}
    first_cases: list = []
    for name in dict.fromkeys((args.model, *args.baselines)):
        folder = args.output / "predictions" / Path(name).name
        with alone(folder):  # before the model is loaded, which takes its time
            if name in BASELINES:
                answerer: Any = make_baseline(name, training)
                made_of: Any = None if training is None else digest_rows(training)
            else:
                answerer = ModelAnswerer(*_load(args, args.dtype, args.load_in_4bit), **generate_kwargs)
                made_of = identify(answerer.model)
            predictions = predict(
                answerer,
                rows,
                folder,
                {"system": name, "made_of": made_of, **settings},
                batch_size=args.batch_size,
                own_history=not args.right_history,
                verbatim_questions=args.verbatim_questions,
            )
        if state.is_main_process:
            texts = rows.remove_columns(["before", "after"])
            systems[name], cases = evaluate_predictions(texts, predictions, protocol)
            first_cases = first_cases or cases
    if not state.is_main_process:
        return 0
    if args.protocol == "coco" and set(tasks) & {"caption", "open"} and not has_java("In the report's captions"):
        settings["captions"] = "split at white space, not by the Penn Treebank tokenizer, for want of Java"
    title = f"{args.model} on {settings['data']}"
    beside = published_tasks(rows, args.data, args.split) if args.data else []
    files = write_report(
        args.output, systems, first_cases, rows, title=title, settings=settings, published_tasks=beside
    )
    print(files[1].read_text(encoding="utf-8"))
    print("\n".join(map(str, files)), file=sys.stderr)
    failed = sum(case.error is not None for case in first_cases)
    if failed:
        print(f"{failed} records have no answer; their reasons are in {args.output}/predictions", file=sys.stderr)
    return FAILED if failed else 0


def _train(args: argparse.Namespace) -> int:
    from .training.run import TrainingRun, train

    print(train(TrainingRun.from_yaml(args.config), show=lambda text: print(text, file=sys.stderr)))
    return 0


def _convert(args: argparse.Namespace) -> int:
    needed = {name: getattr(args, name) for name in ("vision", "language_model", "qformer_tokenizer")}
    options = {"output_dir": args.output_dir, "small": args.small, "max_shard_size": args.max_shard_size}
    if args.instructblip:
        given = [name for name, value in {**needed, "config": args.config}.items() if value is not None]
    else:
        given = [name for name, value in needed.items() if value is None]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        args.error(
            f"--instructblip holds all parts itself: leave out {flags}" if args.instructblip else f"add {flags}"
        )
    from . import DeltaVLMConfig, convert_instructblip, convert_original_checkpoint

    if args.instructblip:
        folder = convert_instructblip(args.instructblip, **options)
    else:
        config = DeltaVLMConfig.from_json_file(args.config) if args.config else None
        folder = convert_original_checkpoint(args.checkpoint, **needed, **options, config=config)
    print(folder)
    return 0


def _publish(args: argparse.Namespace) -> int:
    from .publishing import Publication

    publication = Publication(args.folder, args.repo_id, args.report, args.license, args.base_model)
    if args.dry_run:
        print(publication.preview())
    else:
        print(publication.push(private=args.private, revision=args.revision))
    return 0


def _check_data(args: argparse.Namespace) -> int:
    from .data.check import check_data

    report = check_data(args.source, args.images, look_at_images=not args.no_images, revision=args.revision)
    print(report.table())
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report.to_dict(), indent=1, ensure_ascii=False), encoding="utf-8")
    return FAILED if report.problems else 0


def _pairs(args: argparse.Namespace) -> dict:
    """The arguments that building and writing have in common."""
    from .data.build import find_pairs
    from .data.rules import LEVIR, Thresholds

    return {
        "pairs": find_pairs(args.images, args.captions, args.masks, args.split),
        "output": args.output,
        "split": args.split,
        "name": args.name,
        "thresholds": Thresholds(args.min_area or LEVIR.min_area, args.min_cell_area or LEVIR.min_cell_area),
        "binary_masks": args.binary_masks,
    }


def _build_data(args: argparse.Namespace) -> int:
    from .data.build import RULE_TASKS, build_dataset

    choices = {"tasks": args.tasks or RULE_TASKS, "seed": args.seed, "paraphrase": args.paraphrase}
    summary = build_dataset(**_pairs(args), **choices, overwrite=args.overwrite)
    print(json.dumps(vars(summary), indent=1, ensure_ascii=False))
    return 0


def _write_data(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from .data.write import WRITTEN_TASKS, Settings, write_dataset

    names = ("questions", "turns", "attempts", "retries", "concurrency", "max_answer_tokens", "timeout", "temperature")
    given = {name: value for name, value in vars(args).items() if name in names and value is not None}
    settings = Settings(args.model, json_schema=not args.no_json_schema, **given)
    with tqdm(desc="written", disable=None) as bar:

        def show_progress(finished: int, total: int) -> None:
            bar.total = total
            bar.update(finished - bar.n)

        summary = write_dataset(
            **_pairs(args),
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


def _show_data(args: argparse.Namespace) -> int:
    from .data import TASKS, load_changechat, load_generated
    from .data.show import undecoded, write_sheet

    tasks = (args.task,) if args.task else TASKS
    if args.source:
        rows = load_changechat(
            args.source, args.images, split=args.split, tasks=tasks, masks=True, revision=args.revision
        )
        rows = undecoded(rows.shuffle(seed=args.seed).select(range(min(args.number, len(rows)))))
        title = f"{args.source}: {args.split}"
    else:
        pairs = -(-args.number // len(tasks))
        rows = load_generated(pairs, args.seed, tasks=tasks, masks=True, streaming=True).take(args.number)
        title = f"Generated scenes, seeds from {args.seed}"
    print(f"{args.output}: {write_sheet(rows, args.output, title)} records")
    return 0
