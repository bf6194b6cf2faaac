"""Decoding with a cache by the user's own hand, under either of the names that Transformers has had for it."""

import warnings

import pytest
import torch
from generating import answer_ids
from transformers import DynamicCache, GPT2Config, StaticCache
from transformers.utils import logging

from deltavlm_hf import ChangeSession, DeltaVLMForConditionalGeneration
from deltavlm_hf.modeling.cache_name import CACHE

NAMES = ("cache", "past_key_values")


def prompt_and_images(inputs: dict) -> tuple[dict, dict]:
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return prompt, {name: value for name, value in inputs.items() if name not in prompt}


@torch.inference_mode()
def decode(model, inputs: dict, name: str, cache, steps: int = 5) -> torch.Tensor:
    """Greedy search as in anyone's loop: the scores of each step, `(B, steps, vocabulary)`."""
    prompt, images = prompt_and_images(inputs)
    outputs = model(**prompt, **images, **{name: cache})
    mask, scores = prompt["attention_mask"], [outputs.logits[:, -1]]
    for _ in range(steps - 1):
        ids = scores[-1].argmax(-1, keepdim=True)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        outputs = model(input_ids=ids, attention_mask=mask, **{name: outputs[CACHE]})
        scores.append(outputs.logits[:, -1])
    return torch.stack(scores, dim=1)


@pytest.fixture(params=["llama", "gpt2"])
def any_model(request, small_config):
    torch.manual_seed(0)
    texts = {"gpt2": {"text_config": GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4)}, "llama": {}}
    return DeltaVLMForConditionalGeneration(small_config(**texts[request.param])).eval()


class TestDecodingByHand:
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("kind", [None, DynamicCache, StaticCache])
    def test_left_padding_takes_no_position(self, kind, name, any_model, small_inputs):
        """Against each row by itself, without padding."""
        text_config = any_model.config.text_config
        options = {"max_cache_len": 32} if kind is StaticCache else {}
        make = (lambda: None) if kind is None else lambda: kind(config=text_config, **options)
        batch = decode(any_model, small_inputs, name, make())
        for row, padding in enumerate([2, 0]):
            alone = {key: value[row : row + 1] for key, value in small_inputs.items()}
            alone["input_ids"], alone["attention_mask"] = (
                alone[key][:, padding:] for key in ("input_ids", "attention_mask")
            )
            torch.testing.assert_close(batch[row], decode(any_model, alone, name, make())[0], atol=2e-5, rtol=0)

    def test_as_generate(self, any_model, small_inputs):
        options = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False}
        outputs = any_model.generate(**small_inputs, max_new_tokens=5, min_new_tokens=5, **options)
        expected = torch.stack(outputs.logits, dim=1)
        actual = decode(any_model, small_inputs, CACHE, None)
        same = outputs.sequences[:, 9:] == actual.argmax(-1)  # `generate` bars the end of the answer
        until = int(same.all(0).long().cumprod(0).sum())
        torch.testing.assert_close(actual[:, : until + 1], expected[:, : until + 1], atol=2e-5, rtol=0)

    @torch.inference_mode()
    def test_without_a_mask(self, small_model, small_inputs):
        """Without padding a mask changes nothing, in later steps either."""
        prompt, images = prompt_and_images({name: value[1:] for name, value in small_inputs.items()})
        steps = []
        for mask in (torch.ones(1, 10, dtype=torch.long), None):
            cache = small_model(**prompt, **images)[CACHE]
            step = small_model(input_ids=torch.tensor([[7]]), attention_mask=mask, **{CACHE: cache})
            steps.append(step.logits)
        torch.testing.assert_close(*steps)


class TestNames:
    def test_outputs_have_it_under_the_name_of_transformers(self, small_model, small_inputs):
        with torch.inference_mode():
            assert small_model(**small_inputs)[CACHE].get_seq_length() == 9

    def test_both_at_once(self, small_model, small_inputs):
        caches = {name: DynamicCache(config=small_model.config.text_config) for name in NAMES}
        with pytest.raises(ValueError, match="`cache` and `past_key_values` are two names of one argument"):
            small_model(**small_inputs, **caches)

    @torch.inference_mode()
    def test_generate_goes_on_from_a_cache(self, small_model, small_inputs):
        """Left padding included: what was read is not read again."""
        prompt, images = prompt_and_images(small_inputs)
        expected = answer_ids(small_model, small_inputs, min_new_tokens=6)
        kept = {name: value[:, :-1] for name, value in prompt.items()}
        cache = small_model(**kept, **images)[CACHE]
        assert answer_ids(small_model, prompt, min_new_tokens=6, **{CACHE: cache}) == expected

    def test_an_assistant(self, small_config, small_inputs):
        """One DeltaVLM drafts for another."""
        torch.manual_seed(1)
        assistant = DeltaVLMForConditionalGeneration(small_config()).eval()
        torch.manual_seed(0)
        model = DeltaVLMForConditionalGeneration(small_config()).eval()
        inputs = {name: value[:1] for name, value in small_inputs.items()}  # the padded one
        expected = answer_ids(model, inputs, min_new_tokens=6)
        assert answer_ids(model, inputs, min_new_tokens=6, assistant_model=assistant) == expected


def test_nothing_is_deprecated(small_model, small_inputs, model, processor, pairs, caplog):
    """Neither by `warnings` nor in the log of transformers, where 5.24 tells of the old name."""
    logger = logging.get_logger("transformers")
    logging.warning_once.cache_clear()  # which tells everything once in a process
    logger.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            warnings.simplefilter("error", DeprecationWarning)
            with torch.inference_mode():
                decode(small_model, small_inputs, CACHE, None)
            for options in ({}, {"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False}):
                answer_ids(small_model, small_inputs, **options)
            session = ChangeSession(model, processor, *pairs[0], fixed_change_tokens=True)
            for question in ("What changed?", "Where?"):
                session.ask(question, max_new_tokens=4)
    finally:
        logger.removeHandler(caplog.handler)
    assert "deprecated" not in caplog.text
