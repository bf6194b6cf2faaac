"""Heat maps: shapes and sums, and whether they lie where the change is."""

import threading

import numpy as np
import pytest
import torch

from deltavlm_hf import ChangeSession
from deltavlm_hf.data.scenes import generate_scene


def test_shapes_and_sums(model, processor, pairs):
    inputs = processor(images=pairs, text=["What changed?", "How many?"], padding=True, return_tensors="pt")
    maps = model.explain(**inputs)
    assert maps.attention.shape == (2, 2, 56, 56) and maps.change.shape == (2, 56, 56)
    torch.testing.assert_close(maps.attention.sum((1, 2, 3)), torch.ones(2))
    assert (maps.attention >= 0).all() and (maps.change >= 0).all()


def test_it_is_the_cross_attention(model, processor, pairs):
    """Against the probabilities computed from the Q-Former's own projections."""
    inputs = processor(images=pairs[:1], text=["What changed?"], return_tensors="pt")
    seen = []

    def look(module, arguments, inputs):
        query = module.query(inputs["hidden_states"]).unflatten(-1, (module.num_attention_heads, -1)).transpose(1, 2)
        key = module.key(inputs["encoder_hidden_states"]).unflatten(-1, (module.num_attention_heads, -1))
        scores = query @ key.permute(0, 2, 3, 1) * module.scaling
        seen.append(scores.softmax(-1)[:, :, : model.config.num_query_tokens].mean((1, 2)))

    hooks = [
        layer.crossattention.attention.register_forward_pre_hook(look, with_kwargs=True)
        for layer in model.qformer.encoder.layer
        if layer.has_cross_attention
    ]
    try:
        attention = model.explain(**inputs).attention
    finally:
        for hook in hooks:
            hook.remove()
    coarse = torch.stack(seen).mean(0).unflatten(1, (2, -1))[:, :, 1:].unflatten(2, (4, 4))
    fine = torch.nn.functional.interpolate(coarse, (56, 56), mode="bilinear")
    torch.testing.assert_close(attention, fine / fine.sum(), rtol=1e-4, atol=1e-7)


def test_the_question_matters_and_the_change_does_not(model, processor, pairs):
    both = [pairs[0], pairs[0]]
    inputs = processor(images=both, text=["What changed?", "Where are roads?"], padding=True, return_tensors="pt")
    maps = model.explain(**inputs)
    assert not torch.equal(maps.attention[0], maps.attention[1])
    torch.testing.assert_close(maps.change[0], maps.change[1])


def test_from_pair_features(model, processor, pairs):
    inputs = processor(images=pairs[:1], text=["What changed?"], return_tensors="pt")
    expected = model.explain(**inputs)
    pixel_values = inputs.pop("pixel_values")
    maps = model.explain(pair_features=model.encode_pair(pixel_values), **inputs)
    torch.testing.assert_close(maps.attention, expected.attention)
    torch.testing.assert_close(maps.change, expected.change)


def test_equal_images_have_no_change(tiny_model, tiny_processor):
    image = generate_scene(4_950_000, 96).before
    inputs = tiny_processor(images=(image, image), text="What changed?", return_tensors="pt")
    assert tiny_model.explain(**inputs).change.max() < 1e-4


def test_a_session_explains_its_last_question(tiny_model, tiny_processor):
    scene = generate_scene(4_950_001, 96)
    session = ChangeSession(tiny_model, tiny_processor, scene.before, scene.after)
    with pytest.raises(ValueError, match="Nothing has been asked yet"):
        session.explain()
    session.ask("What changed?")
    session.ask("How many buildings?")
    maps = session.explain()
    inputs = tiny_processor(
        images=(scene.before, scene.after),
        text="How many buildings?",
        history=session.history[:1],
        return_tensors="pt",
    )
    torch.testing.assert_close(maps.attention, tiny_model.explain(**inputs).attention)


def test_threads_leave_the_attention_as_it_was(tiny_model, tiny_processor):
    implementation = tiny_model.qformer.config._attn_implementation
    scene = generate_scene(4_950_002, 96)
    inputs = tiny_processor(images=(scene.before, scene.after), text="What changed?", return_tensors="pt")
    expected = tiny_model.explain(**inputs).attention
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(tiny_model.explain(**inputs).attention)) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6 and all(torch.equal(result, expected) for result in results)
    assert tiny_model.qformer.config._attn_implementation == implementation


def test_maps_lie_where_the_change_is(tiny_model, tiny_processor):
    """Mass inside the true mask, against what an even map has there; docs/publishing.md has the figures."""
    inside = {"attention": [], "change": []}
    seeds = (seed for seed in range(4_960_000, 4_961_000) if generate_scene(seed, 96).mask.any())
    for seed, _ in zip(seeds, range(40), strict=False):
        scene = generate_scene(seed, 96)
        inputs = tiny_processor(images=(scene.before, scene.after), text="Where are the changes?", return_tensors="pt")
        maps = tiny_model.explain(**inputs)
        mask = torch.from_numpy(scene.mask > 0)
        chance = float(mask.float().mean())
        attention = maps.attention[0].sum(0)
        inside["attention"].append(float(attention[mask].sum() / attention.sum()) / chance)
        inside["change"].append(float(maps.change[0][mask].sum() / maps.change[0].sum()) / chance)
    assert np.mean(inside["change"]) > 2 and np.mean(inside["attention"]) > 1.2
