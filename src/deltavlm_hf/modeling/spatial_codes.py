"""Fixed 2D position codes for the pair features (`DeltaVLMConfig.spatial_position_codes`)."""

import torch


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
    frequencies = 100.0 ** -torch.linspace(
        0, 1, hidden_size // 4, device=device
    )  # wavelengths 2 pi ... 200 pi patches

    def axis(length: int) -> torch.Tensor:
        angles = torch.arange(length, device=device)[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)  # (length, hidden_size / 2)

    rows = axis(height)[:, None].expand(-1, width, -1)
    columns = axis(width)[None].expand(height, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1) * 2**0.5
