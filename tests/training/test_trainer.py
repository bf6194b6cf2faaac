"""What `DeltaVLMTrainer` does in a step, against the stock `Trainer`."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer

from deltavlm_hf import DeltaVLMForConditionalGeneration
from deltavlm_hf.data import PairCollator, load_generated
from deltavlm_hf.training import DeltaVLMTrainer, DeltaVLMTrainingArguments, TrainingRows, freeze


@pytest.fixture
def trainers(tmp_path, tiny_model, tiny_processor, rows):
    """Ours and the stock one, of one model, in training mode."""

    def make(**kwargs) -> tuple[Trainer, Trainer]:
        freeze(tiny_model)
        plain = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "report_to": "none"}
        args = DeltaVLMTrainingArguments(str(tmp_path), use_cpu=True, **plain, **kwargs)
        rest = {"train_dataset": TrainingRows(rows), "processing_class": tiny_processor}
        ours = DeltaVLMTrainer(tiny_model, args, **rest)
        stock = Trainer(tiny_model, args, data_collator=PairCollator(tiny_processor), **rest)
        tiny_model.train()
        return ours, stock

    return make


def step(trainer: Trainer, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """The loss, the gradients, and at how many positions logits were computed."""
    model = trainer.model
    model.zero_grad()
    torch.manual_seed(0)  # the same dropout
    loss, outputs = trainer.compute_loss(model, dict(batch), return_outputs=True)
    loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return loss.detach(), {name: gradient.clone() for name, gradient in gradients.items()}, outputs.logits.shape[1]


def test_logits_are_computed_where_labels_are_predicted(trainers, batch):
    ours, stock = trainers()
    loss, gradients, positions = step(ours, batch)
    expected_loss, expected_gradients, length = step(stock, batch)
    assert length == batch["input_ids"].shape[1]
    longest_answer = (batch["labels"] != -100).sum(-1).max()
    assert positions == longest_answer < length / 2  # padded on the left: answers end together
    torch.testing.assert_close(loss, expected_loss)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-5, rtol=1e-3)


def test_evaluation_gives_all_logits(trainers, batch):
    ours, _ = trainers()
    ours.model.eval()
    assert step(ours, batch)[2] == batch["input_ids"].shape[1]


def smoothed_loss(logits: torch.Tensor, labels: torch.Tensor, epsilon: float) -> torch.Tensor:
    """By the book: each position's target is the next token, mixed with the mean over the vocabulary."""
    logits, targets = logits[:, :-1], labels[:, 1:]
    logits, targets = logits[targets != -100], targets[targets != -100]
    return torch.nn.functional.cross_entropy(logits.float(), targets, label_smoothing=epsilon)


class Subclass(DeltaVLMForConditionalGeneration):
    pass


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", ["package", "subclass", "peft"])
def test_label_smoothing_smooths_the_next_token(kind, mode, trainers, batch):
    """Not the token itself, and not for some classes only: in the stock `Trainer` and ours."""
    ours, stock = trainers(label_smoothing_factor=0.1)
    for trainer in (stock,) if kind == "peft" else (ours, stock):
        model = trainer.model
        getattr(model, mode)()
        if kind == "subclass":
            model.__class__ = Subclass
        if kind == "peft":
            model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
            getattr(model, mode)()
        with torch.no_grad():
            torch.manual_seed(0)  # the same dropout
            expected = smoothed_loss(model(**batch).logits, batch["labels"], 0.1)
            torch.manual_seed(0)
            loss = trainer.compute_loss(model, dict(batch))
        torch.testing.assert_close(loss, expected)


def test_label_smoothing_in_evaluation(trainers, rows, tiny_processor):
    """Through `evaluate`: the shipped model knows the answers, so the loss is that of smoothing them, not 10."""
    for trainer in trainers(label_smoothing_factor=0.1):
        loss = trainer.evaluate(rows)["eval_loss"]
        batch = PairCollator(tiny_processor)([rows[index] for index in range(len(rows))])
        with torch.no_grad():
            expected = smoothed_loss(trainer.model(**batch).logits, batch["labels"], 0.1)
        assert loss == pytest.approx(expected.item(), rel=0.05)  # a mean of batches' means


def test_shift_labels_of_the_caller(trainers, batch):
    """As context and sequence parallelism give them, with `labels` or without."""
    ours, stock = trainers()
    shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    shifted[:, shifted.shape[1] // 2 :] = -100  # which `labels` would not say
    shifted[:, shifted.shape[1] // 2 - 1] = 7
    for trainer in (ours, stock):
        trainer.model.eval()
        for given in ({**batch, "shift_labels": shifted}, {**dict(batch), "shift_labels": shifted, "labels": None}):
            with torch.no_grad():
                outputs = trainer.model(**given)
            expected = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), shifted.flatten())
            torch.testing.assert_close(outputs.loss, expected)
        trainer.model.train()
        torch.manual_seed(0)
        loss = trainer.compute_loss(trainer.model, {**batch, "shift_labels": shifted})
        torch.manual_seed(0)
        torch.testing.assert_close(loss, trainer.model(**batch, shift_labels=shifted).loss)


def test_a_small_data_set_is_not_warmed_up_for_ever(trainers, caplog):
    """1,400 steps: 50 epochs of 55 pairs. The recipe's 1,000 steps of warm-up would be 36 of them."""
    for trainer in trainers():
        caplog.clear()
        trainer.create_optimizer_and_scheduler(1400)
        rates = []
        for _ in range(1400):
            rates.append(trainer.lr_scheduler.get_last_lr()[0])
            trainer.optimizer.step()
            trainer.lr_scheduler.step()
        assert rates.index(max(rates)) == 140 and max(rates) == pytest.approx(1e-5)
        assert "Warm-up takes 140 of the 1,400 steps of this run" in caplog.text


def test_batches_of_one_step_add_their_shares_of_the_mask_loss(make_mask_model):
    """With gradient accumulation `Trainer` gives the number of labels of the whole step."""
    model, processor = make_mask_model(backbone=False)
    rows = load_generated(1, 4_700_000, tasks=["grid"], masks=True)
    batch = PairCollator(processor, mask_classes=model.config.mask_classes)([rows[0]])
    labels = (batch["labels"] != -100).sum()
    whole = model(**batch, num_items_in_batch=labels).loss
    torch.testing.assert_close(whole, model(**batch).loss)
    torch.testing.assert_close(2 * model(**batch, num_items_in_batch=2 * labels).loss, whole)
