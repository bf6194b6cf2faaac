"""What `DeltaVLMTrainer` does in a step, against the stock `Trainer`."""

import pytest
import torch
from transformers import Trainer

from deltavlm_hf.data import PairCollator
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


def test_label_smoothing_reads_all_logits(trainers, batch):
    ours, stock = trainers(label_smoothing_factor=0.1)
    torch.testing.assert_close(step(ours, batch)[0], step(stock, batch)[0])


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
