"""The Auto classes: with the package imported, and in processes that never import it (`trust_remote_code`)."""

import textwrap

import pytest
import torch
from processes import run_each, run_python

WITH_PACKAGE = "import deltavlm_hf\n"
WITHOUT_PACKAGE = "import sys\nsys.modules['deltavlm_hf'] = None  # any import of it fails\n"


CLASSES = {
    "AutoConfig": "DeltaVLMConfig",
    "AutoModel": "DeltaVLMModel",
    "AutoModelForImageTextToText": "DeltaVLMForConditionalGeneration",
    "AutoProcessor": "DeltaVLMProcessor",
    "AutoImageProcessor": "DeltaVLMImageProcessor",
    "AutoTokenizer": "LlamaTokenizer",
}


@pytest.mark.parametrize("package_first", [True, False])
def test_each_auto_class_alone(package_first, converted):
    codes = []
    for auto_class in CLASSES:
        imports = [WITH_PACKAGE, f"from transformers import {auto_class}\n"]
        call = f"loaded = {auto_class}.from_pretrained({str(converted)!r})\nprint(type(loaded).__name__)"
        codes.append("".join(imports if package_first else reversed(imports)) + call)
    assert run_each(codes) == list(CLASSES.values())


@pytest.mark.parametrize("source", ["deltavlm_hf", "deltavlm_hf.modeling"])
def test_from_config_without_a_lookup_by_name(source):
    code = f"""
    from {source} import DeltaVLMConfig
    from transformers import AutoModel
    small = {{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}}
    config = DeltaVLMConfig(
        vision_config={{**small, "image_size": 28}}, qformer_config={{**small, "vocab_size": 9}}, text_config=small
    )
    print(type(AutoModel.from_config(config)).__name__)
    """
    assert run_python(code) == "DeltaVLMModel"


def test_classes_without_auto(converted):
    code = (
        f"from deltavlm_hf import DeltaVLMProcessor as P\nprint(type(P.from_pretrained({str(converted)!r})).__name__)"
    )
    assert run_python(code) == "DeltaVLMProcessor"


def test_import_is_lazy():
    modules = run_python("import sys, deltavlm_hf\nprint('torch' in sys.modules, 'transformers' in sys.modules)")
    assert modules == "False False"


def test_public_names():
    import deltavlm_hf

    assert set(deltavlm_hf.__all__) <= set(dir(deltavlm_hf))
    for name in deltavlm_hf.__all__:
        assert getattr(deltavlm_hf, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        deltavlm_hf.nothing  # noqa: B018


FORWARD = """
import numpy as np, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
kwargs = {kwargs}
model = AutoModelForImageTextToText.from_pretrained({folder!r}, **kwargs)
processor = AutoProcessor.from_pretrained({folder!r}, **kwargs)
rng = np.random.default_rng(0)
pair = tuple(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(2))
inputs = processor(images=pair, text="What changed?", return_tensors="pt")
with torch.no_grad():
    torch.save(model(**inputs).logits, {output!r})
print(model.generate(**inputs, max_new_tokens=5).tolist(), type(model).__module__.split(".")[0])
"""


def test_remote_code_gives_identical_logits(converted, tmp_path):
    local, remote = tmp_path / "local.pt", tmp_path / "remote.pt"
    here = run_python(WITH_PACKAGE + FORWARD.format(kwargs={}, folder=str(converted), output=str(local)))
    trusted = {"trust_remote_code": True}
    there = run_python(WITHOUT_PACKAGE + FORWARD.format(kwargs=trusted, folder=str(converted), output=str(remote)))
    assert torch.load(local, weights_only=True).equal(torch.load(remote, weights_only=True))
    assert here.endswith("deltavlm_hf") and there.endswith("transformers_modules")
    assert here.split("]]")[0] == there.split("]]")[0]


def test_remote_code_saves_a_folder_that_loads_again(converted, tmp_path):
    first, second = str(converted), str(tmp_path / "again")
    code = f"""
    from transformers import AutoModelForImageTextToText, AutoProcessor
    for auto_class in (AutoModelForImageTextToText, AutoProcessor):
        auto_class.from_pretrained({first!r}, trust_remote_code=True).save_pretrained({second!r})
        auto_class.from_pretrained({second!r}, trust_remote_code=True)
    """
    run_python(WITHOUT_PACKAGE + textwrap.dedent(code))
    code = f"from transformers import AutoProcessor\nAutoProcessor.from_pretrained({second!r})"
    run_python(WITH_PACKAGE + code)


def test_remote_code_is_never_run_unasked(converted):
    code = f"""
    from transformers import AutoModelForImageTextToText
    try:
        AutoModelForImageTextToText.from_pretrained({str(converted)!r}, trust_remote_code=False)
    except ValueError as error:
        print("trust_remote_code" in str(error))
    """
    assert run_python(WITHOUT_PACKAGE + textwrap.dedent(code)) == "True"
