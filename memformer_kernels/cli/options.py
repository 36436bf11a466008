"""What several commands take."""

import typer


def find_device(name: str):
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise typer.BadParameter(f"no such device: {name!r}; cpu, cuda or cuda:1, say") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise typer.BadParameter(f"{name}: torch sees {torch.cuda.device_count()} GPUs here; --device cpu runs without")
    return device


def parse_numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{option} takes numbers with commas between them, such as 2,4,8; got {text!r}"
        ) from None
