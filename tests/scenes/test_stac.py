"""STAC items in place of rasters."""

import json

import numpy as np
import pytest
from geo_rasters import lay_out, write_raster

from deltavlm_hf.scenes.scene import Scene
from deltavlm_hf.scenes.stac import locate

TIFF = "image/tiff; application=geotiff; profile=cloud-optimized"


def write_item(path, **assets):
    """Each asset by its href, or as it is."""
    whole = {key: {"href": each, "type": TIFF} if isinstance(each, str) else each for key, each in assets.items()}
    path.write_text(json.dumps({"type": "Feature", "stac_version": "1.1.0", "id": path.stem, "assets": whole}))
    return path


def test_a_scene_of_two_items_is_that_of_their_assets(tmp_path):
    before, after, _ = lay_out((2, 3, 8, 10), 2)
    (tmp_path / "data of 2020").mkdir()
    first = write_raster(tmp_path / "data of 2020" / "visual.tif", before)
    second = write_raster(tmp_path / "second.tif", after)
    thumbnail = {"href": "./thumbnail.png", "type": "image/png", "roles": ["thumbnail"]}
    items = (
        write_item(tmp_path / "one.json", visual="./data%20of%202020/visual.tif", red="red.tif", thumbnail=thumbnail),
        write_item(tmp_path / "two.json", scene={"href": second.as_uri(), "type": TIFF, "roles": ["data"]}),
    )
    scene, plain = Scene(*items, size=96), Scene(first, second, size=96)
    assert scene.facts() == plain.facts()
    for found, expected in zip(scene[1], plain[1], strict=True):
        np.testing.assert_array_equal(found, expected)


def test_which_asset_is_meant(tmp_path):
    item = write_item(tmp_path / "item.json", red="red.tif", nir="../nir.tif", metadata={"href": "a.xml"})
    assert locate(f"{item}#nir") == str(tmp_path / "../nir.tif")
    assert locate(write_item(tmp_path / "one.json", red="red.tif", about={"href": "a.xml"})) == str(
        tmp_path / "red.tif"
    )
    assert locate("scene#1.tif") == "scene#1.tif" and locate("/vsizip/a.zip/b.tif") == "/vsizip/a.zip/b.tif"
    with pytest.raises(
        ValueError, match=r"has no asset 'visual', but red, nir, metadata: name one, as in item.json#red"
    ):
        locate(item)
    with pytest.raises(ValueError, match="has no asset 'blue'"):
        locate(f"{item}#blue")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ('{"type": "FeatureCollection", "features": []}', "expected `stac_version` and `assets`, or a raster"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"stac_version": "1.0.0", "assets": {"visual": "a.tif"}}', "expected `stac_version` and `assets`"),
        ('{"stac_version": "1.0.0", "assets": {}}', "but none at all"),
        (
            '{"stac_version": "1.0.0", "assets": {"visual": {"href": "s3://bucket/a.tif"}}}',
            "is at s3://bucket/a.tif, not on this machine",
        ),
    ],
)
def test_what_is_no_item_is_told(content, message, tmp_path):
    path = tmp_path / "item.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        Scene(path, path, size=96)


def test_an_item_that_is_missing(tmp_path):
    with pytest.raises(OSError, match="missing.json"):
        locate(tmp_path / "missing.json")
