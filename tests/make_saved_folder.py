"""
Makes `fixtures/saved_VERSION.zip`: what this version's `save_pretrained` writes, code included, and what it computes.

    python tests/make_saved_folder.py

Run once for each release; `test_saved_folders.py` loads all of them with the code of today.
"""

import json
import tempfile
import zipfile
from pathlib import Path

import torch
from paths import FIXTURES
from safetensors.torch import save_file
from transformers import AutoProcessor, LlamaConfig

import deltavlm_hf
from deltavlm_hf import DeltaVLMConfig, DeltaVLMForConditionalGeneration
from deltavlm_hf.data.scenes import generate_scene

QUESTION = "What changed?"


def main() -> None:
    processor = AutoProcessor.from_pretrained(deltavlm_hf.tiny())
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = DeltaVLMConfig(
        vision_config={**sizes, "image_size": 96, "patch_size": 16},
        qformer_config={**sizes, "vocab_size": len(processor.qformer_tokenizer), "max_position_embeddings": 128},
        text_config=LlamaConfig(**sizes, vocab_size=len(processor.tokenizer)),
        image_token_id=processor.image_token_id,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    model = DeltaVLMForConditionalGeneration(config).eval()
    scene = generate_scene(0, 96)
    inputs = processor(images=(scene.before, scene.after), text=QUESTION, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        save_file(
            {"pixel_values": inputs["pixel_values"].contiguous(), "logits": logits}, folder / "expected.safetensors"
        )
        ids = {name: inputs[name].tolist() for name in ("input_ids", "qformer_input_ids")}
        (folder / "expected.json").write_text(json.dumps({"question": QUESTION, **ids}))
        target = FIXTURES / f"saved_{deltavlm_hf.__version__}.zip"
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(folder.rglob("*")):
                archive.write(path, path.relative_to(folder))


if __name__ == "__main__":
    main()
