"""
Makes the tiny model that ships with the package, from seed to weights, on generated scenes.

    python examples/train_tiny.py --output src/deltavlm_hf/tiny_model

On 2 CPU cores beside other work it took 62 minutes. Every stage is a plain `Trainer`:
1. `language`: a small language model learns, from text alone, to answer all six tasks from a description of the change
   in 32 tokens. Then it is frozen.
2. `eyes`: vision encoder and CSRM learn, under a throw-away head, to mark what is new in every patch.
3. `align`: the Q-Former learns to write the description in the language model's own embedding space.
4. `reread`: the language model goes on with stage 1. Its embeddings, in which the Q-Former has learnt to write, stay.
5. `speak`: Q-Former, CSRM and vision encoder learn from the answers, through the frozen language model.
"""

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from deltavlm_hf import (
    DeltaVLMConfig,
    DeltaVLMForConditionalGeneration,
    DeltaVLMImageProcessor,
    DeltaVLMProcessor,
    replacing,
)
from deltavlm_hf.data import load_generated
from deltavlm_hf.data.questions import TASKS, make_turns
from deltavlm_hf.data.rules import BUILDING, CELLS, ROAD, Facts, Thresholds, read_facts
from deltavlm_hf.data.scenes import generate_scene
from deltavlm_hf.evaluation import ModelAnswerer, evaluate_predictions, predict

SIZE, PATCH, QUERIES, WIDTH = 96, 8, 32, 128
GRID = SIZE // PATCH
NOWHERE = np.zeros(9, int)  # how many roads have their centre in each cell does not matter
THRESHOLDS = Thresholds.for_size(SIZE)
POSITIONS, LONGEST_ANSWER = 1024, 160  # tokens that the language model can read, and those kept for an answer
TRAIN_SEEDS, VALIDATION_SEEDS, TEST_SEEDS = 1_000_000, 2_000_000, 5_000_000  # where each range begins
# Stage -> optimizer steps, batch size, learning rate.
STAGES = {
    "language": (1000, 64, 1e-3),
    "eyes": (8000, 8, 1e-3),  # small batches learn more from the same pairs; Muon's matrices do not
    "align": (3200, 8, 1e-3),
    "reread": (700, 64, 1e-3),
    "speak": (1600, 8, 2e-4),
}
MUON_RATE = 20  # the learning rate of Muon's matrices, relative to AdamW's
DESCRIPTION_NOISE = 0.3  # relative to the embeddings: what the Q-Former writes later will not be exact either
QUESTIONS_PER_PAIR = 3
# Each cell has words of its own: told apart by position alone, cells are learnt far more slowly.
CELL_WORDS = [f"<{kind} {cell}>" for kind in ("road", "building") for cell in CELLS]
TASK_WEIGHTS = {"caption": 1, "binary": 1, "count": 1.5, "grid": 2.5, "open": 2, "dialogue": 2.5}


# Data


class Scenes(Dataset):
    """Generated pairs, each time flipped or turned at random, with what the stages learn from."""

    def __init__(self, first_seed: int, count: int):
        with Pool() as pool:
            seeds = range(first_seed, first_seed + count)
            pairs = list(tqdm(pool.imap(_generate, seeds, chunksize=64), total=count, desc="scenes"))
        self.images = np.stack([images for images, _, _ in pairs])  # (n, 2, H, W, 3), uint8
        self.dense = np.stack([dense for _, dense, _ in pairs])  # (n, GRID, GRID, 3): road, building, centre
        self.facts = [facts for _, _, facts in pairs]

    def __len__(self) -> int:
        return len(self.facts)

    def __getitem__(self, index: int) -> dict:
        turn = int(torch.randint(8, ()))
        return {
            "images": dihedral(self.images[index], turn, axes=(1, 2)),
            "dense": dihedral(self.dense[index], turn, axes=(0, 1)),
            "facts": turn_facts(self.facts[index], turn),
        }


class Texts(Dataset):
    """Changes that need no picture: facts drawn at random, without end. Lists of cells are longer than scenes have."""

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> dict:
        rng = np.random.default_rng(int(torch.randint(2**31, ())))
        roads, buildings = rng.integers(0, 3), rng.integers(0, 7)
        if rng.random() < 0.25:
            roads = buildings = 0
        by_cell = np.bincount(rng.integers(0, 9, buildings), minlength=9)
        building_cells = (by_cell > 0) | (rng.random(9) < 0.15) & (buildings > 0)
        road_cells = (rng.random(9) < 0.4) & (roads > 0)
        return {"facts": Facts((int(roads), int(buildings)), (road_cells, building_cells), (NOWHERE, by_cell))}


def _generate(seed: int) -> tuple[np.ndarray, np.ndarray, Facts]:
    scene = generate_scene(seed, SIZE)
    patches = scene.mask.reshape(GRID, PATCH, GRID, PATCH)
    dense = np.zeros((GRID, GRID, 3), np.float32)
    for channel, value in enumerate((ROAD, BUILDING)):
        dense[..., channel] = (patches == value).mean((1, 3)) > 0.1
    for row, column in np.clip(scene.buildings / PATCH, 0, GRID - 1).astype(int):
        dense[row, column, 2] = 1
    return np.stack([scene.before, scene.after]), dense, read_facts(scene.mask, THRESHOLDS)


def dihedral(array: np.ndarray, turn: int, axes: tuple[int, int]) -> np.ndarray:
    array = np.rot90(array, turn % 4, axes)
    return np.flip(array, axes[1]) if turn >= 4 else array


def turn_facts(facts: Facts, turn: int) -> Facts:
    cells = np.stack([facts.road_cells, facts.building_cells, facts.counts_by_cell[1]], -1).reshape(3, 3, 3)
    roads, buildings, by_cell = dihedral(cells, turn, axes=(0, 1)).reshape(9, 3).T
    return Facts(facts.counts, (roads.astype(bool), buildings.astype(bool)), (NOWHERE, by_cell))


def describe_in_tokens(facts: Facts) -> list[str]:
    """The description of a change in 32 words, each a token: the Q-Former's first lesson."""
    truths = (*facts.road_cells, *facts.building_cells)
    cells = [word if truth else "no" for word, truth in zip(CELL_WORDS, truths, strict=True)]
    numbers = [facts.roads, facts.buildings, *facts.counts_by_cell[1], facts.roads, facts.buildings]
    return ["yes" if facts.changed else "no", *cells, *map(str, numbers)]


def make_turn(facts: Facts, rng: np.random.Generator) -> tuple[str, list[tuple[str, str]] | None, str]:
    """A question, the turns before it (None: the question stands alone) and its answer."""
    weights = np.array([TASK_WEIGHTS[task] for task in TASKS])
    task = rng.choice(TASKS, p=weights / weights.sum())
    turns = make_turns(task, facts, rng, paraphrase=0.5)
    if task == "dialogue":
        turn = int(rng.integers(len(turns)))
        history = list(turns[:turn])
    else:
        turn, history = 0, ([] if rng.random() < 0.5 else None)
        if rng.random() < 0.2:  # after another question
            task = rng.choice([task for task in TASKS if task != "dialogue"])
            history = list(make_turns(task, facts, rng, paraphrase=0.5))
    question, answer = turns[turn]
    if rng.random() < 0.2:  # as people type
        question = question.lower().rstrip("?.")
    return question, history, answer


class Collator:
    """Items of `Scenes` -> a batch; `questions` for each pair, in the processor's own form."""

    def __init__(self, processor: DeltaVLMProcessor, questions: int, with_images: bool = True):
        self.processor = processor
        self.questions = questions
        self.with_images = with_images
        image_processor = processor.image_processor
        self.mean, self.std = (
            torch.tensor(values).view(3, 1, 1) * 255
            for values in (image_processor.image_mean, image_processor.image_std)
        )
        words = ["yes", "no", *map(str, range(10)), *CELL_WORDS]
        self.ids = {word: _only(processor.tokenizer(word, add_special_tokens=False)["input_ids"]) for word in words}

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng(int(torch.randint(2**31, ())))
        facts = [item["facts"] for item in items for _ in range(self.questions)]
        questions, histories, answers = zip(*(make_turn(fact, rng) for fact in facts), strict=True)
        batch = self.processor(
            text=list(questions), history=list(histories), answers=list(answers), padding=True, return_tensors="pt"
        )
        if self.with_images:
            images = torch.from_numpy(np.stack([item["images"] for item in items])).permute(0, 1, 4, 2, 3)
            batch["pixel_values"] = (images - self.mean) / self.std  # what the image processor does at this size
            batch["dense"] = torch.from_numpy(np.stack([item["dense"] for item in items]))
        described = [[self.ids[word] for word in describe_in_tokens(item["facts"])] for item in items]
        batch["description"] = torch.tensor(described)
        return dict(batch)


def _only(ids: list[int]) -> int:
    (token,) = ids
    return token


# Model


def make_tokenizer(facts: list[Facts], words: Sequence[str] = tuple(map(str, range(10)))) -> PreTrainedTokenizerFast:
    """Byte-level BPE on this project's own texts: their words are single tokens, other text still has its bytes."""
    rng = np.random.default_rng(0)
    texts = [text for fact in facts for text in (*sum(make_turns("dialogue", fact, rng), ()), *words)]
    for fact in facts:
        texts += [text for _ in range(4) for text in _flat(make_turn(fact, rng))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?[\w-]+| ?[^\s\w]|\s"), "isolated"),  # "top-left" stays whole
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>", *CELL_WORDS]
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=POSITIONS - LONGEST_ANSWER,
    )


def _flat(turn) -> list[str]:
    question, history, answer = turn
    return [question, answer, "q: a:", *(text for pair in history or () for text in pair)]


def make_processor(facts: list[Facts]) -> DeltaVLMProcessor:
    tokenizer = make_tokenizer(facts)
    return DeltaVLMProcessor(
        DeltaVLMImageProcessor(size={"height": SIZE, "width": SIZE}),
        tokenizer,
        copy.deepcopy(tokenizer),
        num_query_tokens=QUERIES,
    )


def make_qformer_config(processor: DeltaVLMProcessor) -> dict:
    return {
        "vocab_size": len(processor.qformer_tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 3 * WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "cross_attention_frequency": 1,
        "max_position_embeddings": 128,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def make_text_config(processor: DeltaVLMProcessor) -> LlamaConfig:
    tokenizer = processor.tokenizer
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_config(processor: DeltaVLMProcessor) -> DeltaVLMConfig:
    return DeltaVLMConfig(
        vision_config={
            "hidden_size": WIDTH,
            "intermediate_size": 3 * WIDTH,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "image_size": SIZE,
            "patch_size": PATCH,
        },
        qformer_config=make_qformer_config(processor),
        text_config=make_text_config(processor),
        num_query_tokens=QUERIES,
        image_token_id=processor.image_token_id,
        difference_dropout=0.1,
        spatial_position_codes=True,
    )


# What each stage learns: modules that exist only here


def answer_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with weight 1 / sqrt(length) on each answer, lest long answers drown yes and no."""
    labels = labels[:, 1:]
    losses = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="none")
    weights = (labels != -100) / (labels != -100).sum(-1, keepdim=True).sqrt()
    return (losses.view_as(labels) * weights).sum() / weights.sum()


class Language(nn.Module):
    """The language model, fed the description where change tokens will stand."""

    def __init__(self, model: DeltaVLMForConditionalGeneration):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, labels, description, **_):
        table = self.model.get_input_embeddings().weight
        described = table[description.repeat_interleave(len(input_ids) // len(description), 0)]
        described = described + DESCRIPTION_NOISE * table.std().detach() * torch.randn_like(described)
        placeholders = (input_ids == self.model.config.image_token_id).unsqueeze(-1)
        embeddings = table[input_ids].masked_scatter(placeholders, described)
        logits = self.model(inputs_embeds=embeddings, attention_mask=attention_mask).logits
        return {"loss": answer_loss(logits, labels)}


class Eyes(nn.Module):
    """Vision encoder and CSRM under a head that marks each patch: new road, new building, new building's centre."""

    def __init__(self, model: DeltaVLMForConditionalGeneration):
        super().__init__()
        self.vision_model, self.difference = model.vision_model, model.difference
        self.encode_pair = model.encode_pair
        self.head = nn.Sequential(nn.Linear(2 * WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 3))

    def forward(self, pixel_values, dense, **_):
        before, after = self.encode_pair(pixel_values).chunk(2, dim=1)
        marks = self.head(torch.cat([before, after], dim=-1)[:, 1:])  # (B, GRID * GRID, 3)
        loss = nn.functional.binary_cross_entropy_with_logits(
            marks, dense.flatten(1, 2), pos_weight=torch.tensor([2.0, 2.0, 4.0])
        )
        return {"loss": loss}


def alignment_loss(change_tokens: torch.Tensor, description: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """How far change tokens are from the description's embeddings: distance, and which token they are nearest to."""
    scale = table.std()
    distance = nn.functional.mse_loss(change_tokens / scale, table[description] / scale)
    nearness = change_tokens @ table.T - table.square().sum(-1) / 2  # half the squared distance, turned round
    scores = nearness / (scale.square() * WIDTH**0.5)
    return distance + nn.functional.cross_entropy(scores.flatten(0, 1), description.flatten())


class Align(nn.Module):
    """The Q-Former, taught to write the description; the eyes keep learning."""

    def __init__(self, model: DeltaVLMForConditionalGeneration):
        super().__init__()
        self.model = model

    def forward(self, pixel_values, qformer_input_ids, qformer_attention_mask, description, **_):
        change_tokens = self.model.get_image_features(
            pixel_values, qformer_input_ids, qformer_attention_mask, return_dict=True
        ).pooler_output
        return {"loss": alignment_loss(change_tokens, description, self.model.get_input_embeddings().weight)}


class Speak(nn.Module):
    """Everything but the language model, taught by the answers that come through it."""

    def __init__(self, model: DeltaVLMForConditionalGeneration):
        super().__init__()
        self.model = model

    def forward(self, pixel_values, labels, description, dense=None, **inputs):
        questions = len(labels) // len(pixel_values)
        pair_features = self.model.encode_pair(pixel_values).repeat_interleave(questions, 0)
        outputs = self.model(**inputs, pair_features=pair_features)
        table = self.model.get_input_embeddings().weight
        described = description.repeat_interleave(questions, 0)
        alignment = alignment_loss(outputs.image_hidden_states, described, table)
        return {"loss": answer_loss(outputs.logits, labels) + 0.2 * alignment}


class MuonAndAdamW(torch.optim.Optimizer):
    """
    For the language model: Muon for the matrices between hidden states, AdamW for embeddings and norms. In the same
    steps it learns to list cells far better than under AdamW alone. The other stages did not gain.
    """

    def __init__(self, module: nn.Module, learning_rate: float, weight_decay: float):
        matrices, others = [], []
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                hidden = parameter.ndim == 2 and "embed" not in name
                (matrices if hidden else others).append(parameter)
        super().__init__([*matrices, *others], {"lr": learning_rate})
        self.parts = (
            torch.optim.Muon(matrices, lr=MUON_RATE * learning_rate, weight_decay=weight_decay),
            torch.optim.AdamW(others, lr=learning_rate, weight_decay=weight_decay),
        )
        self.param_groups = [group for part in self.parts for group in part.param_groups]  # for the scheduler

    def step(self, closure=None):
        for part in self.parts:
            part.step()


def train(stage: str, module: nn.Module, data: Dataset, collator: Collator, scale: float, seed: int) -> float:
    """Runs one stage; returns the minutes it took."""
    steps, batch_size, learning_rate = STAGES[stage]
    steps = max(2, round(steps * scale))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=min(100, steps // 10),
            weight_decay=0.05,
            max_grad_norm=1.0,
            use_cpu=True,
            logging_steps=max(1, steps // 20),
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            label_names=[],
            dataloader_num_workers=1,
            dataloader_persistent_workers=True,
            seed=seed,
        )
        optimizer = (
            MuonAndAdamW(module, learning_rate, arguments.weight_decay) if isinstance(module, Language) else None
        )
        Trainer(module, arguments, train_dataset=data, data_collator=collator, optimizers=(optimizer, None)).train()
    return (time.perf_counter() - start) / 60


def make_generation_config(processor: DeltaVLMProcessor) -> GenerationConfig:
    return GenerationConfig(
        bos_token_id=processor.tokenizer.bos_token_id,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
        suppress_tokens=[processor.image_token_id],
        max_new_tokens=LONGEST_ANSWER,
    )


def save(model: DeltaVLMForConditionalGeneration, processor: DeltaVLMProcessor, folder: Path) -> None:
    """Writes model and processor, in half precision."""
    model.generation_config = make_generation_config(processor)
    for saved in (DeltaVLMConfig, DeltaVLMForConditionalGeneration, DeltaVLMImageProcessor, DeltaVLMProcessor):
        saved._auto_class = None  # no copy of the code: it is in the package, beside the folder
    with replacing(folder) as new:
        model.requires_grad_(True).half().save_pretrained(new)
        processor.save_pretrained(new)
        path = Path(new) / "config.json"
        config = json.loads(path.read_text())
        config["dtype"] = "float32"  # kept in half precision, used in full
        path.write_text(json.dumps(config, indent=2) + "\n")


# Evaluation, as `deltavlm evaluate` does it


def evaluate(folder: Path, first_seed: int, pairs: int) -> dict:
    """Asks the saved model about unseen pairs; the figures of `evaluation.json`."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    rows = load_generated(pairs, first_seed)
    with tempfile.TemporaryDirectory() as answers:
        predictions = predict(ModelAnswerer(model, processor), rows, answers, {}, batch_size=32)
    results, _ = evaluate_predictions(rows.remove_columns(["before", "after"]), predictions, intervals=False)
    count, grid, dialogue = results["count"], results["grid"], results["dialogue"]
    return {
        "pairs": pairs,
        "first_seed": first_seed,
        "yes_no": results["binary"]["accuracy"],
        "yes_no_from_caption": results["caption"]["yes_no_from_captions"]["accuracy"],
        "roads_exact": count["roads"]["exact"],
        "buildings_exact": count["buildings"]["exact"],
        "grid_f1_roads": grid["roads"]["f1"],
        "grid_f1_buildings": grid["buildings"]["f1"],
        "open_exact": results["open"]["exact"],
        "dialogue": dialogue["whole"],
        "dialogue_consistent": dialogue["consistent"],
        "unparsed": {"count": count["roads"]["unparsed"], "grid": grid["roads"]["unparsed"]},
    }


# Everything in order


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the folder to write the model to")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="steps of every stage, relative to the shipped model's"
    )
    parser.add_argument("--scenes", type=int, default=16_000, help="generated training pairs")
    parser.add_argument("--test", type=int, default=1000, help="unseen pairs for the evaluation")
    parser.add_argument("--validate", action="store_true", help="evaluate on validation pairs, to choose settings by")
    parser.add_argument("--keep", type=Path, help="keep finished stages in this folder, and go on from those in it")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    set_seed(args.seed)
    scenes = Scenes(TRAIN_SEEDS, args.scenes)
    processor = make_processor(scenes.facts[:2000])
    model = DeltaVLMForConditionalGeneration(make_config(processor))
    print(f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} million parameters")
    minutes = {}
    for stage, module, data, collator in (
        ("language", Language, Texts(), Collator(processor, 1, with_images=False)),
        ("eyes", Eyes, scenes, Collator(processor, 1)),
        ("align", Align, scenes, Collator(processor, 1)),
        ("reread", Language, Texts(), Collator(processor, 1, with_images=False)),
        ("speak", Speak, scenes, Collator(processor, QUESTIONS_PER_PAIR)),
    ):
        model.requires_grad_(module is not Language)
        model.language_model.requires_grad_(module is Language)
        model.get_input_embeddings().requires_grad_(stage == "language")
        kept = args.keep / f"{stage}.pt" if args.keep else None
        if kept and kept.exists():
            finished = torch.load(kept, weights_only=True)
            model.load_state_dict(finished["weights"])
            minutes[stage] = finished["minutes"]
            continue
        minutes[stage] = train(stage, module(model), data, collator, args.scale, args.seed)
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"weights": model.state_dict(), "minutes": minutes[stage]}, kept)

    save(model, processor, args.output)
    figures = evaluate(args.output, VALIDATION_SEEDS if args.validate else TEST_SEEDS, args.test)
    figures["minutes"] = {stage: round(value, 1) for stage, value in minutes.items()}
    (args.output / "evaluation.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
