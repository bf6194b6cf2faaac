"""Answering a whole data set: with the shipped model, with baselines, killed, in two processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import datasets
import pytest
import torch
from broken_images import write_refused
from local_hub import Hub
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainerState, TrainingArguments

import deltavlm_hf
from deltavlm_hf.cli import main
from deltavlm_hf.data import PairCollator, load_generated
from deltavlm_hf.data.rows import undecoded
from deltavlm_hf.evaluation import (
    AnswerMetrics,
    ModelAnswerer,
    evaluate_predictions,
    make_baseline,
    predict,
    write_report,
)
from deltavlm_hf.inference import answer
from deltavlm_hf.inference.identity import identify
from deltavlm_hf.inference.loading import load_model
from deltavlm_hf.inference.processes import lock_folder

SEED = 4_500_000  # beyond all that the shipped model was trained or tested on


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(deltavlm_hf.tiny())


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(deltavlm_hf.tiny())


@pytest.fixture(scope="module")
def rows():
    return load_generated(6, SEED)


@pytest.fixture(scope="module")
def answers(model, processor, rows, tmp_path_factory):
    return predict(ModelAnswerer(model, processor), rows, tmp_path_factory.mktemp("answers"), {}, batch_size=4)


class Watched(ModelAnswerer):
    """Counts what is encoded and asked, and fails where it is told to."""

    def __init__(self, *arguments, poison: str | None = None):
        super().__init__(*arguments)
        self.encoded, self.asked, self.poison = 0, [], poison

    def encode(self, pairs):
        self.encoded += len(pairs)
        return super().encode(pairs)

    def answer(self, encoded, which, questions, histories):
        if any(self.poison and self.poison in question for question in questions):
            raise RuntimeError(f"no answer to {self.poison}")
        self.asked += questions
        return super().answer(encoded, which, questions, histories)


def test_answers_are_those_of_single_calls(model, processor, rows, answers):
    for row, entry in zip(rows, answers, strict=True):
        assert (entry["id"], entry["task"]) == (row["id"], row["task"])
        history: list = []
        for turn, said in zip(row["turns"], entry["answers"], strict=True):
            assert [said] == answer(model, processor, [turn["question"]], [history], [(row["before"], row["after"])])
            history = [*history, (turn["question"], said)]


class Listening(ModelAnswerer):
    """Keeps what it is asked, and answers nothing."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.prompts: set[str] = set()

    def answer(self, encoded, which, questions, histories):
        inputs = self.processor(text=questions, history=histories)["input_ids"]
        queries = self.processor.num_query_tokens
        self.prompts |= {self.processor.decode(ids[queries:], skip_special_tokens=True) for ids in inputs}
        return ["no"] * len(questions)


def test_questions_have_the_form_of_training_or_none(model, processor, rows, tmp_path):
    """As the collator makes them; verbatim only where it is asked for, and never in dialogues."""
    trained, verbatim = Listening(model, processor), Listening(model, processor)
    predict(trained, rows, tmp_path / "trained", {})
    predict(verbatim, rows, tmp_path / "verbatim", {}, verbatim_questions=True)
    single = {row["turns"][0]["question"] for row in rows if len(row["turns"]) == 1}
    collator = PairCollator(processor)
    learned = set()
    for row in rows:
        batch = collator([row | {"turns": row["turns"][:1]}])
        asked = batch["input_ids"][0][batch["labels"][0] == -100][processor.num_query_tokens :]
        learned.add(processor.decode(asked, skip_special_tokens=True))
    assert learned < trained.prompts and {f"q: {question}" for question in single} <= learned
    assert all(prompt.startswith("q: ") for prompt in trained.prompts)
    assert verbatim.prompts - trained.prompts == single
    with pytest.raises(ValueError, match="'verbatim_questions': True.* not .*'verbatim_questions': False"):
        predict(trained, rows, tmp_path / "verbatim", {})


def test_validation_during_training_asks_as_training_does(model, processor, rows, tmp_path):
    said = []
    hook = model.register_forward_pre_hook(
        lambda module, arguments, inputs: said.extend(inputs["input_ids"].tolist()), with_kwargs=True
    )
    arguments = TrainingArguments(tmp_path, use_cpu=True, report_to="none")
    binary = rows.filter(lambda task: task == "binary", input_columns="task")
    try:
        state = TrainerState()
        AnswerMetrics(processor, binary, max_new_tokens=2).on_evaluate(arguments, state, None, model, metrics={})
    finally:
        hook.remove()
    asked = {processor.decode(ids, skip_special_tokens=True) for ids in said if len(ids) > 1}
    assert asked == {f"q: {binary[0]['turns'][0]['question']}"}


def test_each_pair_is_encoded_once(model, processor, rows, tmp_path):
    watched = Watched(model, processor)
    shuffled = rows.shuffle(seed=0)  # rows of a pair need not stand together
    predict(watched, shuffled, tmp_path, {}, batch_size=4, num_workers=2)
    assert watched.encoded == 6
    assert len(watched.asked) == 6 * (5 + 3)


def test_right_answers_as_history(model, processor, rows, answers, tmp_path):
    dialogues = rows.filter(lambda task: task == "dialogue", input_columns="task")
    found = predict(ModelAnswerer(model, processor), dialogues, tmp_path, {}, own_history=False)
    for row, entry in zip(dialogues, found, strict=True):
        history = [(turn["question"], turn["answer"]) for turn in row["turns"][:2]]
        expected = answer(model, processor, [row["turns"][2]["question"]], [history], [(row["before"], row["after"])])
        assert [entry["answers"][2]] == expected


def test_what_fails_is_told_apart(model, processor, rows, answers, tmp_path):
    def break_image(row, index):
        if row["id"].startswith(f"scene_{SEED + 2}-"):
            row["after"] = {"bytes": b"no image", "path": row["after"]["path"]}
        return row

    broken = rows
    for column in ("before", "after"):
        broken = broken.cast_column(column, datasets.Image(decode=False))
    broken = broken.map(break_image, with_indices=True)
    watched = Watched(model, processor, poison="how many roads and buildings")
    found = predict(watched, broken, tmp_path, {}, batch_size=4)
    for row, entry, whole in zip(rows, found, answers, strict=True):
        if row["id"].startswith(f"scene_{SEED + 2}-"):
            assert "UnidentifiedImageError" in entry["error"]
        elif row["task"] == "count":
            assert entry["error"] == "RuntimeError: no answer to how many roads and buildings"
        else:
            assert entry["answers"] == whole["answers"]
    results, _ = evaluate_predictions(rows.remove_columns(["before", "after"]), found, intervals=False)
    assert results["binary"]["failed"] == results["binary"]["unparsed"] == 1  # counted as wrong
    assert results["count"]["failed"] == 6 and results["count"]["roads"]["exact"] == 0

    watched.poison = None
    watched.asked.clear()
    again = predict(watched, rows, tmp_path, {}, batch_size=4)  # with images that are whole now
    assert again == answers
    assert len(watched.asked) == 8 + 5  # only what had failed


@pytest.mark.filterwarnings("ignore")
def test_images_of_every_fault_cost_their_own_records_only(tmp_path):
    """From the answers to the report, whose worst cases show images."""
    names = write_refused(tmp_path)
    whole = load_generated(len(names) + 1, SEED, tasks=["binary", "count"])

    def break_image(row, index):
        if index // 2 < len(names):
            date = ("before", "after")[index // 2 % 2]
            row[date] = {"bytes": None, "path": str(tmp_path / names[index // 2])}
        return row

    rows = undecoded(whole).map(break_image, with_indices=True)
    found = predict(make_baseline("no-change", None), rows, tmp_path / "answers", {}, batch_size=4, num_workers=1)
    assert ["error" in entry for entry in found] == [True] * 2 * len(names) + [False] * 2
    for entry, name in zip(found[::2], names, strict=False):
        assert name in entry["error"]
    results, cases = evaluate_predictions(rows.remove_columns(["before", "after"]), found, intervals=False)
    assert results["binary"]["failed"] == len(names)
    write_report(tmp_path / "report", {"no-change": results}, cases, rows, title="Broken", settings={})
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("<article>") == 16 and "No answer: " in page

    nearest = make_baseline("nearest", rows)  # does without them too
    assert nearest.differences.shape == (1, 256)
    with pytest.raises(ValueError, match="no training pair whose images can be read"):
        make_baseline("nearest", rows.select(range(4)))


def test_a_folder_with_other_answers_is_refused(model, processor, rows, tmp_path):
    few = rows.select(range(2))
    predict(make_baseline("no-change", None), few, tmp_path, {"system": "no-change"})
    with pytest.raises(ValueError, match="was made with .*'no-change'.*go on with the same settings"):
        predict(ModelAnswerer(model, processor), few, tmp_path, {"system": "tiny"})


class TestAlone:
    def test_a_second_run_is_told(self, model, processor, rows, tmp_path):
        entered, leave = threading.Event(), threading.Event()

        class Slow(ModelAnswerer):
            def encode(self, pairs):
                entered.set()
                leave.wait(60)
                return super().encode(pairs)

        few = rows.select(range(2))
        first = threading.Thread(target=predict, args=(Slow(model, processor), few, tmp_path, {}))
        first.start()
        try:
            assert entered.wait(60)
            second = Watched(model, processor)
            with pytest.raises(BlockingIOError, match=f"Another run is answering into {tmp_path}: wait"):
                predict(second, few, tmp_path, {})
            assert second.encoded == 0
        finally:
            leave.set()
            first.join(60)
        assert len(predict(second, few, tmp_path, {})) == 2 and second.encoded == 0  # the first one answered

    def test_on_the_command_line(self, tmp_path, capsys, monkeypatch):
        """It is told before the model is loaded."""
        entered, leave = threading.Event(), threading.Event()
        command = ["evaluate", "tiny", "--pairs", "1", "--seed", str(SEED), "--tasks", "binary", "--device", "cpu"]
        command += ["--output", str(tmp_path)]

        def load_slowly(*arguments):
            entered.set()
            leave.wait(60)
            return load_model(*arguments)

        monkeypatch.setattr("deltavlm_hf.evaluation.run.load_model", load_slowly)
        codes = []
        first = threading.Thread(target=lambda: codes.append(main(command)))
        first.start()
        try:
            assert entered.wait(60)
            assert main(command) == 1
        finally:
            leave.set()
            first.join(120)
        folder = tmp_path / "predictions" / "tiny"
        assert f"deltavlm: error: Another run is answering into {folder}" in capsys.readouterr().err
        assert codes == [0]

    def test_a_killed_run_is_no_run(self, model, processor, rows, tmp_path):
        process = os.fork()
        if not process:
            with lock_folder(tmp_path):
                os.kill(os.getpid(), signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert (tmp_path / "predictions.lock").exists()
        assert len(predict(ModelAnswerer(model, processor), rows.select([0]), tmp_path, {})) == 1


class TestWhatAnswers:
    """What a run must have in common with the one that it goes on from."""

    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        return Path(shutil.copytree(deltavlm_hf.tiny(), tmp_path / "model"))

    @pytest.mark.parametrize(
        "file, old, new",
        [
            ("generation_config.json", '"max_new_tokens": ', '"max_new_tokens": 1'),
            ("config.json", '"post_layernorm_eps": ', '"post_layernorm_eps": 1'),
            ("processor_config.json", '"qformer_max_length": ', '"qformer_max_length": 1'),
            ("tokenizer_config.json", "{", "{ "),
            ("qformer_tokenizer/tokenizer.json", "{", "{ "),
            ("chat_template.jinja", "q: ", "Q: "),
        ],
    )
    def test_any_file_that_is_loaded(self, file, old, new, model, folder):
        model = AutoModelForImageTextToText.from_pretrained(folder)
        before = identify(model)
        assert before == identify(model) and before[0].startswith(f"{folder}: ")
        (folder / "report.json").write_text("{}")  # an evaluation may be written there
        (folder / "README.md").write_text("A model")
        assert identify(model) == before
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new, 1))
        assert identify(model) != before

    def test_weights_of_the_same_size_and_time(self, folder):
        model = AutoModelForImageTextToText.from_pretrained(folder)
        before, file = identify(model), folder / "model.safetensors"
        status = file.stat()
        weights = load_file(file)
        weights["query_tokens"] += 1
        save_file(weights, file, {"format": "pt"})
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert file.stat().st_size == status.st_size and identify(model) != before

    def test_the_base_of_a_small_checkpoint(self, folder, tmp_path):
        from deltavlm_hf.training import FreezePolicy, freeze, leave_out_frozen

        model = AutoModelForImageTextToText.from_pretrained(folder)
        freeze(model, FreezePolicy())
        leave_out_frozen(model)
        model.save_pretrained(tmp_path / "small")
        small = AutoModelForImageTextToText.from_pretrained(tmp_path / "small")
        before = identify(small)
        assert [place.partition(": ")[0] for place in before] == [str(tmp_path / "small"), str(folder)]
        weights = load_file(folder / "model.safetensors")
        weights["query_tokens"] += 1
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        after = identify(small)
        assert after[0] == before[0] and after[1] != before[1]

    def test_training_data_of_a_baseline(self, tmp_path, capsys):
        command = ["evaluate", "majority", "--pairs", "2", "--tasks", "binary", "--output", str(tmp_path)]
        assert main(command) == 0
        journal = tmp_path / "predictions" / "majority" / "predictions.0.jsonl"
        head, *lines = journal.read_text().splitlines()
        other = json.loads(head)
        assert len(other["made_of"]) == 16
        journal.write_text("\n".join([json.dumps({**other, "made_of": "of other rows"}), *lines, ""]))
        assert main(command) == 1
        assert "'made_of': 'of other rows'" in capsys.readouterr().err

    @pytest.mark.slow
    def test_the_commit_of_a_hub_id(self, tmp_path):
        """The model on the Hub changes between two runs of one command."""
        model = Path(deltavlm_hf.tiny())
        files = {str(path.relative_to(model)): path.read_bytes() for path in model.rglob("*") if path.is_file()}
        code = (
            "import sys; from deltavlm_hf.cli import main\nfor _ in sys.stdin: print(main(sys.argv[1:]), flush=True)"
        )
        command = ["evaluate", "me/model", "--pairs", "1", "--tasks", "binary", "--device", "cpu"]
        journal = tmp_path / "out" / "predictions" / "model" / "predictions.0.jsonl"
        with Hub() as hub:
            hub.files["me/model"] = {"main": files}
            environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
            environment |= {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1"}
            run = subprocess.Popen(
                [sys.executable, "-c", code, *command, "--output", str(tmp_path / "out")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            assert run.stdin and run.stdout

            def again() -> str:
                run.stdin.write("\n")
                run.stdin.flush()
                return next(line.strip() for line in run.stdout if line.strip() in ("0", "1"))

            try:
                assert again() == "0"
                commit = hub.sha("me/model", "main")
                assert json.loads(journal.read_text().splitlines()[0])["made_of"] == [f"me/model: {commit}"]
                assert again() == "0"
                assert len(journal.read_text().splitlines()) == 2  # nothing was asked again
                hub.files["me/model"]["main"] = {**files, "generation_config.json": b'{"max_new_tokens": 1}'}
                assert again() == "1"
                changed = load_file(model / "model.safetensors")
                save_file({name: weight + 1 for name, weight in changed.items()}, tmp_path / "weights")
                hub.files["me/model"]["main"] = {**files, "model.safetensors": (tmp_path / "weights").read_bytes()}
                assert again() == "1"
                hub.files["me/model"]["main"] = files
                assert again() == "0"
            finally:
                _, errors = run.communicate()
        assert errors.count(f"me/model: {commit}") == 2 and "choose another folder" in errors


def test_baselines(rows, tmp_path):
    training = load_generated(30, SEED + 100)
    results = {}
    for name in ("no-change", "majority", "nearest"):
        found = predict(make_baseline(name, training), rows, tmp_path / name, {})
        results[name], _ = evaluate_predictions(rows.remove_columns(["before", "after"]), found, intervals=False)
        assert all(figures["failed"] == 0 for figures in results[name].values())
        assert results[name]["count"]["roads"]["unparsed"] == results[name]["binary"]["unparsed"] == 0
    unchanged = [not row["changed"] for row in rows if row["task"] == "binary"]
    assert results["no-change"]["binary"]["accuracy"] == pytest.approx(sum(unchanged) / 6)
    itself = predict(make_baseline("nearest", rows), rows, tmp_path / "itself", {})
    perfect, _ = evaluate_predictions(rows.remove_columns(["before", "after"]), itself, intervals=False)
    assert perfect["binary"]["accuracy"] == perfect["grid"]["roads"]["subset_accuracy"] == 1
    assert perfect["dialogue"]["whole"] == perfect["open"]["exact"] == 1
    with pytest.raises(ValueError, match="The baseline majority needs training data"):
        make_baseline("majority", None)
    with pytest.raises(ValueError, match="Unknown baseline 'random', expected one of no-change"):
        make_baseline("random", None)


def evaluate_command(folder: Path, *options: str) -> list[str]:
    """Without captions and open questions, whose scores take Java's time."""
    data = ["tiny", "--pairs", "8", "--seed", str(SEED), "--tasks", "binary", "count", "grid", "dialogue"]
    run = ["--batch-size", "2", "--device", "cpu", "--output", str(folder)]
    return [*options, "-m", "deltavlm_hf", "evaluate", *data, *run]


def figures(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())["systems"]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    done = subprocess.run([sys.executable, *evaluate_command(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "### Counting" in done.stdout and "published (arXiv" not in done.stdout  # of other data
    assert json.loads((folder / "report.json").read_text())["settings"]["questions"] == "as in training, q: ..."
    again = subprocess.run(
        [sys.executable, *evaluate_command(folder), "--verbatim-questions"], capture_output=True, text=True
    )
    assert again.returncode == 1 and "go on with the same settings or choose another folder" in again.stderr
    return folder


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(whole_run, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launch, *evaluate_command(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = [path.read_text().count("\n") - 1 for path in sorted(tmp_path.rglob("predictions.*.jsonl"))]
    assert len(written) == 2 and all(16 == number for number in written)  # each did its half
    assert figures(tmp_path) == figures(whole_run)
    assert done.stdout.count("### Yes or no, asked") == 1


@pytest.mark.slow
def test_a_killed_run_goes_on(whole_run, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen([sys.executable, *evaluate_command(tmp_path)], stderr=subprocess.PIPE, env=environment)
    journal = tmp_path / "predictions" / "tiny" / "predictions.0.jsonl"
    deadline = time.time() + 120
    while time.time() < deadline and not (journal.exists() and journal.read_bytes().count(b"\n") > 6):
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    before = journal.read_bytes()
    assert 6 < before.count(b"\n") < 33
    done = subprocess.run([sys.executable, *evaluate_command(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole_lines = before[: before.rfind(b"\n") + 1]
    assert journal.read_bytes().startswith(whole_lines)
    indices = [json.loads(line)["index"] for line in journal.read_text().splitlines()[1:]]
    assert sorted(indices) == list(range(32))  # none was asked twice
    assert figures(tmp_path) == figures(whole_run)


def test_trainer_has_the_same_figures(processor, rows, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(deltavlm_hf.tiny())
    arguments = TrainingArguments(
        tmp_path, max_steps=1, use_cpu=True, report_to="none", save_strategy="no", remove_unused_columns=False
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=PairCollator(processor),
        callbacks=[AnswerMetrics(processor, rows, max_new_tokens=160)],
    )
    found = trainer.evaluate()
    answers = predict(ModelAnswerer(model, processor), rows, tmp_path / "by-hand", {}, batch_size=8)
    results, _ = evaluate_predictions(rows.remove_columns(["before", "after"]), answers, intervals=False)
    assert found["eval_binary_accuracy"] == results["binary"]["accuracy"]
    assert found["eval_count_roads_mae"] == results["count"]["roads"]["mae"]
    assert found["eval_caption_CIDEr"] == results["caption"]["all"]["CIDEr"]
    assert found["eval_dialogue_whole"] == results["dialogue"]["whole"]
    assert any("eval_grid_roads_f1" in entry for entry in trainer.state.log_history)


def test_validation_asks_anew_at_the_same_step(processor, rows, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(deltavlm_hf.tiny())
    arguments = TrainingArguments(tmp_path, use_cpu=True, report_to="none", remove_unused_columns=False)
    binary = rows.filter(lambda task: task == "binary", input_columns="task")
    callbacks = [AnswerMetrics(processor, binary, max_new_tokens=2)]
    collator = PairCollator(processor)
    trainer = Trainer(model, arguments, eval_dataset=binary, data_collator=collator, callbacks=callbacks)
    assert trainer.evaluate()["eval_binary_accuracy"] > 0.5
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            parameter.zero_()
    assert trainer.evaluate()["eval_binary_accuracy"] == 0


def test_pairs_are_told_apart_by_content(model, processor, rows, answers, tmp_path):
    """Files that were put into a table may all have the same name."""

    def rename(row):
        for date in ("before", "after"):
            row[date] = {**row[date], "path": f"{date}.png"}
        return row

    renamed = rows
    for column in ("before", "after"):
        renamed = renamed.cast_column(column, datasets.Image(decode=False))
    found = predict(ModelAnswerer(model, processor), renamed.map(rename), tmp_path, {}, batch_size=4)
    assert [entry["answers"] for entry in found] == [entry["answers"] for entry in answers]


def test_a_pair_that_cannot_be_encoded_is_told_apart(model, processor, rows, answers, tmp_path):
    class Narrow(ModelAnswerer):
        def encode(self, pairs):
            if len(pairs) > 1:
                raise MemoryError("too many pairs")
            self.pairs = getattr(self, "pairs", 0) + 1
            if self.pairs == 3:
                raise RuntimeError("this pair")
            return super().encode(pairs)

    found = predict(Narrow(model, processor), rows, tmp_path, {}, batch_size=4)
    failed = [entry for entry in found if "error" in entry]
    assert len(failed) == 6 and {entry["error"] for entry in failed} == {"RuntimeError: this pair"}
    assert all(one == other for one, other in zip(found, answers, strict=True) if "error" not in one)


def test_four_bits_on_the_cpu(processor, rows):
    from deltavlm_hf.training.quantization import four_bit_config

    quantised = AutoModelForImageTextToText.from_pretrained(
        deltavlm_hf.tiny(), quantization_config=four_bit_config(torch.float32), device_map="cpu"
    )
    kinds = {name: type(module).__name__ for name, module in quantised.named_modules()}
    four_bit = {name for name, kind in kinds.items() if kind == "Linear4bit"}
    assert four_bit and all(name.startswith("language_model.") for name in four_bit)
    answerer = ModelAnswerer(quantised, processor)
    encoded = answerer.encode([(row["before"], row["after"]) for row in rows.select([1, 7])])
    said = answerer.answer(encoded, [0, 1], [rows[1]["turns"][0]["question"]] * 2, [None, None])
    assert set(said) <= {"yes", "no"}
