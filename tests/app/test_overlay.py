"""Heat and masks as layers over images."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from deltavlm_hf.app.overlay import MOST, embed, heat_layer, mask_layer


class TestHeat:
    def test_it_covers_where_it_is(self):
        heat = np.zeros((6, 9))
        heat[:, :3] = 1.0
        drawn = np.asarray(heat_layer(heat))
        assert drawn.shape == (6, 9, 4)
        assert (drawn[:, 3:, 3] == 0).all()
        assert (drawn[:, :3, 3] == round(255 * MOST)).all()
        assert (drawn[:, :3, :3].mean((0, 1)) > 140).all()  # the ramp ends bright

    def test_maps_of_one_scale(self):
        weak, strong = (np.asarray(heat_layer(np.full((2, 2), heat), top=1.0))[..., 3] for heat in (0.1, 0.9))
        assert (0 < weak).all() and (weak < strong).all()

    def test_none_at_all(self):
        assert (np.asarray(heat_layer(np.zeros((4, 4))))[..., 3] == 0).all()

    def test_other_shapes(self):
        with pytest.raises(ValueError, match=r"shape \(H, W\), got \(1, 2, 2\)"):
            heat_layer(np.zeros((1, 2, 2)))


class TestMask:
    def test_each_class_has_its_colour(self):
        mask = np.zeros((4, 4), np.uint8)
        mask[0], mask[3] = 128, 255
        drawn, colours = mask_layer(mask, ["road", "building"])
        drawn = np.asarray(drawn)
        assert colours == {"road": "#ffc400", "building": "#00aeff"}
        assert (drawn[1:3, :, 3] == 0).all()
        assert (drawn[0] == (255, 196, 0, round(255 * MOST))).all()
        assert (drawn[3] == (0, 174, 255, round(255 * MOST))).all()

    def test_other_classes(self):
        drawn, colours = mask_layer(np.array([[1, 2, 3]], np.uint8), ["water", "building", "trees"])
        assert list(colours) == ["water", "building", "trees"] and len(set(colours.values())) == 3
        assert len(np.unique(np.asarray(drawn).reshape(3, 4), axis=0)) == 3


def test_an_embedded_picture_is_the_picture():
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    kind, _, content = embed(image).partition(",")
    assert kind == "data:image/png;base64"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))), np.asarray(image))
