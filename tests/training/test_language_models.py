"""Around a real language model that somebody else trained: SmolLM2, frozen, in full precision and in 4-bit."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

import deltavlm_hf
from deltavlm_hf import DeltaVLMConfig, DeltaVLMForConditionalGeneration, DeltaVLMProcessor
from deltavlm_hf.data import load_generated
from deltavlm_hf.training import DeltaVLMTrainer, DeltaVLMTrainingArguments, FreezePolicy, TrainingRows, freeze
from deltavlm_hf.training.quantization import four_bit_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def around_smollm(smollm_folder, tmp_path_factory):
    """The shipped model's eyes before SmolLM2: a small folder that points to the language model's own."""
    tiny = AutoModelForImageTextToText.from_pretrained(deltavlm_hf.tiny())
    tiny_processor = AutoProcessor.from_pretrained(deltavlm_hf.tiny())
    tokenizer = AutoTokenizer.from_pretrained(smollm_folder)
    processor = DeltaVLMProcessor(
        tiny_processor.image_processor, tokenizer, tiny_processor.qformer_tokenizer, num_query_tokens=32
    )
    parts = tiny.config.to_dict()
    config = DeltaVLMConfig(
        vision_config=parts["vision_config"],
        qformer_config=parts["qformer_config"],
        text_config=AutoConfig.from_pretrained(smollm_folder),
        image_token_id=processor.image_token_id,
        spatial_position_codes=True,
    )
    torch.manual_seed(0)
    model = DeltaVLMForConditionalGeneration(config)
    model.language_model = AutoModelForCausalLM.from_pretrained(smollm_folder).requires_grad_(False)  # trains nothing
    for name in ("vision_model", "difference", "qformer"):
        getattr(model, name).load_state_dict(getattr(tiny, name).state_dict())
    model.query_tokens.data = tiny.query_tokens.data
    model.keep_out_of_checkpoints(
        [name for name in model.state_dict() if name.startswith("language_model.")],
        [{"name_or_path": str(smollm_folder), "prefix": "language_model."}],
    )
    folder = tmp_path_factory.mktemp("around")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    assert not any(name.startswith("language_model.") for name in load_file(folder / "model.safetensors"))
    return folder


@pytest.mark.parametrize("four_bit", [False, True])
def test_a_short_run_learns(around_smollm, tmp_path, four_bit):
    options = {"quantization_config": four_bit_config(torch.float32)} if four_bit else {}
    model = AutoModelForImageTextToText.from_pretrained(around_smollm, dtype=torch.float32, **options)
    processor = AutoProcessor.from_pretrained(around_smollm)
    freeze(model, FreezePolicy(vision_blocks=0, difference=False))
    args = DeltaVLMTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=16,
        learning_rate=2e-4,
        warmup_steps=2,
        per_device_train_batch_size=4,
        logging_steps=1,
        eval_strategy="no",
        load_best_model_at_end=False,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    rows = TrainingRows(load_generated(4, 4_950_000, tasks=["binary"]))
    trainer = DeltaVLMTrainer(model, args, train_dataset=rows, eval_dataset=rows.rows, processing_class=processor)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * before
    trainer.save_model()
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(loaded.query_tokens, model.query_tokens)
    own = AutoModelForCausalLM.from_pretrained(model.config.weight_sources[-1]["name_or_path"], dtype=torch.float32)
    for name, weight in own.state_dict().items():
        assert torch.equal(loaded.language_model.state_dict()[name], weight)
