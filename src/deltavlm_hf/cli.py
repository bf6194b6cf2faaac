"""The command line: `deltavlm ask | chat | demo | convert`. Answers go to stdout, all else to stderr."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__, tiny

FAILED, INTERRUPTED = 1, 130


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

    def add(name: str, run, help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(run=run)
        return command

    ask = add("ask", _ask, "Ask one question about a pair of images.")
    chat = add("chat", _chat, "Talk about a pair of images: one question a line, an empty line or Ctrl-D ends.")
    demo = add("demo", _demo, "Show a generated pair, with answers of a model, as text and as a picture.")
    convert = add("convert", _convert, "Convert a checkpoint of the authors' release to a folder for from_pretrained.")

    for command in (ask, chat):
        command.add_argument("before", type=Path, metavar="BEFORE", help="image of the first date")
        command.add_argument("after", type=Path, metavar="AFTER", help="image of the second date")
    ask.add_argument("question", metavar="QUESTION")
    ask.add_argument("--json", action="store_true", help="print the answer as a JSON object")
    for command in (ask, chat, demo):
        command.add_argument("--model", help="folder or Hub id (default: the small model inside the package)")
        command.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
        command.add_argument("--max-new-tokens", type=_positive_integer, metavar="N", help="default: the model's own")

    demo.add_argument("--seed", type=int, default=18, help="which pair to show (default: %(default)s)")
    demo.add_argument("--output", type=Path, default=Path("deltavlm_demo.png"), help="default: %(default)s")

    convert.add_argument("output_dir", type=Path, metavar="OUT", help="the folder to make")
    convert.add_argument("--checkpoint", type=Path, required=True, help="the authors' checkpoint_best.pth")
    convert.add_argument("--vision", type=Path, required=True, help="EVA-ViT file, or folder with InstructBLIP")
    convert.add_argument("--language-model", required=True, help="folder or Hub id, such as lmsys/vicuna-7b-v1.5")
    convert.add_argument("--qformer-tokenizer", required=True, help="bert-base-uncased: folder, Hub id or vocab.txt")
    convert.add_argument("--config", type=Path, help="config.json with the sizes (default: the paper's)")
    return parser


def _positive_integer(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def _limit(args: argparse.Namespace) -> dict[str, int]:
    return {} if args.max_new_tokens is None else {"max_new_tokens": args.max_new_tokens}


def _load(args: argparse.Namespace):
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    from .auto_classes import MODEL_TYPE

    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: no CUDA device is available; use --device cpu")
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    source = args.model or tiny()
    model_type = AutoConfig.from_pretrained(source).model_type
    if model_type != MODEL_TYPE:
        raise ValueError(f"--model {source}: expected a {MODEL_TYPE} model, got {model_type}")
    processor = AutoProcessor.from_pretrained(source)
    try:
        model = AutoModelForImageTextToText.from_pretrained(source, dtype="auto", device_map=args.device)
    except SafetensorError as error:
        raise ValueError(f"--model {source}: its weights cannot be read ({error})") from error
    return model, processor


def _open_session(args: argparse.Namespace):
    for path in (args.before, args.after):
        if not path.is_file():  # before the model is loaded, which takes its time
            raise FileNotFoundError(f"{path} is not a file")
    from .inference import ChangeSession

    model, processor = _load(args)
    return ChangeSession(model, processor, args.before, args.after)


def _ask(args: argparse.Namespace) -> int:
    answer = _open_session(args).ask(args.question, **_limit(args))
    if args.json:
        asked = {"before": str(args.before), "after": str(args.after), "question": args.question}
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
    from .demo import run

    model, processor = _load(args)
    run(model, processor, seed=args.seed, output=args.output, **_limit(args))
    return 0


def _convert(args: argparse.Namespace) -> int:
    from . import DeltaVLMConfig, convert_original_checkpoint

    folder = convert_original_checkpoint(
        args.checkpoint,
        vision=args.vision,
        language_model=args.language_model,
        qformer_tokenizer=args.qformer_tokenizer,
        output_dir=args.output_dir,
        config=DeltaVLMConfig.from_json_file(args.config) if args.config else None,
    )
    print(folder)
    return 0
