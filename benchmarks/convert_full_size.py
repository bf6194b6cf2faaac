"""
Peak memory of the conversion at the paper's true sizes, on files of random numbers.

    python benchmarks/convert_full_size.py --tokenizer llama-tokenizer/ --bert-vocab tests/fixtures/bert_vocab.txt

Writes an EVA-ViT-g file (fp16, 2 GB), the authors' checkpoint (fp32, 1 GB) and a language model of Vicuna-7B's shapes
in two files as lmsys has it (fp16, 13.5 GB; `--layers` for fewer), converts them in a process of its own, and loads
the result's vision side and Q-Former again. Takes 31 GB of disk, which `--folder` chooses. Linux only.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from transformers import LlamaConfig

from deltavlm_hf import DeltaVLMConfig, DeltaVLMForConditionalGeneration

CSRM = {
    "context_delta": "context1",
    "context_features": "context2",
    "output": "context3",
    "gate_delta": "gate1",
    "gate_features": "gate2",
}
QFORMER = {
    "qformer.": "Qformer.bert.",
    "embeddings.layernorm": "embeddings.LayerNorm",
    ".attention.attention.": ".attention.self.",
    ".crossattention.attention.": ".crossattention.self.",
}
VISION = {
    "vision_model.embeddings.class_embedding": "cls_token",
    "vision_model.embeddings.position_embedding": "pos_embed",
    "vision_model.embeddings.patch_embedding": "patch_embed.proj",
    "vision_model.encoder.layers": "blocks",
    "layer_norm": "norm",
    "self_attn.projection": "attn.proj",
    "self_attn": "attn",
}
TRAINED_BLOCKS = ("blocks.37.", "blocks.38.")


def random_like(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Random numbers, a block of them over and over: as large on disk, and quick to make."""
    block = torch.randn(min(tensor.numel(), 1 << 20)).to(dtype)
    return block.repeat(-(-tensor.numel() // len(block)))[: tensor.numel()].view(tensor.shape)


def replace(name: str, table: dict[str, str]) -> str:
    for ours, theirs in table.items():
        name = name.replace(ours, theirs)
    return name


def write_sources(folder: Path, tokenizer: Path, layers: int) -> None:
    llama = LlamaConfig(num_hidden_layers=layers, intermediate_size=11008, max_position_embeddings=4096)
    with torch.device("meta"):
        model = DeltaVLMForConditionalGeneration(DeltaVLMConfig(text_config=llama))
    tensors = model.state_dict()
    eva, trained, llm = {}, {}, {}
    for name, tensor in tensors.items():
        if name.startswith("language_model."):
            llm[name.removeprefix("language_model.")] = random_like(tensor, torch.float16)
        elif name.startswith("vision_model.post_layernorm"):
            trained[name.replace("vision_model.post_layernorm", "ln_vision")] = random_like(tensor, torch.float32)
        elif name.startswith("vision_model."):
            theirs = replace(name, VISION)
            weight = random_like(tensor, torch.float16)
            parts = {theirs: weight}
            if theirs.endswith("attn.qkv.bias"):
                query, _, value = weight.chunk(3)
                parts = {theirs.replace("qkv.bias", "q_bias"): query, theirs.replace("qkv.bias", "v_bias"): value}
            for part, values in parts.items():
                eva[part] = values.clone()
                if part.startswith(TRAINED_BLOCKS):
                    trained[f"visual_encoder.{part}"] = values.float()
        elif name.startswith("difference."):
            trained[replace(name.removeprefix("difference."), CSRM)] = random_like(tensor, torch.float32)
        elif name.startswith("qformer."):
            trained[replace(name, QFORMER)] = random_like(tensor, torch.float32)
        else:
            trained[name.replace("language_projection", "llm_proj")] = random_like(tensor, torch.float32)
    torch.save(eva, folder / "eva_vit_g.pth")
    torch.save({"model": trained}, folder / "checkpoint_best.pth")
    shutil.copytree(tokenizer, folder / "llm", copy_function=shutil.copyfile)
    llama.architectures = ["LlamaForCausalLM"]
    llama.save_pretrained(folder / "llm")
    names = list(llm)
    cut = len(names) * 3 // 4
    weight_map = {}
    for number, some in enumerate((names[:cut], names[cut:]), 1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: llm[name] for name in some}, folder / "llm" / file)
        weight_map.update(dict.fromkeys(some, file))
    (folder / "llm" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


class Peak(threading.Thread):
    """Watches a process: megabytes that are its own (anonymous), and all that it has mapped in."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.pid, self.anonymous, self.resident = pid, 0, 0

    def run(self) -> None:
        while True:
            try:
                lines = Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines()
            except OSError:
                return
            sizes = {line.split(":")[0]: int(line.split()[1]) // 1024 for line in lines[1:] if line.endswith("kB")}
            self.anonymous = max(self.anonymous, sizes.get("Anonymous", 0))
            self.resident = max(self.resident, sizes.get("Rss", 0))
            time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with a LLaMA tokenizer")
    parser.add_argument("--bert-vocab", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=32, help="of the language model")
    parser.add_argument("--folder", type=Path, help="where to work")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        folder = Path(work)
        making = os.fork()  # what is made here is not counted there
        if making == 0:
            write_sources(folder, args.tokenizer, args.layers)
            os._exit(0)
        if os.waitpid(making, 0)[1]:
            sys.exit("the sources could not be written")
        command = [sys.executable, "-m", "deltavlm_hf", "convert", str(folder / "out")]
        command += ["--checkpoint", str(folder / "checkpoint_best.pth"), "--vision", str(folder / "eva_vit_g.pth")]
        command += ["--language-model", str(folder / "llm"), "--qformer-tokenizer", str(args.bert_vocab)]
        process = subprocess.Popen(command)
        peak = Peak(process.pid)
        peak.start()
        if process.wait():
            sys.exit("the conversion failed")
        peak.join()
        sizes = {path.name: path.stat().st_size >> 20 for path in sorted((folder / "out").glob("*.safetensors"))}
        figures = {
            "largest_shard_mb": max(sizes.values()),
            "written_mb": sum(sizes.values()),
            "peak_anonymous_mb": peak.anonymous,
            "peak_resident_mb": peak.resident,
        }
        check = (
            "import sys, deltavlm_hf, torch\n"
            "from transformers import AutoModel\n"
            "model, info = AutoModel.from_pretrained(sys.argv[1], dtype=torch.float16, output_loading_info=True)\n"
            "print(sum(weight.numel() for weight in model.parameters()), len(info['missing_keys']))"
        )
        done = subprocess.run([sys.executable, "-c", check, str(folder / "out")], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        parameters, missing = map(int, done.stdout.split())
        figures.update(loaded_without_language_model=parameters, missing_weights=missing)
        print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
