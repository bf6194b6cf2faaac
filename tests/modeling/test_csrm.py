"""CSRM against the paper's equations, written out plainly."""

import pytest
import torch

from deltavlm_hf import DeltaVLMModel
from deltavlm_hf.modeling.csrm import CrossSemanticRelationMeasuring
from deltavlm_hf.modeling.positions import sincos_2d


def equations(module, before, after):
    weights = module.state_dict()
    pair = []
    for features in (before, after):
        rows = []
        for f, delta in zip(features.reshape(-1, 8), (after - before).reshape(-1, 8), strict=True):
            context = torch.tanh(
                weights["context_delta.weight"] @ delta
                + weights["context_features.weight"] @ f
                + weights["context_features.bias"]
            )
            gate = 1 / (
                1
                + torch.exp(
                    -(
                        weights["gate_delta.weight"] @ delta
                        + weights["gate_features.weight"] @ f
                        + weights["gate_features.bias"]
                    )
                )
            )
            rows.append(weights["output.weight"] @ torch.cat([f, delta, gate * context]) + weights["output.bias"])
        pair.append(torch.stack(rows).reshape(features.shape))
    return torch.cat(pair, dim=1)


@pytest.fixture
def module():
    torch.manual_seed(0)
    return CrossSemanticRelationMeasuring(hidden_size=8)


@pytest.fixture
def dates():
    torch.manual_seed(1)
    return torch.randn(2, 5, 8), torch.randn(2, 5, 8)


def test_equals_the_equations(module, dates):
    torch.testing.assert_close(module.eval()(*dates), equations(module, *dates))


def test_unchanged_pair_gives_both_dates_the_same_features(module, dates):
    before, _ = dates
    pair = module.eval()(before, before)
    assert pair[:, :5].equal(pair[:, 5:])


def test_ablations_have_no_parameters(small_config, small_inputs, dates):
    before, after = dates
    expected = {"concat": (before, after), "difference": (before - after, after - before)}
    for kind, pair in expected.items():
        model = DeltaVLMModel(small_config(difference_module=kind)).eval()
        assert not list(model.difference.parameters())
        assert model.difference(before, after).equal(torch.cat(pair, dim=1))
        assert model.encode_pair(small_inputs["pixel_values"]).shape == (2, 2 * 17, 32)


def test_dropout_only_in_training(module, dates):
    assert not module.train()(*dates).equal(module(*dates))
    assert module.eval()(*dates).equal(module(*dates))


def test_spatial_codes_tell_every_patch_apart():
    codes = sincos_2d(12, 12, 64)
    assert codes.shape == (144, 64)
    torch.testing.assert_close(codes.pow(2).mean(-1).sqrt(), torch.ones(144))
    assert torch.cdist(codes, codes).fill_diagonal_(9).min() > 0.5
