"""A Space of Hugging Face: the page of `deltavlm demo --web`. The Space's variables: MODEL_ID, REVISION to pin it."""

import os

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import deltavlm_hf
from deltavlm_hf.app.page import build, launch
from deltavlm_hf.inference.loading import NOTES

# The Space's own proxies tell who asks (X-Forwarded-For), for the page's bounds for each address. uvicorn reads this.
os.environ.setdefault("FORWARDED_ALLOW_IPS", "127.0.0.1,10.0.0.0/8,172.16.0.0/12,192.168.0.0/16")

model_id = os.environ.get("MODEL_ID") or deltavlm_hf.small()
revision = os.environ.get("REVISION") or "main"
device_map = "auto" if torch.cuda.is_available() else None
model = AutoModelForImageTextToText.from_pretrained(model_id, revision=revision, device_map=device_map)
processor = AutoProcessor.from_pretrained(model_id, revision=revision)
demo = build(model, processor, note=None if os.environ.get("MODEL_ID") else NOTES["small"])

if __name__ == "__main__":
    launch(demo)
