"""Models of parts: an encoder's features, sizes and pixels are its own, what is new is named, folders load."""

import json
import shutil
from pathlib import Path

import bitsandbytes
import numpy as np
import pytest
import torch
from paths import FIXTURES, OFFICIAL
from processes import run_python
from safetensors.torch import load_file
from transformers import (
    AutoBackbone,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BeitConfig,
    BeitModel,
    BertConfig,
    BertModel,
    BertTokenizer,
    ConvNextBackbone,
    ConvNextConfig,
    ConvNextForImageClassification,
    Dinov2Backbone,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipVisionConfig,
    LlamaConfig,
    SwinConfig,
    SwinModel,
)

import deltavlm_hf
from deltavlm_hf import compose
from deltavlm_hf.cli import main
from deltavlm_hf.hub.publishing import Publication
from deltavlm_hf.modeling.efficientnet_lite import EfficientNetLiteBackbone, EfficientNetLiteConfig
from deltavlm_hf.training import leave_out_frozen
from deltavlm_hf.training.quantization import four_bit_config

SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
STAGES = {"depths": [1, 1, 2, 1], "image_size": 64}
# Of each family: the model that is saved, the maps that are read, pixels between tokens, maps finer than these.
FAMILIES = {
    "dinov2": (lambda: Dinov2Model(Dinov2Config(**SIZES, image_size=56)), [1, 2, 3, 4], 14, 0),
    "dinov3": (lambda: DINOv3ViTModel(DINOv3ViTConfig(**SIZES, intermediate_size=64)), [1, 2, 3, 4], 16, 0),
    "convnext": (
        lambda: ConvNextForImageClassification(ConvNextConfig(hidden_sizes=[8, 16, 24, 32], **STAGES)),
        [1, 2, 3, 4],
        16,
        2,
    ),
    "swin": (
        lambda: SwinModel(SwinConfig(embed_dim=8, num_heads=[1, 2, 2, 4], window_size=2, **STAGES)),
        [1, 2, 3, 4],
        16,
        2,
    ),
    "efficientnet": (lambda: EfficientNetLiteBackbone(EfficientNetLiteConfig(depth=5)), [1, 2, 3, 4, 5], 16, 3),
}
PIXELS = {"image_mean": (0.3, 0.4, 0.5), "image_std": (0.2, 0.25, 0.3), "rescale_factor": 1 / 255, "resample": 2}
QUESTION = "How many buildings are new?"


@pytest.fixture(scope="module")
def language_model(tmp_path_factory) -> Path:
    """The smallest there is, of the shipped model, with its tokenizer: a folder of its own."""
    folder = tmp_path_factory.mktemp("llm")
    AutoModelForImageTextToText.from_pretrained(deltavlm_hf.tiny()).language_model.save_pretrained(folder)
    AutoProcessor.from_pretrained(deltavlm_hf.tiny()).tokenizer.save_pretrained(folder)
    return folder


def save_encoder(family: str, folder: Path, **pixels) -> Path:
    torch.manual_seed(0)
    model = FAMILIES[family][0]()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2  # no layer scale at 1e-5, under which all would be equal
    model.save_pretrained(folder)
    side = {"height": 64, "width": 64} if family != "dinov2" else {"height": 56, "width": 56}
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": side, **PIXELS, **pixels}))
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def vision(family, tmp_path_factory) -> Path:
    return save_encoder(family, tmp_path_factory.mktemp(family))


@pytest.fixture(scope="module")
def made(vision, language_model):
    torch.manual_seed(0)
    return compose(vision, language_model, num_query_tokens=4, mask_classes=["building"])


@pytest.fixture(scope="module")
def pair() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return tuple(rng.integers(0, 256, (80, 80, 3), dtype=np.uint8) for _ in range(2))


def answer_ids(model, processor, pair) -> torch.Tensor:
    inputs = processor(images=pair, text=QUESTION, history=[], return_tensors="pt")
    return model.generate(**inputs, max_new_tokens=8)


class TestFamilies:
    def test_feature_maps_are_those_of_the_backbone_alone(self, made, family, vision, pair):
        model, processor, _ = made
        _, indices, _, _ = FAMILIES[family]
        with torch.device("meta"):
            kind = type(AutoBackbone.from_config(model.config.vision_config))
        alone = kind.from_pretrained(vision, out_indices=indices).eval()
        pixel_values = processor(images=pair, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            expected = alone(pixel_values[0]).feature_maps
            got = model.vision_model(pixel_values[0]).feature_maps
        assert len(got) == len(indices) and got[0].std() > 0
        assert all(map(torch.equal, got, expected))

    def test_the_processor_is_the_encoders(self, made, family):
        model, processor, _ = made
        side = 56 if family == "dinov2" else 64
        image_processor = processor.image_processor
        assert dict(image_processor.size) == {"height": side, "width": side}
        assert model.config.image_size == side
        assert {name: getattr(image_processor, name) for name in PIXELS} == PIXELS

    def test_layers_stride_and_masks(self, made, family, pair):
        model, processor, _ = made
        _, indices, stride, finer = FAMILIES[family]
        assert model.config.vision_config.out_indices == indices
        assert (model.config.neck_stride, model.config.mask_skip_maps) == (stride, finer)
        side = model.config.image_size
        assert model.segment(**processor(images=pair, return_tensors="pt")).shape == (1, 1, side, side)

    def test_what_is_new_is_named(self, made, family):
        model, _, new = made
        expected = [
            "vision_model.neck",
            "difference",
            "mask_decoder",
            "query_tokens",
            "qformer",
            "language_projection",
        ]
        if family in ("convnext", "swin"):  # norms that backbones have and classifiers have not
            expected.append("vision_model.backbone.hidden_states_norms")
        assert sorted(new) == sorted(expected)
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert trained and all(name.startswith(tuple(expected)) for name in trained)

    def test_the_language_model_is_untouched(self, made, language_model):
        expected = AutoModelForCausalLM.from_pretrained(language_model).state_dict()
        got = made.model.language_model.state_dict()
        assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in expected)

    def test_answers_outlive_saving(self, family, made, pair, tmp_path):
        """In a process without the package too: for a family of Transformers, and for the one whose code travels."""
        model, processor, _ = made
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        expected = answer_ids(model, processor, pair)
        assert len(set(expected[0].tolist())) > 2
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
        assert torch.equal(answer_ids(loaded, AutoProcessor.from_pretrained(tmp_path), pair), expected)
        if family not in ("swin", "efficientnet"):
            return
        np.save(tmp_path / "pair.npy", np.stack(pair))
        code = f"""
        import sys
        sys.modules["deltavlm_hf"] = None
        import numpy as np
        from transformers import AutoModelForImageTextToText, AutoProcessor
        model = AutoModelForImageTextToText.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)
        processor = AutoProcessor.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)
        pair = tuple(np.load({str(tmp_path / "pair.npy")!r}))
        inputs = processor(images=pair, text={QUESTION!r}, history=[], return_tensors="pt")
        print(model.generate(**inputs, max_new_tokens=8).tolist())
        """
        assert json.loads(run_python(code)) == expected.tolist()

    def test_a_whole_folder_tells_no_paths(self, made, tmp_path, language_model, vision):
        made.model.save_pretrained(tmp_path)
        settings = (tmp_path / "config.json").read_text()
        assert "weight_sources" in settings and str(vision) not in settings and str(language_model) not in settings

    def test_a_small_folder_points_to_the_parts(self, family, vision, language_model, pair, tmp_path):
        torch.manual_seed(0)
        folder = tmp_path / "model"
        model, processor, new = compose(vision, language_model, num_query_tokens=4, output_dir=folder, small=True)
        saved = load_file(folder / "model.safetensors").keys()
        assert not any(name.startswith("language_model.") for name in saved)
        of_backbone = {name for name in saved if name.startswith("vision_model.backbone.")}
        if family == "convnext":  # whose classifier has another name before each weight
            assert of_backbone
        elif family == "swin":
            assert len(of_backbone) == 10 and all("norm" in name for name in of_backbone)
        else:
            assert not of_backbone
        loaded = AutoModelForImageTextToText.from_pretrained(folder)
        expected = model.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
        assert torch.equal(
            answer_ids(loaded, AutoProcessor.from_pretrained(folder), pair), answer_ids(model, processor, pair)
        )


class TestSizes:
    """The side of images, where encoder and files differ."""

    def test_positions_are_resampled_as_the_encoder_does(self, language_model, pair, tmp_path):
        vision = save_encoder("dinov2", tmp_path, crop_size={"height": 84, "width": 84}, do_center_crop=True)
        model, processor, _ = compose(vision, language_model)
        assert model.config.image_size == 84 and processor.image_processor.size["height"] == 84
        pixel_values = processor(images=pair, return_tensors="pt")["pixel_values"]
        alone = Dinov2Backbone.from_pretrained(vision, out_indices=[1, 2, 3, 4]).eval()
        with torch.no_grad():
            got, expected = model.vision_model(pixel_values[0]).feature_maps, alone(pixel_values[0]).feature_maps
        assert all(map(torch.equal, got, expected))
        assert compose(vision, language_model, image_size=56).model.config.image_size == 56

    def test_an_encoder_of_any_size(self, language_model, tmp_path):
        vision = save_encoder("convnext", tmp_path, size={"shortest_edge": 96}, crop_pct=0.875)
        assert compose(vision, language_model).model.config.num_vision_tokens == 36
        assert compose(vision, language_model, image_size=128).processor.image_processor.size["height"] == 128
        with pytest.raises(ValueError, match="`neck_stride` is 16, of which the image size of 100 is no multiple"):
            compose(vision, language_model, image_size=100)

    def test_an_encoder_of_one_size(self, language_model, tmp_path):
        BeitModel(
            BeitConfig(**SIZES, intermediate_size=64, image_size=64, use_relative_position_bias=True)
        ).save_pretrained(tmp_path)
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 96}))
        model, processor, _ = compose(tmp_path, language_model)
        assert model.config.image_size == processor.image_processor.size["height"] == 64
        with pytest.raises(ValueError, match="bound to images of 64 pixels .*relative_position_bias"):
            compose(tmp_path, language_model, image_size=96)

    @pytest.mark.parametrize("family, mean", [("convnext", 0.485), ("efficientnet", 0.5)])
    def test_without_a_preprocessor(self, family, mean, language_model, tmp_path):
        vision = save_encoder(family, tmp_path)
        (vision / "preprocessor_config.json").unlink()
        model, processor, _ = compose(vision, language_model)
        assert processor.image_processor.image_mean[0] == mean
        assert processor.image_processor.size["height"] == model.config.vision_config.image_size

    def test_the_caller_chooses_layers_and_neck(self, language_model, tmp_path):
        vision = save_encoder("convnext", tmp_path)
        config = compose(
            vision, language_model, out_indices=[2, 4], neck_stride=8, neck_hidden_size=64, mask_classes=["road"]
        ).model.config
        assert config.vision_config.out_indices == [2, 4]
        assert (config.num_vision_tokens, config.vision_width, config.mask_skip_maps) == (64, 64, 0)


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = BertTokenizer(str(FIXTURES / "bert_vocab.txt"))
    tokenizer.save_pretrained(folder)
    BertModel(BertConfig(vocab_size=len(tokenizer), **SIZES, intermediate_size=64)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def instructblip(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("instructblip")
    tokenizer = BertTokenizer(str(FIXTURES / "bert_vocab.txt"))
    tokenizer.save_pretrained(folder / "qformer_tokenizer")
    config = InstructBlipConfig(
        vision_config={**SIZES, "intermediate_size": 64, "image_size": 56},
        qformer_config={**SIZES, "intermediate_size": 64, "vocab_size": len(tokenizer)},
        text_config=LlamaConfig(**SIZES, intermediate_size=64, vocab_size=50),
        num_query_tokens=8,
    )
    torch.manual_seed(1)
    model = InstructBlipForConditionalGeneration(config)
    for parameter in model.parameters():
        parameter.data.normal_()
    model.save_pretrained(folder)
    return folder


class TestQFormer:
    def test_of_instructblip_with_its_vit(self, instructblip, language_model, pair, tmp_path):
        """All fits but what the language model reads."""
        base = InstructBlipForConditionalGeneration.from_pretrained(instructblip).eval()
        model, processor, new = compose(
            instructblip,
            language_model,
            qformer=instructblip,
            num_query_tokens=8,
            output_dir=tmp_path / "small",
            small=True,
        )
        assert sorted(new) == ["difference", "language_projection"]
        pixel_values = processor(images=pair, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            expected = base.vision_model(pixel_values[0]).last_hidden_state
            assert torch.equal(model.vision_model(pixel_values[0]).last_hidden_state, expected)
        for name, value in base.qformer.state_dict().items():
            assert torch.equal(model.qformer.state_dict()[name], value)
        assert torch.equal(model.query_tokens, base.query_tokens)
        assert type(processor.qformer_tokenizer).__name__ == "BertTokenizer"
        saved = load_file(tmp_path / "small" / "model.safetensors")
        assert {name.split(".")[0] for name in saved} == {
            "difference",
            "language_projection",
            "qformer",
            "query_tokens",
        }
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "small")
        assert torch.equal(answer_ids(loaded, processor, pair), answer_ids(model, processor, pair))

    def test_of_instructblip_where_shapes_fit(self, instructblip, language_model, tmp_path):
        """Of another encoder's tokens, other queries: cross-attention and query tokens begin anew."""
        vision = save_encoder("convnext", tmp_path)
        model, _, new = compose(vision, language_model, qformer=instructblip, num_query_tokens=4, neck_hidden_size=64)
        of_qformer = {name for name in new if name.startswith("q")}
        layers = (0, 2)  # every other one reads the images
        expected = {
            f"qformer.encoder.layer.{layer}.crossattention.attention.{name}.weight"
            for layer in layers
            for name in ("key", "value")
        }
        assert of_qformer == {"query_tokens", *expected}

    def test_of_bert(self, bert, language_model, tmp_path):
        vision = save_encoder("convnext", tmp_path)
        model, processor, new = compose(vision, language_model, qformer=bert)
        layers = (0, 2)
        of_qformer = {name for name in new if name.startswith("q")}
        assert of_qformer == {"query_tokens", *(f"qformer.encoder.layer.{layer}.crossattention" for layer in layers)}
        expected = BertModel.from_pretrained(bert)
        feed_forward = expected.encoder.layer[1].intermediate.dense.weight
        assert torch.equal(model.qformer.encoder.layer[1].intermediate.dense.weight, feed_forward)
        assert torch.equal(model.qformer.encoder.layer[1].intermediate_query.dense.weight, feed_forward)
        ours, theirs = model.qformer.embeddings, expected.embeddings
        assert torch.equal(ours.word_embeddings.weight, theirs.word_embeddings.weight)
        assert torch.equal(ours.layernorm.weight, theirs.LayerNorm.weight)
        assert (
            processor.qformer_tokenizer("a road").input_ids == AutoTokenizer.from_pretrained(bert)("a road").input_ids
        )

    def test_of_a_deltavlm(self, language_model, tmp_path):
        model, processor, new = compose(save_encoder("convnext", tmp_path), language_model, qformer=deltavlm_hf.tiny())
        shipped = AutoModelForImageTextToText.from_pretrained(deltavlm_hf.tiny())
        assert torch.equal(model.query_tokens, shipped.query_tokens) and "query_tokens" not in new
        assert len(processor.qformer_tokenizer) == shipped.config.qformer_config.vocab_size

    def test_a_new_one(self, language_model, tmp_path):
        vision = save_encoder("convnext", tmp_path)
        config = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
        vocab = FIXTURES / "bert_vocab.txt"
        model, processor, _ = compose(vision, language_model, qformer_config=config, qformer_tokenizer=vocab)
        assert len(model.qformer.encoder.layer) == 2 and model.config.qformer_config.hidden_size == 32
        assert model.config.qformer_config.vocab_size == len(BertTokenizer(str(vocab)))
        assert processor.qformer_tokenizer("a road").input_ids == BertTokenizer(str(vocab))("a road").input_ids

    def test_one_of_both(self, bert, language_model, tmp_path):
        with pytest.raises(ValueError, match="leave it or `qformer` out"):
            compose(save_encoder("convnext", tmp_path), language_model, qformer=bert, qformer_config={})

    def test_what_is_none(self, language_model, tmp_path):
        vision = save_encoder("convnext", tmp_path)
        with pytest.raises(ValueError, match="is a 'convnext', expected an InstructBLIP, a DeltaVLM or a BERT"):
            compose(vision, language_model, qformer=vision)


class TestForms:
    """Of `vision`: what is not a folder."""

    def test_a_configuration_begins_untrained(self, language_model):
        config = ConvNextConfig(hidden_sizes=[8, 16, 24, 32], **STAGES, out_indices=[3, 4])
        model, _, new = compose(config, language_model)
        assert "vision_model" in new
        assert all(parameter.requires_grad for parameter in model.vision_model.parameters())
        assert model.config.vision_config.out_indices == [3, 4]
        vit = compose(InstructBlipVisionConfig(**SIZES, intermediate_size=64, image_size=56), language_model)
        assert "vision_model" in vit.new and vit.model.config.num_vision_tokens == 17

    def test_a_loaded_backbone(self, language_model, tmp_path):
        backbone = ConvNextBackbone.from_pretrained(save_encoder("convnext", tmp_path), out_indices=[2, 3])
        model, _, new = compose(backbone, language_model)
        assert model.vision_model.backbone is backbone and "vision_model.neck" in new

    def test_a_loaded_model_that_is_none(self, language_model):
        with pytest.raises(ValueError, match="is a Dinov2Model, expected a backbone"):
            compose(Dinov2Model(Dinov2Config(**SIZES, image_size=56)), language_model)


class TestRefused:
    @pytest.fixture
    def vision(self, tmp_path) -> Path:
        return save_encoder("convnext", tmp_path / "vision")

    def change(self, folder: Path, file: str, **settings) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, **settings}))

    def test_a_language_model_that_is_none(self, vision):
        with pytest.raises(ValueError, match="is a 'convnext', expected a causal language model"):
            compose(vision, vision)

    def test_a_vision_encoder_that_is_none(self, language_model):
        with pytest.raises(ValueError, match="'llama', which is neither"):
            compose(language_model, language_model)

    def test_a_tokenizer_of_another_model(self, vision, language_model):
        with pytest.raises(ValueError, match="tokenizer of the language model has 1000 tokens, but"):
            compose(vision, language_model, tokenizer=OFFICIAL / "llm")

    def test_other_channels(self, vision, language_model):
        self.change(vision, "config.json", num_channels=12)
        with pytest.raises(ValueError, match="reads 12 channels .*expected 3"):
            compose(vision, language_model)

    @pytest.mark.parametrize(
        "settings", [{"image_mean": [0.5]}, {"size": {"height": -3, "width": -3}}, {"size": {"shortest_edge": "a"}}]
    )
    def test_a_preprocessor_that_cannot_be(self, settings, vision, language_model):
        self.change(vision, "preprocessor_config.json", **settings)
        with pytest.raises(ValueError, match="image_mean|side of"):
            compose(vision, language_model)

    def test_weights_that_are_pickled(self, vision, language_model):
        (vision / "model.safetensors").unlink()
        torch.save({}, vision / "pytorch_model.bin")
        with pytest.raises(OSError, match="model.safetensors"):
            compose(vision, language_model)

    def test_weights_of_something_else(self, vision, language_model):
        shutil.copyfile(language_model / "model.safetensors", vision / "model.safetensors")
        with pytest.raises(ValueError, match="holds no weights of a 'convnext' backbone"):
            compose(vision, language_model)

    @pytest.mark.parametrize(
        "settings",
        [
            {"hidden_sizes": [2**30, 1, 1, 1]},
            {"_attn_implementation": "org/kernel"},
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            {"auto_map": {"AutoConfig": "harm.Config"}, "model_type": "new"},
        ],
        ids=str,
    )
    def test_what_a_stranger_asks_for(self, settings, vision, language_model):
        self.change(vision, "config.json", **settings)
        with pytest.raises(ValueError, match="at most|never fetched|quantised|trust_remote_code"):
            compose(vision, language_model)

    def test_an_adapter_beside_the_weights(self, vision, language_model, tmp_path):
        folder = Path(shutil.copytree(language_model, tmp_path / "llm"))
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        with pytest.raises(ValueError, match="holds an adapter .* merge it first"):
            compose(vision, folder)

    def test_where_something_is_already(self, vision, language_model):
        with pytest.raises(FileExistsError, match="exists already"):
            compose(vision, language_model, output_dir=vision)
        with pytest.raises(ValueError, match="`small` is about `output_dir`"):
            compose(vision, language_model, small=True)


def test_a_tokenizer_without_padding(language_model, pair, tmp_path):
    """As GPT-2's and Llama's are: it pads with its end of text."""
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    tokenizer.pad_token = None
    model, processor, _ = compose(save_encoder("convnext", tmp_path), language_model, tokenizer=tokenizer)
    assert processor.tokenizer.pad_token_id == processor.tokenizer.eos_token_id == model.generation_config.pad_token_id
    inputs = processor(images=[pair, pair], text=["a", QUESTION], padding=True, return_tensors="pt")
    alone = processor(images=pair, text="a", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits[0, -1], model(**alone).logits[0, -1], rtol=1e-3, atol=1e-4)


def test_16_bits_throughout(language_model, tmp_path):
    model = compose(save_encoder("dinov2", tmp_path), language_model, dtype=torch.bfloat16).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_what_the_documentation_shows(language_model, pair, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "encoders.md").read_text()
    snippet = text.partition("```python\n")[2].partition("```")[0]
    for name, folder in (
        ("facebook/dinov2-small", save_encoder("dinov2", tmp_path / "dinov2")),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", language_model),
    ):
        assert name in snippet
        snippet = snippet.replace(name, str(folder))
    exec(snippet, {})
    assert "'vision_model.neck'" in capsys.readouterr().out
    sizes = [(tmp_path / folder / "model.safetensors").stat().st_size for folder in ("start", "start-small")]
    assert sizes[1] < sizes[0]
    whole, small = (AutoModelForImageTextToText.from_pretrained(folder) for folder in ("start", "start-small"))
    processor = AutoProcessor.from_pretrained("start-small")
    assert torch.equal(answer_ids(whole, processor, pair), answer_ids(small, processor, pair))
    assert whole.segment(**processor(images=pair, return_tensors="pt")).shape[1] == 2


def test_a_classifier_saved_as_a_backbone_is_pointed_to(language_model, tmp_path):
    classifier = save_encoder("convnext", tmp_path / "classifier")
    compose(classifier, language_model).model.vision_model.backbone.save_pretrained(tmp_path / "backbone")
    compose(tmp_path / "backbone", language_model, output_dir=tmp_path / "small", small=True)
    saved = load_file(tmp_path / "small" / "model.safetensors")
    assert not any(name.startswith("vision_model.backbone.") for name in saved)


def test_small_checkpoints_after_training(tmp_path, language_model):
    """Of a folder that is whole, and of parts at once."""
    model = compose(save_encoder("dinov2", tmp_path / "v"), language_model, output_dir=tmp_path / "m").model
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "m")
    for part in (whole.vision_model.backbone, whole.language_model):
        part.requires_grad_(False)
    for each, source in ((model, "v"), (whole, "m")):
        each.query_tokens.data += 1
        left_out = leave_out_frozen(each)
        assert {name.split(".")[0] for name in left_out} >= {"vision_model", "language_model"}
        assert str(tmp_path / source) in {place["name_or_path"] for place in each.config.weight_sources}
        each.save_pretrained(tmp_path / "small")
        assert not load_file(tmp_path / "small" / "model.safetensors").keys() & set(left_out)
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "small")
        expected = each.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


def test_only_the_language_model_is_quantised(tmp_path, language_model, pair):
    compose(save_encoder("dinov3", tmp_path / "v"), language_model, num_query_tokens=4, output_dir=tmp_path / "m")
    model = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "m", quantization_config=four_bit_config(torch.float32)
    )
    four_bit = {name for name, each in model.named_modules() if isinstance(each, bitsandbytes.nn.Linear4bit)}
    assert four_bit and all(name.startswith("language_model.") for name in four_bit)
    assert answer_ids(model, AutoProcessor.from_pretrained(tmp_path / "m"), pair).shape[1] > 4


class TestCommand:
    """`deltavlm compose`."""

    @pytest.fixture
    def vision(self, tmp_path) -> Path:
        vision = save_encoder("dinov2", tmp_path / "eyes")
        (vision / "README.md").write_text("---\nlicense: other\nlicense_name: eyes-1.0\n---\n# Eyes\n")
        return vision

    def test_a_model_to_train_with_pointers(self, vision, language_model, pair, tmp_path, capsys):
        start = tmp_path / "start"
        command = ["compose", str(start), "--vision", str(vision), "--language-model", str(language_model)]
        assert main([*command, "--query-tokens", "4", "--mask-classes", "building", "--ground-resolution", "0.5"]) == 0
        said = capsys.readouterr().out
        assert said.count("\n") == 1 and f"{start} is a model to train" in said and "vision_model.neck" in said
        assert "Licences: vision_model eyes-1.0; language_model not stated" in said
        saved = load_file(start / "model.safetensors")
        assert not any(name.startswith(("language_model.", "vision_model.backbone.")) for name in saved)
        loaded, processor = AutoModelForImageTextToText.from_pretrained(start), AutoProcessor.from_pretrained(start)
        assert loaded.config.mask_classes == ["building"] and loaded.config.ground_resolution == 0.5
        assert answer_ids(loaded, processor, pair).shape[1] > 5
        count = sum(weight.numel() for name, weight in saved.items())
        assert f"{count:,} weights of it" in said

    def test_the_seed_is_what_is_new(self, vision, language_model, tmp_path):
        def make(name: str, seed: str) -> torch.Tensor:
            command = ["compose", str(tmp_path / name), "--vision", str(vision), "--seed", seed]
            assert main([*command, "--language-model", str(language_model)]) == 0
            return load_file(tmp_path / name / "model.safetensors")["query_tokens"]

        assert torch.equal(make("one", "3"), make("same", "3")) and not torch.equal(make("other", "4"), make("9", "3"))

    def test_licences_reach_the_card(self, vision, language_model, tmp_path):
        start = tmp_path / "start"
        command = ["compose", str(start), "--vision", str(vision), "--language-model", str(language_model)]
        assert main([*command, "--whole", "--dtype", "bfloat16"]) == 0
        card = Publication(start, "me/start").card.text
        assert "- the vision encoder's weights: eyes-1.0, as its folder says" in card and str(tmp_path) not in card

    @pytest.mark.parametrize(
        "head", ["license: [a, b]", "license: '<script>'", "license: {", "- a", "license: '\\u2028'", "x: y"]
    )
    def test_a_strangers_card(self, head, vision, language_model, tmp_path, capsys):
        (vision / "README.md").write_text(f"---\n{head}\n---\n")
        command = ["compose", str(tmp_path / "start"), "--vision", str(vision)]
        assert main([*command, "--language-model", str(language_model)]) == 0
        assert "vision_model not stated" in capsys.readouterr().out

    @pytest.mark.parametrize(
        "options, words",
        [
            (["--language-model", "nowhere.gguf"], "nowhere.gguf does not exist; a GGUF file on the Hub is named"),
            (["--language-model", "{llm}", "--dtype", "int8"], "--dtype int8: expected float32"),
            (["--language-model", "{llm}", "--tokenizer", str(OFFICIAL / "llm")], "it is another model's"),
            (["--language-model", "{vision}"], "expected a causal language model"),
        ],
        ids=str,
    )
    def test_what_does_not_fit(self, options, words, vision, language_model, tmp_path, capsys):
        options = [each.format(llm=language_model, vision=vision) for each in options]
        assert main(["compose", str(tmp_path / "start"), "--vision", str(vision), *options]) == 1
        assert words in capsys.readouterr().err and not (tmp_path / "start").exists()

    @pytest.mark.slow
    def test_a_gguf_file(self, vision, smollm_gguf, smollm_folder, tmp_path, capsys):
        """A real one: the model that its own reader makes of it, in float32."""
        start = tmp_path / "start"
        command = ["compose", str(start), "--vision", str(vision), "--language-model", str(smollm_gguf)]
        assert main(command) == 0
        assert "language_model apache-2.0" in capsys.readouterr().out
        loaded = AutoModelForImageTextToText.from_pretrained(start)
        expected = AutoModelForCausalLM.from_pretrained(smollm_folder).state_dict()
        got = loaded.language_model.state_dict()
        assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in expected)
        processor = AutoProcessor.from_pretrained(start)
        text = "How many buildings are new?"
        assert processor.tokenizer(text).input_ids == AutoTokenizer.from_pretrained(smollm_folder)(text).input_ids
        saved = load_file(start / "model.safetensors")
        assert not any(name.startswith("vision_model.backbone.") for name in saved)
