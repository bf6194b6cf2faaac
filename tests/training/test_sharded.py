"""The model in the pieces that examples/accelerate/fsdp.yaml shares out: PyTorch's own FSDP2, two gloo processes."""

import os
import subprocess
import sys
from pathlib import Path

import yaml

EXAMPLES = Path(__file__).parents[2] / "examples" / "accelerate"

WORKER = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForImageTextToText, AutoProcessor
import deltavlm_hf
from deltavlm_hf.data import PairCollator, load_generated
from deltavlm_hf.training import freeze

classes = sys.argv[1].split(",")
torch.manual_seed(0)
model, alone = (AutoModelForImageTextToText.from_pretrained(deltavlm_hf.tiny()) for _ in range(2))
for each in (model, alone):
    freeze(each)
processor = AutoProcessor.from_pretrained(deltavlm_hf.tiny())
rows = load_generated(2, 4_700_000, unroll=True)
collate = PairCollator(processor)
halves = [collate([rows[index] for index in part]) for part in (range(3), range(3, 6))]

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
shared_out = set()
for module in model.modules():
    name = type(module).__name__
    if name in classes:
        fully_shard(module, mesh=mesh)
        shared_out.add(name)
assert shared_out == set(classes), shared_out
fully_shard(model, mesh=mesh)
assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
here = sum(parameter.to_local().numel() for parameter in model.parameters())
assert here < 0.7 * sum(parameter.numel() for parameter in alone.parameters())

optimizers = [
    torch.optim.SGD([weight for weight in each.parameters() if weight.requires_grad], lr=0.01)
    for each in (model, alone)
]
for step in range(2):
    model(**halves[dist.get_rank()]).loss.backward()
    sum(alone(**half).loss for half in halves).div(2).backward()
    compared = 0
    for (name, found), expected in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert found.requires_grad == expected.requires_grad, name
        scale = 0 if expected.grad is None else expected.grad.abs().max()
        if scale > 1e-6:  # those of key biases are rounding errors around 0
            torch.testing.assert_close(found.grad.full_tensor() / scale, expected.grad / scale, rtol=1e-3, atol=1e-4)
            compared += 1
    assert compared > 100
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
dist.destroy_process_group()
"""


def test_gradients_are_those_of_one_process(tmp_path):
    config = yaml.safe_load((EXAMPLES / "fsdp.yaml").read_text())
    (tmp_path / "worker.py").write_text(WORKER)
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29541"]
    classes = config["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"]
    done = subprocess.run(
        [sys.executable, *launcher, str(tmp_path / "worker.py"), classes],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
