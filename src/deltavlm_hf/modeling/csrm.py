"""
Cross-semantic relation measuring (CSRM), DeltaVLM's visual difference perception.

Shapes: B pairs, N tokens of one date (CLS first), D vision width.
"""

import re

import torch
from torch import nn

_OLD_NAME = re.compile(r"(?<=difference\.)(context|gate)_difference(?=\.weight$)")


def current_name(name: str) -> str:
    """The name of a weight of DeltaVLM, given one in a file, where it may be the one that it had at first."""
    return _OLD_NAME.sub(r"\1_delta", name)


def _rename_old_weights(module: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    for name in [name for name in state_dict if name.startswith(prefix)]:
        state_dict[current_name(name)] = state_dict.pop(name)


class CrossSemanticRelationMeasuring(nn.Module):
    r"""
    Measures, token by token, how each date relates to the difference of both (paper, visual difference perception;
    the authors' `context1..3`, `gate1..2`). With $\Delta = f_{after} - f_{before}$, and the same weights for both:

    $$c_t = \tanh(W_c \Delta + W'_c f_t + b_c), \quad g_t = \sigma(W_g \Delta + W'_g f_t + b_g)$$
    $$e_t = W_o [f_t; \Delta; \mathrm{dropout}(g_t) \odot \mathrm{dropout}(c_t)] + b_o$$

    Args:
        hidden_size (`int`): D, the width of the vision features.
        dropout (`float`): dropout on gate and context, while training only.
    """

    def __init__(self, hidden_size: int, dropout: float = 0.5):
        super().__init__()
        # PEFT finds `modules_to_save` by the ends of names: none here may end as a part of the model does.
        self.context_delta = nn.Linear(hidden_size, hidden_size, bias=False)
        self.context_features = nn.Linear(hidden_size, hidden_size)
        self.gate_delta = nn.Linear(hidden_size, hidden_size, bias=False)
        self.gate_features = nn.Linear(hidden_size, hidden_size)
        self.output = nn.Linear(3 * hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.register_load_state_dict_pre_hook(_rename_old_weights)  # runs that go on from an older checkpoint

    def forward(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """
        Args:
            before (`torch.Tensor` of shape `(B, N, D)`): features of the first date.
            after (`torch.Tensor` of shape `(B, N, D)`): features of the second date.

        Returns:
            `torch.Tensor` of shape `(B, 2N, D)`: the pair features, the first date's tokens in front.
        """
        difference = after - before
        context_delta = self.context_delta(difference)
        gate_delta = self.gate_delta(difference)
        dates = []
        for features in (before, after):
            context = torch.tanh(context_delta + self.context_features(features))
            gate = torch.sigmoid(gate_delta + self.gate_features(features))
            relation = self.dropout(gate) * self.dropout(context)
            dates.append(self.output(torch.cat([features, difference, relation], dim=-1)))  # (B, N, 3D) -> (B, N, D)
        return torch.cat(dates, dim=1)


class Concatenation(nn.Module):
    """The ablation of CSRM: both dates' features as they are, `(B, N, D)` twice -> `(B, 2N, D)`."""

    def forward(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        return torch.cat([before, after], dim=1)


class Difference(nn.Module):
    """The ablation that keeps the difference alone, seen from either date: `(B, N, D)` twice -> `(B, 2N, D)`."""

    def forward(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        return torch.cat([before - after, after - before], dim=1)


def make_difference_module(kind: str, hidden_size: int, dropout: float) -> nn.Module:
    """The module that `DeltaVLMConfig.difference_module` names."""
    if kind == "csrm":
        return CrossSemanticRelationMeasuring(hidden_size, dropout)
    return Difference() if kind == "difference" else Concatenation()
