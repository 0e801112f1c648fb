"""Which parameters get no weight decay."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from .names import NamedParameter, Node, PatternLike, select, without_wrappers

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

#: ``bias``, ``in_proj_bias``, ``pos_bias_u``, ``attention_biases``, ``relPosBias``; not ``unbiased``, and not what
#: biases are computed with, such as ``bias_proj``.
BIAS = re.compile(
    r"((?<![a-zA-Z])bias|(?<![A-Z])Bias)(es)?(?![a-z])(?!_?(weight|proj|kernel|matrix|embed|net|mlp))", re.ASCII
)
#: Mamba's ``A_log`` and ``D``, Vim's ``A_b_log`` and ``D_b``, VMamba's ``A_logs`` and ``Ds``. A ``D`` alone may be
#: anything.
STATE_DECAY = re.compile(r"A(_[a-z])?_logs?")
STATE_SKIP = re.compile(r"D(_[a-z]|s)?")
#: What keeps parameters under numbers or keys: it says as much of what they are as those.
COLLECTIONS = (nn.ParameterList, nn.ParameterDict, ParametrizationList)

#: Attributes under which models keep the norms of queries and keys, which may have a vector for each head.
HEADS_NORM = re.compile(r"(q|k|query|key)_?(layer)?_?norm")

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
        len(param.shape) <= 1
        or is_bias(param)
        or is_of_norm(param)
        or is_of_state_space(param)
        or _is_marked(param.param)
    )


def is_bias(param: NamedParameter) -> bool:
    """Whether one of its names, without the numbers and keys of a collection, says so."""
    return any(BIAS.search(part) for part, _ in _places(param))


def is_of_norm(param: NamedParameter) -> bool:
    """Whether it belongs to one of torch's norm layers, or is the scale or shift of one by its class's name."""
    return any(isinstance(owner, NORMS) for owner in param.owners) or (
        _is_vector(param) and any(map(is_norm, param.owners))
    )


def is_of_state_space(param: NamedParameter) -> bool:
    """Whether it is the decay or the skip connection of a state space model."""
    return any(_is_decay_or_skip(part, owner) for part, owner in _places(param))


def _places(param: NamedParameter) -> list[tuple[str, nn.Module]]:
    """The last part of each name, of what a collection has the last two, with the module that owns it."""
    return [
        (part, owner)
        for name, owner in zip(param.names, param.owners, strict=True)
        for part in name.split(".")[-2 if isinstance(owner, COLLECTIONS) else -1 :]
    ]


def _is_vector(param: NamedParameter) -> bool:
    """Whether it can be the scale of a norm: a layer that is only called a norm may be a projection."""
    heads = any(HEADS_NORM.fullmatch(name.split(".")[-2]) for name in param.names if "." in name)
    return sum(size > 1 for size in param.shape) <= 1 + heads


def _is_decay_or_skip(name: str, owner: nn.Module) -> bool:
    if not STATE_SKIP.fullmatch(name):
        return STATE_DECAY.fullmatch(name) is not None
    return any(STATE_DECAY.fullmatch(sibling) for sibling, _ in owner.named_parameters(recurse=False))


def _is_marked(param: nn.Parameter) -> bool:
    """Whether its author said so: as Mamba does, or as S4, which keeps settings of the optimizer on the parameter."""
    if getattr(param, "_no_weight_decay", False) or getattr(param, "no_weight_decay", False):
        return True
    settings = getattr(param, "_optim", None)
    return isinstance(settings, Mapping) and settings.get("weight_decay") == 0


def _hints(root: Node) -> Callable[[str], bool]:
    """What the model, or a part of it, says of names below it: timm's and BEiT's method, and Swin's.

    Their names may have been taken from ``named_parameters()``, where wrappers within the model have a part in them.
    """
    names: list[tuple[Node, str]] = []
    words: list[tuple[Node, str]] = []
    for node in root.walk():
        for found, method in ((names, "no_weight_decay"), (words, "no_weight_decay_keywords")):
            found += [(node, without_wrappers(hint)) for hint in _told(node, method)]

    def hinted(name: str) -> bool:
        below = {node: without_wrappers(relative) for node in nodes if (relative := node.relative(name)) is not None}
        return any(node in below and fnmatch.fnmatchcase(below[node], hint) for node, hint in names) or any(
            node in below and word in below[node] for node, word in words
        )

    nodes = {node for node, _ in (*names, *words)}
    return hinted


def _told(node: Node, method: str) -> list[str]:
    """The names that a module lists, by a method or as an attribute."""
    hints = getattr(node.module, method, None)
    hints = hints() if callable(hints) else hints
    hints = [hints] if isinstance(hints, str) else hints
    if hints is not None and not isinstance(hints, Iterable):
        what = f"{node.path}.{method}" if node.path else method
        raise ValueError(f"{what} should list names of parameters but is: {hints!r}")
    return [*(hints or ())]
