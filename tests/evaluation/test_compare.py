"""Reports beside each other: figures are those of the reports, intervals those of paired draws, other data refused."""

import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest

from deltavlm_hf.cli import main
from deltavlm_hf.evaluation.compare import compare
from deltavlm_hf.evaluation.metrics import figure_of


def evaluate(model, folder, *options) -> None:
    assert main(["evaluate", str(model), "--output", str(folder), *options]) == 0


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Of two baselines on twelve generated pairs, one of them beside a third."""
    folder = tmp_path_factory.mktemp("reports")
    evaluate("no-change", folder / "one", "--pairs", "12", "--baselines", "majority")
    evaluate("nearest", folder / "two", "--pairs", "12")
    return folder / "one", folder / "two"


def rows_of(markdown: str) -> dict[str, list[str]]:
    cells = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line[:1] == "|"
    )
    return {name: values for name, *values in cells}


def test_figures_are_those_of_the_reports(reports):
    one, two = (json.loads((folder / "report.json").read_text())["systems"] for folder in reports)
    found = {name: values for name, values, _ in compare(reports).rows}
    for number, figures in enumerate((one["no-change"], two["nearest"])):
        expected = {
            "binary: accuracy": figures["binary"]["accuracy"],
            "binary: f1": figures["binary"]["f1"],
            "dialogue: turns": figures["dialogue"]["turns"],
            "dialogue: whole": figures["dialogue"]["whole"],
            "dialogue: consistent": figures["dialogue"]["consistent"],
            "open: exact": figures["open"]["exact"],
        }
        for kind in ("roads", "buildings"):
            expected |= {f"count: {kind} {name}": figures["count"][kind][name] for name in ("exact", "mae", "rmse")}
            expected[f"grid: {kind} f1"] = figures["grid"][kind]["f1"]
            expected[f"grid: {kind} all-right"] = figures["grid"][kind]["subset_accuracy"]
        for task in ("caption", "open"):
            for subset in ("all", "changed", "unchanged"):
                for name in ("BLEU-4", "ROUGE-L", "CIDEr"):
                    expected[f"{task}: {subset} {name}"] = figures[task][subset][name]
        assert {name: found[name][number] for name in expected} == pytest.approx(expected, abs=1e-9)


def test_differences_and_intervals_by_hand(reports):
    """The same draws for both, done anew: pairs, with all that was asked about them."""
    found = compare(reports, resamples=200)
    (difference,) = next(each for name, _, each in found.rows if name == "count: buildings mae")
    one, two = (json.loads((folder / "report.json").read_text())["systems"] for folder in reports)
    first, other = (
        np.array([abs((said or 0) - truth) for truth, said in figures["count"]["buildings"]["pairs"]])
        for figures in (one["no-change"], two["nearest"])
    )
    draws = np.random.default_rng(0).multinomial(12, np.full(12, 1 / 12), size=200)
    drawn = [(draw * other).sum() / 12 - (draw * first).sum() / 12 for draw in draws]
    expected = (other.mean() - first.mean(), *np.quantile(drawn, (0.025, 0.975)))
    assert difference == pytest.approx(expected)


def test_intervals_of_bleu_hold_it(reports):
    for folder in reports:
        for figures in json.loads((folder / "report.json").read_text())["systems"].values():
            for task in ("caption", "open"):
                low, high = figures[task]["intervals"]["BLEU-4"]
                assert low - 1e-9 <= figures[task]["all"]["BLEU-4"] <= high + 1e-9 and low <= high


def test_the_command(reports, tmp_path, capsys):
    assert main(["compare", *map(str, reports), "--output", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "2 systems on 12 pairs:" in said.err
    markdown = (tmp_path / "comparison.md").read_text()
    assert said.out.strip() in markdown
    rows = rows_of(markdown)
    assert rows["figure"] == ["no-change", "nearest", "difference"]
    first, other, difference = rows["binary: accuracy"]
    shown = re.fullmatch(r"\**([+-][\d.]+) \(([+-][\d.]+) to ([+-][\d.]+)\)\**", difference)
    assert shown and float(shown[1]) == pytest.approx(float(other) - float(first), abs=0.011)
    assert float(shown[2]) <= float(shown[1]) <= float(shown[3])
    bold = float(shown[2]) > 0 or float(shown[3]) < 0
    assert difference.startswith("**") == bold
    assert "METEOR has no interval" in markdown

    class Cells(HTMLParser):
        found: list[str] = []

        def handle_data(self, data):
            self.found.append(data)

    page = Cells()
    page.feed((tmp_path / "comparison.html").read_text())
    assert {cell.strip("*") for cells in rows.values() for cell in cells if cell[0] != "-"} <= {*page.found}


def test_all_systems_of_one_report(reports, tmp_path, capsys):
    assert main(["compare", str(reports[0] / "report.json"), "--output", str(tmp_path)]) == 0
    assert rows_of(capsys.readouterr().out)["figure"] == ["no-change", "majority", "difference"]
    assert main(["compare", str(reports[1]), "--output", str(tmp_path)]) == 1
    assert "has one system, nearest: name another report" in capsys.readouterr().err


def test_systems_of_one_name_and_without_difference(reports, tmp_path, capsys):
    shutil.copytree(reports[1], tmp_path / "again")
    assert main(["compare", str(reports[1]), str(tmp_path / "again"), "--output", str(tmp_path / "out")]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert rows["figure"][:2] == [f"nearest ({reports[1]})", f"nearest ({tmp_path / 'again'})"]
    assert rows["binary: f1"][2] == "+0.00 (+0.00 to +0.00)"


def test_a_report_of_fewer_tasks(reports, tmp_path):
    """What one alone was asked stands without a difference, whichever comes first."""
    evaluate("majority", tmp_path / "few", "--pairs", "12", "--tasks", "count")
    for order in ([reports[1], tmp_path / "few"], [tmp_path / "few", reports[1]]):
        rows = {name: (values, differences) for name, values, differences in compare(order, resamples=20).rows}
        values, (difference,) = rows["count: roads exact"]
        assert None not in values and difference is not None
        values, (difference,) = rows["binary: f1"]
        assert [value is None for value in values] == [path.name == "few" for path in order] and difference is None


def test_other_data_are_refused(reports, tmp_path, capsys):
    evaluate("no-change", tmp_path / "fewer", "--pairs", "5", "--tasks", "binary")
    evaluate("no-change", tmp_path / "others", "--pairs", "12", "--tasks", "binary", "--seed", "6000000")
    for other in ("fewer", "others"):
        assert main(["compare", str(reports[0]), str(tmp_path / other), "--output", str(tmp_path / "out")]) == 1
        assert "are not measured on the same: 12 and" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["", "{}", '{"nearest": [["binary"]]}', '{"x": []}', "[1]"])
def test_damaged_records(content, reports, tmp_path, capsys):
    folder = shutil.copytree(reports[1], tmp_path / "report")
    (folder / "records.json").write_text(content)
    assert main(["compare", str(reports[0]), str(folder)]) == 1
    assert "records" in capsys.readouterr().err
    (folder / "records.json").unlink()
    assert main(["compare", str(reports[0]), str(folder)]) == 1
    assert "records.json is missing" in capsys.readouterr().err
    assert main(["compare", str(reports[0]), str(tmp_path / "nowhere")]) == 1
    assert "does not exist; `deltavlm evaluate` writes it" in capsys.readouterr().err


def test_masks_of_a_model(mask_model_folder, tmp_path):
    options = ["--pairs", "3", "--tasks", "binary", "--max-new-tokens", "2", "--baselines", "no-change"]
    evaluate(mask_model_folder, tmp_path / "masks", *options)
    figures = json.loads((tmp_path / "masks" / "report.json").read_text())["systems"][str(mask_model_folder)]
    found = {name: (values, differences) for name, values, differences in compare([tmp_path / "masks"]).rows}
    for kind, each in figures["masks"]["classes"].items():
        values, differences = found[f"masks: {kind} iou"]
        assert values == [pytest.approx(each["iou"] or 0.0), None] and differences == [None]


def test_a_figure_with_nothing_to_divide_by():
    for name in ("accuracy", "f1", "iou", "roads rmse"):
        assert figure_of(name, np.zeros(3)) == 0
    assert figure_of("BLEU-4", np.zeros((2, 10))).tolist() == [0, 0]
