"""
`deltavlm demo --web`, and the Space in `examples/space`: a page to drop two images on and talk about them.

What a visitor uploads and says is kept in the session's own state, and dropped with it, see `guard`. What the viewer
and the conversation look like and do in the browser is in `static`.
"""

import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from html import escape
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
from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from ..data.classes import ROADS_AND_BUILDINGS, Classes, classes_of
from ..data.questions import parse_grid, wording
from ..data.scenes import generate_scene
from ..inference import ChangeSession, answer, ask_pairs, predict_mask
from ..inference.loading import name_model
from ..inference.turns import Turns
from ..modeling import DeltaVLMForConditionalGeneration
from ..processing import DeltaVLMProcessor
from ..processing.conversation import Turn
from . import guard
from .guard import Guard, Visit
from .overlay import embed, heat_layer, mask_layer
from .pair import SHOWN, TILES, Photo, Unusable, is_large, middle_tiles, notices, read_photo
from .telling import (
    cells_so_far,
    cells_to_draw,
    explain_answer,
    explain_scan,
    join_grids,
    snippets,
    trained_on,
)

logger = logging.getLogger(__name__)


def tasks_of(classes: Classes) -> dict[str, str]:
    """What the buttons ask, about the classes that the model knows."""
    names = {"What changed?": "caption", "Any change?": "binary", "How many?": "count", "Where?": "grid"}
    return {name: wording(classes).instructions[task] for name, task in names.items()}


TASKS = tasks_of(ROADS_AND_BUILDINGS)
MAX_QUESTION = 1000  # characters
MAX_SECONDS = 120  # for one answer
MAX_SEEN = 10  # answers whose heat maps are kept
HEAT_SIDE = 64  # pixels of a heat map; a browser enlarges it as smoothly
EXAMPLE_SEEDS = (18, 7, 3, 12)
_STATIC = Path(__file__).with_name("static")
_SUFFIXES = [".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".gif", ".bmp", ".jp2", ".ppm", ".pgm"]


def build(
    model: DeltaVLMForConditionalGeneration,
    processor: DeltaVLMProcessor,
    title: str = "DeltaVLM",
    note: str | None = None,
    turns: Turns | None = None,
) -> gr.Blocks:
    """
    Makes the page. One per process, for it has gradio keep all files in a folder of its own.

    Args:
        model ([`DeltaVLMForConditionalGeneration`]): on any device.
        processor ([`DeltaVLMProcessor`]): the model's.
        title (`str`, *optional*): what stands above.
        note (`str`, *optional*): what is to be known of this model's answers; it stands beside each of them, unless
            the images are generated ones.
        turns ([`Turns`], *optional*): with whom else the page shares the model.

    Returns:
        `gradio.Blocks`: for [`launch`] or [`mount`].
    """
    folder = guard.make_folder()
    examples = _examples(folder)
    visits = _Visits(model, processor, folder, examples, note, turns or Turns())
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True) as page:
        gr.HTML(
            _heading(title, *trained_on(model.config.name_or_path, model.weights_revision)),
            js_on_load=None,
            head=f"<style>{(_STATIC / 'page.css').read_text()}</style>",
            elem_id="heading",
        )
        visit = gr.State()
        with gr.Row(elem_id="page"):
            with gr.Column(elem_id="seeing"):
                with gr.Row(elem_id="sources"):
                    before, after = (
                        gr.UploadButton(f"{date}…", file_types=_SUFFIXES, size="sm", elem_id=date.lower())
                        for date in ("Before", "After")
                    )
                    scenes = [
                        gr.Button(f"Generated {number}", icon=pair[1], size="sm", elem_classes="example")
                        for number, pair in enumerate(examples, start=1)
                    ]
                viewer = _part("viewer")
            with gr.Column(elem_id="talking"):
                with gr.Row(elem_id="chips"):
                    tasks = [gr.Button(name, size="sm") for name in TASKS]
                    scan = gr.Button("Scan the middle", size="sm", visible=False)
                chat = _part("chat")
                with gr.Row(elem_id="asking"):
                    question = gr.Textbox(
                        label="Question",
                        show_label=False,
                        placeholder="Ask in your own words",
                        max_length=MAX_QUESTION,
                        container=False,
                        elem_id="question",
                    )
                    send = gr.Button("Send", variant="primary", elem_id="send")
                    stop = gr.Button("Stop", variant="stop", elem_id="stop")

        # Whatever costs computing goes through one queue, one at a time. Nothing here may have `queue=False` or
        # `cancels=`: the former can be called past the queue, the latter leaves its work running beside the next.
        work: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
        light: dict[str, Any] = {"concurrency_id": "light", "concurrency_limit": 4, "api_visibility": "private"}
        # `preprocess=False`, for gradio would move or decode an upload, whatever it is.
        compare: dict[str, Any] = {
            "preprocess": False,
            "show_progress_on": viewer,
            "api_visibility": "private",
            **work,
        }
        talk: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", **work}
        pictures: list[Any] = [before, after]
        for image in pictures:
            image.async_move_resource_to_block_cache = _stay
            image.upload(visits.compare, pictures, [visit, viewer, chat, scan], **compare)
        for number, scene in enumerate(scenes):
            chosen = scene.click(visits.choose, gr.State(number), pictures, **light)
            chosen.then(visits.compare, pictures, [visit, viewer, chat, scan], **compare)
        outputs = [question, chat]
        question.submit(visits.converse, [question, visit], outputs, **talk)
        send.click(visits.converse, [question, visit], outputs, **talk)
        for button, instruction in zip(tasks, visits.tasks.values(), strict=True):
            button.click(visits.converse, [gr.State(instruction), visit], outputs, **talk)
        scan.click(visits.scan, visit, chat, **talk)
        stop.click(visits.halt, visit, **light)
        # For programs; through components, so that paths can only be those of uploaded files.
        once, reply = gr.Button(visible=False), gr.Textbox(visible=False)
        once.click(visits.ask_once, [*pictures, question], reply, **work, preprocess=False, api_name="ask")
    return page


def _part(name: str) -> gr.HTML:
    """A part of the page with a script of its own, which is given values and draws them."""
    return gr.HTML(
        html_template=(_STATIC / f"{name}.html").read_text(),
        js_on_load=(_STATIC / f"{name}.js").read_text(),
        apply_default_css=False,
        elem_id=name,
    )


def _heading(title: str, trained: str, points: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(point)}</li>" for point in points)
    learnt = (
        f"<details><summary><b>Trained on</b> {escape(trained)}</summary><ul>{items}</ul></details>"
        if points
        else "<p>What the model was trained on, its card does not say.</p>"
    )
    return f"<header><h1>{escape(title)}</h1><p>Two images of one place: ask what changed.</p>{learnt}</header>"


def _refusal(text: str) -> gr.Error:
    return gr.Error(escape(text), title="That did not work", print_exception=False)


@contextmanager
def _in_plain_words() -> Iterator[None]:
    """What a visitor is told of errors: ours are said, all others are for the log."""
    try:
        yield
    except gr.Error:
        raise
    except Unusable as error:
        raise _refusal(str(error)) from error
    except Exception as error:
        logger.exception("A visitor's request failed")
        raise _refusal("Something went wrong here, and has been noted. Try again, or try other images.") from error


class _Visits:
    """What visitors do, for gradio to call."""

    def __init__(
        self,
        model: DeltaVLMForConditionalGeneration,
        processor: DeltaVLMProcessor,
        folder: Path,
        examples: list[list[str]],
        note: str | None,
        turns: Turns,
    ):
        self.model = model
        self.processor = processor
        self.folder = folder
        self.examples = examples
        self.seeds: dict[tuple[str | None, ...], int] = {
            tuple(pair): seed for pair, seed in zip(examples, EXAMPLE_SEEDS, strict=True)
        }
        self.classes = classes_of(model.config)
        self.tasks = tasks_of(self.classes)
        self.note = f"{note[0].upper()}{note[1:]}" if note else ""
        self.turns = turns

    def choose(self, number: int) -> list[str]:
        """The files of a generated pair."""
        return self.examples[number]

    @_in_plain_words()
    def compare(self, *uploads: Any):
        """Encodes the images once, if both are there, and shows them."""
        paths = _paths(uploads, self.folder)
        visit = Visit([path for path in paths if path])
        visit.seed = self.seeds.get(tuple(paths))
        photos = [self._read(path) if path else None for path in paths]
        shown: dict[str, Any] = {"before": None, "after": None, "notices": [], "mask": None}
        for date, photo in zip(("before", "after"), photos, strict=True):
            if photo is not None:
                shown[date] = photo.to_show()
        before, after = photos
        if before is not None and after is not None:
            self._meet(visit, before, after)
            shown["notices"] = notices(before, after, self.processor.image_processor)
            shown["mask"] = self._mask(before, after)
        return visit, shown, self._conversation(visit), gr.Button(visible=visit.large)

    def _read(self, path: str) -> Photo:
        generated = any(path in pair for pair in self.examples)
        name = f"{Path(path).stem.partition('_')[2]}.png" if generated else None
        return read_photo(path, self.processor.image_processor, name)

    def _meet(self, visit: Visit, before: Photo, after: Photo) -> None:
        with self.turns:
            visit.session = ChangeSession(self.model, self.processor, before.picture, after.picture)
        visit.note = self.note if visit.seed is None else ""
        visit.large = is_large(before)
        visit.about = {"model": name_model(self.model.config.name_or_path), "generated": visit.seed is not None}
        for date, photo in (("before", before), ("after", after)):
            width, height = photo.picture.size
            visit.about[date] = {"name": photo.name, "width": width, "height": height}

    def _mask(self, before: Photo, after: Photo) -> dict[str, Any] | None:
        classes = self.model.config.mask_classes
        if not classes:
            return None
        size = after.picture.copy()
        size.thumbnail((SHOWN, SHOWN))
        with self.turns:
            mask = predict_mask(self.model, self.processor, before.picture, after.picture, size.size[::-1])
        picture, colours = mask_layer(mask, classes, self.classes)
        return {"url": embed(picture), "colours": colours}

    def _as_shown(self, question: str) -> str:
        """A fixed instruction by the words on its button."""
        return next((name for name, instruction in self.tasks.items() if instruction == question), question)

    def _conversation(self, visit: Visit, *unfinished: dict[str, Any]) -> dict[str, Any]:
        """All that the page is told of it."""
        turns = [dict(turn) for turn in (*visit.turns, *unfinished)]  # gradio compares what it is given one by one
        told = {"turns": turns, "about": visit.about, "snippets": {}}
        if visit.session is not None:
            question = visit.session.history[-1][0] if visit.session.history else self.tasks["What changed?"]
            before, after = (visit.about[date]["name"] for date in ("before", "after"))
            told["snippets"] = snippets(self.model.config.name_or_path, before, after, question, visit.seed)
        return told

    async def converse(self, question: str, visit: Visit | None):
        """Streams an answer into the conversation."""
        with _in_plain_words():
            if visit is None or visit.session is None:
                raise _refusal("Give two images first: before and after.")
            question = _question(question, self.processor, visit.session.history)
            visit.stop.clear()
            turn: dict[str, Any] = {
                "question": question,
                "asked": self._as_shown(question),
                "answer": "",
                "done": False,
            }
            yield "", self._conversation(visit, turn)
            try:
                answering = stream_answer(visit.session, question, visit.stop, self.turns)
                async with aclosing(_in_thread(answering)) as pieces:
                    async for piece in pieces:
                        turn["answer"] += piece
                        if (cells := cells_so_far(turn["answer"], self.classes)) is not None:
                            turn |= {"cells": cells_to_draw(cells, self.classes), "across": 3, "box": [0, 0, 1, 1]}
                        yield gr.skip(), self._conversation(visit, turn)
                turn["answer"] = visit.session.history[-1][1]
                turn |= await anyio.to_thread.run_sync(self._evidence, visit.session)
            except Exception:
                yield gr.skip(), self._conversation(visit)
                raise
            turn |= {
                "meaning": explain_answer(question, turn["answer"], self.classes),
                "note": visit.note,
                "done": True,
            }
            visit.turns.append(turn)
            for old in visit.turns[:-MAX_SEEN]:
                old |= {"attention": None, "change": None}
            yield gr.skip(), self._conversation(visit)

    async def scan(self, visit: Visit | None):
        """Asks about tiles in the middle of a large scene, and draws what is found as it comes."""
        with _in_plain_words():
            if visit is None or not visit.large:
                raise _refusal("Give two images of a large scene first.")
            visit.stop.clear()
            pairs, box = await anyio.to_thread.run_sync(self._cut, visit)
            turn: dict[str, Any] = {"question": self.tasks["Where?"], "asked": "Scan the middle", "done": False}
            turn |= {"across": 3 * TILES, "box": box, "note": visit.note, "answer": ""}
            yield self._conversation(visit, turn)
            grids = []
            try:
                async with aclosing(_in_thread(self._ask_tiles(pairs))) as answers:
                    async for text in answers:
                        grids.append(parse_grid(text, self.classes))
                        turn["answer"] = explain_scan(grids, len(pairs), self.classes)
                        turn["cells"] = cells_to_draw(join_grids(grids, TILES, self.classes), self.classes)
                        if visit.stop.is_set():
                            break
                        yield self._conversation(visit, turn)
            except Exception:
                yield self._conversation(visit)
                raise
            turn |= {"meaning": "Framed in the image, each tile in cells of its own.", "done": True}
            visit.turns.append(turn)
            yield self._conversation(visit)

    def _cut(self, visit: Visit) -> tuple[list[tuple[Image.Image, Image.Image]], list[float]]:
        before, after = (self._read(path) for path in visit.files)  # again, rather than to keep them
        return middle_tiles(before, after)

    def _ask_tiles(self, pairs: list[tuple[Image.Image, Image.Image]]) -> Generator[str, None, None]:
        options: dict[str, Any] = {"batch_size": TILES, "max_time": MAX_SECONDS / TILES}
        answers = ask_pairs(self.model, self.processor, pairs, [self.tasks["Where?"]], **options)
        while True:
            with self.turns:  # of each batch, not of all for as long as they are read
                said = next(answers, None)
            if said is None:
                return
            assert not isinstance(said, Exception)  # those are raised
            yield said[0]

    def _evidence(self, session: ChangeSession) -> dict[str, Any]:
        """Where the model looked for the last question, and how far the dates differ: layers."""
        with self.turns:
            attention, change = (maps[0].float().cpu().numpy() for maps in session.explain().to_tuple())
        return {
            "attention": [_heat(date, attention.max()) for date in attention],
            "change": _heat(change, change.max()),
        }

    def halt(self, visit: Visit | None) -> None:
        """Ends the answer that is being given."""
        if visit is not None:
            visit.stop.set()

    @_in_plain_words()
    def ask_once(self, before: Any, after: Any, question: Any) -> str:
        """One question about one pair, without a conversation."""
        question = _question(question, self.processor, [])
        paths = _paths([before, after], self.folder)
        if None in paths:
            raise _refusal("Give two images: before and after.")
        images = [[self._read(path).picture for path in paths if path]]
        options: dict[str, Any] = {"histories": [[]], "images": images, "max_time": MAX_SECONDS}
        with self.turns:
            (reply,) = answer(self.model, self.processor, [question], **options)
        return reply


async def _stay(path: str) -> str:
    """In place of what gradio does with a file that is named: fetch it, if it is an address."""
    return path


async def _in_thread(items: Generator[Any, None, None]) -> AsyncGenerator[Any, None]:
    """What comes of work that keeps a thread busy; closed also when the visitor is gone."""
    try:
        while (item := await anyio.to_thread.run_sync(next, items, None)) is not None:
            yield item
    finally:  # it waits for the model, as nothing else should
        await anyio.to_thread.run_sync(items.close)


def launch(page: gr.Blocks, **kwargs: Any) -> None:
    """
    Serves the page.

    Args:
        page (`gradio.Blocks`): from [`build`].
        kwargs: for `gradio.Blocks.launch`, such as `server_name`, `server_port`, `share`.
    """
    if threading.current_thread() is threading.main_thread():
        guard.exit_on_sigterm()
    page.launch(state_session_capacity=guard.MAX_SESSIONS, **_guarded(page), **kwargs)


def mount(app: FastAPI, page: gr.Blocks, path: str) -> Callable[[], None]:
    """
    Serves the page as a part of another application.

    Args:
        app (`fastapi.FastAPI`): the application. From now on it lets no page of another site read its answers, as
            gradio would with its own.
        page (`gradio.Blocks`): from [`build`].
        path (`str`): where.

    Returns:
        `Callable`: to be called when the server is to end. Pages that are open hold a connection each, and a server
        that waits for what is under way would wait for them.
    """
    app.add_middleware(CORSMiddleware)  # with this there, gradio leaves it to the application
    page.state_session_capacity = guard.MAX_SESSIONS
    gr.mount_gradio_app(app, page, path, show_error=False, **_guarded(page))
    return app.routes[-1].app.stop_event.set  # type: ignore[attr-defined]


def _guarded(page: gr.Blocks) -> dict[str, Any]:
    """What gradio is told, however it serves the page."""
    page.queue(max_size=guard.MAX_WAITING, api_open=False)
    page._queue.ANALYTICS_MAX_EVENTS = 100  # of which gradio would keep ten thousand, and sum them up after each job
    around = Guard(page)
    return {
        "max_file_size": guard.MAX_FILE,
        "run_history": False,
        "enable_monitoring": False,
        "mcp_server": False,
        "ssr_mode": False,
        "app_kwargs": {"middleware": [Middleware(around.around)], "lifespan": around.running},
    }


def _paths(uploads: Iterable[Any], folder: Path) -> list[str | None]:
    """Of the images, where they are there. gradio itself lets any path pass that comes without its own mark."""
    paths = [upload["path"] if upload and upload["path"] else None for upload in uploads]
    if not all(path is None or Path(path).resolve().is_relative_to(folder) for path in paths):
        raise _refusal("Upload the images: other files are not read, and addresses not fetched.")
    return paths


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


def _heat(heat: np.ndarray, top: float) -> str:
    small = Image.fromarray(heat).resize((HEAT_SIDE, HEAT_SIDE), Image.Resampling.BOX)
    return embed(heat_layer(np.asarray(small), top))


class _Stop(StoppingCriteria):
    def __init__(self, asked: threading.Event):
        self.asked = asked

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.asked.is_set(), dtype=torch.bool, device=input_ids.device)


def stream_answer(
    session: ChangeSession,
    question: str,
    stop: threading.Event | None = None,
    turns: Turns | None = None,
) -> Generator[str, None, None]:
    """
    The pieces of an answer as they come. Generation stops when nobody listens any more.

    Args:
        session ([`ChangeSession`]): the conversation, which the turn is added to.
        question (`str`): the question.
        stop (`threading.Event`, *optional*): once set, the answer ends.
        turns ([`Turns`], *optional*): with whom the model is shared.
    """
    pieces: queue.Queue[str | BaseException | None] = queue.Queue()
    stop = stop or threading.Event()

    def work() -> None:
        try:
            criteria = StoppingCriteriaList([_Stop(stop)])
            with turns or Turns():
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
