"""`torch.compile` and `torch.export`: how many graphs there are, and that they compute the same."""

import copy

import pytest
import torch
from packaging.version import parse
from torch._dynamo.testing import CompileCounter
from transformers import CompileConfig, StaticCache

from deltavlm_hf.modeling.cache_name import CACHE

pytestmark = pytest.mark.skipif(
    parse(torch.__version__) < parse("2.7"), reason="torch 2.6 cannot trace the decorators of transformers"
)


@pytest.fixture(autouse=True)
def forget_what_was_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def wrong_number_of_placeholders(inputs: dict) -> dict:
    input_ids = inputs["input_ids"].clone()
    input_ids[0, 5] = 7
    return {**inputs, "input_ids": input_ids}


@pytest.fixture
def forms(small_model, small_inputs) -> dict[str, dict]:
    """What `forward` is given: images, a pair that is encoded already, or text alone."""
    words = {name: small_inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        pair_features = small_model.encode_pair(small_inputs["pixel_values"])
    encoded = {name: value for name, value in small_inputs.items() if name != "pixel_values"}
    return {
        "images": small_inputs,
        "pair": {**encoded, "pair_features": pair_features},
        "text": {**words, "input_ids": words["input_ids"].masked_fill(words["input_ids"] == 61, 5)},
        "labels": {**small_inputs, "labels": words["input_ids"].masked_fill(words["input_ids"] >= 60, -100)},
    }


@torch.no_grad()
@pytest.mark.parametrize("form", ["images", "pair", "text", "labels"])
def test_forward_is_one_graph(form, small_model, forms):
    found = torch._dynamo.explain(small_model)(**forms[form])
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


@torch.no_grad()
def test_encoding_a_pair_is_one_graph(small_model, small_inputs):
    found = torch._dynamo.explain(small_model.encode_pair)(small_inputs["pixel_values"])
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


@torch.no_grad()
def test_compiled_forward_computes_the_same_and_is_compiled_once(small_model, small_inputs):
    counter = CompileCounter()
    compiled = torch.compile(small_model, fullgraph=True, backend=counter)
    for images in (small_inputs["pixel_values"], small_inputs["pixel_values"].flip(1)):
        inputs = {**small_inputs, "pixel_values": images}
        torch.testing.assert_close(compiled(**inputs).logits, small_model(**inputs).logits)
    assert counter.frame_count == 1


@torch.no_grad()
def test_compiled_forward_notices_a_wrong_number_of_placeholders(small_model, small_inputs):
    compiled = torch.compile(small_model, fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match="placeholders and change tokens do not match"):
        compiled(**wrong_number_of_placeholders(small_inputs))


def test_compiled_training_has_the_same_gradients(small_config, small_model, small_inputs):
    labels = small_inputs["input_ids"].masked_fill(small_inputs["input_ids"] >= 60, -100)
    plain, model = copy.deepcopy(small_model), small_model  # in evaluation mode: nothing drops out
    plain(**small_inputs, labels=labels).loss.backward()
    counter = CompileCounter()
    torch.compile(model, fullgraph=True, backend=counter)(**small_inputs, labels=labels).loss.backward()
    assert counter.frame_count == 1
    for (name, one), other in zip(plain.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, msg=name)


@torch.no_grad()
def test_a_decoding_step_is_one_graph(small_model, small_inputs):
    cache = StaticCache(config=small_model.config.text_config, max_cache_len=16)
    small_model(**small_inputs, **{CACHE: cache})
    mask = torch.nn.functional.pad(small_inputs["attention_mask"], (0, 1), value=1)
    step = {"input_ids": torch.tensor([[5], [6]]), "attention_mask": mask, "position_ids": torch.tensor([[7], [9]])}
    found = torch._dynamo.explain(small_model)(**step, **{CACHE: copy.deepcopy(cache)})
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons
    compiled = torch.compile(small_model, fullgraph=True, backend="eager")
    actual = compiled(**step, **{CACHE: copy.deepcopy(cache)}).logits
    torch.testing.assert_close(actual, small_model(**step, **{CACHE: cache}).logits)


@pytest.mark.parametrize("form", ["images", "pair"])
def test_generation_with_a_static_cache_is_compiled_once(form, small_model, forms):
    """`generate` compiles the decoding step, by itself only on an accelerator; here it is told to."""
    graphs = []

    def backend(graph, inputs):  # a function, for `generate` copies its settings and a function stays what it is
        graphs.append(graph)
        return graph

    config = CompileConfig(backend=backend, fullgraph=True, mode=None)
    config._compile_all_devices = True
    settings = {"max_new_tokens": 8, "eos_token_id": None}
    inputs = forms[form]
    others = {**inputs, "qformer_input_ids": inputs["qformer_input_ids"].flip(0)}
    for prompt in (inputs, others):
        answers = small_model.generate(**prompt, **settings, cache_implementation="static", compile_config=config)
        assert answers.equal(small_model.generate(**prompt, **settings))
    assert len(graphs) == 1


@torch.no_grad()
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, small_model, small_inputs, tmp_path):
    exported = torch.export.export(small_model, (), {**small_inputs, "use_cache": False}, strict=strict)
    torch.export.save(exported, tmp_path / "deltavlm.pt2")
    loaded = torch.export.load(tmp_path / "deltavlm.pt2").module()
    others = {**small_inputs, "pixel_values": small_inputs["pixel_values"].flip(1)}
    assert not small_model(**others).logits.equal(small_model(**small_inputs).logits)
    for inputs in (small_inputs, others):
        torch.testing.assert_close(loaded(**inputs, use_cache=False).logits, small_model(**inputs).logits)
    with pytest.raises(RuntimeError, match="placeholders and change tokens do not match"):
        loaded(**wrong_number_of_placeholders(small_inputs), use_cache=False)
