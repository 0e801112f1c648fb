"""Which parameters get no weight decay."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Sequence

from torch import nn

from .names import NamedParameter, Node, PatternLike, select

#: The norm layers of torch.nn.
NORMS = tuple(cls for name, cls in vars(nn).items() if isinstance(cls, type) and "Norm" in name)
#: Norm layers that torch.nn lacks go by their name. ``NormalizedLinear`` is none, nor is what has a class of
#: ``NO_NORMS`` as its base, whatever its name.
NORM_NAME = re.compile(r"norm(?!al|ed)|grn$", re.IGNORECASE)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
NO_NORMS = (
    nn.Linear, nn.Bilinear, *EMBEDDINGS, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)  # fmt: skip

#: What may stand in ``no_decay`` beside patterns.
AUTO, EMBEDDING = "auto", "embeddings"


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm layer, by its type or the name of its class."""
    if isinstance(module, NORMS):
        return True
    return bool(NORM_NAME.search(type(module).__name__)) and not isinstance(module, NO_NORMS)


def is_embedding(module: nn.Module) -> bool:
    return isinstance(module, EMBEDDINGS) or type(module).__name__.endswith(("Embedding", "Embeddings"))


def without_decay(
    root: Node, params: Sequence[NamedParameter], no_decay: str | Sequence[PatternLike] | None
) -> set[NamedParameter]:
    """The parameters without weight decay; see ``no_decay`` of :func:`~optimx.param_groups.param_groups`."""
    if no_decay is None:
        return set()
    if no_decay in (AUTO, EMBEDDING):
        no_decay = [no_decay]  # type: ignore[list-item]
    elif isinstance(no_decay, str) or not isinstance(no_decay, Sequence):
        raise ValueError(f"no_decay should be 'auto', 'embeddings', None or a list but is: {no_decay!r}")
    chosen: set[NamedParameter] = set()
    for i, item in enumerate(no_decay):
        what = f"no_decay[{i}]"
        if item == AUTO:
            hinted = _hints(root)
            chosen.update(param for param in params if _is_exempt(param) or any(map(hinted, param.names)))
        elif item == EMBEDDING:
            chosen.update(param for param in params if any(map(is_embedding, param.owners)))
        elif isinstance(item, str) and item.startswith("!"):
            chosen.difference_update(select(item[1:], params, what))
        else:
            chosen.update(select(item, params, what))
    return chosen


def _is_exempt(param: NamedParameter) -> bool:
    return (
        param.ndim <= 1
        or any(name.rpartition(".")[2] == "bias" for name in param.names)
        or any(map(is_norm, param.owners))
        or getattr(param.param, "_no_weight_decay", False)
    )


def _hints(root: Node) -> Callable[[str], bool]:
    """What the model, or a part of it, says of names below it: timm's and BEiT's method, and Swin's."""
    names: list[tuple[Node, str]] = []
    words: list[tuple[Node, str]] = []
    for node in root.walk():
        for found, method in ((names, "no_weight_decay"), (words, "no_weight_decay_keywords")):
            hints = getattr(node.module, method, ())
            found += [(node, hint) for hint in (hints() if callable(hints) else hints)]

    def hinted(name: str) -> bool:
        return any(
            (below := node.relative(name)) is not None and fnmatch.fnmatchcase(below, hint) for node, hint in names
        ) or any((below := node.relative(name)) is not None and word in below for node, word in words)

    return hinted
