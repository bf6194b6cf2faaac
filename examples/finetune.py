"""
Fine-tunes DeltaVLM with the plain `Trainer`: the pieces that `deltavlm train` puts together, to change as you like.

    python examples/finetune.py --output out --max-steps 20                      # the tiny model, generated scenes
    python examples/finetune.py --output out --model MODEL --data DATASET --load-in-4bit
    accelerate launch examples/finetune.py ...                                   # several processes
"""

import argparse

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, EarlyStoppingCallback, Trainer

import deltavlm_hf
from deltavlm_hf.data import PairCollator, load_changechat, load_generated
from deltavlm_hf.evaluation import AnswerMetrics
from deltavlm_hf.training import (
    DeltaVLMTrainingArguments,
    FreezePolicy,
    PairAugmentation,
    TrainingRows,
    freeze,
    last_complete_checkpoint,
    leave_out_frozen,
    trainable_table,
)
from deltavlm_hf.training.quantization import four_bit_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="where checkpoints and the result go")
    parser.add_argument("--model", default=deltavlm_hf.tiny(), help="folder or Hub id")
    parser.add_argument("--data", help="folder as in docs/data.md, or Hub id (default: generated scenes)")
    parser.add_argument("--load-in-4bit", action="store_true", help="the language model in 4-bit")
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--batch-size", type=int, default=12)
    args = parser.parse_args()

    if args.data:
        train, validation = (load_changechat(args.data, split=split, unroll=True) for split in ("train", "val"))
        asked = load_changechat(args.data, split="val").select(range(200))
    else:
        train, validation = load_generated(200, 6_000_000, unroll=True), load_generated(20, 6_100_000, unroll=True)
        asked = load_generated(5, 6_100_000)

    options = {"quantization_config": four_bit_config()} if args.load_in_4bit else {"dtype": torch.float32}
    model = AutoModelForImageTextToText.from_pretrained(args.model, **options)
    processor = AutoProcessor.from_pretrained(args.model)
    freeze(model, FreezePolicy(vision_blocks=2))  # the paper's recipe: the language model stays as it is
    leave_out_frozen(model)  # checkpoints hold what trains, and point to args.model for the rest
    print(trainable_table(model))

    trainer = Trainer(
        model,
        DeltaVLMTrainingArguments(
            output_dir=args.output,
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            eval_strategy="steps",
            eval_steps=500 if args.data else 10,
            save_strategy="steps",
            save_steps=500 if args.data else 10,
        ),
        train_dataset=TrainingRows(train, PairAugmentation()),
        eval_dataset=validation,
        data_collator=PairCollator(processor),
        processing_class=processor,
        callbacks=[AnswerMetrics(processor, asked), EarlyStoppingCallback(10)],
    )
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(args.output))
    trainer.save_model()


if __name__ == "__main__":
    main()
