"""The API and the page beside each other, of one process with one model."""

import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from api_server import SECONDS, as_file, ask_about, command, make_pair, serving, until
from gradio_client import Client, handle_file
from page_visitor import Visitor
from playwright.sync_api import sync_playwright
from transformers import AutoModelForImageTextToText

import deltavlm_hf
from deltavlm_hf import ask_pairs
from deltavlm_hf.app import guard
from deltavlm_hf.data.questions import INSTRUCTIONS

BINARY, COUNT, GRID = (INSTRUCTIONS[task] for task in ("binary", "count", "grid"))
QUESTIONS = list(INSTRUCTIONS.values())
KEY = "secret-key"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def pairs():
    return [make_pair(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def files(pairs):
    return [[as_file(image) for image in pair] for pair in pairs]


@pytest.fixture(scope="module")
def expected(tiny_model, tiny_processor, pairs):
    return list(ask_pairs(tiny_model, tiny_processor, pairs, QUESTIONS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gradio")


@pytest.fixture(scope="module")
def process(folder):
    environment = {"GRADIO_TEMP_DIR": str(folder), "GRADIO_ANALYTICS_ENABLED": "False", "DELTAVLM_API_KEY": KEY}
    with command("--page", "--wait-ms", "0", **environment) as (process, address):
        until(lambda: _is_up(address))
        yield process, address


def _is_up(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health").status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture
def address(process):
    return process[1]


@pytest.mark.slow
class TestOneProcess:
    """`deltavlm serve tiny --page` with a key."""

    def test_the_official_client(self, address, files, expected):
        with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=SECONDS) as client:
            completion = client.chat.completions.create(model="tiny", messages=ask_about(files[0], BINARY))
        assert completion.choices[0].message.content == expected[0][QUESTIONS.index(BINARY)]

    def test_the_page_by_program(self, address, files, expected, tmp_path):
        headers = {"Authorization": f"Bearer {KEY}"}
        client = Client(f"{address}/page/", headers=headers, httpx_kwargs={"timeout": SECONDS}, verbose=False)
        images = []
        for date, file in zip(("before", "after"), files[0], strict=True):
            (tmp_path / f"{date}.png").write_bytes(file)
            images.append(handle_file(str(tmp_path / f"{date}.png")))
        assert client.predict(*images, BINARY, api_name="/ask") == expected[0][QUESTIONS.index(BINARY)]

    def test_the_page_in_a_browser(self, address):
        if CHROMIUM is None:
            pytest.skip("there is no Chromium on this machine")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_context(http_credentials={"username": "", "password": KEY}).new_page()
            page.set_default_timeout(SECONDS * 1000)
            page.goto(address)
            assert page.url == f"{address}/page/"
            page.get_by_role("button", name="Generated 1").click()
            page.locator("#viewer .whole-pair").wait_for()
            page.get_by_role("button", name="Any change?").click()
            page.locator("#chat .look").wait_for()
            assert page.locator("#chat .words").inner_text() in ("yes", "no")
            browser.close()

    def test_without_the_key_nothing_of_the_page_is_had(self, address, files):
        tries = [
            ("GET", "", {}),
            ("GET", "config", {}),
            ("GET", "gradio_api/heartbeat/x", {}),
            ("GET", "gradio_api/queue/data?session_hash=x", {}),
            ("POST", "login", {"data": {"username": "x", "password": KEY}}),
            ("POST", "gradio_api/upload", {"files": {"files": ("x.png", files[0][0])}}),
            ("POST", "gradio_api/call/ask", {"json": {"data": [None, None, "?"]}}),
            ("POST", "gradio_api/queue/join", {"json": {"data": [], "fn_index": 0, "session_hash": "x"}}),
        ]
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "Basic eDpvdGhlcg=="}):
            for method, path, body in tries:
                reply = httpx.request(method, f"{address}/page/{path}", headers=headers, timeout=SECONDS, **body)
                assert reply.status_code == 401 and reply.headers["WWW-Authenticate"].startswith("Basic")
        for path in ("//page/config", "/page/../page/config", "/v1/../page/config", "/PAGE/config"):
            assert httpx.get(httpx.URL(address, raw_path=path.encode())).status_code == 401
        assert httpx.get(f"{address}/page/config", auth=("anybody", KEY)).status_code == 200

    def test_other_sites_read_nothing(self, address):
        """Of a server with a public name, which gradio by itself would let them."""
        headers = {"Host": "deltavlm.example", "Origin": "https://other.example"}
        for path in ("/page/config", "/v1/models"):
            reply = httpx.get(address + path, auth=("", KEY), headers=headers)
            assert reply.status_code == 200
            assert not [name for name in reply.headers if name.startswith("access-control")]

    @pytest.mark.parametrize("size, status", [(31, 200), (33, 413)])
    def test_uploads_are_bounded_as_those_of_the_page_alone(self, address, size, status):
        form = {"files": ("x.png", bytes(size << 20))}
        sent = httpx.post(f"{address}/page/gradio_api/upload", files=form, auth=("", KEY), timeout=SECONDS)
        assert sent.status_code == status

    def test_what_is_under_way_is_answered_before_the_end(self, process, folder, files, expected):
        """
        An answer to a program and one to a visitor; a page that is only open holds nothing up. It is the last test of
        this process.
        """
        process, address = process
        visitor = Visitor(f"{address}/page/", auth=("", KEY))
        with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=SECONDS) as client:
            with visitor.page_open(), ThreadPoolExecutor(2) as others:
                uploads = [visitor.upload(file) for file in files[0]]
                stream = client.chat.completions.create(model="tiny", messages=ask_about(files[0], GRID), stream=True)
                next(stream)
                asked = threading.Event()
                answer = others.submit(visitor.run, "ask", [*uploads, GRID], told=asked.set)
                assert asked.wait(SECONDS)
                process.send_signal(signal.SIGTERM)
                text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
                assert text == answer.result()["data"][0] == expected[0][QUESTIONS.index(GRID)]
            assert process.wait(SECONDS) == 128 + signal.SIGTERM
        assert not list(folder.glob("*-page-*"))


@pytest.fixture
def model():
    """One of its own, to be watched."""
    return AutoModelForImageTextToText.from_pretrained(deltavlm_hf.tiny())


def test_the_model_is_at_one_work_at_a_time(model, tiny_processor, pairs, files, expected, tmp_path, monkeypatch):
    """Answers to programs are those of `ask_pairs` while visitors ask and are shown where the model looks."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # to be restored
    monkeypatch.setattr(guard, "_TEMP", tmp_path)
    at_work: list[int] = []
    most = [0]

    def begins(*_) -> None:
        at_work.append(threading.get_ident())
        most[0] = max(most[0], len(set(at_work)))

    for part in (model.vision_model, model.qformer, model.language_model):
        part.register_forward_pre_hook(begins)
        part.register_forward_hook(lambda *_: at_work.remove(threading.get_ident()))

    with serving(model, tiny_processor, wait_ms=0, page=True) as address, ThreadPoolExecutor(4) as clients:

        def ask(number: int) -> None:
            pair, question = number % len(pairs), number % len(QUESTIONS)
            body = {"model": "tiny", "messages": ask_about(files[pair], QUESTIONS[question])}
            reply = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=SECONDS)
            assert reply.json()["choices"][0]["message"]["content"] == expected[pair][question]

        def visit(pair: int) -> None:
            visitor = Visitor(f"{address}/page/")
            assert "error" not in visitor.run("compare", [visitor.upload(file) for file in files[pair]])
            turn = visitor.run("converse", [BINARY, None])["data"][1]["turns"][-1]
            assert turn["answer"] == expected[pair][QUESTIONS.index(BINARY)] and len(turn["attention"]) == 2

        visits = [clients.submit(visit, pair) for pair in range(2)]
        asked = [clients.submit(ask, number) for number in range(24)]
        for each in (*visits, *asked):
            each.result()
    assert most == [1] and not at_work
