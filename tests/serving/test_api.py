"""The API as clients meet it: the official client, and clients that mean no good."""

import json
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import openai
import pytest
from api_server import SECONDS, as_file, ask_about, command, image_part, make_pair, serving
from broken_images import BOMB, REFUSED

from deltavlm_hf import ChangeSession, ask_pairs
from deltavlm_hf.data.questions import FOLLOW_UPS, INSTRUCTIONS

BINARY, COUNT, GRID = (INSTRUCTIONS[task] for task in ("binary", "count", "grid"))


@pytest.fixture(scope="module")
def address(tiny_model, tiny_processor):
    with serving(tiny_model, tiny_processor, wait_ms=0) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=SECONDS) as client:
        yield client


@pytest.fixture(scope="module")
def pair():
    return make_pair(18)


@pytest.fixture(scope="module")
def files(pair):
    return [as_file(image) for image in pair]


@pytest.fixture(scope="module")
def expected(tiny_model, tiny_processor, pair):
    """What `ask_pairs` answers."""

    def answer(question: str, **options) -> str:
        ((text,),) = ask_pairs(tiny_model, tiny_processor, [pair], [question], **options)
        return text

    return answer


@pytest.fixture(scope="module")
def described(address) -> dict:
    """The API's description of itself."""
    return httpx.get(f"{address}/openapi.json").json()


@pytest.fixture
def post(address, described):
    def post(body, **options) -> httpx.Response:
        given = {"content": body} if isinstance(body, bytes) else {"json": body}
        headers = {"Content-Type": "application/json", **options.pop("headers", {})}
        reply = httpx.post(f"{address}/v1/chat/completions", headers=headers, timeout=SECONDS, **given, **options)
        assert str(reply.status_code) in described["paths"]["/v1/chat/completions"]["post"]["responses"]
        return reply

    return post


class TestOfficialClient:
    def test_an_answer(self, client, files, expected):
        completion = client.chat.completions.create(model="tiny", messages=ask_about(files, COUNT))
        (choice,) = completion.choices
        assert choice.message.content == expected(COUNT)
        assert (choice.message.role, choice.finish_reason, completion.model) == ("assistant", "stop", "tiny")
        assert completion.usage.completion_tokens > 2
        assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens

    def test_a_stream(self, client, files, expected):
        chunks = list(
            client.chat.completions.create(
                model="tiny", messages=ask_about(files, COUNT), stream=True, stream_options={"include_usage": True}
            )
        )
        *chunks, usage = chunks
        assert usage.choices == [] and usage.usage.completion_tokens > 2
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
        assert "".join(pieces) == expected(COUNT)
        assert sum(map(bool, pieces)) > 2
        assert chunks[0].choices[0].delta.role == "assistant"
        assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
        assert len({chunk.id for chunk in chunks}) == 1

    def test_a_conversation(self, client, tiny_model, tiny_processor, pair, files):
        session = ChangeSession(tiny_model, tiny_processor, *pair)
        turns = []
        for question in (BINARY, *FOLLOW_UPS):
            messages = ask_about(files, question, *turns)
            said = client.chat.completions.create(model="tiny", messages=messages).choices[0].message.content
            assert said == session.ask(question)
            turns.append((question, said))

    def test_a_pair_is_asked_about_again_by_its_id(self, client, files, expected):
        first = client.chat.completions.create(model="tiny", messages=ask_about(files, BINARY))
        again = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": GRID}], extra_body={"pair_id": first.pair_id}
        )
        assert again.choices[0].message.content == expected(GRID)
        assert again.pair_id == first.pair_id

    def test_order_makes_another_pair(self, client, files):
        ids = {
            client.chat.completions.create(model="tiny", messages=ask_about(each, BINARY)).pair_id
            for each in (files, files[::-1], [files[0] + files[1][:1], files[1]])
        }
        assert len(ids) == 3

    @pytest.mark.parametrize("stream", [False, True])
    def test_what_an_answer_means(self, client, files, stream):
        """The columns of `deltavlm predict`."""
        answered = client.chat.completions.create(
            model="tiny", messages=ask_about(files, BINARY), stream=stream, extra_body={"parsed": True}
        )
        parsed = [*answered][-1].choices[0].delta.parsed if stream else answered.choices[0].message.parsed
        assert parsed == {
            "task": "binary",
            "changed": False,
            "roads": None,
            "buildings": None,
            "road_cells": None,
            "building_cells": None,
        }

    def test_an_answer_is_cut_before_a_stop(self, client, files, expected):
        text = expected(COUNT)
        stop = text[5:9]
        options = {"model": "tiny", "messages": ask_about(files, COUNT), "stop": ["no such words", stop]}
        (choice,) = client.chat.completions.create(**options).choices
        pieces = client.chat.completions.create(**options, stream=True)
        assert choice.message.content == text[: text.index(stop)].rstrip()
        assert choice.finish_reason == "stop"
        assert "".join(each.choices[0].delta.content or "" for each in pieces) == choice.message.content

    def test_an_answer_is_at_most_so_long(self, client, files, expected):
        for name in ("max_tokens", "max_completion_tokens"):
            completion = client.chat.completions.create(model="tiny", messages=ask_about(files, COUNT), **{name: 3})
            assert completion.choices[0].message.content == expected(COUNT, max_new_tokens=3)
            assert (completion.choices[0].finish_reason, completion.usage.completion_tokens) == ("length", 3)

    def test_samples(self, client, files, expected):
        def draw(seed: int | None, n: int = 4, **options) -> list[str]:
            completion = client.chat.completions.create(
                model="tiny", messages=ask_about(files, COUNT), n=n, seed=seed, **{"temperature": 1.8, **options}
            )
            assert [choice.index for choice in completion.choices] == list(range(n))
            return [choice.message.content for choice in completion.choices]

        drawn = draw(5)
        assert len(set(drawn)) > 1
        assert draw(5) == drawn != draw(6)
        assert draw(None) != draw(None)
        assert draw(7, top_p=1e-6) == draw(8, temperature=0) == [expected(COUNT)] * 4
        assert draw(2**63 - 1, n=2) and draw(-(2**63), n=2)

    def test_several_answers_in_one_stream(self, client, files, expected):
        texts = ["", ""]
        for chunk in client.chat.completions.create(model="tiny", messages=ask_about(files, COUNT), n=2, stream=True):
            (choice,) = chunk.choices
            texts[choice.index] += choice.delta.content or ""
        assert texts == [expected(COUNT)] * 2

    def test_models(self, client):
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").object == "model"
        with pytest.raises(openai.NotFoundError, match="no model 'gpt-5'"):
            client.models.retrieve("gpt-5")

    def test_errors_are_the_clients_own(self, client, files):
        with pytest.raises(openai.NotFoundError, match="only 'tiny'") as refused:
            client.chat.completions.create(model="gpt-5", messages=ask_about(files, BINARY))
        assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.BadRequestError, match="`tools` is not supported"):
            client.chat.completions.create(
                model="tiny",
                messages=ask_about(files, BINARY),
                tools=[{"type": "function", "function": {"name": "f"}}],
            )


def refusal(reply: httpx.Response, status: int) -> dict:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert "/tmp" not in error["message"] and "Traceback" not in error["message"] and len(error["message"]) < 600
    return error


class TestRefusals:
    @pytest.mark.parametrize(
        "change, message",
        [
            ({"model": None}, "`model`: Field required"),
            ({"model": 3}, "`model`"),
            ({"messages": []}, "`messages`"),
            ({"messages": "What changed?"}, "`messages`"),
            ({"messages": [{"role": "user", "content": "?"}] * 257}, "`messages`"),
            ({"messages": [{"role": "user", "content": "What changed?"}]}, "There are no images"),
            ({"messages": [{"role": "user", "content": 5}]}, "`messages.0.content`"),
            ({"messages": [{"role": "user", "content": [{"type": "image", "path": "/etc/passwd"}]}]}, "`messages.0"),
            ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "`messages.0"),
            ({"messages": [{"role": "user", "content": [None]}]}, "`messages.0"),
            ({"messages": [{"role": "system", "content": "Be brief."}]}, "no system or tool messages"),
            ({"messages": [{"role": "user", "content": "x" * 40_000}]}, "40000 characters"),
            ({"messages": [{"role": "user", "content": "\ud800"}]}, "`messages.0"),
            ({"max_tokens": -1}, "greater than or equal to 1"),
            ({"max_tokens": 0}, "greater than or equal to 1"),
            ({"max_tokens": 513}, "at most 512"),
            ({"max_completion_tokens": 10**400}, "`max_completion_tokens`"),
            ({"max_tokens": "5"}, "`max_tokens`"),
            ({"max_tokens": True}, "`max_tokens`"),
            ({"temperature": -1}, "`temperature`"),
            ({"temperature": 10**400}, "`temperature`"),
            ({"temperature": float("nan")}, "`temperature`"),
            ({"temperature": float("inf")}, "`temperature`"),
            ({"top_p": 0}, "`top_p`"),
            ({"n": 9}, "`n`"),
            ({"n": 10**9}, "`n`"),
            ({"seed": 2**63}, "`seed`"),
            ({"stop": ["a"] * 5}, "`stop`"),
            ({"stop": ""}, "`stop"),
            ({"stop": [1]}, "`stop"),
            ({"stream": "yes"}, "`stream`"),
            ({"frequency_penalty": 1}, "`frequency_penalty`"),
            ({"response_format": {"type": "json_object"}}, "`response_format` is not supported"),
            ({"\ud800": 1}, "Send a JSON object"),
        ],
        ids=lambda value: value if isinstance(value, str) else None,
    )
    def test_requests_that_are_none(self, post, files, change, message):
        body = {"model": "tiny", "messages": ask_about(files, "?"), **change}
        error = refusal(post(json.dumps(body).encode()), 400)
        assert message in error["message"] and error["type"] == "invalid_request_error"

    @pytest.mark.parametrize("number", [1, 3, 4])
    def test_other_numbers_of_images(self, post, files, number):
        messages = ask_about((files * 2)[:number], "?")
        assert f"got {number}" in refusal(post({"model": "tiny", "messages": messages}), 400)["message"]

    def test_images_of_several_turns_are_counted(self, post, files):
        messages = ask_about(files, "What else?", ("What changed?", "nothing"))
        messages[2]["content"] = [image_part(files[0]), {"type": "text", "text": "and here?"}]
        assert "got 3" in refusal(post({"model": "tiny", "messages": messages}), 400)["message"]

    def test_images_of_a_later_turn(self, post, files, expected):
        messages = ask_about([], BINARY, ("Hello?", "yes"))
        messages[2]["content"] = [*map(image_part, files), {"type": "text", "text": BINARY}]
        assert post({"model": "tiny", "messages": messages}).status_code == 200

    def test_messages_without_a_question(self, post, files):
        for messages, said in (
            (ask_about(files, " "), "has no question"),
            (ask_about(files, "?")[:1] + [{"role": "assistant", "content": "yes"}], "end with a user's"),
        ):
            assert said in refusal(post({"model": "tiny", "messages": messages}), 400)["message"]

    def test_both_images_and_an_id(self, post, files):
        body = {"model": "tiny", "messages": ask_about(files, "?"), "pair_id": "pair-0"}
        assert "not both" in refusal(post(body), 400)["message"]

    def test_an_id_that_is_not_known(self, post):
        body = {"model": "tiny", "messages": [{"role": "user", "content": "?"}], "pair_id": "pair-" + "0" * 48}
        assert refusal(post(body), 404)["code"] == "pair_not_found"

    @pytest.mark.parametrize(
        "body",
        [b"", b"{", b"null", b"[]", b'"text"', b"\xff\xfe{}", b"[" * 200_000, b'{"a":' * 200_000, b"1" * 10_000],
        ids=lambda body: repr(body[:8]),
    )
    def test_bodies_that_are_none(self, post, body):
        refusal(post(body), 400)

    def test_other_types_of_content(self, post, files):
        """A page of another site can send these without asking."""
        body = json.dumps({"model": "tiny", "messages": ask_about(files, "?")}).encode()
        assert "Content-Type" in refusal(post(body, headers={"Content-Type": "text/plain"}), 400)["message"]

    def test_too_much(self, post):
        assert refusal(post(b" " * (50 << 20)), 413)["code"] == "request_too_large"

    def test_no_length(self, address):
        reply = httpx.post(f"{address}/v1/chat/completions", content=iter([b"{}"]), timeout=SECONDS)
        refusal(reply, 411)

    @pytest.mark.parametrize("method, path, status", [("GET", "/v1/chat/completions", 405), ("POST", "/v1/x", 404)])
    def test_addresses_that_are_none(self, address, method, path, status):
        refusal(httpx.request(method, address + path), status)


class TestImages:
    @pytest.mark.parametrize("name", REFUSED)
    def test_files_that_cannot_be_read(self, post, files, name):
        for pair, date in (([REFUSED[name], files[1]], "before"), ([files[0], REFUSED[name]], "after")):
            error = refusal(post({"model": "tiny", "messages": ask_about(pair, "?")}), 400)
            assert error["message"].startswith(date) and error["code"] == "invalid_image"

    def test_more_pixels_than_are_taken(self, post, files):
        wide = BOMB.replace((100_000).to_bytes(4), (6_000).to_bytes(4))
        wide = wide[:29] + __import__("zlib").crc32(wide[12:29]).to_bytes(4) + wide[33:]
        error = refusal(post({"model": "tiny", "messages": ask_about([wide, files[1]], "?")}), 400)
        assert "6000 x 6000 pixels" in error["message"]

    def test_larger_a_file_than_is_taken(self, post, files):
        error = refusal(post({"model": "tiny", "messages": ask_about([files[0], bytes(17 << 20)], "?")}), 413)
        assert "after" in error["message"]

    @pytest.mark.parametrize(
        "url",
        [
            "",
            "/etc/passwd",
            "file:///etc/passwd",
            "http://127.0.0.1:9/x.png",
            "//127.0.0.1/x.png",
            "data:image/png,abc",
            "data:image/png;base64,a",
            "data:image/png;base64,ä",
            "data:" + ";a=b" * 50_000 + ";base64,aaaa",
        ],
        ids=lambda url: url[:30],
    )
    def test_urls_that_are_not_read(self, post, files, url):
        messages = ask_about(files, "?")
        messages[0]["content"][0]["image_url"]["url"] = url
        refusal(post({"model": "tiny", "messages": messages}), 400)


class TestUrls:
    @pytest.fixture
    def host(self, files):
        """Serves an image at /x.png, leads from /away to it, and breaks off at /cut; knows its visitors."""

        class Host(BaseHTTPRequestHandler):
            visits = []

            def do_GET(self):
                self.visits.append(self.path)
                self.send_response(302 if self.path == "/away" else 200)
                self.send_header("Location", "/x.png")
                self.send_header("Content-Length", str(len(files[0])))
                self.end_headers()
                self.wfile.write(files[0][: 50 if self.path == "/cut" else None])

            def log_message(self, *_):
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Host) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"127.0.0.1:{server.server_port}", Host.visits
            server.shutdown()

    def ask(self, address, files, url) -> httpx.Response:
        messages = ask_about(files, COUNT)
        messages[0]["content"][0]["image_url"]["url"] = url
        body = {"model": "tiny", "messages": messages}
        return httpx.post(f"{address}/v1/chat/completions", json=body, timeout=SECONDS)

    def test_nothing_is_fetched_unasked(self, address, files, host):
        name, visits = host
        assert refusal(self.ask(address, files, f"http://{name}/x.png"), 400)["code"] == "url_not_allowed"
        assert visits == []

    def test_hosts_that_are_allowed(self, tiny_model, tiny_processor, files, host, expected):
        name, visits = host
        with serving(tiny_model, tiny_processor, allow_urls=[name, "example.org"]) as address:
            reply = self.ask(address, files, f"http://{name}/x.png")
            assert reply.json()["choices"][0]["message"]["content"] == expected(COUNT)
            port = name.rpartition(":")[2]
            for url in (f"http://127.0.0.1:{int(port) - 1}/", "http://localhost/", f"http://{name}@127.0.0.1/"):
                assert refusal(self.ask(address, files, url), 400)["code"] == "url_not_allowed"
            assert visits == ["/x.png"]
            assert "answered 302" in refusal(self.ask(address, files, f"http://{name}/away"), 400)["message"]
            assert "not be fetched" in refusal(self.ask(address, files, f"http://{name}/cut"), 400)["message"]
            assert visits == ["/x.png", "/away", "/cut"]


def test_other_addresses(address):
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}
    assert httpx.get(f"{address}/docs").status_code == 200
    assert "/docs" in httpx.get(address).json()["message"]
    assert httpx.get(f"{address}/page/").status_code == 404


def test_the_description(described):
    paths, schemas = described["paths"], described["components"]["schemas"]
    asking = paths["/v1/chat/completions"]["post"]
    schema = asking["requestBody"]["content"]["application/json"]["schema"]
    assert schema == {"$ref": "#/components/schemas/ChatRequest"}
    errors = {"400", "404", "408", "411", "413", "429", "500", "default"}
    assert set(asking["responses"]) == {"200", *errors}
    for status in errors:
        told = asking["responses"][status]["content"]["application/json"]["schema"]
        assert told == {"$ref": "#/components/schemas/ErrorBody"}
    assert set(schemas["_Error"]["required"]) == {"message", "type", "param", "code"}
    every = [operation["responses"] for path in paths.values() for operation in path.values()]
    assert not any({"401", "422"} & set(responses) for responses in every)
    assert not any("Validation" in name for name in schemas)


def test_a_key(tiny_model, tiny_processor, files):
    with serving(tiny_model, tiny_processor, api_key="secret-key") as address:
        assert httpx.get(f"{address}/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "secret-key"}):
            for path in ("/v1/models", "/metrics"):
                assert refusal(httpx.get(address + path, headers=headers), 401)["code"] == "invalid_api_key"
            reply = httpx.post(f"{address}/v1/chat/completions", content=bytes(5 << 20), headers=headers)
            assert "secret-key" not in refusal(reply, 401)["message"]
        with openai.OpenAI(base_url=f"{address}/v1", api_key="secret-key", max_retries=0) as client:
            assert client.chat.completions.create(model="tiny", messages=ask_about(files, BINARY)).choices
        described = httpx.get(f"{address}/openapi.json").text
        assert "secret-key" not in described and described.count('"401"') == 4


class TestCommand:
    def test_what_is_under_way_is_answered_before_the_end(self, files, expected):
        with command("--wait-ms", "5000") as (process, address):
            body = {"model": "tiny", "messages": ask_about(files, COUNT)}
            with ThreadPoolExecutor(2) as clients:
                asked = [
                    clients.submit(httpx.post, f"{address}/v1/chat/completions", json=body, timeout=SECONDS)
                    for _ in range(2)
                ]
                while "deltavlm_waiting 2" not in httpx.get(f"{address}/metrics").text:
                    pass
                process.send_signal(signal.SIGTERM)
                while True:  # nobody else is let in
                    try:
                        socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), 1).close()
                    except OSError:
                        break
                replies = [each.result() for each in asked]
            texts = [reply.json()["choices"][0]["message"]["content"] for reply in replies]
            assert texts == [expected(COUNT)] * 2
            assert process.wait(SECONDS) == -signal.SIGTERM

    def test_an_address_that_is_taken(self, capsys):
        from deltavlm_hf.cli import main

        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            assert main(["serve", "tiny", "--port", port]) == 1
        assert "deltavlm: error: [Errno" not in (said := capsys.readouterr().err) and f"--port {port}" in said

    @pytest.mark.parametrize("port", ["65536", "99999999999999999999"])
    def test_a_port_that_is_none(self, capsys, port):
        from deltavlm_hf.cli import main

        assert main(["serve", "tiny", "--port", port]) == 1
        assert "expected a number from 0 to 65535" in capsys.readouterr().err
