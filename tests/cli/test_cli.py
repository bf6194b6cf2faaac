"""The command line, as a user meets it: real processes, real files, the model that ships with the package."""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from paths import OFFICIAL
from PIL import Image
from safetensors.torch import load_file, save_file

from deltavlm_hf import predict_mask, tiny
from deltavlm_hf.cli import main
from deltavlm_hf.data.scenes import generate_scene
from deltavlm_hf.inference.loading import load_model

BINARY = "Please judge whether these two images have changed. Please answer yes or no."


def deltavlm(*arguments, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "deltavlm_hf", *map(str, arguments)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # the same on machines with a GPU
    return subprocess.run(command, capture_output=True, text=True, env=environment, **kwargs)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A generated pair with changes, as files."""
    folder = tmp_path_factory.mktemp("images")
    scene = next(scene for scene in map(generate_scene, range(100)) if len(scene.buildings) > 2)
    paths = folder / "before.png", folder / "after.png"
    for path, image in zip(paths, (scene.before, scene.after), strict=True):
        Image.fromarray(image).save(path)
    return paths


def test_ask(images):
    done = deltavlm("ask", *images, BINARY)
    assert (done.returncode, done.stdout) == (0, "yes\n"), done.stderr


@pytest.fixture(scope="module")
def addresses(images):
    """The pair from a server on this machine."""
    handler = partial(SimpleHTTPRequestHandler, directory=images[0].parent)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield [f"http://127.0.0.1:{server.server_port}/{path.name}" for path in images]
        server.shutdown()


def test_images_by_address(images, addresses, capsys):
    """All that the processor takes as text."""
    data = [f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" for path in images]
    for pair in (addresses, data, (images[0], addresses[1])):
        assert main(["ask", *map(str, pair), BINARY, "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["answer"] == "yes" and [said["before"], said["after"]] == [str(image) for image in pair]


def test_an_address_without_an_image(images, addresses, capsys):
    assert main(["ask", str(images[0]), f"{addresses[1]}.gone", BINARY, "--model", "nowhere"]) == 1
    _, error, said = capsys.readouterr().err.partition("deltavlm: error: ")
    assert error and "pair 1, after image: cannot load 'http://127.0.0.1" in said and len(said.splitlines()) == 1


def test_ask_of_an_unchanged_pair(images):
    done = deltavlm("ask", images[0], images[0], BINARY)
    assert (done.returncode, done.stdout) == (0, "no\n"), done.stderr


def test_ask_as_json(images):
    done = deltavlm("ask", *images, BINARY, "--json")
    assert json.loads(done.stdout) == {
        "before": str(images[0]),
        "after": str(images[1]),
        "question": BINARY,
        "answer": "yes",
        "model": "small",
    }


def test_ask_another_model(images, converted):
    done = deltavlm(
        "ask", *images, "What?", "--model", converted, "--max-new-tokens", "3", "--device", "cpu", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == str(converted)


def test_ask_for_the_mask(images, mask_model_folder, tmp_path, capsys):
    path = tmp_path / "new" / "mask.png"
    options = ["--model", str(mask_model_folder), "--max-new-tokens", "2", "--json", "--mask", str(path)]
    assert main(["ask", *map(str, images), BINARY, *options]) == 0
    assert json.loads(capsys.readouterr().out)["mask"] == str(path)
    model, processor = load_model(str(mask_model_folder))
    with Image.open(path) as mask, Image.open(images[1]) as after:
        assert mask.mode == "L" and mask.size == after.size
        assert (np.asarray(mask) == predict_mask(model, processor, *images)).all()
    assert list(path.parent.iterdir()) == [path]


def test_no_mask_of_a_model_without(images, tmp_path, capsys):
    assert main(["ask", *map(str, images), BINARY, "--model", "tiny", "--mask", str(tmp_path / "mask.png")]) == 1
    said = capsys.readouterr()
    assert "deltavlm: error: This model makes no masks" in said.err and not said.out
    assert not list(tmp_path.iterdir())


def test_chat(images):
    questions = f"{BINARY}\nIf changes have occurred, count the number of road and building changes separately.\n"
    done = deltavlm("chat", *images, input=questions)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.strip().splitlines()
    assert first == "yes"
    assert "new building" in second


def test_demo(tmp_path):
    picture = tmp_path / "demo.png"
    done = deltavlm("demo", "--output", picture)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\nA: ") == 6 and "In truth: " in done.stdout
    assert "the tiny model" in done.stderr  # which knows such scenes best
    with Image.open(picture) as image:
        pixels = np.asarray(image)
    assert pixels.shape[2] == 3 and min(pixels.shape[:2]) > 400
    assert pixels.std() > 20


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "usage: deltavlm"),
        (["ask", "a.png", "b.png"], 2, "QUESTION"),
        (["ask", "nowhere.png", "b.png", "What?"], 1, "pair 1, before image: no such file"),
        (["chat", "nowhere.png", "b.png", "--model", "nowhere"], 1, "pair 1, before image: no such file"),
        (["demo", "--max-new-tokens", "0"], 2, "must be an integer of at least 1, got '0'"),
        (["demo", "--max-new-tokens", "many"], 2, "must be an integer of at least 1, got 'many'"),
        (["demo", "--device", "cuda"], 1, "no CUDA device is available; use --device cpu"),
        (["demo", "--model", OFFICIAL / "llm"], 1, "expected a deltavlm model, got llama"),
        (["convert", "out", "--checkpoint", "a"], 2, "--vision"),
    ],
    ids=str,
)
def test_errors(arguments, code, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    try:
        found = main(list(map(str, arguments)))
    except SystemExit as end:  # usage
        found = end.code
    out, err = capsys.readouterr()
    assert (found, out) == (code, "")
    assert message in err and "Traceback" not in err


def test_broken_image(images, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(images[1].read_bytes()[:500])
    done = deltavlm("ask", images[0], broken, "What?")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("deltavlm: error: pair 1, after image: cannot read")


def test_missing_model(images, tmp_path):
    done = deltavlm("ask", *images, "What?", "--model", tmp_path / "nothing")
    assert done.returncode == 1
    assert "deltavlm: error:" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"cut"), "model.safetensors cannot be read"),
        (lambda folder: (folder / "config.json").write_text("null"), "--model"),
        (lambda folder: (folder / "processor_config.json").write_text("null"), "--model"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot be loaded as a DeltaVLMProcessor"),
    ],
    ids=["weights", "configuration", "processor", "tokenizer"],
)
def test_damaged_models_are_one_line(damage, message, images, tmp_path, capsys):
    folder = shutil.copytree(tiny(), tmp_path / "model")
    damage(folder)
    assert main(["ask", *map(str, images), "What?", "--model", str(folder)]) == 1
    _, error, said = capsys.readouterr().err.partition("deltavlm: error: ")
    assert error and message in said and str(folder) in said and len(said.splitlines()) == 1


def nan_model(folder):
    """The small model after a training run that diverged."""
    shutil.copytree(tiny(), folder)
    weights = load_file(folder / "model.safetensors")
    weights["language_model.model.norm.weight"].fill_(float("nan"))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_nan_is_no_answer(images, tmp_path, capsys):
    model = str(nan_model(tmp_path / "model"))
    assert main(["ask", *map(str, images), "What?", "--model", model]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "scores are NaN or infinite" in captured.err
    assert main(["evaluate", model, "--pairs", "1", "--tasks", "binary", "--output", str(tmp_path / "out")]) == 1
    assert "1 records have no answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo", "--output", "file/picture.png"],
        ["evaluate", "no-change", "--pairs", "1", "--tasks", "binary", "--output", "file/out"],
        ["data", "show", "--number", "1", "--output", "file/sheet.html"],
        ["train", "below.yaml"],
        ["publish", "file", "me/model", "--dry-run"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_places_that_cannot_be_written_to(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    settings = "training: {output_dir: file/run, use_cpu: true}\ndata: {pairs: 1, validation_pairs: 0}\n"
    (tmp_path / "below.yaml").write_text(settings)
    assert main(arguments) == 1
    error = capsys.readouterr().err.partition("deltavlm: error: ")[2]
    assert "file" in error and len(error.splitlines()) == 1
    assert (tmp_path / "file").read_text() == "mine"


SETTINGS = """
training: {output_dir: run, max_steps: 1000, use_cpu: true, report_to: none, per_device_train_batch_size: 2}
data: {pairs: 8, validation_pairs: 0}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "sign"),
    [
        (["ask", "before.png", "after.png", "What?"], None),
        (["evaluate", "tiny", "--pairs", "40", "--tasks", "open"], "evaluation/predictions/tiny/predictions.0.jsonl"),
        (["train", "settings.yaml"], "run"),
        (["publish", "model", "me/model", "--dry-run"], None),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_ctrl_c(arguments, sign, images, tmp_path):
    """While torch is loaded or, where there is a sign of it, in the midst of work."""
    for image in images:
        shutil.copy(image, tmp_path)
    shutil.copytree(tiny(), tmp_path / "model")
    (tmp_path / "settings.yaml").write_text(SETTINGS)
    command = [sys.executable, "-m", "deltavlm_hf", *arguments]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell's & hands down none
    )
    maps = Path(f"/proc/{process.pid}/maps")
    while not ((tmp_path / sign).exists() if sign else "libtorch" in maps.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said, error = process.communicate()
    assert process.returncode == 130, error
    assert "Traceback" not in error and said == ""
    import deltavlm_hf

    assert deltavlm("--version").stdout == f"deltavlm {deltavlm_hf.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-change", "--protocol", "words"], "Unknown protocol 'words'"),
        (
            ["no-change", "--protocol", "levir-words"],
            "the training captions: --train-captions FILE",
        ),
        (["no-change", "--tasks", "captions"], "'captions'"),
        (["no-change", "nowhere/data"], "nowhere/data"),
        (["nowhere/model"], "nowhere/model"),
    ],
)
def test_evaluate_tells_what_is_wrong(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *arguments, "--pairs", "1"]) == 1
    _, error, said = capsys.readouterr().err.partition("deltavlm: error: ")
    assert error and message in said


def test_a_mistyped_baseline_is_no_model(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "tiny", "--baselines", "majorty"])
    assert stopped.value.code == 2 and "invalid choice: 'majorty'" in capsys.readouterr().err


def test_answers_of_other_weights_are_not_taken_over(tmp_path, capsys):
    folder = shutil.copytree(tiny(), tmp_path / "model")
    command = ["evaluate", str(folder), "--pairs", "1", "--tasks", "binary", "--output", str(tmp_path / "out")]
    assert main(command) == 0
    assert main(command) == 0
    weights = load_file(folder / "model.safetensors")
    save_file({name: weight * 0 for name, weight in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    assert main(command) == 1
    assert "go on with the same settings or choose another folder" in capsys.readouterr().err
