"""What any model of Transformers does; what is not here, such as padding and attention, is in `test_modeling.py`."""

import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from generating import answer_ids
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, DynamicCache, GPT2Config, LlamaForCausalLM, StaticCache

from deltavlm_hf import DeltaVLMForConditionalGeneration, DeltaVLMModel
from deltavlm_hf.inference import answer
from deltavlm_hf.modeling.cache_name import CACHE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parameters_of(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def second_row(inputs: dict) -> dict:
    """The row without padding."""
    return {name: value[1:] for name, value in inputs.items()}


class TestSavingEveryPrecision:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_it_comes_back_bit_by_bit(self, dtype, small_model, tmp_path):
        saved = parameters_of(small_model.to(DTYPES[dtype]))
        small_model.save_pretrained(tmp_path)
        for name, tensor in load_file(tmp_path / "model.safetensors").items():
            assert tensor.dtype == DTYPES[dtype], name
        loaded = parameters_of(DeltaVLMForConditionalGeneration.from_pretrained(tmp_path))
        assert loaded.keys() == saved.keys()
        for name, tensor in loaded.items():
            assert tensor.dtype == DTYPES[dtype] and tensor.equal(saved[name]), name

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_another_precision_on_request(self, dtype, small_model, tmp_path):
        small_model.save_pretrained(tmp_path)
        loaded = DeltaVLMForConditionalGeneration.from_pretrained(tmp_path, dtype=DTYPES[dtype])
        for name, parameter in loaded.named_parameters():
            assert parameter.equal(small_model.get_parameter(name).to(DTYPES[dtype])), name

    @pytest.mark.parametrize("frozen", ["bfloat16", "float16"])
    def test_what_was_trained_beside_a_language_model_in_half_precision_loses_nothing(
        self, frozen, small_model, tmp_path
    ):
        small_model.language_model.to(DTYPES[frozen])
        saved = parameters_of(small_model)
        small_model.save_pretrained(tmp_path)
        loaded = DeltaVLMForConditionalGeneration.from_pretrained(tmp_path)
        for name, parameter in loaded.named_parameters():
            assert parameter.equal(saved[name].float()), name

    def test_in_several_files(self, small_model, tmp_path):
        small_model.save_pretrained(tmp_path, max_shard_size="50KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
        loaded = parameters_of(DeltaVLMForConditionalGeneration.from_pretrained(tmp_path))
        for name, parameter in small_model.named_parameters():
            assert parameter.equal(loaded[name]), name


class TestResizedEmbeddings:
    """The placeholder, 61, lies just outside the vocabulary of 61 tokens; at 70 it lies within."""

    @pytest.mark.parametrize("size", [50, 70])
    @pytest.mark.parametrize("tied", [False, True])
    @torch.inference_mode()
    def test_known_tokens_score_as_before(self, tied, size, small_config, small_inputs, tmp_path):
        torch.manual_seed(0)
        text_config = GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, tie_word_embeddings=tied)
        model = DeltaVLMForConditionalGeneration(small_config(text_config=text_config)).eval()
        inputs = second_row(small_inputs)
        before = model(**inputs).logits
        model.resize_token_embeddings(size)
        after = model(**inputs).logits
        assert after.shape[-1] == model.config.text_config.vocab_size == size
        torch.testing.assert_close(after[..., :50], before[..., :50])
        model.save_pretrained(tmp_path)
        loaded, info = DeltaVLMForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
        assert loaded(**inputs).logits.equal(after)
        assert answer_ids(loaded, inputs) == answer_ids(model, inputs)

    def test_what_is_added_learns(self, small_model, small_inputs):
        small_model.resize_token_embeddings(70)
        input_ids = small_inputs["input_ids"].masked_fill(small_inputs["input_ids"] == 7, 69)
        labels = input_ids.masked_fill((input_ids == 60) | (input_ids == 61), -100)
        small_model(**{**small_inputs, "input_ids": input_ids}, labels=labels).loss.backward()
        assert small_model.get_input_embeddings().weight.grad[69].any()


class TestOutputs:
    @torch.inference_mode()
    def test_hidden_states(self, small_model, small_inputs):
        outputs = small_model(**small_inputs, output_hidden_states=True)
        assert [state.shape for state in outputs.hidden_states] == [(2, 9, 32)] * 3
        assert [state.shape for state in outputs.vision_outputs.hidden_states] == [(4, 17, 32)] * 3
        assert [state.shape for state in outputs.qformer_outputs.hidden_states] == [(2, 8, 24)] * 3
        torch.testing.assert_close(small_model.get_output_embeddings()(outputs.hidden_states[-1]), outputs.logits)

    @torch.inference_mode()
    def test_tuples(self, small_model, small_inputs):
        outputs = small_model(**small_inputs, use_cache=False)
        logits, change_tokens, *_ = small_model(**small_inputs, use_cache=False, return_dict=False)
        assert logits.equal(outputs.logits) and change_tokens.equal(outputs.image_hidden_states)

    @torch.inference_mode()
    def test_of_the_images(self, small_config, small_inputs):
        """What `get_image_features` gives is in the output; on request with the vision encoder's states on top."""
        model = DeltaVLMForConditionalGeneration._from_config(small_config(), attn_implementation="eager").eval()
        images = {name: value for name, value in small_inputs.items() if name.startswith(("pixel", "qformer"))}
        features = model.get_image_features(**images, output_hidden_states=True, output_attentions=True)
        assert [state.shape for state in features.hidden_states] == [(4, 17, 32)] * 3
        assert [state.shape for state in features.attentions] == [(4, 4, 17, 17)] * 2
        assert features.hidden_states[-1].equal(features.vision_outputs.hidden_states[-1])
        assert model.get_image_features(**images).hidden_states is None
        pair = {**images, "pixel_values": None, "pair_features": model.encode_pair(images["pixel_values"])}
        assert model.get_image_features(**pair, output_hidden_states=True).hidden_states is None  # nothing was encoded
        outputs = model(**small_inputs)
        assert outputs.image_outputs.pooler_output.equal(features.pooler_output)
        assert outputs.image_outputs.last_hidden_state.equal(features.last_hidden_state)
        text = {name: value for name, value in small_inputs.items() if name not in images}
        text["input_ids"] = text["input_ids"].masked_fill(text["input_ids"] == 61, 5)
        assert model(**text).image_outputs is None

    def test_of_generation(self, small_config, small_inputs):
        model = DeltaVLMForConditionalGeneration._from_config(small_config(), attn_implementation="eager").eval()
        kept = dict.fromkeys(("return_dict_in_generate", "output_hidden_states", "output_attentions"), True)
        outputs = model.generate(**small_inputs, max_new_tokens=3, min_new_tokens=3, **kept)
        assert [step[0].shape for step in outputs.hidden_states] == [(2, 9, 32), (2, 1, 32), (2, 1, 32)]
        assert [step[0].shape for step in outputs.attentions] == [(2, 4, 9, 9), (2, 4, 1, 10), (2, 4, 1, 11)]


class TestGeneration:
    @pytest.mark.parametrize("beams", [1, 3])
    def test_caches_give_the_same_answers(self, beams, small_model, small_inputs):
        text_config = small_model.config.text_config
        expected = answer_ids(small_model, small_inputs, num_beams=beams)
        caches = [
            {"cache_implementation": "dynamic"},
            {"cache_implementation": "static"},
            {"use_cache": False},
            {CACHE: DynamicCache(config=text_config)},
            {CACHE: StaticCache(config=text_config, max_cache_len=32)},
        ]
        for cache in caches:
            assert answer_ids(small_model, small_inputs, num_beams=beams, **cache) == expected, cache

    def test_beam_sampling_is_seeded(self, small_model, small_inputs):
        samples = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            samples.append(answer_ids(small_model, small_inputs, do_sample=True, num_beams=3, temperature=2.0))
        assert samples[0] == samples[1] != samples[2]

    def test_several_threads_on_one_model(self, small_model, small_inputs):
        """Each with a question of its own, greedy and with beams; a thread more looks at heat maps."""

        def work(number: int) -> list[list[int]]:
            input_ids = torch.where(prompts < 60, (prompts + 7 * number) % 60, prompts)
            inputs = {**small_inputs, "input_ids": input_ids, "pixel_values": number * images}
            return answer_ids(small_model, inputs, num_beams=1 + number % 2)

        images, prompts = small_inputs["pixel_values"], small_inputs["input_ids"]
        expected = [work(number) for number in range(8)]
        assert len({str(answers) for answers in expected}) == 8
        with ThreadPoolExecutor(9) as pool:
            looking = pool.submit(lambda: [small_model.explain(**small_inputs) for _ in range(20)])
            for _ in range(3):
                assert list(pool.map(work, range(8))) == expected
            assert all(maps.attention.equal(looking.result()[0].attention) for maps in looking.result())


DETERMINISM = """
import hashlib, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
import deltavlm_hf
from deltavlm_hf.data.scenes import generate_scene
torch.set_num_threads(1)
model = AutoModelForImageTextToText.from_pretrained(deltavlm_hf.tiny())
processor = AutoProcessor.from_pretrained(deltavlm_hf.tiny())
scene = generate_scene(4_900_018, 96)
inputs = processor(images=(scene.before, scene.after), text="Where are the changes?", return_tensors="pt")
outputs = model.generate(**inputs, return_dict_in_generate=True, output_logits=True, max_new_tokens=16)
print(hashlib.sha256(torch.stack(outputs.logits).numpy().tobytes()).hexdigest(), outputs.sequences.tolist())
"""


def test_another_process_computes_the_same_bits():
    processes = [
        subprocess.Popen([sys.executable, "-c", DETERMINISM], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    one, other = (process.communicate()[0] for process in processes)
    assert one == other != ""


class TestPickling:
    """By the user's own hand, for `multiprocessing` and its like."""

    def test_model(self, small_model, small_inputs):
        copy = pickle.loads(pickle.dumps(small_model))
        assert answer_ids(copy, small_inputs) == answer_ids(small_model, small_inputs)

    def test_config(self, small_config):
        config = small_config(spatial_position_codes=True)
        assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()

    def test_processor(self, model, processor, pairs):
        copy = pickle.loads(pickle.dumps(processor))
        assert copy.to_dict() == processor.to_dict()
        questions = {"questions": ["What changed?"], "images": pairs[0], "max_new_tokens": 4}
        assert answer(model, copy, **questions) == answer(model, processor, **questions)

    def test_outputs(self, small_model, small_inputs):
        with torch.inference_mode():
            for outputs in (small_model(**small_inputs), small_model.explain(**small_inputs)):
                copy = pickle.loads(pickle.dumps(outputs))
                assert type(copy) is type(outputs) and copy.keys() == outputs.keys()
                assert copy[0].equal(outputs[0])


def test_placed_by_size_with_the_rest_on_disk(small_model, small_inputs, tmp_path):
    """`device_map="auto"`: no block that reads its own input again is torn in two."""
    small_model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": "200KB"}, offload_folder=tmp_path / "offload"
    )
    places = set(loaded.hf_device_map.values())
    assert "disk" in places and "cpu" in places
    assert answer_ids(loaded, small_inputs) == answer_ids(small_model, small_inputs)


@pytest.mark.parametrize("kind", [DeltaVLMForConditionalGeneration, DeltaVLMModel])
def test_gradient_checkpointing_by_the_configuration(kind, small_config, small_inputs, tmp_path):
    kind(small_config()).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "gradient_checkpointing": True}))
    model = kind.from_pretrained(tmp_path, attn_implementation="eager").train()
    assert model.is_gradient_checkpointing
    if kind is DeltaVLMForConditionalGeneration:
        labels = small_inputs["input_ids"].masked_fill(small_inputs["input_ids"] >= 60, -100)
        model(**small_inputs, labels=labels).loss.backward()
        assert model.query_tokens.grad.any()


class TestErrorsOfTheCall:
    """A mistake in the call is told as Transformers tells it of its own models, not as damage to the folder."""

    @pytest.mark.parametrize(
        ("options", "kind"),
        [
            ({"nonsense": 1}, TypeError),
            ({"max_memory": 3, "device_map": "auto"}, TypeError),
            ({"key_mapping": 3}, AttributeError),
            ({"quantization_config": 3}, AttributeError),
            ({"dtype": 3}, ValueError),
            ({"attn_implementation": "nope"}, ValueError),
        ],
        ids=str,
    )
    def test_arguments(self, options, kind, small_model, tmp_path):
        small_model.language_model.save_pretrained(tmp_path / "plain")
        with pytest.raises(kind):
            LlamaForCausalLM.from_pretrained(tmp_path / "plain", **options)
        small_model.save_pretrained(tmp_path)
        with pytest.raises(kind):
            DeltaVLMForConditionalGeneration.from_pretrained(tmp_path, **options)

    def test_meta_device(self, small_model, tmp_path):
        small_model.save_pretrained(tmp_path)
        with torch.device("meta"), pytest.raises(RuntimeError, match="meta device"):
            DeltaVLMForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_in_bfloat16(checkpointing, small_config, small_inputs):
    torch.manual_seed(0)
    model = DeltaVLMForConditionalGeneration(small_config()).to(torch.bfloat16).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    labels = small_inputs["input_ids"].masked_fill(small_inputs["input_ids"] >= 60, -100)
    inputs = {**small_inputs, "pixel_values": small_inputs["pixel_values"].bfloat16(), "labels": labels}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(parameter.isfinite().all() for parameter in model.parameters())
