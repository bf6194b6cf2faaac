"""Parts of a model that do not train."""

from torch import nn


def set_frozen_parts_to_eval(module: nn.Module) -> None:
    """Parts whose parameters are all frozen into evaluation mode: nothing drops out there."""
    for child in module.children():
        parameters = list(child.parameters())
        if not parameters or any(parameter.requires_grad for parameter in parameters):
            set_frozen_parts_to_eval(child)
            continue
        child.eval()
        for part in child.modules():
            if getattr(part, "gradient_checkpointing", False):  # which looks at its own module's mode
                part.training = True
