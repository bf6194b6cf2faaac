"""`deltavlm serve`."""

import argparse
import os
import sys

from .arguments import add_command, add_llm_url, load, positive_integer, whole_number

KEY = "DELTAVLM_API_KEY"
_LOCAL = ("127.0.0.1", "::1", "localhost")


def add(subparsers) -> None:
    command = add_command(
        subparsers, "serve", run, "Serve a model to programs over HTTP, in the form of OpenAI's chat completions."
    )
    add_argument = command.add_argument
    add_argument("model", metavar="MODEL", help="folder or Hub id; inside the package are `small` and `tiny`")
    add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    add_llm_url(command)
    add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine alone)")
    add_argument("--port", type=whole_number, default=8000, help="0: a free one (default: %(default)s)")
    add_argument("--api-key", metavar="KEY", help=f"what clients have to show (default: ${KEY}; none without)")
    add_argument("--name", help="what clients call the model (default: MODEL; of a folder its last part)")
    for name, default, help in (
        ("batch-size", 32, "answers made at once"),
        ("max-waiting", 128, "answers that may wait; more are told to come back (429)"),
        ("max-tokens", 512, "the longest answer that may be asked for"),
        ("keep-minutes", 10, "how long a pair can be asked about again by its id"),
        ("keep-pairs", 256, "pairs that are kept at most"),
    ):
        add_argument(
            f"--{name}", type=positive_integer, default=default, metavar="N", help=f"{help} (default: %(default)s)"
        )
    add_argument(
        "--wait-ms",
        type=whole_number,
        default=10,
        metavar="N",
        help="milliseconds that a question waits for others to be answered with it (default: %(default)s)",
    )
    add_argument(
        "--allow-urls",
        nargs="+",
        default=(),
        metavar="HOST",
        help="fetch images from these hosts (host or host:port); without it only images in the request are read",
    )
    add_argument("--page", action="store_true", help="a page for people too, at /page, as of `demo --web`")


def run(args: argparse.Namespace) -> int:
    from ..inference.loading import NOTES, name_model
    from ..serving import Settings, listen, serve

    if args.page:  # what it lacks is said before a model is loaded
        from ..app.page import mount  # noqa: F401
    key = args.api_key if args.api_key is not None else os.environ.get(KEY) or None
    if key is not None and (not key.isascii() or not key.strip()):
        raise ValueError("--api-key: expected a key of ASCII characters")
    if key is None and args.host not in _LOCAL:
        print(f"deltavlm: anybody who reaches {args.host} may ask: consider --api-key", file=sys.stderr)
    listening = listen(args.host, args.port)
    model, processor = load(args.model, args.device, args.llm_url)
    names = ("batch_size", "max_waiting", "max_tokens", "keep_minutes", "keep_pairs", "wait_ms", "allow_urls")
    name = args.name or name_model(args.model)
    options = {name: getattr(args, name) for name in names}
    settings = Settings(name, **options, api_key=key, page=args.page, note=NOTES.get(args.model))
    host, port = listening.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    page = f", a page at {address}/page/" if args.page else ""
    print(f"deltavlm: {settings.name} at {address}/v1{page}", file=sys.stderr)
    serve(model, processor, settings, listening)
    return 0
