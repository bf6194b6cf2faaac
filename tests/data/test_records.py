import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltavlm_hf.data.questions import INSTRUCTIONS, TASKS
from deltavlm_hf.data.records import Record, RecordError, read_records, write_records

TEXT = st.text(min_size=1, max_size=30).map(str.strip).filter(lambda text: text and "<image>" not in text)
NAMES = st.text("abcxyz019_-. ", min_size=1, max_size=12).filter(lambda name: name.strip(". ") != "")
TURNS = st.lists(st.tuples(TEXT, st.text(max_size=30)), min_size=1, max_size=4).map(tuple)
FLAGS = st.sampled_from([None, True, False])


@st.composite
def records(draw) -> Record:
    before, after = f"train/A/{draw(NAMES)}.png", f"train/B/{draw(NAMES)}.png"
    captions = draw(st.lists(TEXT, max_size=3).map(tuple))
    if captions:
        turns = ((INSTRUCTIONS["caption"], captions[0]),)
        return Record(draw(TEXT), "caption", before, after, turns, draw(FLAGS), captions)
    return Record(draw(TEXT), draw(st.sampled_from(TASKS)), before, after, draw(TURNS), draw(FLAGS))


@given(st.lists(records(), max_size=5))
def test_what_is_written_is_read(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "records.json"
    assert write_records(path, content) == len(content)
    assert list(read_records(path)) == content
    assert len(json.loads(path.read_text(encoding="utf-8"))) == len(content)


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "records.json"
    record = Record("1", "open", "a.png", "b.png", (("q", "a"),))
    write_records(path, [record])

    def failing():
        yield record
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_records(path, failing())
    assert list(read_records(path)) == [record]


def test_upstream_names_come_in_and_go_out(changechat):
    (first, *_) = read_records(changechat / "annotations" / "changechat_105k_train.json")
    assert first == Record(
        "0",
        "caption",
        "train/A/train_000000.png",
        "train/B/train_000000.png",
        ((INSTRUCTIONS["caption"], "there is no difference"),),
        changed=False,
    )
    (first, *_) = read_records(changechat / "annotations" / "changechat_105k_test.json")
    assert (first.id, first.task, len(first.captions)) == ("test_000000", "caption", 5)
    assert set(first.to_json()) == {"id", "image_A", "image_B", "captions", "changeflag"}


GOOD = {
    "id": 3,
    "image": ["A/x.png", "B/x.png"],
    "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image": ["A/x.png"]}, r"'image' must list the paths of two images, got \['A/x.png'\]"),
        ({"image": ["../secret.png", "B/x.png"]}, "image paths must lie below the folder of images, got '../secret"),
        ({"image": ["/etc/x.png", "B/x.png"]}, "must lie below the folder of images"),
        ({"image": ["C:/x.png", "B/x.png"]}, "must lie below the folder of images"),
        ({"image": ["A/a::b.png", "B/x.png"]}, "must not have '::' in them"),
        ({"conversations": GOOD["conversations"][:1]}, "'conversations' must list questions with their answers"),
        ({"conversations": GOOD["conversations"][::-1]}, "message 0 must have 'from': 'human'"),
        ({"conversations": [{"from": "human"}, GOOD["conversations"][1]]}, "message 0 must have .* a text 'value'"),
        ({"id": 1.5}, "'id' must be a number or a text, got 1.5"),
        ({"changeflag": "yes"}, "'changeflag' must be 0 or 1, got 'yes'"),
        ({"task": "segment"}, "'task' must be one of caption, .* got 'segment'"),
        ({"captions": [], "image_A": "A/x.png", "image_B": "B/x.png"}, r"'captions' must list at least one text"),
    ],
)
def test_malformed_records(tmp_path, change, message):
    path = tmp_path / "mine_train.json"
    path.write_text(json.dumps([GOOD, {**GOOD, **change}]))
    with pytest.raises(RecordError, match=f"mine_train.json, item 1 .*{message}"):
        list(read_records(path))


def test_a_byte_order_mark_does_not_matter(tmp_path):
    (tmp_path / "mine_train.json").write_text(json.dumps([GOOD]), encoding="utf-8-sig")
    assert [record.id for record in read_records(tmp_path / "mine_train.json")] == ["3"]


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"id": 3}', "holds no JSON list of records"),
        ("", "holds no JSON list of records"),
        ('[{"id": 3', "is not readable as JSON"),
        ("[3]", r"item 0 \(id none\): expected an object, got 3"),
    ],
)
def test_files_that_are_no_list_of_records(tmp_path, content, message):
    (tmp_path / "mine_train.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        list(read_records(tmp_path / "mine_train.json"))
