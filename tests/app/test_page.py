"""The page of `deltavlm demo --web`, in a real browser and through its API."""

import asyncio
import base64
import copy
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path

import httpx
import numpy as np
import page_visitor
import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from broken_images import in_steps
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from page_visitor import SECONDS
from PIL import EpsImagePlugin, Image, ImageFile
from playwright.sync_api import Page, expect, sync_playwright
from transformers import AutoModelForImageTextToText, AutoProcessor

import deltavlm_hf
from deltavlm_hf import ChangeSession, predict_mask
from deltavlm_hf.app import guard
from deltavlm_hf.app import page as web
from deltavlm_hf.app.overlay import mask_layer
from deltavlm_hf.app.page import TASKS, stream_answer
from deltavlm_hf.app.pair import MAX_PIXELS, SHOWN
from deltavlm_hf.data.scenes import generate_scene
from deltavlm_hf.processing.reading import FORMATS, read_pixels

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def command(folder: Path):
    """The command, running."""
    environment = {**os.environ, "GRADIO_TEMP_DIR": str(folder), "GRADIO_ANALYTICS_ENABLED": "False"}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]  # the page's own choice may be another test run's at the same moment
    command = [sys.executable, "-m", "deltavlm_hf", "demo", "--web", "--port", str(port)]
    with open(folder / "log", "w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            end = time.monotonic() + SECONDS
            while not (found := re.search(r"http://127\.0\.0\.1:\d+", (folder / "log").read_text())):
                assert process.poll() is None and time.monotonic() < end, (folder / "log").read_text()
                time.sleep(0.2)
            yield process, found[0]
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    with command(tmp_path_factory.mktemp("web")) as (_, address):
        yield address


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    scene = generate_scene(4_900_018, 96)
    for date in ("before", "after"):
        Image.fromarray(getattr(scene, date)).save(folder / f"{date}.png")
    return folder / "before.png", folder / "after.png"


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, address):
    """Opens the page in contexts of their own, as different visitors do."""
    contexts = []

    def open_page(**options) -> Page:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(SECONDS * 1000)
        page.goto(address)
        page.get_by_role("button", name="Where?").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()


# Whether the viewer shows another image than that one, which may be an example's, of this date.
SHOWS_ANOTHER = """([date, shown]) => {
  const image = document.querySelector(`#viewer [data-date="${date}"] img`);
  return image && image.checkVisibility() && image.src !== shown;
}"""


def upload(page: Page, pair: Sequence[Path]) -> None:
    for name, path in zip(("Before", "After"), pair, strict=True):
        date = name.lower()
        shown = page.locator(f'#viewer [data-date="{date}"] img').first.evaluate("(image) => image.src")
        page.get_by_test_id(f"{name}…-upload-button").set_input_files(path)
        page.wait_for_function(SHOWS_ANOTHER, arg=[date, shown])
    page.locator("#viewer .whole-pair").wait_for()
    expect(page.locator("#chat .words")).to_have_count(0, timeout=SECONDS * 1000)


def choose_example(page: Page) -> None:
    page.get_by_role("button", name="Generated 1").click()
    page.locator("#viewer .whole-pair").wait_for()


def press(page: Page, question: str) -> str:
    """The answer to a question, when it is whole and can be looked at on the image."""
    number = page.locator("#chat .look").count() + 1
    page.get_by_role("button", name=question, exact=True).click()
    return last_answer(page, number)


def last_answer(page: Page, number: int) -> str:
    expect(page.locator("#chat .look")).to_have_count(number, timeout=SECONDS * 1000)
    return page.locator("#chat .words").last.inner_text()


PARTS = ("#heading", "#sources", "#viewer .stage", "#viewer .layers", "#chips", "#chat .log", "#chat .take", "#asking")
# Of everything that can be read or pressed: what sticks out of the part that it is in, to the side or out of sight.
CUT = """() => [...document.querySelectorAll('button, label, input, p, summary, output, code, li, textarea')]
  .filter((each) => each.checkVisibility({ visibilityProperty: true, opacityProperty: true }))
  .filter((each) => !each.closest('.modes label:has(input)') && !each.matches('.swipe, summary'))
  .filter((each) => {
    const box = each.getBoundingClientRect();
    return box.width && (box.left < -0.5 || box.right > innerWidth + 0.5 || each.scrollWidth > each.clientWidth + 1
      && getComputedStyle(each).display !== 'inline' && !each.matches('textarea, input'));
  }).map((each) => `${each.tagName} ${each.textContent}`)"""


def boxes(page: Page) -> dict[str, dict[str, float]]:
    found = {name: page.locator(name).bounding_box() for name in PARTS}
    return {name: box for name, box in found.items() if box and box["width"] and box["height"]}


def overlap(one: dict[str, float], other: dict[str, float]) -> bool:
    return all(
        one[start] + one[size] > other[start] + 0.5 and other[start] + other[size] > one[start] + 0.5
        for start, size in (("x", "width"), ("y", "height"))
    )


def check_layout(page: Page, on_top: tuple[str, ...] = ()) -> dict[str, dict[str, float]]:
    """Nothing is cut, no part lies over another, but for those that are to."""
    assert page.evaluate(CUT) == []
    width = page.viewport_size["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    found = boxes(page)
    for name, box in found.items():
        assert box["x"] >= 0 and box["x"] + box["width"] <= width + 0.5, name
    names = [name for name in found if name not in on_top]
    assert not [pair for pair in combinations(names, 2) if overlap(found[pair[0]], found[pair[1]])]
    return found


@pytest.mark.slow
class TestInABrowser:
    def test_upload_ask_follow_up_see_the_evidence(self, open_page, pair):
        page = open_page()
        upload(page, pair)
        assert press(page, "Any change?") in ("yes", "no")
        page.get_by_label("Question", exact=True).fill("How many roads and buildings are new?")
        page.get_by_role("button", name="Send").click()
        assert re.fullmatch(r"(\d+|no) new roads?, (\d+|no) new buildings?", last_answer(page, 2))
        assert "roads: [" in press(page, "Where?")
        named = page.locator("#chat .words").last.inner_text().count("-")
        assert page.locator('#viewer [data-date="after"] .cell').count() == named
        for layer in ("Change heat", "Attention"):
            over = page.locator(f'#viewer [data-date="before"] [data-layer="{layer.split()[0].lower()}"]')
            expect(over).to_be_hidden()
            page.get_by_label(layer, exact=True).check()
            expect(over).to_be_visible()
            page.get_by_label(f"Opacity of {layer.lower()}").fill("30")
            expect(over).to_have_css("opacity", "0.3")
        page.get_by_label("Answer", exact=True).uncheck()
        expect(page.locator("#viewer .cell").first).to_be_hidden()
        page.get_by_role("button", name="Show answer 1 on the image").click()
        expect(page.locator("#viewer .cell")).to_have_count(0)  # a yes or no has none

    def test_visitors_do_not_see_each_other(self, open_page, pair):
        one, other = open_page(), open_page()
        upload(one, pair)
        upload(other, (pair[1], pair[1]))
        assert press(other, "Any change?") == "no"
        first = press(one, "What changed?")
        press(other, "How many?")
        expect(other.locator("#chat .words")).to_have_count(2)
        assert one.locator("#chat .words").all_inner_texts() == [first]

    def test_new_images_begin_a_new_conversation(self, open_page, pair):
        page = open_page()
        upload(page, pair)
        press(page, "Any change?")
        page.get_by_test_id("Before…-upload-button").set_input_files(pair[1])
        expect(page.locator("#chat .words")).to_have_count(0, timeout=SECONDS * 1000)

    def test_mistakes_are_told(self, open_page, tmp_path):
        page = open_page()
        page.get_by_role("button", name="Any change?").click()
        page.get_by_text("Give two images first").first.wait_for()
        (tmp_path / "broken.png").write_bytes(b"no image")
        page.get_by_test_id("Before…-upload-button").set_input_files(tmp_path / "broken.png")
        page.get_by_text("broken.png is no image that can be read").first.wait_for()
        assert not re.search(r"/(home|root|usr|tmp|work|opt|var)/|Traceback|gradio", page.locator("body").inner_text())

    def test_the_desk_is_one_screen(self, open_page):
        page = open_page(viewport={"width": 1280, "height": 800})
        beyond = []
        page.on("request", lambda request: beyond.append(request.url) if "127.0.0.1" not in request.url else None)
        for step in (lambda: None, lambda: choose_example(page), lambda: press(page, "Where?")):
            step()
            found = check_layout(page)
            assert page.evaluate("document.documentElement.scrollHeight") <= 800
            assert all(box["y"] >= 0 and box["y"] + box["height"] <= 800 for box in found.values())
        assert found["#viewer .stage"]["width"] > 700 and found["#viewer .stage"]["height"] > 480
        assert found["#chat .log"]["height"] > 300
        assert found["#viewer .stage"]["x"] + found["#viewer .stage"]["width"] < found["#chat .log"]["x"]
        assert not [url for url in beyond if not url.startswith(("data:", "blob:"))]

    def test_the_phone_is_one_column(self, open_page):
        page = open_page(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
        check_layout(page, on_top=("#asking",))
        page.get_by_role("button", name="Generated 1").tap()
        page.locator("#viewer .whole-pair").wait_for()
        page.get_by_role("button", name="Where?").tap()
        last_answer(page, 1)
        found = check_layout(page, on_top=("#asking",))
        tops = [found[name]["y"] for name in ("#viewer .stage", "#chips", "#chat .log")]
        assert tops == sorted(tops)
        assert found["#asking"]["y"] + found["#asking"]["height"] == pytest.approx(844, abs=1)
        page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
        found = check_layout(page)  # at the end nothing is under the input
        assert found["#asking"]["y"] + found["#asking"]["height"] == pytest.approx(844, abs=1)

    @pytest.mark.parametrize("width, scheme", [(1280, "light"), (1280, "dark"), (390, "light")])
    def test_nothing_serious_for_those_who_see_or_steer_otherwise(self, open_page, width, scheme):
        page = open_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        check_access(page)
        choose_example(page)
        press(page, "Where?")
        check_access(page)
        page.get_by_role("button", name="Use from Python / API").click()
        check_access(page)

    def test_by_keyboard_alone(self, open_page):
        page = open_page(viewport={"width": 1280, "height": 800})
        page.get_by_role("button", name="Generated 1").focus()
        page.keyboard.press("Enter")
        page.locator("#viewer .whole-pair").wait_for()
        stage = page.locator("#viewer .stage")
        page.get_by_label(re.compile("^Swipe: ")).focus()
        page.keyboard.press("End")
        expect(stage).to_have_attribute("style", re.compile("--swipe: 100%"))
        page.get_by_role("radio", name="Swipe").focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        before, after = (page.locator(f'#viewer [data-date="{date}"]').bounding_box() for date in ("before", "after"))
        assert not overlap(before, after)
        stage.focus()
        page.keyboard.press("+")
        page.keyboard.press("+")
        expect(page.locator("#viewer output")).to_have_text("156 %")
        page.keyboard.press("ArrowLeft")
        expect(stage).to_have_attribute("style", re.compile("--x: 40px"))
        page.get_by_role("button", name="Whole").press("Enter")
        expect(page.locator("#viewer output")).to_have_text("100 %")
        page.get_by_label("Question", exact=True).fill("What changed?")
        page.keyboard.press("Enter")
        last_answer(page, 1)

    def test_by_pointer(self, open_page):
        page = open_page(viewport={"width": 1280, "height": 800})
        choose_example(page)
        box = page.locator("#viewer .stage").bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2)
        page.mouse.up()
        assert float(page.get_by_label(re.compile("^Swipe: ")).input_value()) == pytest.approx(25, abs=1)
        page.mouse.wheel(0, -100)
        expect(page.locator("#viewer output")).to_have_text("115 %")
        assert page.evaluate("scrollY") == 0

    def test_what_is_taken_home(self, open_page, pair):
        page = open_page()
        upload(page, pair)
        press(page, "Where?")
        with page.expect_download() as answers:
            page.get_by_role("button", name="Download answers").click()
        told = json.loads(Path(answers.value.path()).read_text())
        assert told["before"] == {"name": "before.png", "width": 96, "height": 96} and told["model"] == "small"
        assert told["turns"][0]["question"] == TASKS["Where?"] and "roads: [" in told["turns"][0]["answer"]
        assert "academic use only" in told["turns"][0]["note"]
        with page.expect_download() as picture:
            page.get_by_role("button", name="Download picture").click()
        with Image.open(picture.value.path()) as image:
            assert image.format == "PNG" and image.width > 1280
        page.get_by_role("button", name="Use from Python / API").click()
        page.get_by_role("button", name="API", exact=True).click()
        code = page.locator("#chat pre").inner_text()
        assert page.url in code and "handle_file('before.png')" in code and TASKS["Where?"][:40] in code

    def test_what_is_to_be_known_of_the_answers(self, open_page, pair):
        page = open_page()
        expect(page.locator("#heading")).to_contain_text("Trained on Buildings: LEVIR-CD")
        choose_example(page)
        press(page, "Any change?")
        expect(page.locator("#chat .note")).to_have_count(0)  # which it is not said for
        upload(page, pair)
        press(page, "Any change?")
        expect(page.locator("#chat .note")).to_contain_text("its answers can be far off")

    def test_images_are_dropped(self, open_page, pair):
        page = open_page()
        data = [base64.b64encode(path.read_bytes()).decode() for path in pair]
        dropped = page.evaluate_handle(
            """(data) => data.reduce((all, content, number) => {
              const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
              all.items.add(new File([bytes], `${number}.png`, { type: 'image/png' }));
              return all;
            }, new DataTransfer())""",
            data,
        )
        page.dispatch_event("#viewer .stage", "drop", {"dataTransfer": dropped})
        page.locator("#viewer .whole-pair").wait_for()
        expect(page.locator('#viewer [data-date="before"] .tag')).to_have_text("Before · 0.png")
        expect(page.locator('#viewer [data-date="after"] .tag')).to_have_text("After · 1.png")


def check_access(page: Page) -> None:
    found = Axe().run(page).response["violations"]
    serious = [each for each in found if each["impact"] in ("serious", "critical")]
    assert not serious, [(each["id"], [node["html"][:200] for node in each["nodes"]]) for each in serious]


@pytest.mark.slow
class TestApi:
    def test_a_question_by_program(self, address, pair):
        client = Client(address, verbose=False)
        reply = client.predict(*map(handle_file, map(str, pair)), TASKS["Any change?"], api_name="/ask")
        assert reply in ("yes", "no")
        assert set(client.view_api(return_format="dict")["named_endpoints"]) == {"/ask"}

    def test_files_of_the_server_are_out_of_reach(self, address, pair):
        """An image that lies on the server's disk, asked about without being uploaded."""
        images = [{"path": str(path), "meta": {"_type": "gradio.FileData"}} for path in pair]
        call = httpx.post(f"{address}/gradio_api/call/ask", json={"data": [*images, TASKS["Any change?"]]})
        outcome = httpx.get(f"{address}/gradio_api/call/ask/{call.json()['event_id']}", timeout=SECONDS).text
        assert outcome.startswith("event: error")

    def test_what_is_no_image(self, address, pair, tmp_path):
        client = Client(address, verbose=False)
        (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n cut short")
        with pytest.raises(AppError):
            client.predict(handle_file(str(tmp_path / "broken.png")), handle_file(str(pair[1])), "?", api_name="/ask")

    def test_too_large_an_image(self, address, pair, tmp_path):
        Image.new("1", (20_000, 4_000)).save(tmp_path / "wide.png")
        client = Client(address, verbose=False)
        with pytest.raises(AppError, match="20000 x 4000 pixels"):
            client.predict(handle_file(str(tmp_path / "wide.png")), handle_file(str(pair[1])), "?", api_name="/ask")

    @pytest.mark.parametrize("size, status", [(31, 200), (33, 413)])
    def test_too_large_a_file(self, address, size, status):
        sent = httpx.post(
            f"{address}/gradio_api/upload", files={"files": ("x.png", bytes(size << 20))}, timeout=SECONDS
        )
        assert sent.status_code == status

    @pytest.mark.parametrize("question, message", [("  ", "Type a question"), ("x" * 1001, "at most 1000 characters")])
    def test_questions_that_are_none(self, address, pair, question, message):
        client = Client(address, verbose=False)
        with pytest.raises(AppError, match=message):
            client.predict(*map(handle_file, map(str, pair)), question, api_name="/ask")


@contextmanager
def serving(folder: Path, model, processor):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", "")  # to be restored
        patch.setattr(guard, "_TEMP", folder)
        patch.setattr(guard, "SWEEP_SECONDS", 0.2)
        page = web.build(model, processor)
        handler = signal.getsignal(signal.SIGTERM)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        web.launch(page, prevent_thread_lock=True, quiet=True, server_port=port)
        signal.signal(signal.SIGTERM, handler)
        page.model = model
        yield page
        page.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The page in this process, and its model: what happens inside can be seen. Real HTTP, short times."""
    model = AutoModelForImageTextToText.from_pretrained(deltavlm_hf.tiny())
    processor = AutoProcessor.from_pretrained(deltavlm_hf.tiny())
    with serving(tmp_path_factory.mktemp("gradio"), model, processor) as page:
        yield page


@pytest.fixture
def small_served(tmp_path):
    """The same with the small model, which knows the form of an answer. In its time it is the only page."""
    model = AutoModelForImageTextToText.from_pretrained(deltavlm_hf.small())
    processor = AutoProcessor.from_pretrained(deltavlm_hf.small())
    with serving(tmp_path / "gradio", model, processor) as page:
        yield page


@pytest.fixture
def work(served):
    """What the model does: how much at the same time, how often, and it can be held up."""

    class Work:
        now: list[int] = []  # threads that are at work
        most = times = 0
        goes_on = threading.Event()

    def begins(*_) -> None:
        Work.times += 1
        Work.now.append(threading.get_ident())
        Work.most = max(Work.most, len(set(Work.now)))
        Work.goes_on.wait(SECONDS)

    def ends(*_) -> None:
        Work.now.remove(threading.get_ident())

    Work.goes_on.set()
    hooks = []
    for part in (served.model.vision_model, served.model.qformer, served.model.language_model):
        hooks += [part.register_forward_pre_hook(begins), part.register_forward_hook(ends)]
    yield Work
    Work.goes_on.set()
    until(lambda: not served._queue.event_ids_to_events)
    for hook in hooks:
        hook.remove()


def until(there, seconds: float = SECONDS) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end
        time.sleep(0.05)


class Visitor(page_visitor.Visitor):
    def __init__(self, page, address: str = "203.0.113.1"):
        super().__init__(page.local_url, address)


def png(width: int, height: int) -> bytes:
    """Black, of any size, in a few bytes, without the pixels being made."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + (width + 7) // 8)) for _ in range(height)) + packer.flush()
    header = width.to_bytes(4) + height.to_bytes(4) + bytes([1, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def picture(shown: dict) -> Image.Image:
    """What the page is given to show."""
    return Image.open(io.BytesIO(base64.b64decode(shown["url"].partition(",")[2])))


@pytest.fixture(scope="module")
def files_of_all_kinds(tmp_path_factory, pair) -> list[tuple[Path, Path]]:
    """Pairs of 8 and 16 bits, floats and bands that GDAL reads, turned by EXIF, of one size and of two."""
    folder = tmp_path_factory.mktemp("kinds")
    grey = [np.asarray(Image.open(path).convert("L").resize((90, 60))) for path in pair]
    files = {kind: [Image.fromarray(each.astype(np.uint16) * 257) for each in grey] for kind in ("16.png", "16.tif")}
    files["float.tif"] = [Image.fromarray(each.astype(np.float32) / 255) for each in grey]
    pairs = [tuple(pair)]
    for kind, images in files.items():
        paths = [folder / f"{date}_{kind}" for date in ("before", "after")]
        for image, path in zip(images, paths, strict=True):
            image.save(path)
        pairs.append((paths[0], paths[1]))
    turned = Image.Exif()
    turned[274] = 6
    Image.fromarray(grey[0]).save(folder / "turned.png", exif=turned)
    pairs.append((folder / "turned.png", pair[1]))
    rasterio = pytest.importorskip("rasterio")
    bands = folder / "bands.tif"
    profile = {"driver": "GTiff", "width": 90, "height": 60, "count": 4, "dtype": "uint16"}
    with warnings.catch_warnings(), rasterio.open(bands, "w", **profile) as file:
        file.write(np.stack([grey[0], grey[1], grey[0], grey[1]]).astype(np.uint16) * 257)
    pairs.append((bands, pair[1]))
    return pairs


def files_of(page) -> set[Path]:
    return {path for path in Path(os.environ["GRADIO_TEMP_DIR"]).rglob("*") if path.is_file()}


def test_a_question_by_program_has_the_form_of_training(served, pair):
    read = []
    hook = served.model.register_forward_pre_hook(
        lambda module, arguments, inputs: read.append(inputs["input_ids"][0]), with_kwargs=True
    )
    visitor = Visitor(served)
    answered = visitor.run("ask", [*map(visitor.upload, pair), " What changed? "])
    hook.remove()
    processor = AutoProcessor.from_pretrained(deltavlm_hf.tiny())
    assert "error" not in answered and processor.decode(read[0], skip_special_tokens=True) == "q: What changed?"


class TestOneQueue:
    @pytest.mark.parametrize("way", ["run", "api"])
    @pytest.mark.parametrize("function", ["ask", "compare", "converse", "predict"])
    def test_no_function_runs_beside_it(self, served, work, pair, way, function):
        visitor = Visitor(served)
        data = [*map(visitor.upload, pair), TASKS["Any change?"]]
        for path in (f"gradio_api/{way}/{function}", f"gradio_api/{way}/{function}/", f"{way}/{function}"):
            call = {"data": data, "session_hash": visitor.session, "fn_index": visitor.numbers["ask"]}
            assert visitor.http.post(path, json=call).status_code == 404
        assert work.times == 0

    @pytest.mark.parametrize(
        "path",
        ["cancel", "call/compare", "call/v2/compare", "component_server", "process_recording", "stream/x", "mcp/"],
    )
    def test_what_the_page_does_not_need_is_closed(self, served, path):
        assert Visitor(served).http.post(f"gradio_api/{path}", json={}).status_code == 404

    @pytest.mark.parametrize(
        "path", ["gradio_api/deep_link?session_hash=x", "monitoring/summary", "gradio_api/proxy=https://x.hf.space"]
    )
    def test_what_the_page_does_not_show_is_closed(self, served, path):
        assert Visitor(served).http.get(path).status_code == 404

    def test_all_work_has_one_turn(self, served):
        limits = {function.concurrency_id: function.concurrency_limit for function in served.fns.values()}
        assert limits == {"model": 1, "light": 4}
        light = {function.api_name for function in served.fns.values() if function.concurrency_id == "light"}
        assert {name.rstrip("_0123456789") for name in light} == {"halt", "choose"}  # sets a flag; names an example
        assert all(function.queue and not function.cancels for function in served.fns.values())

    @pytest.mark.slow
    def test_twenty_visitors_at_once(self, served, work, pair):
        def visit(_) -> str:
            visitor = Visitor(served)
            assert "error" not in visitor.run("compare", [*map(visitor.upload, pair)])
            shown = visitor.run("converse_3", [None, None])["data"][1]  # the button "Any change?"
            return shown["turns"][-1]["answer"]

        with ThreadPoolExecutor(20) as visitors:
            answers = list(visitors.map(visit, range(20)))
        assert set(answers) <= {"yes", "no"} and len(set(answers)) == 1
        assert work.most == 1

    def test_the_program_way_waits_as_well(self, served, work, pair):
        client = Client(served.local_url, httpx_kwargs={"timeout": SECONDS}, verbose=False)
        ask = [*map(handle_file, map(str, pair)), TASKS["Any change?"]]
        jobs = [client.submit(*ask, api_name="/ask") for _ in range(5)]
        assert {job.result() for job in jobs} <= {"yes", "no"}
        assert work.most == 1

    def test_a_visitor_has_so_many_at_once(self, served, work, pair):
        work.goes_on.clear()
        visitor = Visitor(served)
        images = [*map(visitor.upload, pair)]
        with ThreadPoolExecutor(20) as threads:
            joined = list(threads.map(lambda _: visitor.join("compare", images), range(20)))
        refused = [answer for answer in joined if answer.status_code != 200]
        assert len(refused) == 20 - guard.MAX_WAITING_OF_SESSION
        assert all(answer.status_code == 429 and "Busy" in answer.json()["detail"] for answer in refused)
        assert Visitor(served).join("compare", images).status_code == 200  # another visitor, behind the same router

    def test_an_address_has_so_many_at_once(self, served, work, pair, monkeypatch):
        monkeypatch.setattr(guard, "MAX_WAITING_OF_ADDRESS", 5)
        work.goes_on.clear()
        images = [*map(Visitor(served).upload, pair)]
        with ThreadPoolExecutor(20) as threads:  # sessions cost nothing
            joined = list(threads.map(lambda _: Visitor(served).join("compare", images), range(20)))
        assert sorted(answer.status_code for answer in joined) == [200] * 5 + [429] * 15
        assert Visitor(served, "203.0.113.2").join("compare", images).status_code == 200

    def test_a_full_queue_says_that_it_is_busy(self, served, work, pair, monkeypatch):
        monkeypatch.setattr(served._queue, "max_size", 3)
        work.goes_on.clear()
        images = [*map(Visitor(served).upload, pair)]
        joined = [Visitor(served, f"203.0.113.{number}").join("compare", images) for number in range(9)]
        assert {answer.status_code for answer in joined} == {200, 503}  # what gradio's pages and clients call busy
        assert "Queue is full" in joined[-1].json()["detail"]

    def test_stop_ends_an_answer(self, served, work, pair, monkeypatch):
        monkeypatch.setattr(served.model.generation_config, "eos_token_id", None)  # it would go on to the limit
        visitor = Visitor(served)
        visitor.run("compare", [*map(visitor.upload, pair)])
        whole = visitor.run("converse_2", [None, None])["data"][1]["turns"][-1]["answer"]
        work.goes_on.clear()
        asked = visitor.join("converse_2", [None, None])
        until(lambda: work.now)
        assert visitor.join("halt", [None]).status_code == 200
        kept = served.state_holder[visitor.session].state_data.values()
        (visit,) = [value for value in kept if isinstance(value, guard.Visit)]
        until(visit.stop.is_set)
        work.goes_on.set()
        until(lambda: asked.json()["event_id"] not in served._queue.event_ids_to_events)
        assert len(visit.session.history[1][1]) < len(whole) / 2

    @pytest.mark.parametrize(
        "call",
        [b"[]", b"null", b"{", b"[" * 100_000, b"\xff\xfe", b"{}"]
        + [
            json.dumps({"data": [None], "session_hash": "x", "fn_index": 0, **more}).encode()
            for more in ({"fn_index": 99}, {"fn_index": "0"}, {"session_hash": ["x"]}, {"session_hash": "x" * 65})
        ],
    )
    def test_calls_that_are_none(self, served, call):
        headers = {"Content-Type": "application/json"}
        refused = Visitor(served).http.post("gradio_api/queue/join", content=call, headers=headers)
        assert refused.status_code in (400, 404) and refused.json()["detail"]

    def test_nothing_else_of_a_call_reaches_gradio(self, served, pair):
        """As a batch a call would pass a list for the request; naming a component would take it from its place."""
        visitor = Visitor(served)
        parents = {number: block.parent for number, block in served.blocks.items()}
        more = {"batched": True, "event_data": {"x": 1}, "oauth_token": "x"}
        for number in served.blocks:
            assert "error" not in visitor.run("compare", [None, None], trigger_id=number, **more)
        assert {number: block.parent for number, block in served.blocks.items()} == parents

    def test_a_body_of_any_length(self, served):
        visitor = Visitor(served)
        assert visitor.http.post("gradio_api/queue/join", content=bytes(2 << 20)).status_code == 413
        assert visitor.http.post("gradio_api/queue/join", content=iter([b"{}"])).status_code == 411
        assert visitor.http.post("gradio_api/upload", content=iter([b"{}"])).status_code == 411


class TestUploads:
    @pytest.mark.parametrize(
        "data, message",
        [
            (png(13_370, 13_370), "13370 x 13370 pixels"),
            (png(9_000, 9_000), "9000 x 9000 pixels"),
            (png(20_000, 20_000), "far too many pixels"),
            (b"GIF89a" + b"\xff" * 4 + bytes(3) + b"," + bytes(4) + b"\xff" * 4 + b"\0\2", "far too many pixels"),
            (in_steps(100), "more than 40 scans"),
            (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "no image that can be"),
            (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no image that can be read"),
            (b"\x89PNG\r\n\x1a\n cut short", "no image that can be read"),
            (png(96, 96)[:45], "no image that can be read"),
            (b"", "no image that can be read"),
        ],
        ids=["13370", "9000", "20000", "gif", "scans", "eps", "svg", "cut in the header", "cut in the data", "empty"],
    )
    @pytest.mark.parametrize("function", ["compare", "ask"])
    def test_what_is_refused_is_not_decoded(self, served, pair, monkeypatch, function, data, message):
        decoded, load = [], ImageFile.ImageFile.load

        def watched(image):
            decoded.append(image.size)
            return load(image)

        def ghostscript(*_, **__):
            raise AssertionError("Ghostscript was called.")

        monkeypatch.setattr(ImageFile.ImageFile, "load", watched)
        monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ghostscript)
        visitor = Visitor(served)
        for images in ([visitor.upload(data), visitor.upload(pair[1])], [visitor.upload(data)] * 2):
            told = visitor.run(function, [*images, "?"][: len(served.fns[visitor.numbers[function]].inputs)])
            assert message in told["error"]
            assert "/" not in told["error"]
        assert all(width * height <= MAX_PIXELS for width, height in decoded)

    @pytest.mark.parametrize("kind", FORMATS)
    @pytest.mark.parametrize("mode", ["RGB", "L", "I;16"])
    def test_what_is_taken(self, served, tmp_path, kind, mode):
        try:
            Image.new(mode, (90, 60), 200 if mode == "L" else 0).save(tmp_path / "image", kind)
        except (OSError, KeyError):
            pytest.skip(f"there is no {kind} of mode {mode}")
        visitor = Visitor(served)
        image = visitor.upload(tmp_path / "image", "image")  # whatever its name
        assert "error" not in visitor.run("compare", [image, image])

    def test_a_large_image_is_decoded_once_and_shown_small(self, served, pair, monkeypatch):
        decoded, load = [], ImageFile.ImageFile.load

        def watched(image):
            decoded.extend([image.size] * (getattr(image, "_im", None) is None))  # a second call does nothing
            return load(image)

        monkeypatch.setattr(ImageFile.ImageFile, "load", watched)
        visitor = Visitor(served)
        told = visitor.run("compare", [visitor.upload(png(5_000, 4_000)), visitor.upload(pair[1])])
        assert decoded.count((5_000, 4_000)) == 1
        assert [max(picture(told["data"][1][date]).size) for date in ("before", "after")] == [SHOWN, 96]

    def test_it_is_shown_and_asked_about_as_the_processor_has_it(self, served, tmp_path, files_of_all_kinds):
        visitor, processor = Visitor(served), AutoProcessor.from_pretrained(deltavlm_hf.tiny())
        question = TASKS["What changed?"]
        for before, after in files_of_all_kinds:
            session = ChangeSession(served.model, processor, before, after)
            uploads = [visitor.upload(path, path.name) for path in (before, after)]
            told = visitor.run("compare", uploads)["data"][1]
            kept = served.state_holder[visitor.session].state_data.values()
            (visit,) = [value for value in kept if isinstance(value, guard.Visit)]
            assert torch.equal(visit.session.pair_features, session.pair_features), before.name
            assert visitor.run("ask", [*uploads, question])["data"] == [session.ask(question)], before.name
            for date, path in (("before", before), ("after", after)):
                pixels = processor.image_processor.process_image(read_pixels(path)).transpose(1, 2, 0)
                assert np.array_equal(np.asarray(picture(told[date]).convert("RGB")), pixels), path.name

    def test_what_is_told_of_a_pair(self, served, pair, tmp_path):
        visitor = Visitor(served)
        Image.fromarray(np.full((80, 64), 900, np.uint16)).save(tmp_path / "dark.png")
        other = visitor.upload(tmp_path / "dark.png", "dark.png")
        notices = visitor.run("compare", [visitor.upload(pair[0]), other])["data"][1]["notices"]
        assert "96 x 96 and 64 x 80 pixels" in notices[0]["text"]
        assert "dark.png fills less than a tenth" in notices[1]["text"]
        same = [visitor.upload(path) for path in pair]
        assert visitor.run("compare", same)["data"][1]["notices"] == []

    def test_floats_that_are_no_picture(self, served, pair, tmp_path):
        Image.fromarray(np.full((64, 64), 3000, np.float32)).save(tmp_path / "heights.tif")
        visitor = Visitor(served)
        told = visitor.run(
            "compare", [visitor.upload(tmp_path / "heights.tif", "heights.tif"), visitor.upload(pair[1])]
        )
        assert "heights.tif is not taken: float images must lie in [0, 1], got [3000, 3000]" in told["error"]

    def test_one_image_is_shown_while_the_other_is_awaited(self, served, pair):
        visitor = Visitor(served)
        _, shown, conversation, scan = visitor.run("compare", [None, visitor.upload(pair[1], "b.png")])["data"]
        assert shown["before"] is None and shown["after"]["name"] == "b.png"
        assert conversation["snippets"] == {} and scan["visible"] is False

    def test_the_middle_of_a_large_scene_is_scanned(self, small_served, tmp_path):
        scene = generate_scene(18, 256)
        for date in ("before", "after"):
            whole = np.tile(np.asarray(scene.before), (5, 5, 1))
            if date == "after":
                whole[512:768, 512:768] = scene.after  # the tile in the middle alone
            Image.fromarray(whole).save(tmp_path / f"{date}.png")
        visitor = Visitor(small_served)
        files = [visitor.upload(tmp_path / f"{date}.png", f"{date}.png") for date in ("before", "after")]
        _, shown, _, scan = visitor.run("compare", files)["data"]
        (notice,) = shown["notices"]
        assert "1280 x 1280 pixels" in notice["text"] and scan["visible"] is True
        assert notice["command"] == "deltavlm scan before.png after.png --html changes.html"
        (turn,) = visitor.run("scan", [None])["data"][0]["turns"]
        assert turn["answer"].startswith("9 of 9 tiles asked")
        assert turn["box"] == [0.2, 0.2, 0.6, 0.6] and turn["across"] == 9
        drawn = {cell for each in turn["cells"] for cell in each["cells"]}
        assert drawn and all(3 <= cell % 9 < 6 and 3 <= cell // 9 < 6 for cell in drawn)

    def test_nothing_is_scanned_of_a_small_one(self, served, pair):
        visitor = Visitor(served)
        assert visitor.run("scan", [None])["error"].startswith("Give two images of a large scene")

    @pytest.mark.parametrize("mark", [{}, {"meta": {"_type": "gradio.FileData"}}, {"meta": {}}, {"url": "x"}])
    @pytest.mark.parametrize("prefix", ["", "http:/", "https://"])
    def test_other_files_are_not_read(self, served, pair, mark, prefix):
        """gradio lets a path pass that comes without its own mark: the image would be seen in the slider."""
        visitor = Visitor(served)
        images = [{"path": f"{prefix}{path}", **mark} for path in pair]
        for function, data in (("compare", images), ("ask", [*images, "?"])):
            assert "error" in visitor.run(function, data)

    def test_addresses_are_not_fetched(self, served, monkeypatch):
        fetched = []
        monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_download", lambda *a, **k: fetched.append(a))
        image = {"path": "https://huggingface.co/x.png", "meta": {"_type": "gradio.FileData"}}
        visitor = Visitor(served)
        assert "addresses not fetched" in visitor.run("compare", [image, image])["error"]
        assert visitor.http.get("gradio_api/file=https://huggingface.co/x.png").status_code == 403
        assert not fetched

    @pytest.mark.parametrize("name", ["..", ".", "/etc/x.png", "a/../../x.png", "x\0.png", ".x", "x" * 999 + ".png"])
    def test_names(self, served, name):
        path = Path(Visitor(served).upload(b"x", name)["path"])
        assert path.is_file() and path.parent.parent == Path(os.environ["GRADIO_TEMP_DIR"])

    def test_two_visitors_with_one_file_share_nothing(self, served, pair):
        one, other = (Visitor(served).upload(pair[0])["path"] for _ in range(2))
        assert one != other

    def test_forms_that_are_none(self, served):
        http, path = Visitor(served).http, "gradio_api/upload"
        before = files_of(served)
        assert http.post(path, files=[("files", ("x.png", b"x"))] * 3).status_code == 400
        assert http.post(path, files={"other": ("x.png", b"x")}).status_code == 400
        assert http.post(path, data={"files": "x"}).status_code == 400
        assert http.post(path, content=b"x", headers={"Content-Type": "multipart/form-data"}).status_code == 400
        assert files_of(served) == before

    def test_one_that_breaks_off_leaves_nothing(self, served):
        before = files_of(served)
        with socket.create_connection(("127.0.0.1", served.server_port)) as connection:
            connection.sendall(
                b"POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Length: 3000000\r\n"
                b"Content-Type: multipart/form-data; boundary=b\r\n\r\n"
                b'--b\r\nContent-Disposition: form-data; name="files"; filename="x.png"\r\n\r\n' + bytes(2 << 20)
            )
            time.sleep(0.3)
        time.sleep(0.3)
        assert files_of(served) == before

    def test_an_address_may_store_so_much(self, served, monkeypatch):
        monkeypatch.setattr(guard, "MAX_STORED_OF_ADDRESS", 10 << 20)
        greedy, other = Visitor(served, "203.0.113.50"), Visitor(served, "203.0.113.51")
        form = {"files": ("x.png", bytes(3 << 20))}
        sent = [greedy.http.post("gradio_api/upload", files=form) for _ in range(5)]
        assert [answer.status_code for answer in sent] == [200, 200, 200, 429, 429]
        assert "Busy" in sent[-1].json()["detail"]
        assert other.http.post("gradio_api/upload", files=form).status_code == 200


class TestNothingRemains:
    @pytest.fixture(autouse=True)
    def short(self, monkeypatch):
        monkeypatch.setattr(guard, "FILE_SECONDS", 1)
        monkeypatch.setattr(guard, "LEAVE_SECONDS", 1)

    def test_of_a_visitor_who_closes_the_page(self, served, pair):
        visitor = Visitor(served)
        with visitor.page_open():
            images = [*map(visitor.upload, pair)]
            assert "error" not in visitor.run("compare", images)
            assert [visitor.file(image) for image in images] == [200] * 2
            time.sleep(2.5)
            assert [visitor.file(image) for image in images] == [200] * 2  # who is there keeps what is needed
            assert "error" not in visitor.run("converse", ["What changed?", None])
        until(lambda: [visitor.file(image) for image in images] == [404] * 2, 10)
        until(lambda: self.kept(served, visitor.session) == 0, 10)
        assert visitor.run("converse", ["What changed?", None])["error"].startswith("Give two images first")

    def test_of_programs_and_of_uploads_without_a_question(self, served, pair):
        before = files_of(served)
        visitor = Visitor(served)
        images = [*map(visitor.upload, pair)]
        call = visitor.http.post("gradio_api/call/ask", json={"data": [*images, "?"]}).json()["event_id"]
        assert "complete" in visitor.http.get(f"gradio_api/call/ask/{call}").text
        never_fetched = visitor.http.post("gradio_api/call/ask", json={"data": [*images, "?"]}).json()["event_id"]
        Visitor(served).upload(pair[0])
        until(lambda: files_of(served) <= before, 10)
        until(lambda: self.kept(served, call) == self.kept(served, never_fetched) == 0, 10)
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        until(lambda: not [path for path in folder.iterdir() if path.is_dir()], 10)

    def test_what_a_waiting_job_needs_stays(self, served, work, pair):
        work.goes_on.clear()
        visitor = Visitor(served)
        images = [*map(visitor.upload, pair)]
        calls = [visitor.http.post("gradio_api/call/ask", json={"data": [*images, "?"]}) for _ in range(2)]
        time.sleep(2.5)
        work.goes_on.set()
        for call in calls:
            outcome = visitor.http.get(f"gradio_api/call/ask/{call.json()['event_id']}").text
            assert "event: complete" in outcome

    def test_the_examples_stay(self, served):
        visitor = Visitor(served)
        time.sleep(1.5)
        examples = visitor.run("choose", [None])["data"]
        assert [visitor.file(image["value"] if "value" in image else image) for image in examples] == [200, 200]

    @pytest.mark.slow
    def test_memory_is_flat(self, served, pair):
        """`VISITS=500 python -m pytest tests/app/test_page.py -k flat` for more of them."""

        def resident() -> float:  # MB
            return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

        visits, sizes = int(os.environ.get("VISITS", 30)), []
        for number in range(visits):
            visitor = Visitor(served)
            with visitor.page_open():
                visitor.run("compare", [*map(visitor.upload, pair)])
                visitor.run("converse_3", [None, None])
            visitor.http.close()
            if number % 10 == 9:
                sizes.append(round(resident()))
        assert sizes[-1] - sizes[0] < 30, sizes  # it was 2.4 for each visit

    @staticmethod
    def kept(page, session: str) -> int:
        queue, holder = page._queue, page.state_holder
        places = (
            holder.session_data,
            holder.time_last_used,
            queue.pending_messages_per_session,
            queue.pending_event_ids_session,
            page.pending_diff_streams,
        )
        return sum(session in place for place in places)

    def test_of_a_server_that_was_killed(self, tmp_path, monkeypatch):
        monkeypatch.setenv("GRADIO_TEMP_DIR", "")
        monkeypatch.setattr(guard, "_TEMP", tmp_path)
        living = guard.make_folder()
        killed = tmp_path / "deltavlm-page-killed"
        (killed / "x").mkdir(parents=True)
        (killed / "x/image.png").write_bytes(b"x")
        os.utime(killed, (0, 0))
        guard.make_folder()
        assert living.exists() and not killed.exists()

    @pytest.mark.slow
    def test_of_a_server_that_is_stopped(self, tmp_path, pair):
        with command(tmp_path) as (process, address):
            form = {"files": ("x.png", pair[0].read_bytes())}
            (path,) = httpx.post(f"{address}/gradio_api/upload", files=form).json()
            assert Path(path).is_relative_to(tmp_path) and Path(path).is_file()
            process.terminate()
            process.wait(30)
        assert not list(tmp_path.glob("*-page-*"))


class TestWhatIsTold:
    @pytest.mark.parametrize("function", ["compare", "converse", "ask"])
    def test_faults_of_the_server(self, served, pair, monkeypatch, caplog, function):
        def broken(*_, **__):
            raise RuntimeError("/root/secret/weights.safetensors")

        visitor = Visitor(served)
        images = [*map(visitor.upload, pair)]
        if function == "converse":
            visitor.run("compare", images)
        monkeypatch.setattr(
            web, {"compare": "ChangeSession", "ask": "answer", "converse": "stream_answer"}[function], broken
        )
        told = visitor.run(function, {"compare": images, "ask": [*images, "?"], "converse": ["?", None]}[function])
        assert told["error"].startswith("Something went wrong here") and "secret" not in str(told)
        assert "secret" in caplog.text  # the log has it

    def test_a_question_that_does_not_fit(self, served, pair):
        visitor = Visitor(served)
        told = visitor.run("ask", [*map(visitor.upload, pair), "\u202e" * 999])
        assert "tokens" in told["error"]

    def test_paths_of_the_server(self, served):
        http, folder = Visitor(served).http, os.environ["GRADIO_TEMP_DIR"]
        for path in ("", "config", "gradio_api/info?all_endpoints=true", "gradio_api/openapi.json"):
            text = http.get(path).text.replace(folder, "")
            assert not re.search(r"/(home|root|usr|tmp|work|opt|var)/", text), path
        assert not served.analytics_enabled and not served.allowed_paths and not served.show_error


def test_an_answer_ends_with_its_listener():
    """Whoever stops listening stops the generation."""
    model = AutoModelForImageTextToText.from_pretrained(deltavlm_hf.tiny())
    model.generation_config.eos_token_id = None  # it would go on to the limit
    session = ChangeSession(
        model,
        AutoProcessor.from_pretrained(deltavlm_hf.tiny()),
        Image.new("RGB", (96, 96)),
        Image.new("RGB", (96, 96)),
    )
    whole = "".join(stream_answer(session, "What changed?"))
    pieces = stream_answer(session, "What changed?")
    next(pieces)
    pieces.close()
    assert session.history[0][1] == whole.strip()
    assert len(session.history[1][1]) < len(whole) / 2


def test_cells_are_drawn_as_they_stream_in(small_served):
    visitor = Visitor(small_served)
    visitor.run("compare", visitor.run("choose", [None])["data"])
    (visit,) = [
        value
        for value in small_served.state_holder[visitor.session].state_data.values()
        if isinstance(value, guard.Visit)
    ]
    visits = next(function.fn.__self__ for function in small_served.fns.values() if function.api_name == "scan")

    async def follow() -> list[dict]:
        return [copy.deepcopy(told) async for _, told in visits.converse(TASKS["Where?"], visit)]

    with ThreadPoolExecutor(1) as aside:  # in this thread the browser of other tests has its event loop running
        steps = [told["turns"][-1] for told in aside.submit(asyncio.run, follow()).result()]
    numbers = [sum(len(each["cells"]) for each in step.get("cells", [])) for step in steps]
    assert numbers == sorted(numbers) and numbers[-1] == steps[-1]["answer"].count("-") > 1
    assert any(0 < number < numbers[-1] for number in numbers)  # some before all
    assert not any(step["done"] for step in steps[:-1]) and steps[-1]["done"]


def test_a_models_masks_are_shown(make_mask_model, tmp_path, pair):
    model, processor = make_mask_model()
    with serving(tmp_path, model, processor) as page:
        visitor = Visitor(page)
        shown = visitor.run("compare", [*map(visitor.upload, pair)])["data"][1]
        mask = predict_mask(model, processor, *map(str, pair))
        expected, colours = mask_layer(mask, model.config.mask_classes)
        assert shown["mask"]["colours"] == colours and mask.any()
        assert np.array_equal(np.asarray(picture(shown["mask"])), np.asarray(expected))
