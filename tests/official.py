"""The model that the authors' own code made (`fixtures/official`): its sizes, and where its parts are."""

import json
from pathlib import Path

from paths import FIXTURES, OFFICIAL

from deltavlm_hf import DeltaVLMConfig


def official_config(difference_module: str = "csrm") -> DeltaVLMConfig:
    """Its sizes, for the converter."""
    official = json.loads((OFFICIAL / "io.json").read_text())
    sizes = official["config"]
    return DeltaVLMConfig(
        vision_config={
            "hidden_size": sizes["embed"],
            "intermediate_size": int(sizes["embed"] * sizes["mlp"]),
            "num_hidden_layers": sizes["depth"],
            "num_attention_heads": sizes["heads"],
            "image_size": sizes["img"],
            "patch_size": sizes["patch"],
        },
        qformer_config={
            "vocab_size": official["qformer_tokenizer"]["len"],
            "hidden_size": sizes["q_hidden"],
            "num_hidden_layers": sizes["q_layers"],
            "num_attention_heads": sizes["q_heads"],
            "intermediate_size": sizes["q_inter"],
        },
        num_query_tokens=sizes["q_len"],
        difference_module=difference_module,
    )


def official_sources() -> dict[str, Path]:
    """The arguments of the converter."""
    return {
        "checkpoint": OFFICIAL / "checkpoint_best.pth",
        "vision": OFFICIAL / "eva_vit_base.pth",
        "language_model": OFFICIAL / "llm",
        "qformer_tokenizer": FIXTURES / "bert_vocab.txt",
    }
