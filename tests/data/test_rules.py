import numpy as np
import pytest
from broken_images import REFUSED
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from paths import SHARED
from PIL import Image

from deltavlm_hf.data.rules import BUILDING, CELLS, LEVIR, ROAD, Thresholds, find_objects, load_mask, read_facts
from deltavlm_hf.data.scenes import generate_scene

REAL = SHARED / "real"

MASKS = arrays.arrays(
    np.uint8,
    st.tuples(st.integers(3, 14), st.integers(3, 14)),
    elements=st.sampled_from([0, 0, ROAD, BUILDING]),
)
LIMITS = st.builds(Thresholds, st.integers(1, 5), st.integers(1, 5))

# What a person sees in the masks: roads, buildings and their cells. Houses that touch are one; the slivers and specks
# at the edges of test_102, test_55, train_36, val_27 and train_005218 are none.
ALL = set(CELLS)
TRUTH = {
    "levir_cd/label/test_102_0512_0000.png": (
        (0, set()),
        (1, {"top-center", "top-right", "center-center", "center-right"}),
    ),
    "levir_cd/label/test_121_0768_0256.png": ((0, set()), (8, ALL - {"top-right", "center-right"})),
    "levir_cd/label/test_2_0000_0000.png": ((0, set()), (18, ALL)),
    "levir_cd/label/test_55_0256_0000.png": ((0, set()), (10, ALL - {"top-left", "top-right"})),
    "levir_cd/label/train_36_0512_0512.png": ((0, set()), (16, ALL - {"bottom-left", "bottom-center"})),
    "levir_cd/label/val_27_0000_0256.png": (
        (0, set()),
        (11, {"top-right", "bottom-left", "bottom-center", "bottom-right"}),
    ),
    "levir_mci/label/train_000518.png": ((0, set()), (0, set())),
    "levir_mci/label/train_005218.png": (
        (2, {"center-right", "bottom-left", "bottom-center", "bottom-right"}),
        (0, set()),
    ),
    "levir_mci/label/train_005650.png": ((1, {"center-center", "center-right", "bottom-center"}), (13, ALL)),
}


def names(cells: np.ndarray) -> set[str]:
    return {cell for cell, listed in zip(CELLS, cells, strict=True) if listed}


def components(changed: np.ndarray) -> list[set[tuple[int, int]]]:
    """Flood fill, pixel by pixel."""
    left = {(int(row), int(column)) for row, column in np.argwhere(changed)}
    found = []
    while left:
        edge = [left.pop()]
        part = set(edge)
        while edge:
            row, column = edge.pop()
            for neighbour in [(row + down, column + right) for down in (-1, 0, 1) for right in (-1, 0, 1)]:
                if neighbour in left:
                    left.remove(neighbour)
                    part.add(neighbour)
                    edge.append(neighbour)
        found.append(part)
    return found


def cell_of(position: int, length: int) -> int:
    """The first `length % 3` thirds have one pixel more."""
    edges = np.cumsum([length // 3 + (part < length % 3) for part in range(3)])
    return int(np.searchsorted(edges, position, side="right"))


@pytest.mark.skipif(not REAL.is_dir(), reason="the real masks are not beside the repository")
@pytest.mark.parametrize("name", TRUTH)
def test_real_masks(name):
    found = read_facts(load_mask(REAL / name, binary=name.startswith("levir_cd")))
    (roads, road_cells), (buildings, building_cells) = TRUTH[name]
    assert (found.roads, found.buildings) == (roads, buildings)
    assert names(found.road_cells) == road_cells
    assert names(found.building_cells) == building_cells


@given(MASKS, LIMITS)
def test_facts_against_brute_force(mask, thresholds):
    found = read_facts(mask, thresholds)
    for value, number, cells in (
        (ROAD, found.roads, found.road_cells),
        (BUILDING, found.buildings, found.building_cells),
    ):
        parts = [part for part in components(mask == value) if len(part) >= thresholds.min_area]
        assert number == len(parts)
        pixels = np.zeros(9, int)
        for row, column in set().union(*parts):
            pixels[cell_of(row, mask.shape[0]) * 3 + cell_of(column, mask.shape[1])] += 1
        assert cells.tolist() == (pixels >= thresholds.min_cell_area).tolist()
    assert [by_cell.sum() for by_cell in found.counts_by_cell] == [*found.counts]


@given(MASKS, LIMITS)
def test_objects_against_brute_force(mask, thresholds):
    found = find_objects(mask, thresholds)
    expected = []
    for kind, value in (("road", ROAD), ("building", BUILDING)):
        for part in components(mask == value):
            if len(part) >= thresholds.min_area:
                rows, columns = zip(*part, strict=True)
                box = (min(columns), min(rows), max(columns) + 1, max(rows) + 1)
                expected.append((kind, len(part), box, np.mean(columns).round(6), np.mean(rows).round(6)))
    assert sorted((item.kind, item.area, item.box, *np.round(item.centre, 6)) for item in found) == sorted(expected)


@given(MASKS)
def test_mirroring_the_mask_mirrors_the_cells(mask):
    height, width = mask.shape
    mask = mask[: height - height % 3, : width - width % 3]  # thirds of equal size
    plain, mirrored = read_facts(mask, Thresholds(1, 1)), read_facts(mask[:, ::-1], Thresholds(1, 1))
    assert (plain.roads, plain.buildings) == (mirrored.roads, mirrored.buildings)
    assert plain.road_cells.reshape(3, 3)[:, ::-1].ravel().tolist() == mirrored.road_cells.tolist()


def test_rules_and_generated_pictures_agree():
    for seed in range(4_000_000, 4_000_200):
        scene = generate_scene(seed)
        found = read_facts(scene.mask, Thresholds.for_size(96))
        assert (found.roads, found.buildings) == (scene.roads, len(scene.buildings))
        assert found.changed == scene.changed == bool(found.road_cells.any() or found.building_cells.any())


def test_thresholds():
    assert Thresholds.for_size(256) == LEVIR == Thresholds(20, 73)
    assert Thresholds.for_size(96) == Thresholds(3, 11)
    with pytest.raises(ValueError, match="min_area must be at least 1 pixel, got 0"):
        Thresholds(min_area=0)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "1", "zero-one", "soft", "I;16", "palette"])
def test_forms_of_masks(tmp_path, mode):
    classes = np.zeros((30, 40), np.uint8)
    classes[5:15, 5:15] = BUILDING
    image = Image.fromarray(classes)
    if mode == "zero-one":
        image = Image.fromarray(classes // 255)
    elif mode == "soft":
        classes[20:25, 5:30] = ROAD
        noise = np.random.default_rng(0).integers(-40, 41, classes.shape)
        image = Image.fromarray(np.clip(classes.astype(int) + noise, 0, 255).astype(np.uint8))
    elif mode == "palette":  # the numbers say nothing, the colours do
        image = Image.fromarray(np.where(classes, 0, 1).astype(np.uint8), "P")
        image.putpalette([255, 255, 255, 0, 0, 0])
    elif mode == "I;16":
        image = Image.fromarray(classes.astype(np.uint16))
    elif mode != "L":
        image = image.convert(mode)
    image.save(tmp_path / "mask.png")
    assert np.array_equal(load_mask(tmp_path / "mask.png"), classes)


def test_a_binary_mask_is_of_buildings(tmp_path):
    values = np.array([[0, 100, 128, 200, 255]], np.uint8)
    Image.fromarray(values).save(tmp_path / "mask.png")
    assert load_mask(tmp_path / "mask.png").tolist() == [[0, ROAD, ROAD, BUILDING, BUILDING]]
    assert load_mask(tmp_path / "mask.png", binary=True).tolist() == [[0, 0, BUILDING, BUILDING, BUILDING]]


@pytest.mark.parametrize(
    "values, message",
    [
        (np.array([[0, 1, 2]], np.uint8), r"mask.png has values from 0 to 2; expected 0, 128 \(road\) and 255"),
        (np.array([[0, 9999]], np.uint16), "has values from 0 to 9999"),
        (np.array([[[255, 0, 0], [0, 255, 0]]], np.uint8), "has colours; expected grey values"),
    ],
)
def test_masks_that_are_none(tmp_path, values, message):
    Image.fromarray(values).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match=message):
        load_mask(tmp_path / "mask.png")


def test_what_is_too_faint_or_of_another_kind(tmp_path):
    Image.fromarray(np.array([[0, 100]], np.uint8)).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match="has values from 0 to 100"):
        load_mask(tmp_path / "mask.png", binary=True)
    Image.fromarray(np.array([[0.0, 0.9]], np.float32)).save(tmp_path / "mask.tif")
    with pytest.raises(ValueError, match="mask.tif is an image of mode F; expected grey values of 8 bits"):
        load_mask(tmp_path / "mask.tif")


def test_a_file_that_is_no_image(tmp_path):
    (tmp_path / "mask.png").write_text("no image")
    with pytest.raises(ValueError, match=r"Cannot read the mask .*mask.png"):
        load_mask(tmp_path / "mask.png")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED)
def test_masks_of_every_fault_are_named(tmp_path, data):
    (tmp_path / "mask.png").write_bytes(data)
    with pytest.raises(ValueError, match=r"Cannot read the mask .*mask.png"):
        load_mask(tmp_path / "mask.png")
