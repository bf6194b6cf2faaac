"""Publishing: what goes up, the card, and round trips through an HTTP server into processes without this package."""

import json
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from local_hub import Hub
from markdown_it import MarkdownIt
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import deltavlm_hf
from deltavlm_hf.cli import main
from deltavlm_hf.data import load_generated
from deltavlm_hf.hub.publishing import Publication
from deltavlm_hf.training import freeze, leave_out_frozen

REPORT = Path(__file__).parents[2] / "docs" / "tiny_report" / "report.json"
REPO = "someone/changes"
# A process that finds transformers but not this package, as other people's machines have it.
LOAD = """
import sys, torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
repo, revision, before, after = sys.argv[1:]
options = {"trust_remote_code": True, "revision": revision or None}
model = AutoModelForImageTextToText.from_pretrained(repo, **options)
assert not any(name == "deltavlm_hf" or name.startswith("deltavlm_hf.") for name in sys.modules)
processor = AutoProcessor.from_pretrained(repo, **options)
inputs = processor(images=(before, after), text="What changed?", return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=32)
print(processor.batch_decode(ids[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)[0])
other = AutoModelForMultimodalLM.from_pretrained(repo, **options)
assert all(map(torch.equal, other.state_dict().values(), model.state_dict().values()))
part = AutoModel.from_pretrained(repo, **options)
assert not hasattr(part, "language_model") and torch.equal(part.query_tokens, model.query_tokens)
"""


@pytest.fixture(scope="session")
def pair(tmp_path_factory) -> tuple[str, str]:
    """A generated pair as files."""
    folder = tmp_path_factory.mktemp("pair")
    row = load_generated(1, 4_900_000)[0]
    for date in ("before", "after"):
        row[date].save(folder / f"{date}.png")
    return str(folder / "before.png"), str(folder / "after.png")


@pytest.fixture(scope="session")
def expected(pair) -> str:
    """What the shipped model says of it."""
    model = AutoModelForImageTextToText.from_pretrained(deltavlm_hf.tiny())
    processor = AutoProcessor.from_pretrained(deltavlm_hf.tiny())
    inputs = processor(images=pair, text="What changed?", history=[], return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=32)
    return processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]


@pytest.fixture
def hub():
    with Hub() as server:
        yield server


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A Hub to which the command has sent the tiny model, as `REPO`. Tests leave that, and add repositories."""
    with Hub() as hub:
        options = ("--license", "apache-2.0", "--report", str(REPORT))
        done = publish(hub, tmp_path_factory.mktemp("home"), deltavlm_hf.tiny(), REPO, *options)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == f"{hub.endpoint}/{REPO}/commit/{hub.sha(REPO, 'main')}"
        yield hub


def clean_environment(hub: Hub | None, home: Path) -> dict[str, str]:
    """Without this package, without a cache, and with the Hub at another address."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHON"))}
    environment["HF_HOME"] = str(home)
    if hub is None:
        environment["HF_HUB_OFFLINE"] = "1"
    else:
        environment.update(HF_ENDPOINT=hub.endpoint, HF_TOKEN="hf_test", HF_HUB_DISABLE_XET="1")
    return environment


HIDE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "deltavlm_hf":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
"""


def run(code: str, *arguments: str, hub: Hub | None, home: Path, hidden: bool = True) -> str:
    """The last line that a process prints; in it, if `hidden`, `import deltavlm_hf` fails, as on other machines."""
    done = subprocess.run(
        [sys.executable, "-c", HIDE * hidden + code, *arguments],
        capture_output=True,
        text=True,
        env=clean_environment(hub, home),
        cwd=home,
    )
    assert done.returncode == 0, done.stderr
    return (done.stdout.strip().splitlines() or [""])[-1]


def publish(hub: Hub, home: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "deltavlm_hf", "publish", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=clean_environment(hub, home))


@pytest.mark.slow
class TestRoundTrip:
    def test_from_the_command_line_to_a_process_without_this_package(self, published, tmp_path, pair, expected):
        """Model, processor and code by their name on the Hub; then the same again by its commit."""
        commit = published.sha(REPO, "main")
        assert run(LOAD, REPO, "", *pair, hub=published, home=tmp_path) == expected
        assert run(LOAD, REPO, commit, *pair, hub=None, home=tmp_path) == expected  # offline, from the cache
        good = published.files[REPO]["main"]
        moved = "someone/moved"
        published.files[moved] = {"main": {**good, "config.json": b"changed since"}, "before": good}
        (tmp_path / "fresh").mkdir()
        commit = published.sha(moved, "before")
        assert run(LOAD, moved, commit, *pair, hub=published, home=tmp_path / "fresh") == expected

    def test_with_this_package_no_remote_code_is_needed(self, published, tmp_path, pair, expected):
        code = (
            "import sys, deltavlm_hf\n"
            "from transformers import pipeline\n"
            "model, before, after = sys.argv[1:]\n"
            "content = [{'type': 'image', 'path': before}, {'type': 'image', 'path': after}]\n"
            "content.append({'type': 'text', 'text': 'What changed?'})\n"
            "answers = pipeline('image-text-to-text', model=model)(\n"
            "    text=[{'role': 'user', 'content': content}], return_full_text=False, max_new_tokens=32)\n"
            "print(answers[0]['generated_text'])"
        )
        assert run(code, REPO, *pair, hub=published, home=tmp_path, hidden=False) == expected

    def test_push_to_hub_of_model_and_processor(self, hub, tmp_path, pair, expected):
        code = (
            "import sys, deltavlm_hf\n"
            "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
            "for kind in (AutoModelForImageTextToText, AutoProcessor):\n"
            "    kind.from_pretrained(deltavlm_hf.tiny()).push_to_hub(sys.argv[1])"
        )
        run(code, REPO, hub=hub, home=tmp_path, hidden=False)
        assert run(LOAD, REPO, "", *pair, hub=hub, home=tmp_path) == expected

    def test_push_to_hub_of_a_trainer(self, hub, tmp_path, pair):
        code = (
            "import sys\n"
            "from deltavlm_hf.training.run import TrainingRun, train\n"
            "settings = {'output_dir': sys.argv[1], 'max_steps': 1, 'push_to_hub': True,\n"
            "            'hub_model_id': sys.argv[2], 'report_to': 'none', 'use_cpu': True,\n"
            "            'save_frozen_weights': True, 'save_strategy': 'no',\n"
            "            'per_device_train_batch_size': 2}\n"
            "from deltavlm_hf.training.run import DataConfig\n"
            "train(TrainingRun(training=settings, data=DataConfig(pairs=2, validation_pairs=0)))"
        )
        run(code, str(tmp_path / "run"), REPO, hub=hub, home=tmp_path, hidden=False)
        assert {"model.safetensors", "processor_config.json", "README.md"} <= hub.files[REPO]["main"].keys()
        assert run(LOAD, REPO, "", *pair, hub=hub, home=tmp_path)

    def test_a_small_one_finds_its_base_on_the_hub(self, published, tmp_path, pair):
        """What was trained goes up alone, and points to the base's commit."""
        code = (
            "import sys, torch\n"
            "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
            "import deltavlm_hf\n"
            "from deltavlm_hf.training import freeze, leave_out_frozen\n"
            "model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])\n"
            "freeze(model)\n"
            "torch.nn.init.normal_(model.query_tokens)\n"
            "leave_out_frozen(model)\n"
            "model.save_pretrained(sys.argv[2])\n"
            "AutoProcessor.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])"
        )
        small = tmp_path / "small"
        run(code, REPO, str(small), hub=published, home=tmp_path, hidden=False)
        (source,) = json.loads((small / "config.json").read_text())["weight_sources"]
        assert (source["name_or_path"], source["revision"]) == (REPO, published.sha(REPO, "main"))
        assert publish(published, tmp_path, str(small), "someone/small").returncode == 0
        card = ModelCard(published.files["someone/small"]["main"]["README.md"].decode())
        assert card.data.base_model == [REPO] or card.data.base_model == REPO
        (tmp_path / "fresh").mkdir()
        assert run(LOAD, "someone/small", "", *pair, hub=published, home=tmp_path / "fresh")

    def test_a_card_that_the_hub_refuses_leaves_nothing_there(self, tmp_path):
        with Hub(refuse_card="no-such-licence") as hub:
            done = publish(hub, tmp_path, deltavlm_hf.tiny(), REPO, "--license", "no-such-licence")
            assert done.returncode == 1 and "no-such-licence" in done.stderr
            assert REPO not in hub.files


class TestWhatGoesUp:
    def test_dry_run_shows_it_and_sends_nothing(self, tmp_path, capsys):
        folder = Path(shutil.copytree(deltavlm_hf.tiny(), tmp_path / "model"))
        (folder / "checkpoint-10").mkdir()
        for name in ("optimizer.pt", "training_args.bin", "notes.py", "secrets.json"):
            (folder / name).write_text("not for others")
        assert main(["publish", str(folder), REPO, "--dry-run"]) == 0
        listed, _, card = capsys.readouterr().out.partition("\n---\n")
        names = {line.split()[-1] for line in listed.splitlines() if not line.startswith("Not sent")}
        assert {"README.md", "config.json", "model.safetensors", "modeling_deltavlm.py", "tokenizer.json"} <= names
        assert not names & {"optimizer.pt", "training_args.bin", "notes.py", "secrets.json", "checkpoint-10"}
        assert "Not sent: " in listed and "secrets.json" in listed.partition("Not sent: ")[2]
        assert f"{(folder / 'model.safetensors').stat().st_size:,}" in listed
        assert "library_name: transformers" in card

    def test_files_are_those_that_load(self, tmp_path, pair, expected):
        folder = tmp_path / "up"
        folder.mkdir()
        for name, content in Publication(deltavlm_hf.tiny(), REPO).files().items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        (tmp_path / "home").mkdir()
        assert run(LOAD, str(folder), "", *pair, hub=None, home=tmp_path / "home") == expected

    def test_pointers_to_this_machine_are_refused(self, tmp_path):
        base = Path(shutil.copytree(deltavlm_hf.tiny(), tmp_path / "base"))
        model = AutoModelForImageTextToText.from_pretrained(base)
        freeze(model)
        with torch.no_grad():
            model.query_tokens.add_(1)
        leave_out_frozen(model)
        model.save_pretrained(tmp_path / "small")
        AutoProcessor.from_pretrained(base).save_pretrained(tmp_path / "small")
        with pytest.raises(ValueError, match="which nobody else has") as caught:
            Publication(tmp_path / "small", REPO)
        assert str(base) in str(caught.value)

    @pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "processor_config.json"])
    def test_what_is_no_model(self, tmp_path, missing, capsys):
        folder = Path(shutil.copytree(deltavlm_hf.tiny(), tmp_path / "model"))
        (folder / missing).unlink()
        assert main(["publish", str(folder), REPO, "--dry-run"]) == 1
        assert f"{missing}" in capsys.readouterr().err
        with pytest.raises(FileNotFoundError, match="is no saved model"):
            Publication(tmp_path / "nowhere", REPO)


class TestWhatStaysHere:
    """Secrets behind the names of files that go up, and sources that are not where they seem to be."""

    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "token").write_text("hf_secret")
        return Path(shutil.copytree(deltavlm_hf.tiny(), tmp_path / "model"))

    def refused(self, folder: Path, words: str) -> str:
        with pytest.raises(ValueError, match=words) as caught:
            Publication(folder, REPO)
        return str(caught.value)

    @pytest.mark.parametrize(
        "name",
        ["vocab.txt", "README.md", "config.json", "processor_config.json", "model.safetensors", "tokenizer_x.json"]
        + ["a.jinja", "qformer_tokenizer/vocab.txt", "training_run.json", "LICENSE", "modeling_deltavlm.py"],
    )
    @pytest.mark.parametrize("target", ["../elsewhere/token", "absolute", "secrets.json", "nowhere"])
    def test_links(self, target, name, folder, tmp_path):
        (folder / "secrets.json").write_text("{}")
        if name.endswith(".py"):
            auto_map = {"AutoConfig": "configuration_deltavlm.X", "AutoModel": "modeling_deltavlm.Y"}
            change(folder / "config.json", auto_map=auto_map)
        target = tmp_path / "elsewhere" / "token" if target == "absolute" else target
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)
        told = self.refused(folder, "has what is not sent to anyone")
        assert f"{name} (a link to {target})" in told

    def test_all_of_them_are_named(self, folder, tmp_path):
        for name in ("vocab.txt", "merges.txt"):
            (folder / name).symlink_to(tmp_path / "elsewhere" / "token")
        os.mkfifo(folder / "added_tokens.json")
        told = self.refused(folder, "vocab.txt .*")
        assert "merges.txt (a link" in told and "added_tokens.json (no regular file)" in told

    def test_folders_behind_a_link(self, folder, tmp_path):
        (folder / "qformer_tokenizer").rename(tmp_path / "elsewhere" / "tokens")
        (folder / "qformer_tokenizer").symlink_to(tmp_path / "elsewhere" / "tokens")
        assert "qformer_tokenizer (a link to" in self.refused(folder, "not sent to anyone")

    def test_other_things_are_listed_and_stay(self, folder, tmp_path):
        for name in (".env", "token", "model.pt", "weights.pkl", ".git/config", "sub/vocab.txt", "id_rsa"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("secret")
        (folder / "linked").symlink_to(tmp_path / "elsewhere")
        publication = Publication(folder, REPO)
        listed = publication.preview().partition("Not sent: ")[2].partition("\n")[0].split(", ")
        assert {".env", "token", "model.pt", "weights.pkl", ".git", "sub", "id_rsa", "linked"} <= set(listed)
        for name, content in publication.files().items():
            assert b"secret" != (content if isinstance(content, bytes) else content.read_bytes()), name

    @pytest.mark.parametrize("module", ["../elsewhere/code", "/etc/passwd", "{absolute}/elsewhere/code", "a--b", ""])
    def test_code_elsewhere(self, module, folder, tmp_path):
        (tmp_path / "elsewhere" / "code.py").write_text("secret = 1")
        change(folder / "config.json", auto_map={"AutoModel": f"{module.format(absolute=tmp_path)}.X"})
        files = Publication(folder, REPO).files()
        assert not any(name.endswith(".py") for name in files)

    def test_a_snapshot_of_the_cache(self, folder, tmp_path):
        """Its files are links into the cache's own store, and these alone are followed."""
        cache = tmp_path / "models--someone--changes"
        snapshot = cache / "snapshots" / ("0" * 40)
        for number, path in enumerate(path for path in folder.rglob("*") if path.is_file()):
            (cache / "blobs").mkdir(parents=True, exist_ok=True)
            shutil.copy(path, cache / "blobs" / str(number))
            (snapshot / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / path.relative_to(folder)).symlink_to(cache / "blobs" / str(number))
        assert set(Publication(folder, REPO).files()) == set(Publication(snapshot, REPO).files())
        (snapshot / "vocab.txt").symlink_to(tmp_path / "elsewhere" / "token")
        self.refused(snapshot, r"not sent to anyone.*: vocab.txt \(a link to [^,]*\)\.")

    @pytest.mark.parametrize(
        "place, revision, words",
        [
            ("base", None, "no Hub id with an owner"),
            ("models/llama/7b", None, "no Hub id with an owner"),
            ("someone/ba se", "0" * 40, "no Hub id with an owner"),
            ("https://huggingface.co/someone/base", "0" * 40, "no Hub id with an owner"),
            ("../base", "0" * 40, "which nobody else has"),
            ("~/base", "0" * 40, "which nobody else has"),
            ("C:\\base", "0" * 40, "which nobody else has"),
            ("here/base", "0" * 40, "which nobody else has"),
            ("someone/base", None, "needs a commit"),
            ("someone/base", "main", "needs a commit"),
            ("someone/base", "0" * 39, "needs a commit"),
            ("someone/base", "v1." + "0" * 37, "needs a commit"),
        ],
    )
    def test_sources_that_are_no_commit(self, place, revision, words, folder, tmp_path, monkeypatch):
        (tmp_path / "here" / "base").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        change(folder / "config.json", weight_sources=[{"name_or_path": place, "revision": revision}])
        self.refused(folder, words)
        sources = [{"name_or_path": "someone/base", "revision": "0" * 40}]
        change(folder / "config.json", weight_sources=sources)
        assert "`someone/base` at revision `0000" in Publication(folder, REPO).card.text

    def test_the_commit_is_recorded_where_a_branch_was_named(self, folder, published, tmp_path):
        """A source of a source: named by its branch, and kept by its commit."""
        weights = load_file(folder / "model.safetensors")
        save_file({"query_tokens": weights["query_tokens"] + 1}, folder / "model.safetensors", {"format": "pt"})
        change(folder / "config.json", weight_sources=[{"name_or_path": REPO, "revision": "main"}])
        code = (
            "import sys\nfrom deltavlm_hf import DeltaVLMForConditionalGeneration as Model\n"
            "from deltavlm_hf.training import freeze, leave_out_frozen\n"
            "model = Model.from_pretrained(sys.argv[1])\nfreeze(model)\nleave_out_frozen(model)\n"
            "model.save_pretrained(sys.argv[2])"
        )
        run(code, str(folder), str(tmp_path / "small"), hub=published, home=tmp_path, hidden=False)
        sources = json.loads((tmp_path / "small" / "config.json").read_text())["weight_sources"]
        assert (sources[-1]["name_or_path"], sources[-1]["revision"]) == (REPO, published.sha(REPO, "main"))

    @pytest.mark.parametrize("name", ["../x", "a/b/c", "a b/c", 'a/b"\nimport os', ""])
    def test_names_of_repositories_that_are_none(self, name, folder):
        with pytest.raises(ValueError, match="[Rr]epo id"):
            Publication(folder, name)


def change(file: Path, **settings) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[x](javascript:alert(1))",
    "![x](https://evil/x.png)",
    "` <script>alert(1)</script> `",
    "``` \n<script>alert(1)</script>",
    "a\n\n# Heading\n\n<script>",
    "a | b |\n| c | [x](javascript:y)",
    "x\n---\nlicense: mit\n---\n<script>",
    "&lt;script&gt;<!-- ",
    "\\<script>",
    "\u2028<script>\x00",
]


class Page(HTMLParser):
    """What a reader of Markdown makes of a card: its tags and links."""

    def __init__(self):
        super().__init__()
        self.tags: set[str] = set()
        self.links: set[str | None] = set()

    @classmethod
    def of(cls, markdown: str) -> "Page":
        page = cls()
        page.feed(MarkdownIt("commonmark").enable("table").render(markdown))
        return page

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.links |= {value for name, value in attributes if name in ("href", "src") or name.startswith("on")}


class TestCard:
    def test_metadata_is_what_the_hub_reads(self):
        card = Publication(deltavlm_hf.tiny(), REPO, REPORT, "apache-2.0", ["someone/base"]).card
        again = ModelCard(str(card))
        data = again.data.to_dict()
        assert data["pipeline_tag"] == "image-text-to-text" and data["library_name"] == "transformers"
        assert data["license"] == "apache-2.0" and data["base_model"] == ["someone/base"]
        name, results = model_index_to_eval_results(data["model-index"])
        assert name == "changes"
        report = json.loads(REPORT.read_text())["systems"]["tiny"]
        figures = {result.metric_name: result.metric_value for result in results}
        assert figures["yes/no accuracy"] == round(report["binary"]["accuracy"], 4)
        assert figures["captions, BLEU-4, protocol coco"] == round(report["caption"]["all"]["BLEU-4"], 4)
        assert figures["buildings, exact count"] == round(report["count"]["buildings"]["exact"], 4)
        assert all(f"| {result.metric_name} | {result.metric_value} |" in again.text for result in results)

    @pytest.mark.parametrize(
        ("data", "tasks", "limit", "kinds"),
        [
            ("generated, seeds from 0, 5 pairs", [], None, {"generated"}),
            ("mine, test", [], None, {"other"}),
            (
                "hlwu/changechat-105k, test",
                ["caption", "binary", "count", "grid", "open", "dialogue"],
                None,
                {"changechat"},
            ),
            ("hlwu/changechat-105k, test", ["count"], 3000, {"changechat", "other"}),
        ],
    )
    def test_figures_are_those_of_the_data_set_if_of_the_whole(self, data, tasks, limit, kinds, tmp_path):
        report = json.loads(REPORT.read_text())
        report["settings"].update(data=data, limit=limit, questions="as in training, q: ...")
        (tmp_path / "report.json").write_text(json.dumps({**report, "published_tasks": tasks}))
        card = Publication(deltavlm_hf.tiny(), REPO, tmp_path / "report.json").card
        assert {result.dataset_type for result in card.data.eval_results} == kinds
        assert (f"on {data}, its first 3000 records;" in card.text) == (limit is not None)
        assert "questions: as in training, q: ..." in card.text and "GPT-4o" not in card.text

    def test_figures_of_masks(self, tmp_path):
        report = json.loads(REPORT.read_text())
        report["systems"]["tiny"] |= {
            "masks": {"classes": {"road": {"f1": None}, "building": {"f1": 0.81234}}, "miou": 0.7},
            "agreement": {"count": {"all": 0.9}},
        }
        (tmp_path / "report.json").write_text(json.dumps(report))
        text = Publication(deltavlm_hf.tiny(), REPO, tmp_path / "report.json").card.text
        for row in ("pixel F1, buildings | 0.8123", "mIoU with unchanged pixels | 0.7", "agree, counts | 0.9"):
            assert f"{row} |" in text
        assert "pixel F1, roads" not in text

    def test_encoder_and_masks_are_named(self, tmp_path):
        folder = Path(shutil.copytree(deltavlm_hf.tiny(), tmp_path / "model"))
        assert "- vision encoder: InstructBLIP's ViT, 5 blocks, 96 pixels" in Publication(folder, REPO).card.text
        change(
            folder / "config.json",
            vision_config={"model_type": "convnext", "image_size": 64, "out_features": ["stage2", "stage3"]},
            mask_classes=["road", "<b>house</b>"],
            weight_sources=[
                {"name_or_path": "someone/eyes", "revision": "0" * 40, "prefix": "vision_model.backbone."},
                {"name_or_path": "someone/words", "revision": "1" * 40, "prefix": "language_model."},
                {"name_or_path": "someone/rest", "revision": "2" * 40},
            ],
        )
        card = Publication(folder, REPO).card
        assert "- vision encoder: convnext, its feature maps stage2, stage3, 64 pixels" in card.text
        assert "- change masks: road, &#60;b&#62;house" in card.text
        assert f"- the vision encoder's weights are read from `someone/eyes` at revision `{'0' * 40}`" in card.text
        assert f"- the language model's weights are read from `someone/words` at revision `{'1' * 40}`" in card.text
        assert f"- the other weights are read from `someone/rest` at revision `{'2' * 40}`" in card.text
        assert card.data.base_model == ["someone/eyes", "someone/words", "someone/rest"]
        for place, told in (("someone/eyes", "convnext (`someone/eyes`), its"), ("/home/me/eyes", "convnext, its")):
            change(folder / "config.json", vision_config={"model_type": "convnext", "_name_or_path": place})
            assert f"- vision encoder: {told} feature maps of the last stage, " in Publication(folder, REPO).card.text

    def test_without_a_report_there_are_no_figures(self):
        card = Publication(deltavlm_hf.tiny(), REPO).card
        assert card.data.eval_results is None and "None were measured." in card.text

    @pytest.mark.slow
    def test_its_snippet_runs(self, published, tmp_path, pair, expected):
        for path in pair:
            shutil.copy(path, tmp_path)
        card = published.files[REPO]["main"]["README.md"].decode()
        snippet = card.partition("```python\n")[2].partition("```")[0]
        assert run(snippet, hub=published, home=tmp_path) == expected

    def test_what_a_training_run_leaves_is_in_it(self, tmp_path):
        folder = Path(shutil.copytree(deltavlm_hf.tiny(), tmp_path / "model"))
        settings = {
            "training": {"output_dir": str(tmp_path), "learning_rate": 1e-4},
            "model": "someone/base",
            "data": {"source": "hlwu/changechat-105k", "images": "/home/me/images"},
            "task_weights": None,
        }
        (folder / "training_run.json").write_text(json.dumps(settings))
        text = Publication(folder, REPO).card.text
        assert "| training.learning_rate | `0.0001` |" in text and "| model | `someone/base` |" in text
        assert "LEVIR-CC imagery: academic use only" in text and "CC-BY-4.0" in text
        settings["data"] = {"source": "/home/me/mine", "limit": 9, "pairs": 1000}
        (folder / "training_run.json").write_text(json.dumps(settings))
        others = Publication(folder, REPO).card.text
        assert "| data.limit | `9` |" in others and "data.pairs" not in others
        assert "LEVIR-CC imagery" not in others and "licences of the images and annotations" in others
        assert "/home/me" not in text + others and str(tmp_path) not in text

    @pytest.mark.parametrize("text", HOSTILE, ids=ascii)
    def test_nothing_of_what_is_reported_becomes_markup(self, text, tmp_path):
        folder = Path(shutil.copytree(deltavlm_hf.tiny(), tmp_path / "model"))
        settings = {"training": {"learning_rate": text, text: 1, "a": [text]}, text: text, "data": {"source": text}}
        (folder / "training_run.json").write_text(json.dumps(settings))
        report = json.loads(REPORT.read_text())
        report["settings"].update(data=text, limit=text, questions=text, history=text)
        report["systems"]["model"] = report["systems"].pop("tiny")
        report["systems"]["model"]["caption"]["protocol"] = text
        (tmp_path / "report.json").write_text(json.dumps(report))
        card = Publication(folder, REPO, tmp_path / "report.json", license=text, base_models=[text]).card
        again = ModelCard(str(card))
        assert again.data.license == text and again.data.base_model == [text] and again.data.pipeline_tag
        plain = Publication(folder, REPO).card.text
        page, expected = (Page.of(markdown) for markdown in (again.text, plain))
        assert page.tags <= expected.tags | {"code"} and page.links == expected.links

    def test_nothing_of_a_configuration_becomes_markup(self, tmp_path):
        folder = Path(shutil.copytree(deltavlm_hf.tiny(), tmp_path / "model"))
        config = (folder / "config.json").read_text()
        for text in HOSTILE:
            for settings in (
                {"difference_module": text},
                {"vision_config": text},
                {"vision_config": {"image_size": text}},
            ):
                (folder / "config.json").write_text(config)
                change(folder / "config.json", **settings)
                with pytest.raises(ValueError):
                    Publication(folder, REPO)

    def test_the_owners_own_card_is_kept(self, tmp_path):
        folder = Path(shutil.copytree(deltavlm_hf.tiny(), tmp_path / "model"))
        (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
        publication = Publication(folder, REPO)
        assert publication.card.data.license == "mit"
        assert publication.files()["README.md"].endswith(b"# Mine\n")

    def test_a_report_of_another_model(self, tmp_path):
        folder = Path(shutil.copytree(deltavlm_hf.tiny(), tmp_path / "mine"))
        with pytest.raises(ValueError, match="has figures of tiny, no-change.*would call changes or mine"):
            Publication(folder, REPO, REPORT)

    @pytest.mark.parametrize("content", ["", "[]", "{}"])
    def test_a_report_of_another_form(self, tmp_path, content):
        (tmp_path / "report.json").write_text(content)
        with pytest.raises(ValueError, match="is no report.json"):
            Publication(deltavlm_hf.tiny(), REPO, tmp_path / "report.json")
