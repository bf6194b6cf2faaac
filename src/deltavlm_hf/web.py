"""
`deltavlm demo --web`, and the Space in `examples/space`: a page to drop two images on and talk about them.

What a visitor uploads and says is kept in the session's own state, and dropped with it.
"""

import logging
import queue
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList

from .data.questions import FOLLOW_UPS, INSTRUCTIONS, parse_grid
from .data.scenes import generate_scene
from .inference import ChangeSession, answer
from .modeling import DeltaVLMForConditionalGeneration
from .overlay import draw_cells, overlay_heat
from .processing import DeltaVLMProcessor

logger = logging.getLogger(__name__)

TASKS = {
    "Describe": INSTRUCTIONS["caption"],
    "Changed?": INSTRUCTIONS["binary"],
    "Count": INSTRUCTIONS["count"],
    "Locate": INSTRUCTIONS["grid"],
    "Ask": "What kinds of objects are new?",
    "Go on": FOLLOW_UPS[0],
}
MAX_FILE_SIZE = "32mb"
MAX_PIXELS = 64_000_000  # of one image
MAX_QUESTION = 1000  # characters
MAX_SECONDS = 120  # for one answer
IDLE_SECONDS = 1800  # after which a visitor's pair is forgotten
SHOWN = 640  # longest side of the pictures that are sent back
EXAMPLE_SEEDS = (18, 7, 3, 12)
_CSS = ".narrow button { min-width: 5rem } .evidence img { image-rendering: auto }"
_NOTE = (
    "**Attention is where the model looks, not proof of what its answer rests on.** Answers can be wrong; those of "
    "the small model that ships with the package mean nothing on real imagery."
)


def build(model: DeltaVLMForConditionalGeneration, processor: DeltaVLMProcessor, title: str = "DeltaVLM"):
    """
    Makes the page.

    Args:
        model ([`DeltaVLMForConditionalGeneration`]): on any device.
        processor ([`DeltaVLMProcessor`]): the model's.
        title (`str`, *optional*): what stands above.

    Returns:
        `gradio.Blocks`: for [`launch`].

    Raises:
        ImportError: without gradio.
    """
    try:
        import gradio as gr
    except ImportError as error:
        raise ImportError('The page needs gradio: pip install "deltavlm-hf[web]"') from error

    def compare(before: str | None, after: str | None):
        """Both images are there: encodes them once and shows where they differ."""
        if not (before and after):
            return None, None, [], None
        try:
            session = ChangeSession(model, processor, _checked(before), _checked(after))
        except (ValueError, OSError) as error:
            raise gr.Error(str(error)) from error
        shown = _thumbnails(before, after)
        return _Visit(session, shown), shown, [], None

    def converse(question: str, visit: _Visit | None, messages: list[dict]):
        """Streams an answer into the conversation."""
        question = _question(question)
        if visit is None:
            raise gr.Error("Give two images first: before and after.")
        messages = [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": ""}]
        yield "", messages, gr.skip()
        for piece in stream_answer(visit.session, question):
            messages[-1]["content"] += piece
            yield gr.skip(), messages, gr.skip()
        yield gr.skip(), messages, _evidence(visit)

    def ask_once(before: str, after: str, question: str) -> str:
        """One question about one pair, without a conversation."""
        images = (_checked(before), _checked(after))
        (reply,) = answer(model, processor, [_question(question)], images=[images], max_time=MAX_SECONDS)
        return reply

    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.Markdown(f"# {title}\nTwo images of the same place, before and after: ask what changed.")
        visit = gr.State(time_to_live=IDLE_SECONDS)
        with gr.Row():
            before = gr.Image(label="Before", type="filepath", sources=["upload", "clipboard"], elem_id="before")
            after = gr.Image(label="After", type="filepath", sources=["upload", "clipboard"], elem_id="after")
        gr.Examples(_examples(), [before, after], label="Generated scenes")
        slider = gr.ImageSlider(label="Swipe: before | after", interactive=False, elem_id="swipe")
        with gr.Row(elem_classes="narrow"):
            tasks = [gr.Button(name, size="sm") for name in TASKS]
        chat = gr.Chatbot(label="Conversation", elem_id="chat", height=360)
        with gr.Row():
            question = gr.Textbox(placeholder="What changed?", show_label=False, scale=4, max_length=MAX_QUESTION)
            send = gr.Button("Send", variant="primary", scale=1)
            stop = gr.Button("Stop", variant="stop", scale=1)
        evidence = gr.Gallery(label="Evidence", columns=2, elem_id="evidence", elem_classes="evidence")
        gr.Markdown(_NOTE)

        for image in (before, after):
            image.change(compare, [before, after], [visit, slider, chat, evidence], api_visibility="private")
        outputs = [question, chat, evidence]
        shared: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
        running: list[Any] = [
            question.submit(converse, [question, visit, chat], outputs, **shared),
            send.click(converse, [question, visit, chat], outputs, **shared),
        ]
        for button, instruction in zip(tasks, TASKS.values(), strict=True):
            running.append(button.click(converse, [gr.State(instruction), visit, chat], outputs, **shared))
        stop.click(None, cancels=running, api_visibility="private")
        # For programs; through components, so that paths can only be those of uploaded files.
        once, reply = gr.Button(visible=False), gr.Textbox(visible=False)
        once.click(
            ask_once, [before, after, question], reply, api_name="ask", concurrency_id="model", concurrency_limit=1
        )
    return page


def launch(page, **kwargs: Any) -> None:
    """
    Serves the page.

    Args:
        page (`gradio.Blocks`): from [`build`].
        kwargs: for `gradio.Blocks.launch`, such as `server_name`, `server_port`, `share`.
    """
    page.queue(max_size=64)
    page.launch(max_file_size=MAX_FILE_SIZE, css=_CSS, show_error=True, **kwargs)


class _Visit:
    """What is known of one visitor: the conversation, and both images as they are shown."""

    def __init__(self, session: ChangeSession, shown: tuple[Image.Image, Image.Image]):
        self.session = session
        self.shown = shown


def _checked(path: str) -> str:
    """A path to an image that is not too large, which its first bytes tell."""
    try:
        with Image.open(path) as image:
            width, height = image.size
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"This file is no image that can be read: {Path(path).name}.") from error
    if width * height > MAX_PIXELS:
        raise ValueError(f"An image has {width} x {height} pixels; at most {MAX_PIXELS:,} in all are taken.")
    return path


def _question(text: str) -> str:
    import gradio as gr

    text = text.strip()
    if not text:
        raise gr.Error("Type a question, or press one of the buttons.")
    if len(text) > MAX_QUESTION:
        raise gr.Error(f"A question has at most {MAX_QUESTION} characters; this one has {len(text)}.")
    return text


def _thumbnails(before: str, after: str) -> tuple[Image.Image, Image.Image]:
    """Both dates at one size, for the slider and for evidence."""
    images = []
    for path in (before, after):
        with Image.open(path) as image:
            images.append(image.convert("RGB"))
    images[0].thumbnail((SHOWN, SHOWN))
    return images[0], images[1].resize(images[0].size)


def _evidence(visit: _Visit) -> list[tuple[Image.Image, str]]:
    attention, change = (maps[0].float().cpu().numpy() for maps in visit.session.explain().to_tuple())
    before, after = visit.shown
    pictures = [
        (overlay_heat(before, attention[0], attention.max()), "attention, before"),
        (overlay_heat(after, attention[1], attention.max()), "attention, after"),
        (overlay_heat(after, change), "how far the dates differ"),
    ]
    cells = parse_grid(visit.session.history[-1][1])
    if cells is not None:
        pictures.insert(0, (draw_cells(after, *cells), "the answer: roads yellow, buildings blue"))
    return pictures


class _Stop(StoppingCriteria):
    def __init__(self, asked: threading.Event):
        self.asked = asked

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.asked.is_set(), dtype=torch.bool, device=input_ids.device)


def stream_answer(session: ChangeSession, question: str) -> Iterator[str]:
    """
    The pieces of an answer as they come. Generation stops when nobody listens any more.

    Args:
        session ([`ChangeSession`]): the conversation, which the turn is added to.
        question (`str`): the question.
    """
    pieces: queue.Queue[str | BaseException | None] = queue.Queue()
    stop = threading.Event()

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


def _examples() -> list[list[str]]:
    folder = Path(tempfile.mkdtemp(prefix="deltavlm-examples-"))
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
