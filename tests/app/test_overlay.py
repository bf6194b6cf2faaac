"""Heat and cells over images."""

import numpy as np
import pytest
from PIL import Image

from deltavlm_hf.app.overlay import MOST, draw_cells, overlay_heat, overlay_mask


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

    def test_each_class_of_a_mask_has_its_colour(self):
        mask = np.zeros((4, 4), np.uint8)
        mask[0], mask[3] = 128, 255
        drawn, legend = overlay_mask(Image.new("RGB", (40, 40), (100, 100, 100)), mask, ["road", "building"])
        drawn = np.asarray(drawn)
        assert legend == "road yellow, building blue"
        assert (drawn[10:30] == 100).all()
        yellow, blue = (100 * (1 - MOST) + MOST * np.array(colour) for colour in ((255, 196, 0), (0, 174, 255)))
        assert (abs(drawn[:10] - yellow) <= 1).all() and (abs(drawn[30:] - blue) <= 1).all()

    def test_masks_of_other_classes(self):
        mask = np.array([[1, 2, 3]], np.uint8)
        classes = ["water", "building", "trees"]
        drawn, legend = overlay_mask(Image.new("RGB", (3, 1)), mask, classes)
        assert legend == "water red, building blue, trees green"
        assert len(np.unique(np.asarray(drawn).reshape(3, 3), axis=0)) == 3
