"""From answers to the report's files, through hand-made rows whose figures can be worked out on paper."""

import json
import re
from html.parser import HTMLParser

import datasets
import pytest

from deltavlm_hf.data import TASKS, load_generated
from deltavlm_hf.data.check import PUBLISHED
from deltavlm_hf.evaluation import evaluate_predictions, make_tables, published, published_tasks, write_report
from deltavlm_hf.evaluation.tables import HERE

SEED = 4_600_000
SETTINGS = {"data": "generated", "tasks": ["caption", "open"], "limit": None, "generate": {"num_beams": 5}}


@pytest.fixture(scope="module")
def rows():
    return load_generated(8, SEED)


@pytest.fixture(scope="module")
def texts(rows):
    return rows.remove_columns(["before", "after"])


@pytest.fixture(scope="module")
def right(texts):
    return [{"id": row["id"], "answers": [turn["answer"] for turn in row["turns"]]} for row in texts]


@pytest.fixture(scope="module")
def useless(texts):
    return [{"id": row["id"], "answers": ["<script>alert(1)</script>"] * len(row["turns"])} for row in texts]


@pytest.fixture(scope="module")
def evaluated(texts, right, useless):
    """Systems with their figures and cases, the useless one first."""
    return {name: evaluate_predictions(texts, answers) for name, answers in (("useless", useless), ("right", right))}


@pytest.fixture(scope="module")
def report(rows, evaluated, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    systems = {name: results for name, (results, _) in evaluated.items()}
    _, cases = evaluated["useless"]
    paths = write_report(folder, systems, cases, rows, title="A <test>", settings=SETTINGS)
    return {path.suffix: path.read_text() for path in paths}


def test_right_answers_have_full_marks(evaluated):
    results, cases = evaluated["right"]
    assert set(results) == set(TASKS)
    assert results["binary"]["accuracy"] == results["binary"]["f1"] == results["open"]["exact"] == 1
    assert results["caption"]["yes_no_from_captions"]["accuracy"] == 1
    for kind in ("roads", "buildings"):
        assert results["count"][kind]["exact"] == results["grid"][kind]["f1"] == 1
        assert results["count"][kind]["rmse"] == results["grid"][kind]["hamming"] == 0
    assert results["dialogue"]["whole"] == results["dialogue"]["consistent"] == 1
    assert all(case.score == 1 for case in cases)


def test_answers_that_cannot_be_read_are_wrong_and_counted(evaluated):
    results, cases = evaluated["useless"]
    assert results["binary"]["accuracy"] == results["open"]["exact"] == results["dialogue"]["turns"] == 0
    assert results["binary"]["unparsed"] == results["count"]["roads"]["unparsed"] == 8
    assert results["grid"]["buildings"]["unparsed"] == 8 and results["grid"]["buildings"]["hamming"] == 1
    assert results["dialogue"]["unparsed"] == 16  # yes or no, and counts
    assert all(case.score < 0.5 for case in cases)


def test_mixed_answers_by_hand(texts, right):
    rows = [row for row in texts if row["task"] == "count"][:2]
    truths = [answers["answers"][0] for row, answers in zip(texts, right, strict=True) if row["task"] == "count"][:2]
    results, cases = evaluate_predictions(rows, [{"answers": [truths[0]]}, {"answers": ["90 roads, 3 buildings"]}])
    assert results["count"]["roads"]["exact"] == 0.5
    assert results["count"]["roads"]["pairs"][1][1] == 90
    assert cases[0].score == 1 and cases[1].score < 0.02


def test_dialogues_that_contradict_themselves(texts):
    row = next(row for row in texts if row["task"] == "dialogue")
    others = [["yes", "no new roads, no new buildings", "x"], ["no", "1 new road, no new buildings", "x"]]
    agreeing = ["yes", "1 new road, no new buildings", "x"]
    results, _ = evaluate_predictions([row] * 3, [{"answers": answers} for answers in (*others, agreeing)])
    assert results["dialogue"]["consistent"] == pytest.approx(1 / 3)
    spoken = {**row, "turns": [{**row["turns"][0], "answer": "There are changes."}]}
    results, _ = evaluate_predictions([spoken], [{"answers": ["There are changes."]}])
    assert results["dialogue"]["turns"] == 1  # word for word, where the grammar does not read


def test_failed_captions_say_nothing_about_change(texts):
    rows = [{**row, "changed": True} for row in texts if row["task"] == "caption"]
    results, _ = evaluate_predictions(rows, [{"error": "out of memory"}] * len(rows))
    read = results["caption"]["yes_no_from_captions"]
    assert read["accuracy"] == read["recall"] == 0 and read["unparsed"] == len(rows)


def test_confusion_and_worst_cases_are_the_right_way_round(rows, texts, tmp_path):
    binary = [row for row in texts if row["task"] == "binary"]
    answers = ["yes" if index < 5 else "no" for index in range(8)]
    results, cases = evaluate_predictions(binary, [{"answers": [answer]} for answer in answers])
    truths = [row["turns"][0]["answer"] for row in binary]
    figures = results["binary"]
    for name, said, truth in (
        ("true_positives", "yes", "yes"),
        ("false_positives", "yes", "no"),
        ("false_negatives", "no", "yes"),
        ("true_negatives", "no", "no"),
    ):
        assert figures[name] == list(zip(answers, truths, strict=True)).count((said, truth))
    select = rows.filter(lambda task: task == "binary", input_columns="task")
    write_report(tmp_path, {"x": results}, cases, select, title="t", settings={})
    shown = re.findall(r"score (\d\.\d\d)", (tmp_path / "report.html").read_text())
    assert shown == sorted(shown) and "1.00" in shown and "0.00" in shown


def test_truths_that_cannot_be_read_are_left_out_and_told(rows, texts, right, tmp_path):
    changed = list(texts)
    index = next(index for index, row in enumerate(changed) if row["task"] == "count")
    turns = [{"question": changed[index]["turns"][0]["question"], "answer": "some"}]
    changed[index] = {**changed[index], "turns": turns}
    results, cases = evaluate_predictions(changed, right)
    assert results["count"]["samples"] == 7 and results["count"]["unreadable_truths"] == 1
    assert results["count"]["roads"]["exact"] == 1
    write_report(tmp_path, {"right": results}, cases, rows, title="t", settings={})
    told = "count: 7 samples; 1 left out: their right answer cannot be read"
    assert f"- {told}\n" in (tmp_path / "report.md").read_text()
    assert f"<li>{told}</li>" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda answers: answers[:-1], "Expected a prediction for each row; got 47 for 48 rows."),
        (lambda answers: [{**answers[0], "id": "x"}, *answers[1:]], "Prediction 0 is for record 'x'"),
        (lambda answers: [{"answers": "yes"}, *answers[1:]], "Prediction 0 must have a list of 1 answers, got 'yes'"),
        (lambda answers: [{"answers": []}, *answers[1:]], "Prediction 0 must have a list of 1 answers, got []"),
    ],
)
def test_predictions_of_other_rows_are_refused(texts, right, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate_predictions(texts, change(right))


def test_tables_stand_beside_the_published_ones(evaluated):
    systems = {name: results for name, (results, _) in evaluated.items()}
    tables = {table.title: table for table in make_tables(systems, TASKS)}
    yes_no = tables["Yes or no, asked"]
    assert [(name, source) for name, _, source in yes_no.rows] == [("useless", HERE), ("right", HERE)]
    for title, figures in (
        ("Captioning, all pairs (coco)", published.CAPTION["DeltaVLM"]),
        ("Yes or no, read off the caption", published.YES_NO["DeltaVLM"]),
        ("Counting", published.COUNT["DeltaVLM"]),
        ("3x3 grid, roads", published.GRID["roads"]["DeltaVLM"]),
        ("3x3 grid, buildings", published.GRID["buildings"]["DeltaVLM"]),
        ("Open questions, all pairs (coco)", published.OPEN["DeltaVLM"]),
    ):
        (name, shown, source) = next(row for row in tables[title].rows if row[0] == "DeltaVLM")
        assert tuple(shown[: len(figures)]) == figures
        assert "published" in source
    assert all(len(figures) == len(table.columns) for table in tables.values() for _, figures, _ in table.rows)
    lines = yes_no.markdown().splitlines()
    assert "| right | 100.00 | 100.00 | 100.00 | 100.00 | 100.00 | 0 | measured here |" in lines


def test_a_class_that_no_pair_has(texts, right, useless):
    """As roads are in LEVIR-CD: the table says why its figures are 0, once, whatever the answers are."""
    numbers = [number for number, row in enumerate(texts) if row["task"] == "grid"]
    numbers = [number for number in numbers if right[number]["answers"][0].endswith("buildings: []")]
    kept = [texts[number] for number in numbers]
    systems = {
        name: evaluate_predictions(kept, [answers[number] for number in numbers])[0]
        for name, answers in (("right", right), ("useless", useless))
    }
    roads, buildings = (table.notes for table in make_tables(systems) if table.title.startswith("3x3 grid"))
    told = "No pair has buildings: precision, recall, F1 and `jaccard` can be nothing but 0."
    assert buildings.count(told) == 1 and not any("No pair has" in note for note in roads)


@pytest.mark.parametrize("task", [None, "caption", "count", "grid", "open"])
def test_each_tasks_published_rows_stand_alone(task, evaluated):
    systems = {name: results for name, (results, _) in evaluated.items()}
    tables = make_tables(systems, [] if task is None else [task])
    having = [table.title for table in tables if any(source == published.SOURCE for _, _, source in table.rows)]
    assert (
        having
        == {
            None: [],
            "caption": ["Captioning, all pairs (coco)", "Yes or no, read off the caption"],
            "count": ["Counting"],
            "grid": ["3x3 grid, roads", "3x3 grid, buildings"],
            "open": ["Open questions, all pairs (coco)"],
        }[task]
    )
    notes = " ".join(note for table in tables for note in table.notes)
    assert ("The published" in notes) == (task in ("caption", "open"))


def test_on_other_data_nothing_published_is_shown(report):
    for text in report.values():
        assert "GPT-4o" not in text and published.SOURCE not in text
    assert json.loads(report[".json"])["published_tasks"] == []
    assert "stand beside no others" in report[".md"]


def official_rows(records: dict[str, int], split: str = "test") -> datasets.Dataset:
    """As many records of each task, about as many pairs of LEVIR-CC as there are, in turn."""
    tasks = [task for task, number in records.items() for _ in range(number)]
    numbers = [index % 1929 + 1 for number in records.values() for index in range(number)]
    paths = [f"images/{split}/A/{split}_{number:06}.png" for number in numbers]
    rows = datasets.Dataset.from_dict({"task": tasks, "before": paths})
    return rows.cast_column("before", datasets.Image())


class TestWhatThePublishedFiguresCompareWith:
    COUNTS = PUBLISHED["test"]

    @pytest.fixture
    def folder(self, tmp_path):
        for name in ("train", "test", "test_binary", "test_count", "test_loc", "test_open", "test_dialog"):
            (tmp_path / f"changechat_105k_{name}.json").write_text("[]")
        return tmp_path

    def test_the_whole_test_split(self, folder):
        assert published_tasks(official_rows(self.COUNTS), folder, "test") == list(self.COUNTS)
        few = official_rows({"count": 1929, "open": 7527})
        assert published_tasks(few, folder, "test") == ["count", "open"]
        assert published_tasks(few, folder / "changechat_105k_test_count.json", "test") == ["count", "open"]

    @pytest.mark.parametrize(
        ("rows", "split"),
        [
            (lambda rows: rows.select(range(100)), "test"),
            (lambda rows: rows.select([*range(1928), 0]), "test"),  # one pair twice
            (lambda rows: rows, "train"),
            (lambda rows: rows, "test[:50%]"),
            (lambda rows: official_rows({"caption": 1929}, "val"), "test"),
        ],
    )
    def test_no_part_and_no_other_split(self, rows, split, folder):
        assert published_tasks(rows(official_rows({"caption": 1929})), folder, split) == []

    def test_a_task_that_is_cut_short(self, folder):
        """As by `--limit`."""
        rows = official_rows({**self.COUNTS, "open": 7526})
        assert published_tasks(rows, folder, "test") == [task for task in self.COUNTS if task != "open"]

    def test_annotations_of_ones_own_about_the_same_images(self, folder):
        (folder / "changechat_105k_test_count.json").rename(folder / "mine_test_count.json")
        assert published_tasks(official_rows({"count": 1929}), folder, "test") == []


class Page(HTMLParser):
    """What a page loads, and what it shows."""

    def __init__(self, text: str):
        super().__init__()
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.shown: list[str] = []
        self.feed(text)

    def handle_data(self, data):
        if self.tags[-1:] != ["style"]:
            self.shown.append(data)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]


def test_page_needs_nothing_else_and_trusts_no_answer(report):
    page = Page(report[".html"])
    assert page.loaded and all(source.startswith("data:image/png;base64,") for source in page.loaded)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "url(" not in report[".html"] and "@import" not in report[".html"]
    assert "&lt;script&gt;" in report[".html"]
    for plot in ("Yes or no", "Cells missed, roads", "caption: length in words", "open: ROUGE-L"):
        assert f'alt="{plot}"' in report[".html"]
    assert all(f"Worst cases: {task}" in report[".html"] for task in TASKS)


def test_the_page_shows_no_markdown(report, evaluated):
    page = Page(report[".html"])
    lines = [line for text in page.shown for line in text.splitlines()]
    assert not [line for line in lines if re.match(r"\s*([-*#>] |\|)|```", line)]
    texts = "\n".join(lines).partition("Worst cases")[0]  # where answers are shown as they were given
    assert not re.search(r"`|\*\*|\]\(|\['", texts)
    assert "pre" not in page.tags and {"ul", "li", "code"} <= set(page.tags)
    assert "data: generated" in lines and "binary: 8 samples" in lines


def test_machine_and_people_read_the_same_figures(report, evaluated):
    results, _ = evaluated["right"]
    saved = json.loads(report[".json"])["systems"]["right"]
    assert saved == json.loads(json.dumps(results))
    low, high = saved["caption"]["intervals"]["ROUGE-L"]
    assert low <= saved["caption"]["all"]["ROUGE-L"] <= high
    assert "| right | 100.00 |" in report[".md"]


def test_an_old_report_outlives_a_failed_one(report, rows, evaluated, tmp_path):
    (tmp_path / "report.md").write_text("old")
    results, cases = evaluated["right"]
    with pytest.raises(TypeError):
        write_report(tmp_path, {"right": results}, cases, rows, title="t", settings={"what": object()})
    assert (tmp_path / "report.md").read_text() == "old"
