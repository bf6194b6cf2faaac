"""The page of `deltavlm demo --web`, in a real browser and through its API."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright
from transformers import AutoModelForImageTextToText, AutoProcessor

import deltavlm_hf
from deltavlm_hf import ChangeSession
from deltavlm_hf.data.scenes import generate_scene
from deltavlm_hf.overlay import draw_cells, overlay_heat
from deltavlm_hf.web import TASKS, build, stream_answer

SECONDS = 120  # for slow machines; time never fails a test before
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    """The command, running."""
    folder = tmp_path_factory.mktemp("web")
    environment = {**os.environ, "GRADIO_TEMP_DIR": str(folder), "GRADIO_ANALYTICS_ENABLED": "False"}
    command = [sys.executable, "-m", "deltavlm_hf", "demo", "--web"]
    with open(folder / "log", "w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            end = time.monotonic() + SECONDS
            while not (found := re.search(r"http://127\.0\.0\.1:\d+", (folder / "log").read_text())):
                assert process.poll() is None and time.monotonic() < end, (folder / "log").read_text()
                time.sleep(0.2)
            yield found[0]
        finally:
            process.terminate()
            process.wait(30)


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
        page.get_by_role("button", name="Describe").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()


def upload(page: Page, pair: tuple[Path, Path]) -> None:
    for name, path in zip(("before", "after"), pair, strict=True):
        page.locator(f"#{name} input[type=file]").set_input_files(path)
        page.locator(f"#{name} img").first.wait_for()
    page.locator("#swipe img").first.wait_for()


def answers(page: Page, number: int) -> list[str]:
    """The answers so far, once there are so many and evidence for the last is there."""
    bubbles = page.locator("#chat .bot.message, #chat .message.bot")
    expect(bubbles).to_have_count(number, timeout=SECONDS * 1000)
    expect(bubbles.last).to_have_text(re.compile(r"\w"), timeout=SECONDS * 1000)
    page.locator("#evidence img").first.wait_for()
    before = None
    while (texts := [text.strip() for text in bubbles.all_inner_texts()]) != before:  # it still streams
        before = texts
        page.wait_for_timeout(1500)
    return texts


@pytest.mark.slow
class TestInABrowser:
    def test_upload_ask_follow_up_see_the_evidence(self, open_page, pair):
        page = open_page()
        upload(page, pair)
        page.get_by_role("button", name="Changed?").click()
        (first,) = answers(page, 1)
        assert first in ("yes", "no")
        page.get_by_placeholder("What changed?").fill("How many roads and buildings are new?")
        page.get_by_role("button", name="Send").click()
        assert re.fullmatch(r"(\d+|no) new roads?, (\d+|no) new buildings?", answers(page, 2)[1])
        page.get_by_role("button", name="Locate").click()
        third = answers(page, 3)[2]
        assert "roads: [" in third
        expect(page.locator("#evidence")).to_contain_text("the answer: roads yellow", timeout=SECONDS * 1000)
        expect(page.locator("#evidence")).to_contain_text("attention, before")

    def test_visitors_do_not_see_each_other(self, open_page, pair):
        one, other = open_page(), open_page()
        upload(one, pair)
        upload(other, (pair[1], pair[1]))
        one.get_by_role("button", name="Describe").click()
        other.get_by_role("button", name="Changed?").click()
        assert answers(other, 1) == ["no"]
        first = answers(one, 1)
        other.get_by_role("button", name="Count").click()
        assert len(answers(other, 2)) == 2
        assert answers(one, 1) == first

    def test_new_images_begin_a_new_conversation(self, open_page, pair):
        page = open_page()
        upload(page, pair)
        page.get_by_role("button", name="Changed?").click()
        answers(page, 1)
        page.locator("#before").get_by_label(re.compile("Clear|Remove")).first.click()
        expect(page.locator("#chat .message.bot, #chat .bot.message")).to_have_count(0, timeout=SECONDS * 1000)

    def test_mistakes_are_told(self, open_page, tmp_path):
        page = open_page()
        page.get_by_role("button", name="Describe").click()
        page.get_by_text("Give two images first").first.wait_for()

    def test_on_a_phone_nothing_is_wider_than_the_screen(self, open_page, pair):
        page = open_page(viewport={"width": 375, "height": 740}, is_mobile=True, has_touch=True)
        upload(page, pair)
        page.get_by_role("button", name="Changed?").tap()
        answers(page, 1)
        assert page.evaluate("document.documentElement.scrollWidth") <= 375

    def test_an_example_can_be_chosen(self, open_page):
        page = open_page()
        page.locator("table tbody tr, .gallery-item").first.click()
        page.locator("#swipe img").first.wait_for()


@pytest.mark.slow
class TestApi:
    def test_a_question_by_program(self, address, pair):
        client = Client(address, verbose=False)
        reply = client.predict(*map(handle_file, map(str, pair)), TASKS["Changed?"], api_name="/ask")
        assert reply in ("yes", "no")
        assert set(client.view_api(return_format="dict")["named_endpoints"]) == {"/ask"}

    def test_files_of_the_server_are_out_of_reach(self, address, pair):
        """An image that lies on the server's disk, asked about without being uploaded."""
        images = [{"path": str(path), "meta": {"_type": "gradio.FileData"}} for path in pair]
        call = httpx.post(f"{address}/gradio_api/call/ask", json={"data": [*images, TASKS["Changed?"]]})
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


def test_a_question_by_program_has_the_form_of_training(pair):
    model = AutoModelForImageTextToText.from_pretrained(deltavlm_hf.tiny())
    processor = AutoProcessor.from_pretrained(deltavlm_hf.tiny())
    read = []
    model.register_forward_pre_hook(
        lambda module, arguments, inputs: read.append(inputs["input_ids"][0]), with_kwargs=True
    )
    (ask,) = (each.fn for each in build(model, processor).fns.values() if each.api_name == "ask")
    ask(*map(str, pair), " What changed? ")
    assert processor.decode(read[0], skip_special_tokens=True) == "q: What changed?"


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


class TestOverlay:
    def test_heat_shows_where_it_is(self):
        image = Image.new("RGB", (90, 60), (10, 120, 10))
        heat = np.zeros((6, 9))
        heat[:, :3] = 1.0
        drawn = np.asarray(overlay_heat(image, heat)).astype(int)
        assert drawn.shape == (60, 90, 3)
        assert (drawn[:, 60:] == (10, 120, 10)).all()
        assert (drawn[:, :20].mean((0, 1)) > 140).all()  # the ramp ends bright

    def test_maps_of_one_scale(self):
        image = Image.new("RGB", (8, 8))
        weak = np.asarray(overlay_heat(image, np.full((2, 2), 0.1), top=1.0)).mean()
        assert weak < np.asarray(overlay_heat(image, np.full((2, 2), 0.9), top=1.0)).mean()

    def test_no_heat_leaves_the_image(self):
        image = Image.new("RGB", (8, 8), (1, 2, 3))
        assert np.array_equal(np.asarray(overlay_heat(image, np.zeros((4, 4)))), np.asarray(image))

    def test_other_shapes(self):
        with pytest.raises(ValueError, match=r"shape \(H, W\), got \(1, 2, 2\)"):
            overlay_heat(Image.new("RGB", (8, 8)), np.zeros((1, 2, 2)))

    def test_cells_are_framed(self):
        roads, buildings = np.zeros(9, bool), np.zeros(9, bool)
        roads[0] = buildings[8] = True
        drawn = np.asarray(draw_cells(Image.new("RGB", (300, 300)), roads, buildings))
        yellow = (drawn == (255, 196, 0)).all(-1)
        blue = (drawn == (0, 174, 255)).all(-1)
        assert yellow[:100, :100].any() and not yellow[100:].any() and not yellow[:, 100:].any()
        assert blue[200:, 200:].any() and not blue[:200].any() and not blue[:, :200].any()
