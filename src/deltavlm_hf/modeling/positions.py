"""Where a token stands: among others in a padded row, and in the image (`DeltaVLMConfig.spatial_position_codes`)."""

import torch
from torch import nn


def position_ids_from_mask(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions `(B, L)`: padding before or among the tokens takes none; that after the last token counts on."""
    padding = attention_mask == 0
    ends_sequence = padding.flip(-1).cumprod(-1).flip(-1).bool()
    skipped = (padding & ~ends_sequence).cumsum(-1)
    return (torch.arange(attention_mask.shape[-1], device=attention_mask.device) - skipped).clamp(min=0)


def sincos_2d(height: int, width: int, hidden_size: int, device: torch.device | None = None) -> torch.Tensor:
    """
    Sine/cosine codes of a patch grid: the first half of the channels tells the row, the second the column.

    Args:
        height (`int`): rows of the grid, in patches.
        width (`int`): columns of the grid, in patches.
        hidden_size (`int`): channels, a multiple of 4.

    Returns:
        `torch.Tensor` of shape `(height * width, hidden_size)`, row by row, float32, root mean square 1.
    """
    frequencies = 100.0 ** -torch.linspace(0, 1, hidden_size // 4, device=device)  # waves of 2 pi to 200 pi patches

    def axis(length: int) -> torch.Tensor:
        angles = torch.arange(length, device=device)[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)  # (length, hidden_size / 2)

    rows = axis(height)[:, None].expand(-1, width, -1)
    columns = axis(width)[None].expand(height, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1) * 2**0.5


def add_spatial_codes(pair_features: torch.Tensor, height: int, width: int, prefix_tokens: int = 1) -> torch.Tensor:
    """
    Adds the same codes to both dates, none to CLS, each as strong as the token that it is added to.

    Args:
        pair_features (`torch.Tensor` of shape `(B, 2N, D)`).
        height, width (`int`): of the grid, in patches; N = height * width + prefix_tokens.
        prefix_tokens (`int`, *optional*, defaults to 1): before those of the grid: CLS, or none.

    Returns:
        `torch.Tensor` of shape `(B, 2N, D)`.
    """
    codes = sincos_2d(height, width, pair_features.shape[-1], pair_features.device)
    codes = nn.functional.pad(codes, (0, 0, prefix_tokens, 0)).repeat(2, 1)  # (2N, D)
    scale = pair_features.float().pow(2).mean(-1, keepdim=True).sqrt()
    return pair_features + (codes * scale).to(pair_features.dtype)
