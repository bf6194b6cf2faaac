"""Every key of the authors' checkpoint: the name that it has here, or that it is dropped."""

import re

# The authors' names (model/blip2_vicua.py, LAVIS) -> ours, tried in this order on the whole name.
NAMES = (
    (r"visual_encoder\.cls_token", "vision_model.embeddings.class_embedding"),
    (r"visual_encoder\.pos_embed", "vision_model.embeddings.position_embedding"),
    (r"visual_encoder\.patch_embed\.proj\.(weight|bias)", r"vision_model.embeddings.patch_embedding.\1"),
    (r"visual_encoder\.blocks\.(\d+)\.norm([12])\.(.+)", r"vision_model.encoder.layers.\1.layer_norm\2.\3"),
    (r"visual_encoder\.blocks\.(\d+)\.attn\.proj\.(.+)", r"vision_model.encoder.layers.\1.self_attn.projection.\2"),
    (r"visual_encoder\.blocks\.(\d+)\.attn\.(.+)", r"vision_model.encoder.layers.\1.self_attn.\2"),
    (r"visual_encoder\.blocks\.(\d+)\.mlp\.(.+)", r"vision_model.encoder.layers.\1.mlp.\2"),
    (r"ln_vision\.(.+)", r"vision_model.post_layernorm.\1"),
    (r"context1\.(.+)", r"difference.context_delta.\1"),
    (r"context2\.(.+)", r"difference.context_features.\1"),
    (r"context3\.(.+)", r"difference.output.\1"),
    (r"gate1\.(.+)", r"difference.gate_delta.\1"),
    (r"gate2\.(.+)", r"difference.gate_features.\1"),
    (r"query_tokens", "query_tokens"),
    (r"Qformer\.bert\.embeddings\.LayerNorm\.(.+)", r"qformer.embeddings.layernorm.\1"),
    (r"Qformer\.bert\.(encoder\..+)\.(attention|crossattention)\.self\.(.+)", r"qformer.\1.\2.attention.\3"),
    (r"Qformer\.bert\.((?:embeddings|encoder)\..+)", r"qformer.\1"),
    (r"llm_proj\.(.+)", r"language_projection.\1"),
)
# What no answer depends on: buffers, and heads that the authors build but never call.
DROPPED = (
    r"Qformer\.bert\.embeddings\.position_ids",
    r"llm_model\..+\.inv_freq",
    r"(vision_proj|text_proj)\.(weight|bias)",
    r"temp",
)
# Of old language models: buffers that are computed now.
DROPPED_LANGUAGE_MODEL = re.compile(r"language_model\..+\.rotary_emb\.inv_freq")
# With `difference_module="concat"`, what the authors' training code leaves untrained.
DROPPED_CSRM = (r"(context[123]|gate[12])\.(weight|bias)",)
# Of a base EVA file: what stands behind the last block that is used.
DROPPED_VISION = (r"visual_encoder\.(norm|fc_norm|head)\.(weight|bias)",)
