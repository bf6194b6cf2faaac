"""
`deltavlm demo --web`, and the Space in `examples/space`: a page to drop two images on and talk about them.

What a visitor uploads and says is kept in the session's own state, and dropped with it, see `guard`.
"""

import logging
import queue
import signal
import sys
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio.to_thread
import numpy as np
import torch
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList

from ..extras import missing

try:
    import gradio as gr
except ImportError as error:
    raise missing("The page needs gradio", "web") from error
from starlette.middleware import Middleware

from ..data.questions import FOLLOW_UPS, INSTRUCTIONS, parse_grid
from ..data.scenes import generate_scene
from ..inference import ChangeSession, answer, predict_mask
from ..modeling import DeltaVLMForConditionalGeneration
from ..processing import DeltaVLMProcessor
from ..processing.conversation import Turn
from ..processing.reading import FORMATS, READING_ERRORS, Refused, image_size, read_image
from . import guard
from .guard import Guard, Visit
from .overlay import draw_cells, overlay_heat, overlay_mask

logger = logging.getLogger(__name__)

TASKS = {
    "Describe": INSTRUCTIONS["caption"],
    "Changed?": INSTRUCTIONS["binary"],
    "Count": INSTRUCTIONS["count"],
    "Locate": INSTRUCTIONS["grid"],
    "Ask": "What kinds of objects are new?",
    "Go on": FOLLOW_UPS[0],
}
MAX_PIXELS = 64_000_000  # of one image
LONGEST = 2048  # side of what is kept of an image while it is read; models see far less
MAX_QUESTION = 1000  # characters
MAX_SECONDS = 120  # for one answer
SHOWN = 640  # longest side of the pictures that are sent back
EXAMPLE_SEEDS = (18, 7, 3, 12)
_CSS = ".narrow button { min-width: 5rem } .evidence img { image-rendering: auto }"
_NOTE = "**Attention is where the model looks, not proof of what its answer rests on.** Answers can be wrong."


def build(
    model: DeltaVLMForConditionalGeneration,
    processor: DeltaVLMProcessor,
    title: str = "DeltaVLM",
    note: str | None = None,
) -> gr.Blocks:
    """
    Makes the page. One per process, for it has gradio keep all files in a folder of its own.

    Args:
        model ([`DeltaVLMForConditionalGeneration`]): on any device.
        processor ([`DeltaVLMProcessor`]): the model's.
        title (`str`, *optional*): what stands above.
        note (`str`, *optional*): what visitors should know of this model, in Markdown.

    Returns:
        `gradio.Blocks`: for [`launch`].
    """
    folder = guard.make_folder()
    examples = _examples(folder)
    visits = _Visits(model, processor, folder)
    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.Markdown(f"# {title}\nTwo images of the same place, before and after: ask what changed.")
        visit = gr.State()
        with gr.Row():
            before = gr.Image(label="Before", type="filepath", sources=["upload", "clipboard"], elem_id="before")
            after = gr.Image(label="After", type="filepath", sources=["upload", "clipboard"], elem_id="after")
        pictures: list[Any] = [before, after]
        scenes = gr.Dataset(components=pictures, samples=examples, type="index", label="Generated scenes")
        slider = gr.ImageSlider(label="Swipe: before | after", interactive=False, elem_id="swipe")
        with gr.Row(elem_classes="narrow"):
            tasks = [gr.Button(name, size="sm") for name in TASKS]
        chat = gr.Chatbot(label="Conversation", elem_id="chat", height=360)
        with gr.Row():
            question = gr.Textbox(placeholder="What changed?", show_label=False, scale=4, max_length=MAX_QUESTION)
            send = gr.Button("Send", variant="primary", scale=1)
            stop = gr.Button("Stop", variant="stop", scale=1)
        evidence = gr.Gallery(label="Evidence", columns=2, elem_id="evidence", elem_classes="evidence")
        gr.Markdown(f"{_NOTE} {note[0].upper()}{note[1:]}" if note else _NOTE)

        # Whatever costs computing goes through one queue, one at a time. Nothing here may have `queue=False` or
        # `cancels=`: the former can be called past the queue, the latter leaves its work running beside the next.
        work: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
        light: dict[str, Any] = {"concurrency_id": "light", "concurrency_limit": 4, "api_visibility": "private"}
        # `preprocess=False`, for gradio would decode an upload, whatever it is.
        for image in pictures:
            image.async_move_resource_to_block_cache = _stay
            image.change(
                visits.compare,
                pictures,
                [visit, slider, chat, evidence],
                **work,
                preprocess=False,
                api_visibility="private",
            )
        outputs = [question, chat, evidence]
        question.submit(visits.converse, [question, visit], outputs, **work, api_visibility="private")
        send.click(visits.converse, [question, visit], outputs, **work, api_visibility="private")
        for button, instruction in zip(tasks, TASKS.values(), strict=True):
            button.click(visits.converse, [gr.State(instruction), visit], outputs, **work, api_visibility="private")
        stop.click(visits.halt, visit, **light)
        scenes.click(lambda number: examples[number], scenes, pictures, **light)
        # For programs; through components, so that paths can only be those of uploaded files.
        once, reply = gr.Button(visible=False), gr.Textbox(visible=False)
        once.click(visits.ask_once, [*pictures, question], reply, **work, preprocess=False, api_name="ask")
    return page


def _refusal(text: str) -> gr.Error:
    return gr.Error(text, print_exception=False)


@contextmanager
def _in_plain_words() -> Iterator[None]:
    """What a visitor is told of errors: ours are said, all others are for the log."""
    try:
        yield
    except gr.Error:
        raise
    except Exception as error:
        logger.exception("A visitor's request failed")
        raise _refusal("Something went wrong here, and has been noted. Try again, or try other images.") from error


class _Visits:
    """What visitors do, for gradio to call."""

    def __init__(self, model: DeltaVLMForConditionalGeneration, processor: DeltaVLMProcessor, folder: Path):
        self.model = model
        self.processor = processor
        self.folder = folder

    @_in_plain_words()
    def compare(self, *uploads: Any):
        """Both images are there: encodes them once and shows where they differ."""
        visit = Visit(_paths(uploads, self.folder))
        if len(visit.files) == 2:
            before, after = (_read(path, self.processor) for path in visit.files)
            visit.session = ChangeSession(self.model, self.processor, before, after)
            classes = self.model.config.mask_classes or ()
            mask = predict_mask(self.model, self.processor, before, after) if classes else None
            visit.shown = _small(before, after)
            if mask is not None:
                visit.mask = overlay_mask(visit.shown[1], mask, classes)
        return visit, visit.shown or None, [], None

    async def converse(self, question: str, visit: Visit | None):
        """Streams an answer into the conversation."""
        with _in_plain_words():
            if visit is None or visit.session is None:
                raise _refusal("Give two images first: before and after.")
            question = _question(question, self.processor, visit.session.history)
            visit.stop.clear()
            messages = [
                {"role": role, "content": text}
                for turn in [*visit.session.history, (question, "")]
                for role, text in zip(("user", "assistant"), turn, strict=True)
            ]
            yield "", messages, gr.skip()
            pieces = stream_answer(visit.session, question, visit.stop)
            try:
                while (piece := await anyio.to_thread.run_sync(next, pieces, None)) is not None:
                    messages[-1]["content"] += piece
                    yield gr.skip(), messages, gr.skip()
            finally:  # also when the visitor is gone; it waits for the model, as nothing else should
                await anyio.to_thread.run_sync(pieces.close)
            yield gr.skip(), messages, await anyio.to_thread.run_sync(_evidence, visit)

    def halt(self, visit: Visit | None) -> None:
        """Ends the answer that is being given."""
        if visit is not None:
            visit.stop.set()

    @_in_plain_words()
    def ask_once(self, before: Any, after: Any, question: Any) -> str:
        """One question about one pair, without a conversation."""
        question = _question(question, self.processor, [])
        paths = _paths([before, after], self.folder)
        if len(paths) < 2:
            raise _refusal("Give two images: before and after.")
        images = [[_read(path, self.processor) for path in paths]]
        options: dict[str, Any] = {"histories": [[]], "images": images, "max_time": MAX_SECONDS}
        (reply,) = answer(self.model, self.processor, [question], **options)
        return reply


async def _stay(path: str) -> str:
    """In place of what gradio does with a file that is named: fetch it, if it is an address."""
    return path


def launch(page: gr.Blocks, **kwargs: Any) -> None:
    """
    Serves the page.

    Args:
        page (`gradio.Blocks`): from [`build`].
        kwargs: for `gradio.Blocks.launch`, such as `server_name`, `server_port`, `share`.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which clears the visitors' files
    page.queue(max_size=guard.MAX_WAITING, api_open=False)
    page._queue.ANALYTICS_MAX_EVENTS = 100  # of which gradio would keep ten thousand, and sum them up after each job
    page.launch(
        max_file_size=guard.MAX_FILE,
        css=_CSS,
        state_session_capacity=guard.MAX_SESSIONS,
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        app_kwargs={"middleware": [Middleware(Guard, page=page)]},
        **kwargs,
    )


def _paths(uploads: Iterable[Any], folder: Path) -> list[str]:
    """Of the images that are there. gradio itself lets any path pass that comes without its own mark."""
    paths = [upload["path"] for upload in uploads if upload and upload["path"]]
    if not all(Path(path).resolve().is_relative_to(folder) for path in paths):
        raise _refusal("Upload the images: other files are not read, and addresses not fetched.")
    return paths


def _read(path: str, processor: DeltaVLMProcessor) -> Image.Image:
    """An upload as 8-bit RGB, decoded once, and only if its header promises an image of bounded size."""
    name = Path(path).name
    try:
        width, height = image_size(path)
        if width * height > MAX_PIXELS:
            raise _refusal(f"{name} has {width} x {height} pixels; at most {MAX_PIXELS:,} in all are taken.")
        image = read_image(path)
        image.thumbnail((LONGEST, LONGEST))
        pixels = processor.image_processor.process_image(image)  # (3, H, W)
    except gr.Error:
        raise
    except FileNotFoundError as error:
        raise _refusal(f"{name} is no longer here; upload it again.") from error
    except READING_ERRORS as error:
        if isinstance(error.__cause__, Refused):
            raise _refusal(f"{name} is not taken: {str(error.__cause__).partition(';')[0]}.") from error
        raise _refusal(f"{name} is no image that can be read; {', '.join(FORMATS)} are taken.") from error
    return Image.fromarray(pixels.transpose(1, 2, 0))


def _question(text: Any, processor: DeltaVLMProcessor, history: Sequence[Turn]) -> str:
    text = str(text or "").strip()
    if not text:
        raise _refusal("Type a question, or press one of the buttons.")
    if len(text) > MAX_QUESTION:
        raise _refusal(f"A question has at most {MAX_QUESTION} characters; this one has {len(text)}.")
    try:
        processor(text=[text], history=[history])
    except ValueError as error:  # more tokens than the model reads
        raise _refusal(str(error)) from error
    return text


def _small(before: Image.Image, after: Image.Image) -> tuple[Image.Image, Image.Image]:
    """Both dates at one size, for the slider and for evidence."""
    before.thumbnail((SHOWN, SHOWN))
    return before, after.resize(before.size)


def _evidence(visit: Visit) -> list[tuple[Image.Image, str]]:
    assert visit.session is not None
    attention, change = (maps[0].float().cpu().numpy() for maps in visit.session.explain().to_tuple())
    before, after = visit.shown
    pictures = [
        (overlay_heat(before, attention[0], attention.max()), "attention, before"),
        (overlay_heat(after, attention[1], attention.max()), "attention, after"),
        (overlay_heat(after, change), "how far the dates differ"),
    ]
    if visit.mask is not None:
        picture, legend = visit.mask
        pictures.insert(0, (picture, f"the mask: {legend}"))
    cells = parse_grid(visit.session.history[-1][1])
    if cells is not None:
        pictures.insert(0, (draw_cells(after, *cells), "the answer: roads yellow, buildings blue"))
    return pictures


class _Stop(StoppingCriteria):
    def __init__(self, asked: threading.Event):
        self.asked = asked

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.asked.is_set(), dtype=torch.bool, device=input_ids.device)


def stream_answer(
    session: ChangeSession, question: str, stop: threading.Event | None = None
) -> Generator[str, None, None]:
    """
    The pieces of an answer as they come. Generation stops when nobody listens any more.

    Args:
        session ([`ChangeSession`]): the conversation, which the turn is added to.
        question (`str`): the question.
        stop (`threading.Event`, *optional*): once set, the answer ends.
    """
    pieces: queue.Queue[str | BaseException | None] = queue.Queue()
    stop = stop or threading.Event()

    def work() -> None:
        try:
            criteria = StoppingCriteriaList([_Stop(stop)])
            session.ask(question, stream=pieces.put, stopping_criteria=criteria, max_time=MAX_SECONDS)
        except Exception as error:  # to be raised where the visitor sees it
            pieces.put(error)
        finally:
            pieces.put(None)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (piece := pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece
    finally:
        stop.set()
        thread.join()


def _examples(folder: Path) -> list[list[str]]:
    rows = []
    for seed in EXAMPLE_SEEDS:
        scene = generate_scene(seed, 256)
        row = []
        for date, picture in (("before", scene.before), ("after", scene.after)):
            path = folder / f"{seed}_{date}.png"
            Image.fromarray(np.asarray(picture)).save(path)
            row.append(str(path))
        rows.append(row)
    return rows
