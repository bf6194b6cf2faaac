"""What the package must not do: run what a file brings, call out unasked, leave the data folder, tell secrets."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from local_hub import Hub
from PIL import Image
from transformers import AutoModelForImageTextToText
from transformers.utils import SAFE_WEIGHTS_NAME, WEIGHTS_NAME

import deltavlm_hf
from deltavlm_hf import DeltaVLMForConditionalGeneration
from deltavlm_hf.data import check_data, load_changechat

SOURCES = sorted(Path(deltavlm_hf.__file__).parent.rglob("*.py"))
SECRET = "hf_thisIsTheSecretOfTheTests"


def run(code: str, *arguments: object, **environment: str) -> str:
    """Runs code in a process of its own, with nobody to ask; returns what it printed."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**clean, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


IMPORT_EVERYTHING = """
import pkgutil, socket, sys

called = []

def refuse(event, arguments):
    if event == "socket.bind" and arguments[1] == ("::1", 0):
        return  # urllib3 looks whether there is IPv6
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.bind"):
        called.append(event)
        raise ConnectionRefusedError(f"{event} {arguments}")

sys.addaudithook(refuse)
import deltavlm_hf

names = [each.name for each in pkgutil.walk_packages(deltavlm_hf.__path__, "deltavlm_hf.")]
for name in names:
    if not name.endswith("__main__"):
        __import__(name)
assert called == [], called
try:
    socket.create_connection(("localhost", 9))
except ConnectionRefusedError:
    pass
assert called, "the hook sees nothing"
print(len(names))
"""


def test_importing_everything_calls_nobody(tmp_path):
    count = int(run(IMPORT_EVERYTHING, HF_HOME=str(tmp_path)))
    assert count > 40
    assert not any(path.is_file() for path in tmp_path.rglob("*"))  # nor is anything left in the cache


def name_of(node: ast.expr) -> str:
    """`torch.load` of a call to it."""
    return f"{name_of(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def dangers(code: str) -> list[str]:
    """Calls that run what a file or a text brings along, write where an archive says, or trust code from the Hub."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "dill", "cloudpickle", "joblib", "marshal"):
            found.append(node.module)
        if not isinstance(node, ast.Call):
            continue
        name = name_of(node.func)
        given = {each.arg: ast.unparse(each.value) for each in node.keywords}
        first, _, last = name.rpartition(".")
        if first in ("pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"):
            found.append(name)
        elif name == "torch.load" and given.get("weights_only") != "True":
            found.append(name)
        elif name in ("eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "torch.hub.load"):
            found.append(name)
        elif last in ("extract", "extractall", "unpack_archive"):
            found.append(name)
        found += [
            option
            for option in ("allow_pickle", "shell", "trust_remote_code")
            if given.get(option, "False") != "False"
        ]
    return found


@pytest.mark.parametrize(
    "code",
    [
        "from pickle import loads",
        "pickle.load(file)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
        "zipfile.ZipFile(path).extractall(folder)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_dangers_are_seen(code):
    assert dangers(code)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_danger_in_the_sources(path):
    assert dangers(path.read_text(encoding="utf-8")) == []


class Harm:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


class TestNothingIsUnpickled:
    """The conversion's own files: `test_conversion.py`, `test_nothing_is_unpickled`."""

    refusal = f"{WEIGHTS_NAME} cannot be read .* nothing else is loaded"

    @pytest.fixture
    def evil(self, tmp_path) -> Path:
        """A folder with the small model, whose weights bring something along."""
        folder = Path(shutil.copytree(deltavlm_hf.tiny(), tmp_path / "evil"))
        (folder / SAFE_WEIGHTS_NAME).unlink()
        torch.save({"query_tokens": Harm(tmp_path / "harm")}, folder / WEIGHTS_NAME)
        yield folder
        assert not (tmp_path / "harm").exists()
        torch.load(folder / WEIGHTS_NAME, weights_only=False)
        assert (tmp_path / "harm").exists()  # it would have done harm

    @pytest.mark.parametrize("kind", [AutoModelForImageTextToText, DeltaVLMForConditionalGeneration])
    def test_as_a_model(self, kind, evil):
        with pytest.raises(ValueError, match=self.refusal):
            kind.from_pretrained(evil)

    def test_as_the_base_of_a_small_checkpoint(self, evil, tmp_path):
        model = AutoModelForImageTextToText.from_pretrained(deltavlm_hf.tiny()).requires_grad_(False)
        model.keep_out_of_checkpoints(["query_tokens"], [{"name_or_path": str(evil), "prefix": ""}])
        model.save_pretrained(tmp_path / "small")
        with pytest.raises(ValueError, match=self.refusal):
            AutoModelForImageTextToText.from_pretrained(tmp_path / "small")


LOAD_WITHOUT_TRUST = """
import sys
package, folder = sys.argv[1:]
if package == "with the package":
    import deltavlm_hf
else:
    sys.modules["deltavlm_hf"] = None
from transformers import AutoModelForImageTextToText, AutoProcessor
for auto_class in (AutoModelForImageTextToText, AutoProcessor):
    try:
        print(type(auto_class.from_pretrained(folder)).__module__.partition(".")[0])
    except (ValueError, EOFError) as error:
        print("refused")
"""


@pytest.mark.parametrize("package, outcome", [("with the package", "deltavlm_hf"), ("without the package", "refused")])
def test_code_in_a_folder_is_not_run_unasked(package, outcome, converted, tmp_path):
    folder = Path(shutil.copytree(converted, tmp_path / "model"))
    codes = list(folder.glob("*.py"))
    assert len(codes) > 5
    for path in codes:
        path.write_text(f"import os\nos.mkdir({str(tmp_path / 'harm')!r})\n")
    printed = run(LOAD_WITHOUT_TRUST, package, folder, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1")
    assert printed.count(outcome) == 2  # model and processor
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "strategy", [{"penalty_alpha": 0.6, "top_k": 4}, {"num_beams": 4, "num_beam_groups": 2}, {"dola_layers": "low"}]
)
def test_generation_takes_no_code_from_the_hub_unasked(strategy, small_model, small_inputs):
    """Strategies that Transformers has moved to repositories of code."""
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        small_model.generate(**small_inputs, max_new_tokens=2, **strategy)


class TestPathsInAnnotations:
    """Malformed paths one by one: `data/test_records.py`."""

    @pytest.fixture
    def outside(self, tmp_path) -> Path:
        """An image beside the folder of images, which annotations name in several ways."""
        for folder in ("A", "B"):
            (tmp_path / "data" / "images" / folder).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / "data" / "images" / folder / "x.png")
        Image.new("RGB", (9, 9), "red").save(tmp_path / "secret.png")
        return tmp_path / "secret.png"

    def write(self, outside: Path, image: str) -> Path:
        record = {
            "id": 1,
            "image": ["A/x.png", image],
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
        }
        (outside.parent / "data" / "mine_train.json").write_text(json.dumps([record]))
        return outside.parent / "data"

    @pytest.mark.parametrize("image", ["../../secret.png", "A/../../../secret.png", "{absolute}", "file://{absolute}"])
    def test_they_stay_below_the_folder_of_images(self, image, outside, tmp_path):
        folder = self.write(outside, image.format(absolute=outside))
        with pytest.raises((ValueError, FileNotFoundError), match="must lie below|secret.png"):
            load_changechat(folder, cache_dir=tmp_path / "cache")
        (problem,) = check_data(folder).problems
        assert problem.kind in ("malformed record", "missing image")

    def test_addresses_are_not_fetched(self, outside, tmp_path):
        with Hub() as hub:
            folder = self.write(outside, f"{hub.endpoint}/x.png")
            with pytest.raises(FileNotFoundError, match="is not there"):
                load_changechat(folder, cache_dir=tmp_path / "cache")
            assert [problem.kind for problem in check_data(folder).problems] == ["missing image"]
            assert hub.calls == []

    def test_links_are_the_users_own(self, outside, tmp_path):
        """No annotation can make one, and no archive is unpacked: collections of links are how images are shared."""
        folder = self.write(outside, "B/linked.png")
        (folder / "images" / "B" / "linked.png").symlink_to(outside)
        (row,) = load_changechat(folder, cache_dir=tmp_path / "cache", split="train")
        assert row["after"].size == (9, 9)


LOUD = {"HF_DEBUG": "1", "TRANSFORMERS_VERBOSITY": "debug", "HF_HUB_VERBOSITY": "debug"}


class TestSecrets:
    """Keys of endpoints: `data/writing/test_endpoint.py`. Tokens in a training run: `training/test_runs.py`."""

    @pytest.mark.parametrize("refused", [False, True])
    def test_publishing_does_not_tell_the_token(self, refused, tmp_path):
        with Hub(refuse_card="other" if refused else "") as hub:
            command = [sys.executable, "-m", "deltavlm_hf", "publish", deltavlm_hf.tiny(), "someone/deltavlm-tiny"]
            environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
            environment |= {**LOUD, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "HF_TOKEN": SECRET}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            assert done.returncode == int(refused), done.stderr
            kept = [content for files in hub.files.values() for content in files["main"].values()]
        assert bool(kept) != refused
        kept += [done.stdout.encode(), done.stderr.encode()]
        kept += [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
        assert not any(SECRET.encode() in content for content in kept)

    def test_a_saved_model_does_not_keep_the_token(self, tmp_path):
        model = AutoModelForImageTextToText.from_pretrained(deltavlm_hf.tiny(), token=SECRET)
        model.save_pretrained(tmp_path)
        assert (tmp_path / "config.json").exists()
        assert not any(SECRET.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
