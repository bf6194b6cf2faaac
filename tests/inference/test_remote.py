"""A language model in another process: the same answers, token by token, from whatever asks it."""

import json
import shutil

import httpx
import pytest
import torch
from api_server import as_file, ask_about, make_pair, serving
from geo_rasters import lay_out, write_raster
from llm_server import transformers_server, vllm_server
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from deltavlm_hf import ask_pairs
from deltavlm_hf.cli import main
from deltavlm_hf.data.questions import FOLLOW_UPS, INSTRUCTIONS
from deltavlm_hf.hub.export import export_language_model
from deltavlm_hf.inference.asking import encode, generate_ids
from deltavlm_hf.inference.loading import load_model

QUESTIONS = [*(INSTRUCTIONS[task] for task in ("binary", "count", "grid")), "How many buildings are new?"]
PAIRS = [make_pair(seed) for seed in range(6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny model's language model, exported."""
    return export_language_model("tiny", tmp_path_factory.mktemp("exported") / "llm").folder


@pytest.fixture(scope="module")
def server(folder):
    with transformers_server(folder) as server:
        yield server


@pytest.fixture(scope="module", params=["like vLLM", pytest.param("vLLM", marks=pytest.mark.vllm)])
def url(request, folder):
    if request.param == "like vLLM":
        yield request.getfixturevalue("server").url
    else:
        with vllm_server(folder) as url:
            yield url


@pytest.fixture(scope="module")
def remote(url):
    model, _ = load_model("tiny", "cpu", llm_url=url)
    return model


def ids_of(model, processor, **options) -> list[list[int]]:
    """Of each pair and question the answer's tokens, to its end."""
    features = encode(model, processor, PAIRS).repeat_interleave(len(QUESTIONS), 0)
    answers = generate_ids(model, processor, QUESTIONS * len(PAIRS), pair_features=features, **options).tolist()
    return [ids[: ids.index(2) + 1] if 2 in ids else ids for ids in answers]


@pytest.mark.parametrize(
    "options",
    [{}, {"max_new_tokens": 3}, {"repetition_penalty": 1.3, "min_new_tokens": 12, "max_new_tokens": 24}],
    ids=["as it generates by itself", "short", "with penalty and least length"],
)
def test_answers_are_equal_token_by_token(remote, tiny_model, tiny_processor, options):
    expected = ids_of(tiny_model, tiny_processor, **options)
    assert len(expected) == 24 and len(set(map(tuple, expected))) > 3
    assert ids_of(remote, tiny_processor, **options) == expected


def test_only_the_embeddings_are_here(remote, tiny_model):
    here = {name for name, _ in remote.named_parameters() if name.startswith("language_model.")}
    assert here == {"language_model.embeddings.weight"}
    assert torch.equal(remote.get_input_embeddings().weight, tiny_model.get_input_embeddings().weight)
    with pytest.raises(ValueError, match="The language model is at http://127"):
        remote.generate(torch.tensor([[1, 5]]), max_new_tokens=2)


def write_pairs(folder, number: int) -> None:
    for index, pair in enumerate(PAIRS[:number]):
        for date, image in zip("AB", pair, strict=True):
            (folder / "pairs" / date).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / "pairs" / date / f"{index}.png")


def predict(folder, *questions: str) -> list[str]:
    command = ["predict", str(folder / "pairs"), "--questions", *(questions or ["binary"]), "--model", "tiny"]
    return [*command, "--device", "cpu", "--workers", "0", "--output", str(folder / "answers.csv")]


def test_predict(url, tmp_path):
    write_pairs(tmp_path, 3)
    command = predict(tmp_path, "dialogue", "grid")
    assert main(command) == 0
    here = (tmp_path / "answers.csv").read_text()
    assert main([*command, "--llm-url", url]) == 0
    assert (tmp_path / "answers.csv").read_text() == here and here.count("\n") == 1 + 3 * 4


def test_scan(url, tmp_path):
    before, after, _ = lay_out((1, 2), columns=2)
    rasters = [str(write_raster(tmp_path / f"{number}.tif", image)) for number, image in enumerate((before, after))]
    command = ["scan", *rasters, "--model", "tiny", "--device", "cpu", "--questions", "count", "grid"]
    command += ["--resolution", "0.5", "--output", str(tmp_path / "found.geojson")]
    assert main(command) == 0
    here = (tmp_path / "found.geojson").read_text()
    assert main([*command, "--llm-url", url]) == 0
    assert (tmp_path / "found.geojson").read_text() == here and '"changed": "true"' in here


@pytest.fixture(scope="module")
def post(remote, tiny_processor):
    with serving(remote, tiny_processor, wait_ms=0, batch_size=4) as address:

        def post(pair: int, question: str, *turns, **options) -> httpx.Response:
            messages = ask_about(map(as_file, PAIRS[pair]), question, *turns)
            body = {"model": "tiny", "messages": messages, **options}
            return httpx.post(f"{address}/v1/chat/completions", json=body, timeout=600)

        yield post


@pytest.fixture(scope="module")
def expected(tiny_model, tiny_processor):
    return list(ask_pairs(tiny_model, tiny_processor, PAIRS, QUESTIONS))


class TestServe:
    def test_many_at_once(self, post, expected):
        """More than are under way at a time."""
        found = [choice["message"]["content"] for choice in post(0, QUESTIONS[0], n=8).json()["choices"]]
        assert found == [expected[0][0]] * 8

    def test_whole_and_in_pieces(self, post, expected):
        pair = max(range(len(PAIRS)), key=lambda pair: len(expected[pair][2]))
        whole = post(pair, QUESTIONS[2]).json()
        assert whole["choices"][0]["message"]["content"] == expected[pair][2]
        assert whole["choices"][0]["finish_reason"] == "stop"
        lines = post(pair, QUESTIONS[2], stream=True).text.splitlines()
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        pieces = [event["choices"][0]["delta"].get("content") or "" for event in events]
        assert "".join(pieces) == expected[pair][2] and sum(map(bool, pieces)) > 5

    def test_a_dialogue_lengths_and_stops(self, post, tiny_model, tiny_processor):
        history = [(INSTRUCTIONS["binary"], "yes")]
        features = encode(tiny_model, tiny_processor, PAIRS[:1])
        ids = generate_ids(tiny_model, tiny_processor, [FOLLOW_UPS[0]], [history], pair_features=features)
        text = tiny_processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
        assert post(0, FOLLOW_UPS[0], *history).json()["choices"][0]["message"]["content"] == text
        (short,) = post(0, FOLLOW_UPS[0], *history, max_tokens=2).json()["choices"]
        assert short["finish_reason"] == "length" and text.startswith(short["message"]["content"])
        (stopped,) = post(0, FOLLOW_UPS[0], *history, stop=text[3:6]).json()["choices"]
        assert (stopped["message"]["content"], stopped["finish_reason"]) == (text[:3].rstrip(), "stop")

    def test_a_seed_says_the_same_again(self, post):
        drawn = [post(2, QUESTIONS[2], temperature=2, seed=seed, max_tokens=12).json() for seed in (1, 1, 2)]
        texts = [each["choices"][0]["message"]["content"] for each in drawn]
        assert texts[0] == texts[1] != texts[2]


class TestWhatIsTold:
    @pytest.fixture
    def refused(self, tmp_path, capsys):
        """What `predict` says when it cannot."""
        write_pairs(tmp_path, 1)

        def refused(url: str, *options: str) -> str:
            command = [
                "predict",
                str(tmp_path / "pairs"),
                "--questions",
                "binary",
                "--output",
                str(tmp_path / "o.csv"),
            ]
            given = ["--model", "tiny", "--device", "cpu", "--workers", "0", "--llm-url", url, *options]
            assert main([*command, *given]) == 1
            assert not (tmp_path / "answers.csv").exists()
            return capsys.readouterr().err

        return refused

    @pytest.fixture(scope="class")
    def other(self, tmp_path_factory):
        """A language model of another size."""
        folder = tmp_path_factory.mktemp("other")
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        LlamaForCausalLM(LlamaConfig(vocab_size=99, **sizes)).save_pretrained(folder)
        with transformers_server(folder) as server:
            yield server

    @pytest.mark.parametrize("url", ["ftp://127.0.0.1/v1", "127.0.0.1:8001/v1", "http:///v1", "http://[1/v1"])
    def test_what_is_no_url(self, refused, url):
        assert f"--llm-url {url}:" in refused(url)

    def test_nothing_is_there(self, refused):
        assert "the language model does not answer" in refused("http://127.0.0.1:9/v1")

    def test_no_api_is_there(self, refused, server):
        assert "404" in refused(server.url.removesuffix("/v1"))

    def test_no_embeddings_are_taken(self, refused, server, monkeypatch):
        monkeypatch.setattr(server, "takes_embeddings", False)
        assert "What is needed there is vLLM with --enable-prompt-embeds" in refused(server.url)

    def test_a_key(self, refused, server, monkeypatch):
        monkeypatch.setattr(server, "key", "secret-key")
        assert "set VLLM_API_KEY" in refused(server.url)
        monkeypatch.setenv("VLLM_API_KEY", "secret-key")
        load_model("tiny", "cpu", llm_url=server.url)

    def test_a_language_model_of_another_size(self, refused, other):
        said = refused(other.url)
        assert "hidden_size 128 does not match the model's hidden_size 32" in said and "deltavlm export-llm" in said

    def test_the_language_model_of_another_state(self, refused, folder, server, tmp_path, monkeypatch):
        """Of the same size, as after more training: seen where its folder can be."""
        stale = shutil.copytree(folder, tmp_path / "stale")
        (stale / "export.json").write_text('{"of": "0123456789abcdef"}')
        monkeypatch.setattr(server, "folder", str(stale))
        assert "is the language model of another model" in refused(server.url)

    def test_no_cluster(self, refused, server):
        assert "--llm-url is for --engine local" in refused(server.url, "--engine", "ray")

    def test_a_way_to_generate_that_it_cannot_be_told(self, server, tiny_processor):
        model, _ = load_model("tiny", "cpu", llm_url=server.url)
        with pytest.raises(ValueError, match="cannot be told no_repeat_ngram_size"):
            list(ask_pairs(model, tiny_processor, PAIRS[:1], QUESTIONS[:1], no_repeat_ngram_size=3))

    def test_a_run_that_it_leaves_goes_on(self, refused, server, tmp_path, monkeypatch):
        monkeypatch.setattr(server, "breaks_after", 1)
        assert "ended before its answers did" in refused(server.url)
        monkeypatch.undo()
        assert main([*predict(tmp_path), "--llm-url", server.url]) == 0

    def test_clients_of_a_server_that_it_leaves(self, server, tiny_processor, monkeypatch):
        model, _ = load_model("tiny", "cpu", llm_url=server.url)
        with serving(model, tiny_processor) as address:
            body = {"model": "tiny", "messages": ask_about(map(as_file, PAIRS[0]), QUESTIONS[0])}
            monkeypatch.setattr(server, "breaks_after", 1)
            response = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=600)
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "language_model_unavailable"
            monkeypatch.undo()
            assert httpx.post(f"{address}/v1/chat/completions", json=body, timeout=600).status_code == 200
