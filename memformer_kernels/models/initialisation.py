"""How the models' weights start. The writer's own stand in `layers.MemoryWrite`."""

from torch import nn


def initialise(model: nn.Module, residuals: int) -> None:
    """Matrices at `fan_in ** -0.5`; those that end one of `residuals` branches shrunk by `residuals ** -0.5`.

    So every sublayer starts at the scale of its input, and the sum of all branches at the scale of the embedding.
    The head starts near 0: the first loss is that of a uniform guess.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=1.0)
        elif isinstance(module, nn.Linear) and not name.startswith("write."):
            ends_branch = name.endswith((".output", ".feed_forward.2"))
            nn.init.normal_(module.weight, std=(module.in_features * (residuals if ends_branch else 1)) ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.normal_(model.head.weight, std=0.2 * model.head.in_features**-0.5)
