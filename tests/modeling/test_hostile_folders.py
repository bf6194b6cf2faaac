"""Folders of strangers: what they may ask for, name and point to, before anything is built, fetched or opened."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from peft_version import needs_peft
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, GenerationConfig, GPT2Config, LlamaConfig

import deltavlm_hf
from deltavlm_hf import DeltaVLMConfig, DeltaVLMForConditionalGeneration, DeltaVLMModel, DeltaVLMProcessor
from deltavlm_hf.training import FreezePolicy, freeze

MODULE = "import os\nos.mkdir({folder!r})\nclass RowParallelLinear: pass\nclass ColumnParallelLinear: pass\n"
KINDS = [AutoModelForImageTextToText, DeltaVLMForConditionalGeneration, DeltaVLMModel]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the small model that may be changed."""
    return Path(shutil.copytree(deltavlm_hf.tiny(), tmp_path / "model"))


@pytest.fixture
def harm(tmp_path, monkeypatch) -> Path:
    """The name of a module in the working directory, which makes a folder when it is imported."""
    (tmp_path / "harmful.py").write_text(MODULE.format(folder=str(tmp_path / "harm")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "harm"
    assert not (tmp_path / "harm").exists()
    sys.modules.pop("harmful", None)
    import harmful  # noqa: F401

    assert (tmp_path / "harm").exists()  # it would have done harm
    del sys.modules["harmful"]


def change(folder: Path, settings: dict, file: str = "config.json") -> None:
    """Settings by path: `{"text_config.vocab_size": 3}`."""
    content = json.loads((folder / file).read_text())
    for path, value in settings.items():
        part, *names = content, *path.split(".")
        for name in names[:-1]:
            part = part.setdefault(name, {})
        part[names[-1]] = value
    (folder / file).write_text(json.dumps(content))


def refused(folder: Path, words: str, kind=DeltaVLMForConditionalGeneration, **kwargs) -> str:
    with pytest.raises(ValueError, match=words) as caught:
        kind.from_pretrained(folder, **kwargs)
    if kind is not AutoModelForImageTextToText:  # which reads some files before it asks us
        assert str(folder) in str(caught.value)
    return str(caught.value)


class TestGeneration:
    @pytest.mark.parametrize(
        "settings",
        [
            {"num_beams": 10**6},
            {"num_return_sequences": 10**5, "do_sample": True},
            {"min_new_tokens": 10**9},
            {"max_length": 10**12},
        ],
        ids=str,
    )
    def test_an_answer_that_would_not_end(self, settings, folder):
        change(folder, settings, "generation_config.json")
        name = next(iter(settings))
        refused(folder, f"`{name}` of generation_config.json is .*at most")

    def test_the_caller_may(self, folder):
        change(folder, {"num_beams": 10**6}, "generation_config.json")
        own = GenerationConfig(num_beams=300)
        model = DeltaVLMForConditionalGeneration.from_pretrained(folder, generation_config=own)
        assert model.generation_config.num_beams == 300


class TestProcessor:
    @pytest.mark.parametrize("settings", [{"num_query_tokens": 5 * 10**8}, {"qformer_max_length": 10**12}], ids=str)
    def test_counts(self, settings, folder):
        change(folder, settings, "processor_config.json")
        with pytest.raises(ValueError, match="must be an integer of at least .*, and at most"):
            DeltaVLMProcessor.from_pretrained(folder)

    @pytest.mark.parametrize(
        "size", [{"height": 10**6, "width": 10**6}, {"longest_edge": 10**7}, {"height": 0, "width": 3}]
    )
    def test_sizes_that_images_are_brought_to(self, size, folder):
        change(folder, {"image_processor.size": size}, "processor_config.json")
        with pytest.raises(ValueError, match="size"):
            DeltaVLMProcessor.from_pretrained(folder).image_processor((np.zeros((8, 8, 3), np.uint8),) * 2)


class TestSizes:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        "settings",
        [
            {"num_query_tokens": 5 * 10**8},
            {"text_config.num_hidden_layers": 10**7},
            {"text_config.hidden_size": 2**40},
            {"text_config.vocab_size": 10**9},
            {"text_config.max_position_embeddings": 10**12},
            {"text_config.num_labels": 10**8},
            {"text_config.experts.num_local_experts": 10**6},
            {"vision_config.num_hidden_layers": 10**6},
            {"vision_config.image_size": 10**6},
            {"vision_config.image_size": [10**6, 10**6]},
            {"vision_config.num_attention_heads": 10**5},
            {"vision_config.depths": [[1, 10**6]]},
            {"qformer_config.intermediate_size": 10**7},
            {"qformer_config.num_hidden_layers": 10**4},
            {"some_new_thing": 10**9},
            {"num_labels": 10**7},
        ],
        ids=str,
    )
    def test_beyond_any_model(self, settings, kind, folder):
        change(folder, settings)
        ((path, _),) = settings.items()
        assert "at most" in refused(folder, path, kind)

    @pytest.mark.parametrize(
        "config",
        [
            {"model_type": "gpt2", "n_layer": 10**6},
            {"model_type": "gpt2", "n_embd": 10**8},
            {"model_type": "gpt2", "n_positions": 10**10},
            {"model_type": "opt", "ffn_dim": 10**9},
            {"model_type": "bloom", "n_head": 10**6},
            {"model_type": "mixtral", "num_local_experts": 10**6},
            {"model_type": "mixtral", "num_local_experts": 10**4, "num_hidden_layers": 1000},
            {"model_type": "mamba", "state_size": 10**9},
            {"model_type": "gemma3n_text", "altup_num_inputs": 2**20},
            {
                "num_hidden_layers": 4000,
                "intermediate_size": 2**20,
            },  # with a `hidden_size` of 4096 where there is none
        ],
        ids=str,
    )
    def test_of_any_language_model(self, config, folder):
        change(folder, {"text_config": config})
        assert "at most" in refused(folder, "text_config").lower()

    @pytest.mark.parametrize("name", ["num_hidden_layers", "hidden_size", "num_attention_heads"])
    @pytest.mark.parametrize("part", ["text_config", "vision_config", "qformer_config"])
    @pytest.mark.parametrize("value", [True, "12", 1.5, float("nan"), float("inf"), [12], {"": 3}, -1], ids=str)
    def test_what_is_no_size(self, value, part, name, folder):
        change(folder, {f"{part}.{name}": value})
        refused(folder, f"{part}.{name}|{name}")

    @pytest.mark.parametrize("name", ["num_query_tokens", "image_token_id"])
    @pytest.mark.parametrize("value", [True, "12", 1.5, -1], ids=str)
    def test_what_is_no_number(self, value, name, folder):
        change(folder, {name: value})
        refused(folder, name)

    @pytest.mark.parametrize("settings", [{"num_query_tokens": 10**8}, {"text_config": {"num_hidden_layers": 10**7}}])
    def test_in_code(self, settings, small_config):
        (name,) = settings
        with pytest.raises(ValueError, match=f"{name}.* at most"):
            DeltaVLMConfig(**settings)
        with pytest.raises(ValueError, match=f"{name}.* at most"):
            DeltaVLMConfig.from_dict(settings)
        config = small_config()
        config.text_config.num_hidden_layers = 10**7
        with pytest.raises(ValueError, match="`text_config.num_hidden_layers` is 10000000, and at most 1024"):
            DeltaVLMForConditionalGeneration(config)

    @pytest.mark.parametrize(
        "text",
        [
            LlamaConfig(),
            LlamaConfig(hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128),
            LlamaConfig(vocab_size=300_000, max_position_embeddings=10_485_760),
            GPT2Config(n_layer=96, n_embd=12288, n_head=96),
            {"model_type": "deepseek_v3", "hidden_size": 7168, "n_routed_experts": 384, "num_hidden_layers": 61},
            {"model_type": "qwen3_moe", "num_experts": 512, "num_hidden_layers": 94, "max_position_embeddings": 2**20},
            {"model_type": "mamba2", "time_step_limit": [0.0, float("inf")]},
        ],
        ids=lambda text: str(text)[:40],
    )
    def test_models_that_exist_pass(self, text):
        config = DeltaVLMConfig(text_config=text)
        assert DeltaVLMConfig.from_dict(config.to_dict()).text_config.to_dict() == config.text_config.to_dict()

    def test_what_the_files_do_not_hold_is_not_made(self, folder):
        """A Q-Former of 60 GB beside the weights of a small model."""
        weights = load_file(folder / "model.safetensors")
        weights = {
            name: weight for name, weight in weights.items() if not name.startswith(("q", "language_projection"))
        }
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        sizes = {"hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 48, "num_attention_heads": 32}
        change(folder, {f"qformer_config.{name}": value for name, value in sizes.items()})
        assert memory_to_refuse(folder, "of the model's weights are not in its files, among them language_proj") < 3e9

    def test_tables_that_no_file_holds_are_not_made(self, folder):
        size = json.loads((folder / "config.json").read_text())["text_config"]["vocab_size"]
        text = {"model_type": "gpt_neo", "vocab_size": size, "hidden_size": 8, "num_heads": 1, "num_layers": 1}
        change(folder, {"text_config": {**text, "attention_types": [[["global"], 1]]}})
        change(folder, {"text_config.max_position_embeddings": 10**6})
        assert memory_to_refuse(folder, "1000000[0-9]* bytes of tables") < 3e9


REFUSE = """
import re, resource, sys
from deltavlm_hf import DeltaVLMForConditionalGeneration
folder, words = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_DATA, (12 * 2**30, 12 * 2**30))
try:
    DeltaVLMForConditionalGeneration.from_pretrained(folder)
except ValueError as error:
    assert re.search(words, str(error)), error
    # not ru_maxrss: that begins at what the parent had
    print(int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024)
"""


def memory_to_refuse(folder: Path, words: str) -> int:
    """Bytes, of a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", REFUSE, str(folder), words], capture_output=True, text=True, timeout=300
    )
    assert done.stdout, done.stderr
    return int(done.stdout)


class TestBackbones:
    """A vision encoder of others, its neck and the masks."""

    @pytest.fixture(scope="class")
    def saved(self, tmp_path_factory, small_config) -> Path:
        folder = tmp_path_factory.mktemp("convnext")
        encoder = {"model_type": "convnext", "hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4, "image_size": 64}
        config = small_config(
            vision_config={**encoder, "out_indices": [1, 2, 3, 4]}, mask_classes=["road"], mask_skip_maps=1
        )
        DeltaVLMForConditionalGeneration(config).save_pretrained(folder)
        return folder

    @pytest.fixture
    def folder(self, saved, tmp_path) -> Path:
        return Path(shutil.copytree(saved, tmp_path / "model"))

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        "settings",
        [
            {"vision_config.depths": [10**6, 1, 1, 1]},
            {"vision_config.depths": [1000, 1000, 1000, 1000]},
            {"vision_config.hidden_sizes": [2**30, 16, 24, 32]},
            {"vision_config.num_channels": 10**9},
            {"vision_config.patch_size": 2**20},
            {"vision_config": {"model_type": "swin", "embed_dim": 2**40}},
            {"vision_config": {"model_type": "swin", "depths": [2**10] * 4}},
            {"vision_config": {"model_type": "efficientnet_lite", "depth": 10**6}},
            {"neck_hidden_size": 2**30},
            {"neck_stride": 2**30},
            {"mask_hidden_size": 2**30},
        ],
        ids=str,
    )
    def test_beyond_any_model(self, settings, kind, folder):
        change(folder, settings)
        assert "at most" in refused(folder, next(iter(settings)), kind)

    @pytest.mark.parametrize(
        "settings, words",
        [
            ({"vision_config.num_channels": 4}, "reads 4 channels .*expected 3"),
            ({"vision_config.hidden_sizes": ["a"] * 4}, "hidden_sizes"),
            ({"vision_config.out_indices": [10**6]}, "out_indices"),
            ({"vision_config": {"model_type": "efficientnet_lite", "depth": True}}, "depth"),
            ({"vision_config": {"model_type": "efficientnet_lite", "batch_norm_eps": "x"}}, "batch_norm_eps"),
            ({"neck_hidden_size": True}, "neck_hidden_size"),
            ({"neck_hidden_size": 0}, "`neck_hidden_size` is 0|encoder_hidden_size"),
            ({"neck_stride": 0}, "`neck_stride` is 0"),
            ({"neck_stride": 48}, "`neck_stride` is 48, of which the image size of 64 is no multiple"),
            ({"mask_hidden_size": 0}, "`mask_hidden_size` is 0"),
            ({"mask_hidden_size": 1}, "`mask_hidden_size` is 1, too few"),
            ({"mask_skip_maps": 10**6}, "this vision encoder has 4 feature maps"),
            ({"mask_skip_maps": -1}, "this vision encoder has 4 feature maps"),
            ({"mask_classes": [f"class {number}" for number in range(1001)]}, "has 1001 names, expected 1 to 1000"),
            ({"mask_classes": []}, "has 0 names"),
            ({"mask_classes": ["road", "road"]}, "expected different names"),
            ({"mask_classes": [["road"]]}, "expected different names"),
            ({"mask_classes": ["r" * 10**6]}, "of 1 to 100 characters"),
            ({"mask_classes": "road"}, "mask_classes"),
            ({"mask_classes": None}, "need `mask_classes`"),
        ],
        ids=lambda value: str(value)[:60],
    )
    def test_what_cannot_be(self, settings, words, folder):
        change(folder, settings)
        refused(folder, words)

    @pytest.mark.parametrize("model_type", ["llama", "detr", "vit", "deltavlm", "nothing", ["convnext"]], ids=str)
    def test_what_is_no_backbone(self, model_type, folder):
        change(folder, {"vision_config": {"model_type": model_type}})
        refused(folder, "no.* a backbone of Transformers|Unrecognized model type|unhashable")

    @pytest.mark.parametrize("config", [{"backbone": "resnet50"}, {}, {"use_pretrained_backbone": True}], ids=str)
    @pytest.mark.parametrize("model_type", ["timm_backbone", "timm_wrapper"])
    def test_timm(self, model_type, config, folder):
        change(folder, {"vision_config": {"model_type": model_type, **config}})
        refused(folder, "models of timm are not taken, for timm needs torchvision and fetches weights by a name")
        with pytest.raises(ValueError, match="models of timm are not taken"):
            DeltaVLMConfig(vision_config={"model_type": model_type, **config})

    @pytest.mark.parametrize(
        "settings",
        [
            {"vision_config.hidden_sizes": [2**20] * 4},
            {"vision_config": {"model_type": "swin", "window_size": 2**14, "embed_dim": 8, "out_indices": [1, 2]}},
            {"neck_hidden_size": 2**20},
            {"mask_hidden_size": 2**20},
        ],
        ids=str,
    )
    def test_what_the_files_do_not_hold_is_not_made(self, settings, folder):
        """Layers of terabytes, each within its bound."""
        change(folder, settings)
        words = "but the configuration asks for|bytes of tables|weights are not in its files"
        assert memory_to_refuse(folder, words) < 3e9


class TestCode:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("part", ["", "text_config.", "vision_config.", "qformer_config.", "a.b."])
    @pytest.mark.parametrize("name", ["_attn_implementation", "attn_implementation", "_experts_implementation"])
    def test_kernels_of_others(self, name, part, kind, folder):
        for value in ("org/kernel", "kernels-community/flash-attn@v1:fn", "paged|org/kernel", {"": "org/kernel"}, 3):
            change(folder, {f"{part}{name}": value})
            assert "kernels of others are never fetched" in refused(folder, f"{part}{name}", kind)

    @pytest.mark.parametrize("value", ["eager", "sdpa", None])
    @pytest.mark.parametrize("name", ["_attn_implementation", "attn_implementation"])
    def test_what_is_built_in(self, name, value, folder):
        change(folder, {name: value, f"text_config.{name}": value})
        model = DeltaVLMForConditionalGeneration.from_pretrained(folder)
        assert model.config.text_config._attn_implementation == value or value is None

    def test_the_callers_own_wish_is_that_of_transformers(self, folder):
        for value in ("org/kernel", {"": "sdpa", "text_config": "org/kernel"}):
            with pytest.raises((ValueError, ImportError), match="kernels"):
                DeltaVLMForConditionalGeneration.from_pretrained(folder, attn_implementation=value)
        change(folder, {"_attn_implementation": "sdpa"})
        model = DeltaVLMForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
        assert model.language_model.config._attn_implementation == "eager"

    @pytest.mark.parametrize(
        "settings",
        [
            {"quantization_config": {"quant_method": "mxfp4"}},
            {"text_config.quantization_config": {"quant_method": "fp8"}},
            {"quantization_config": {"quant_method": "bitsandbytes", "llm_int8_skip_modules": ["(a+)+$"]}},
            {"fusion_config": {"patch_embeddings": True}},
            {"transformers_weights": "../other.safetensors"},
            {"text_config.backbone": "org/repository"},
            {"dtype": "load"},
            {"text_config.torch_dtype": "hub"},
            {"vision_config.dtype": 16},
        ],
        ids=str,
    )
    def test_settings_that_reach_further(self, settings, folder):
        change(folder, settings)
        ((path, _),) = settings.items()
        refused(folder, f"`{path}")

    def test_configurations_that_could_reach_out_are_not_made(self, folder):
        change(folder, {"text_config": {"model_type": "detr", "backbone": "org/repository"}})
        refused(folder, "'detr', which is no causal language model")


@needs_peft
class TestAdapters:
    """`language_model_lora`, and files that PEFT would read."""

    @pytest.fixture
    def tuned(self, folder) -> Path:
        model = DeltaVLMForConditionalGeneration.from_pretrained(folder)
        freeze(model, FreezePolicy(lora={"r": 4, "target_modules": ["q_proj", "v_proj"]}))
        model.save_pretrained(folder)
        return folder

    @pytest.mark.parametrize(
        "settings",
        [
            {"megatron_config": {"a": 1}, "megatron_core": "harmful"},
            {"megatron_core": "harmful"},
            {"auto_mapping": {"parent_library": "harmful", "base_model_class": "x"}},
            {"target_modules": "(a+)+$"},
            {"target_modules": ["(a+)+$"]},
            {"target_modules": [["q_proj"]]},
            {"exclude_modules": "(a|a)*b"},
            {"modules_to_save": ["lm_head"]},
            {"layers_pattern": ["(a+)+"]},
            {"rank_pattern": {"(a+)+$": 4}},
            {"rank_pattern": {"q_proj": 10**9}},
            {"alpha_pattern": {".*": 4}},
            {"alpha_pattern": ["q_proj"]},
            {"layer_replication": [[0, 10**6]]},
            {"loftq_config": {"loftq_bits": 4}},
            {"runtime_config": {}},
            {"target_parameters": ["x"]},
            {"trainable_token_indices": [1]},
            {"r": 10**9},
            {"r": True},
            {"r": 4.0},
            {"lora_alpha": float("inf")},
            {"lora_dropout": 2},
            {"bias": "some"},
            {"use_dora": "yes"},
            {"init_lora_weights": "eva"},
            {"init_lora_weights": "pissa_niter_999999999"},
            {"peft_type": "IA3"},
            {"inference_mode": False},
        ],
        ids=str,
    )
    def test_settings_that_are_not_plain(self, settings, tuned, harm):
        change(tuned, {f"language_model_lora.{name}": value for name, value in settings.items()})
        assert "LoRA setting" in refused(tuned, next(iter(settings)))
        change(tuned, {"language_model_lora": list(settings.items())})
        refused(tuned, "language_model_lora")
        model = DeltaVLMForConditionalGeneration.from_pretrained(deltavlm_hf.tiny())
        with pytest.raises(ValueError, match="LoRA setting"):  # told before it trains, not when it is saved
            freeze(model, FreezePolicy(lora=settings))

    @pytest.mark.parametrize(
        "settings",
        [
            {"r": 4, "use_rslora": True, "lora_alpha": 2.5, "lora_dropout": 0.5},
            {"use_dora": True},
            {"target_modules": "all-linear", "exclude_modules": ["lm_head"]},
            {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.self_attn": 3}},
            {"target_modules": ["q_proj"], "layers_to_transform": [0]},
            {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": ["layers"]},
            {"lora_bias": True},
            {"init_lora_weights": "gaussian"},
            {"init_lora_weights": "pissa"},
            {"target_modules": ["embed_tokens", "q_proj"]},
        ],
        ids=str,
    )
    def test_plain_settings_come_back(self, settings, folder, tmp_path):
        model = DeltaVLMForConditionalGeneration.from_pretrained(folder)
        freeze(model, FreezePolicy(lora=settings))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if ".lora_" in name:
                    weight.add_(0.01)
        model.save_pretrained(tmp_path / "saved")
        loaded = DeltaVLMForConditionalGeneration.from_pretrained(tmp_path / "saved")
        expected, found = model.state_dict(), loaded.state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], weight) for name, weight in expected.items())

    def test_what_could_not_be_loaded_is_not_saved(self, folder, tmp_path):
        model = DeltaVLMForConditionalGeneration.from_pretrained(folder)
        model.language_model.add_adapter(LoraConfig(target_modules=r".*\.q_(proj|x)"))
        with pytest.raises(ValueError, match="'target_modules' .* expected a list of names"):
            model.save_pretrained(tmp_path / "saved")

    def test_ranks_that_the_files_do_not_have(self, tuned):
        change(tuned, {"language_model_lora.r": 4096})
        refused(tuned, r"lora_A.* has shape \(4, \d+\), expected \(4096, \d+\)")
        change(tuned, {"language_model_lora.r": 4, "language_model_lora.target_modules": "all-linear"})
        refused(tuned, "has shape None, expected")

    @pytest.mark.parametrize("kind", KINDS[:2])
    @pytest.mark.parametrize(
        "settings",
        [
            {"megatron_config": {"a": 1}, "megatron_core": "harmful"},
            {"target_modules": "(a+)+$"},
            {"peft_type": "IA3"},
            {"peft_type": "BOFT"},
            {"r": 10**9},
        ],
        ids=str,
    )
    def test_an_adapter_beside_the_model(self, settings, kind, folder, harm):
        model = DeltaVLMForConditionalGeneration.from_pretrained(folder)
        model.add_adapter(LoraConfig(r=2, target_modules=["language_model.model.layers.0.self_attn.q_proj"]))
        model.peft_config["default"].save_pretrained(folder)
        weights = {f"base_model.model.{name}": each for name, each in model.get_adapter_state_dict().items()}
        save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
        assert any(".lora_" in name for name in kind.from_pretrained(folder).state_dict())  # a plain one is loaded
        change(folder, settings, "adapter_config.json")
        assert "adapter_config.json" in refused(folder, "not loaded unasked", kind)


class TestPlaces:
    """Names of files and folders in `weight_sources` and in indexes of shards."""

    @pytest.fixture
    def sharded(self, folder) -> Path:
        model = DeltaVLMForConditionalGeneration.from_pretrained(folder)
        model.save_pretrained(folder, max_shard_size="5MB")
        return folder

    def name(self, folder: Path, shard: object) -> None:
        index = folder / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"]["query_tokens"] = shard
        index.write_text(json.dumps(content))

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        "shard",
        ["../x.safetensors", "{folder}/x.safetensors", "a/../../x.safetensors", "..\\x.safetensors", "C:x.safetensors"]
        + [
            "sub/x.safetensors",
            ".safetensors",
            "",
            "config.json",
            "x.safetensors\0",
            "~/x.safetensors",
            None,
            3,
            ["a"],
        ],
        ids=repr,
    )
    def test_shards_elsewhere(self, shard, kind, sharded, tmp_path):
        save_file({"query_tokens": torch.ones(1, 32, 128)}, tmp_path / "x.safetensors", {"format": "pt"})
        self.name(sharded, shard.format(folder=tmp_path) if isinstance(shard, str) else shard)
        refused(sharded, "model.safetensors.index.json", kind)

    @pytest.mark.parametrize(
        "content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": {}}}', "[" * 10**5]
    )
    def test_indexes_that_are_none(self, content, sharded):
        (sharded / "model.safetensors.index.json").write_text(content)
        refused(sharded, "model.safetensors.index.json is damaged")

    def test_shards_behind_a_link(self, sharded, tmp_path):
        shard = sorted(sharded.glob("model-*.safetensors"))[0]
        shard.rename(tmp_path / "secret.safetensors")
        shard.symlink_to(tmp_path / "secret.safetensors")
        refused(sharded, "is a link to .*, outside of its folder")

    def test_snapshots_of_the_cache_are_links(self, sharded, tmp_path):
        snapshot = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
        for path in sharded.rglob("*"):
            if path.is_file():
                blob = tmp_path / "models--a--b" / "blobs" / path.relative_to(sharded).as_posix().replace("/", "-")
                blob.parent.mkdir(parents=True, exist_ok=True)
                (snapshot / path.relative_to(sharded)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, blob)
                (snapshot / path.relative_to(sharded)).symlink_to(blob)
        DeltaVLMForConditionalGeneration.from_pretrained(snapshot)

    def test_shards_of_a_source(self, sharded, tmp_path):
        small = Path(shutil.copytree(sharded, tmp_path / "small"))
        for path in small.glob("model*"):
            path.unlink()
        weights = load_file(Path(deltavlm_hf.tiny()) / "model.safetensors")
        save_file({"query_tokens": weights.pop("query_tokens")}, small / "model.safetensors", {"format": "pt"})
        change(small, {"weight_sources": [{"name_or_path": str(sharded)}]})
        DeltaVLMForConditionalGeneration.from_pretrained(small)
        index = sharded / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"] = dict.fromkeys(content["weight_map"], "../x.safetensors")
        index.write_text(json.dumps(content))
        refused(small, "names '../x.safetensors', expected files of weights beside it")

    @pytest.mark.parametrize(
        "sources",
        [
            "elsewhere",
            {"name_or_path": "a/b"},
            [{"name_or_path": 3}],
            [{"name_or_path": "a\0b"}],
            [{"name_or_path": ["a"]}],
            ["a/b"],
            [{"prefix": "x."}],
            [{"name_or_path": "a/b", "prefix": "(a+)+$"}],
            [{"name_or_path": "a/b", "prefix": 3}],
            [{"name_or_path": "a/b", "revision": "../../x"}],
            [{"name_or_path": "a/b", "revision": 3}],
            [{"name_or_path": "a/b", "digests": {"../x": "sha256:" + "0" * 64}}],
            [{"name_or_path": "a/b", "digests": {"x": "md5"}}],
            [{"name_or_path": "a/b", "digests": "x"}],
            [{"name_or_path": "a/b", "token": "x"}],
            [{"name_or_path": "a/b", "subfolder": "../x"}],
            [{"name_or_path": "a/b"}] * 1000,
        ],
        ids=lambda sources: str(sources)[:60],
    )
    def test_sources_that_are_none(self, sources, folder):
        change(folder, {"weight_sources": sources})
        refused(folder, "weight_sources")
