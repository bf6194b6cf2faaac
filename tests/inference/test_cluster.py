"""Many pairs and scenes by a real Ray of this machine: the rows of the local engine, no matter what dies."""

import json
import os
import sys

import geopandas
import psutil
import pytest
from geo_rasters import lay_out, write_raster
from geopandas.testing import assert_geodataframe_equal
from PIL import Image
from processes import run_python

from deltavlm_hf import stream_answers
from deltavlm_hf.cli import main
from deltavlm_hf.data.scenes import generate_scene

SEED = 4_600_205  # beyond all that the shipped model was trained or tested on
TWO_ACTORS = ["--engine", "ray", "--actors", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve generated pairs, in A and B; one image is none."""
    folder = tmp_path_factory.mktemp("scenes")
    for number in range(12):
        scene = generate_scene(SEED + number)
        for date, image in (("A", scene.before), ("B", scene.after)):
            (folder / date).mkdir(exist_ok=True)
            Image.fromarray(image).save(folder / date / f"{number:02}.png")
    (folder / "B" / "03.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def cluster():
    """A running cluster, to which all commands of this module go."""
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def actors() -> list[psutil.Process]:
    """The processes that hold a model."""
    children = psutil.Process().children(recursive=True)
    return [each for each in children if any("_Answerer" in word for word in each.cmdline())]


def predict(folder, output, *options) -> int:
    questions = ["binary", "count", "dialogue"]
    fixed = ["--model", "tiny", "--device", "cpu", "--batch-size", "3"]
    return main(["predict", str(folder), "--questions", *questions, "--output", str(output), *fixed, *options])


@pytest.mark.slow
def test_rows_are_those_of_the_local_engine(cluster, folder, tmp_path, caplog):
    local, shared = tmp_path / "local.jsonl", tmp_path / "shared.jsonl"
    assert predict(folder, local) == predict(folder, shared, *TWO_ACTORS) == 1  # for the image that is none
    assert local.read_bytes() == shared.read_bytes()
    rows = [json.loads(line) for line in shared.read_text().splitlines()]
    assert len(rows) == 12 * 5 and {row["name"] for row in rows if row["error"]} == {"03"}
    assert {row["changed"] for row in rows if row["task"] == "binary"} == {True, False, None}

    # Either engine goes on with what the other has left.
    Image.fromarray(generate_scene(SEED).after).save(folder / "B" / "03.png")
    try:
        caplog.clear()
        assert predict(folder, shared, *TWO_ACTORS) == predict(folder, local) == 0
        assert caplog.text.count("11 of 12 pairs were answered by an earlier run") == 2
    finally:
        (folder / "B" / "03.png").write_bytes(b"no image")
    assert local.read_bytes() == shared.read_bytes() and "cannot read" not in shared.read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"local.jsonl", "shared.jsonl"}


@pytest.mark.slow
def test_an_actor_that_dies_loses_nothing(cluster, folder, tiny_model, tiny_processor):
    from deltavlm_hf.inference.cluster import Cluster

    pairs = [[folder / date / f"{number:02}.png" for date in "AB"] for number in range(12)]
    asked = ["What changed?", ["Is there a change?", "Where?"]]
    expected = list(stream_answers(tiny_model, tiny_processor, pairs, asked, num_workers=0))
    stream = Cluster("tiny", "cpu", actors=2).stream_answers(tiny_model, tiny_processor, pairs, asked, batch_size=1)
    found = [next(stream)]
    victim = actors()[0]
    victim.kill()
    victim.wait(60)
    found += stream
    assert sorted(each.index for each in found) == list(range(12))
    for each in found:
        assert each.answers == expected[each.index].answers
        assert str(each.error) == str(expected[each.index].error)
    assert [each.index for each in found if each.error] == [3]


@pytest.mark.slow
def test_layers_of_a_scan_are_those_of_the_local_engine(cluster, mask_model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before, after, _ = lay_out((2, 3, 8, 10), 2)
    paths = [str(write_raster(tmp_path / f"{number}.tif", image)) for number, image in enumerate((before, after))]
    for name, options in (("local", []), ("shared", TWO_ACTORS)):
        fixed = ["--model", str(mask_model_folder), "--device", "cpu", "--batch-size", "2", "--output", f"{name}.gpkg"]
        assert main(["scan", *paths, *fixed, "--max-new-tokens", "4", *options]) == 0
    for layer in geopandas.list_layers("local.gpkg").name:
        if layer != "layer_styles":
            local, shared = (geopandas.read_file(f"{name}.gpkg", layer=layer) for name in ("local", "shared"))
            assert_geodataframe_equal(local, shared)
    assert len(geopandas.read_file("shared.gpkg", layer="tiles")) > 1


@pytest.mark.slow
def test_without_a_cluster_there_is_one_while_it_is_needed(folder, tmp_path):
    code = """
    import sys
    from deltavlm_hf.cli import main
    from test_cluster import predict
    import ray
    assert predict(sys.argv[1], sys.argv[2], "--engine", "ray") == 1 and not ray.is_initialized()
    """
    output = tmp_path / "answers.jsonl"
    paths = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    run_python(code, folder, output, PYTHONPATH=paths)
    assert len(output.read_text().splitlines()) == 12 * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--actors", "2"], "--ray-address and --actors are for --engine ray."),
        (["--ray-address", "auto"], "--ray-address and --actors are for --engine ray."),
    ],
)
def test_options_of_a_cluster_without_one(options, message, folder, tmp_path, capsys):
    assert predict(folder, tmp_path / "answers.csv", *options) == 1
    assert capsys.readouterr().err == f"deltavlm: error: {message}\n" and not list(tmp_path.iterdir())


def test_without_the_package_of_the_extra(folder):
    code = """
    import contextlib, sys
    from deltavlm_hf.cli import main
    sys.modules["ray"] = None
    with contextlib.redirect_stderr(sys.stdout):
        main(["predict", sys.argv[1], "--questions", "binary", "--output", "answers.csv", "--engine", "ray"])
    """
    assert (
        run_python(code, folder) == "deltavlm: error: --engine ray needs more packages: "
        'pip install "deltavlm-hf[ray]", or in a checkout pip install -e ".[ray]"'
    )
