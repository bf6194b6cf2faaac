import base64
import io
import re

import numpy as np
import pytest
from broken_images import REFUSED, write_refused
from PIL import Image

from deltavlm_hf.data import load_changechat, load_generated, write_sheet
from deltavlm_hf.data.rows import as_seen, undecoded
from deltavlm_hf.data.show import COLOURS, overlay


def pictures(page: str) -> list[Image.Image]:
    return [
        Image.open(io.BytesIO(base64.b64decode(data)))
        for data in re.findall(r'src="data:image/png;base64,(.*?)"', page)
    ]


def test_a_sheet_of_a_data_set(changechat, tmp_path):
    rows = load_changechat(changechat, split="test", masks=True)
    assert write_sheet(rows, tmp_path / "deep" / "sheet.html", "A <title>") == len(rows) == 18
    page = (tmp_path / "deep" / "sheet.html").read_text(encoding="utf-8")
    assert page.count("<article>") == 18 and "A &lt;title&gt;" in page
    assert "Please determine how many roads and buildings have changed?" in page
    assert "a road appears in version 4" in page  # every reference caption
    assert not re.search(r'(src|href)="(?!data:)', page)  # needs no other file
    shown = pictures(page)
    assert len(shown) == 3 * 18
    assert np.array_equal(np.asarray(shown[0]), np.asarray(rows[0]["before"]))


def test_text_is_not_taken_for_markup(tmp_path):
    (row,) = load_generated(1, tasks=["binary"])
    row["turns"] = [{"question": "<script>alert(1)</script>", "answer": "a & b"}]
    write_sheet([row], tmp_path / "sheet.html")
    page = (tmp_path / "sheet.html").read_text(encoding="utf-8")
    assert "<script>" not in page and "a &amp; b" in page
    assert len(pictures(page)) == 2  # no mask, no third picture


def test_files_that_are_missing_or_broken_are_shown_as_such(changechat, tmp_path):
    images = changechat / "images" / "test"
    rows = load_changechat(changechat, split="test", tasks=["grid"], masks=True)
    (images / "A" / "test_000001.png").unlink()
    (images / "B" / "test_000002.png").write_text("no image")
    write_sheet(undecoded(rows), tmp_path / "sheet.html")
    page = (tmp_path / "sheet.html").read_text(encoding="utf-8")
    assert "No such file or directory" in page and "cannot identify image file" in page
    assert len(pictures(page)) == 9 - 1 - 2  # the overlay needs the second date


@pytest.mark.filterwarnings("ignore")
def test_images_of_every_fault_are_shown_as_such(changechat, tmp_path):
    names = write_refused(tmp_path)
    (row,) = undecoded(load_changechat(changechat, split="test", tasks=["grid"], masks=True)).select([0])
    rows = [{**row, "before": {"bytes": None, "path": str(tmp_path / name)}} for name in names]
    rows += [{**row, "after": {"bytes": data, "path": None}} for data in REFUSED.values()]
    rows += [{**row, "mask": {"bytes": data, "path": None}} for data in REFUSED.values()]
    assert write_sheet([*rows, row], tmp_path / "sheet.html") == len(rows) + 1
    page = (tmp_path / "sheet.html").read_text(encoding="utf-8")
    assert page.count("<article>") == len(rows) + 1
    assert len(pictures(page)) == 3 + 2 * len(names) + (1 + 2) * len(REFUSED)  # no overlay on a date that is not there


def test_a_data_set_is_shown_whatever_its_images(changechat, tmp_path):
    """Decoded as rows are looked at, one broken file would end the sheet."""
    rows = load_changechat(changechat, split="test", tasks=["grid"])
    (changechat / "images" / "test" / "A" / "test_000001.png").write_bytes(REFUSED["bomb"])
    assert write_sheet(rows, tmp_path / "sheet.html") == 3
    page = (tmp_path / "sheet.html").read_text(encoding="utf-8")
    assert "pixels" in page and len(pictures(page)) == 5


def test_16_bits_are_shown_as_the_model_gets_them(tmp_path):
    levels = np.arange(16, dtype=np.uint16).reshape(4, 4) * 4096
    assert np.asarray(as_seen(Image.fromarray(levels)))[..., 0].tolist() == (levels / 257).round().tolist()


def test_a_failed_write_leaves_what_was_there(tmp_path):
    write_sheet([], tmp_path / "sheet.html", "first")
    with pytest.raises(KeyError):
        write_sheet([{}], tmp_path / "sheet.html", "second")
    assert "first" in (tmp_path / "sheet.html").read_text(encoding="utf-8")


def test_overlay():
    mask = np.array([[0, 128], [255, 0]], np.uint8)
    seen = np.asarray(overlay(Image.new("RGB", (2, 2), (100, 100, 100)), Image.fromarray(mask)))
    road, building = (np.add(COLOURS[kind], 100) // 2 for kind in ("road", "building"))
    assert seen.tolist() == [[[100] * 3, road.tolist()], [building.tolist(), [100] * 3]]
