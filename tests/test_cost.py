"""The cost by part against PyTorch's own FLOP counter, and against what there is at the paper's sizes."""

import pytest
import torch
from cost import Card, Part, cost_table, estimate_cost
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, LlamaConfig

from deltavlm_hf import DeltaVLMConfig, DeltaVLMForConditionalGeneration
from deltavlm_hf.modeling.cache_name import CACHE


def counted(function) -> int:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("difference", ["csrm", "concat"])
@pytest.mark.parametrize("key_value_heads", [4, 2])
def test_flops_are_those_that_torch_counts(small_config, difference, key_value_heads):
    text = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=72,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=key_value_heads,
        pad_token_id=60,
    )
    config = small_config(difference_module=difference, text_config=text)
    model = DeltaVLMForConditionalGeneration(config).eval()
    model.set_attn_implementation("eager")  # the fused kernels of a CPU are not counted
    pairs, questions, words, instruction, answer = 2, 3, 5, 6, 4
    parts = estimate_cost(
        config,
        pairs=pairs,
        questions=questions,
        text_tokens=words,
        instruction_tokens=instruction,
        answer_tokens=answer,
    )
    pixel_values = torch.randn(pairs, 2, 3, 32, 32)
    assert parts[0].flops + parts[1].flops == counted(lambda: model.encode_pair(pixel_values))
    with torch.no_grad():
        features = model.encode_pair(pixel_values[:1])
    ids = torch.ones(questions, instruction, dtype=torch.long)
    assert parts[2].flops == counted(lambda: model.get_image_features(None, ids, pair_features=features))
    prompt = torch.zeros(questions, config.num_query_tokens + words, config.text_config.hidden_size)
    assert parts[3].flops == counted(lambda: model.language_model(inputs_embeds=prompt, logits_to_keep=1))

    def decode():
        cache = model.language_model(inputs_embeds=prompt, logits_to_keep=1)[CACHE]
        for _ in range(answer - 1):
            model.language_model(inputs_embeds=prompt[:, :1], **{CACHE: cache}, logits_to_keep=1)

    assert parts[3].flops + parts[4].flops == counted(decode)

    known = 6
    (rest,) = estimate_cost(config, questions=questions, text_tokens=words, known_tokens=known)[3:4]
    with torch.no_grad():
        cache = model.language_model(inputs_embeds=prompt[:, :known])[CACHE]
    assert rest.flops == counted(
        lambda: model.language_model(inputs_embeds=prompt[:, known:], **{CACHE: cache}, logits_to_keep=1)
    )
    kept = text.num_hidden_layers * 2 * text.hidden_size * key_value_heads // text.num_attention_heads
    assert rest.bytes == parts[3].bytes + 2 * questions * kept * known


def test_weights_at_the_papers_sizes():
    """Each weight of a matrix is read once; what is left out are norms, biases and what is looked up."""
    with torch.device("meta"):
        model = DeltaVLMForConditionalGeneration(DeltaVLMConfig())
    parts = estimate_cost(model.config, answer_tokens=2, weight_bytes=1)
    expected = [
        model.vision_model,
        model.difference,
        model.qformer,
        model.language_model,
    ]
    for part, module in zip(parts[:4], expected, strict=True):
        total = sum(weight.numel() for weight in module.parameters())
        assert part.bytes == pytest.approx(total, rel=0.15), part.name


def test_the_roofline_is_the_slower_of_both():
    card = Card(flops_per_second=100, bytes_per_second=10)
    assert Part("arithmetic", 1000, 10).seconds(card.flops_per_second, card.bytes_per_second) == 10
    assert Part("memory", 10, 1000).seconds(card.flops_per_second, card.bytes_per_second) == 100


def test_many_questions_read_the_weights_once():
    one, many = (estimate_cost(DeltaVLMConfig(), questions=number) for number in (1, 32))
    assert many[4].flops == 32 * one[4].flops
    assert many[4].bytes < 2 * one[4].bytes
    assert "| vision, 2 images |" in cost_table(one)


def test_another_language_model():
    with pytest.raises(ValueError, match="cost of a 'gpt2' is not known"):
        estimate_cost(DeltaVLMConfig(text_config=GPT2Config()))
