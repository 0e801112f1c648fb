"""Whose a parameter is where Muon trains the hidden matrices and AdamW the rest, and why."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .names import NamedParameter, Node, PatternLike, select
from .no_decay import AUTO, COLLECTIONS, is_bias, is_embedding, is_of_norm, is_of_state_space
from .structure import TOP, layer_ordinals, repeated_layers

#: The values of a group's key ``optimizer``: names of the members of :class:`optimx.Composite` that the groups go to.
#: Others' ``use_muon`` and ``algorithm`` choose a rule within one optimizer; here there are two.
MUON, ADAMW = "muon", "adamw"
OPTIMIZERS = (MUON, ADAMW)

CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip

#: Words of which the names of parameters that are no layer's weight are made: ``pos_embed``, ``relPosTable1``.
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
POSITIONS = {"pos", "position", "positions", "positional"}
TABLES = {
    "cls", "codebook", "emb", "embed", "embedding", "embeddings", "latent", "latents", "prefix", "prompt", "prompts",
    "table", "token", "tokens",
}  # fmt: skip
#: What has one of these words too is a matrix that positions or tokens are multiplied with.
FACTORS = {"kernel", "matrix", "proj", "projection", "weight"}

#: Modules that choose experts; others that are called gates do so where they have experts beside them.
ROUTER = re.compile(r"routers?")
ROUTER_CLASS = re.compile(r"Router|(TopK|Top2|MoE|Moe)\w*Gat(e|ing)")
GATE = re.compile(r"gates?|gating|wg|gate_network")
EXPERTS = re.compile(r"expert|moe(?![a-z])|MoE|Moe(?![a-z])", re.IGNORECASE)
#: Several projections of one input as the rows of one matrix.
FUSED = re.compile(r"in_proj(_weight)?|c_attn|Wqkv|query_key_value|(to_)?(qkv|kv|q_?k)(_proj)?|gate_up_proj", re.ASCII)
FIRST = re.compile(r"patch_embed(s|ding|dings|der)?|stem|conv_stem")

#: Output layers by name: anywhere but in the repeated layers; and where nothing but the end of the model can be meant.
HEAD = re.compile(r"(.*_)?(heads?|classifiers?|logits)(_.*)?", re.ASCII)
OUTPUT = re.compile(
    r"(.*_)?(cls|fc|outputs?|predictions?|score|readout|unembed(ding)?|vocab)(_.*)?|(class|bbox|box)_embed|embed_out|"
    r"proj_out|(text|visual|vision|image|audio)_proj(ection)?", re.ASCII
)  # fmt: skip

EMBEDDING, TIED = "embedding", "embedding tied to the output layer"
HIDDEN, CONVOLUTION, STACK, PROJECTIONS = "hidden matrix", "convolution", "experts' matrices", "fused projections"
BY_HAND = "by a rule or a pattern"


@dataclass(frozen=True)
class Route:
    """Whose a parameter is.

    Attributes:
        optimizer: One of :data:`OPTIMIZERS`.
        reason: What it is, in words.
        settings: Of Muon: how it is several matrices.
    """

    optimizer: str
    reason: str
    settings: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class _Place:
    """Where a name leads, without the collections that keep parametrized weights and lists of parameters.

    Attributes:
        attribute: Under which the last module has it.
        nodes: From the model to that module.
    """

    attribute: str
    nodes: tuple[Node, ...]

    @property
    def module(self) -> nn.Module:
        return self.nodes[-1].module

    @property
    def parts(self) -> list[str]:
        path = self.nodes[-1].path
        return [*(path.split(".") if path else []), self.attribute]


def routes(root: Node, params: Sequence[NamedParameter]) -> dict[NamedParameter, Route]:
    """Whose each parameter is by the module that has it: Muon gets the hidden matrices, AdamW the rest.

    What cannot be told is AdamW's.
    """
    nodes = {node.path: node for node in root.walk()}
    places = {param: [_place(name, nodes) for name in param.names] for param in params}
    reasons = {param: _reason(param, places[param]) for param in params}
    # embeddings are among the layers whose order shows what is first and last
    weights = [param for param in params if reasons[param] in (None, EMBEDDING, TIED)]
    ends = dict.fromkeys(_output_layers(root, nodes, weights, places), "output layer")
    ends |= dict.fromkeys(_first_layers(root, weights, places), "first layer")
    reasons |= {param: reason for param, reason in ends.items() if reasons[param] is None}
    return {
        param: _of_muon(param, places[param]) if reason is None else Route(ADAMW, reason)
        for param, reason in reasons.items()
    }


def choose_muon(
    chosen: str | Sequence[PatternLike], found: dict[NamedParameter, Route], params: Sequence[NamedParameter]
) -> set[NamedParameter]:
    """The parameters that are Muon's; see ``muon`` of :func:`~optimx.param_groups.param_groups`."""
    if chosen == AUTO:
        chosen = [AUTO]
    elif isinstance(chosen, str) or not isinstance(chosen, Sequence):
        raise ValueError(f"muon should be 'auto', None or a list but is: {chosen!r}")
    muons: set[NamedParameter] = set()
    for i, item in enumerate(chosen):
        what = f"muon[{i}]"
        if item == AUTO:
            muons.update(param for param, route in found.items() if route.optimizer == MUON)
        elif isinstance(item, str) and item.startswith("!"):
            muons.difference_update(select(item[1:], params, what))
        else:
            picked = select(item, params, what)
            check_matrices(picked, what)
            muons.update(picked)
    return muons


def check_matrices(params: Iterable[NamedParameter], what: str) -> None:
    """ValueError if one of them has fewer than two dimensions."""
    for param in sorted(params, key=lambda param: param.name):
        if len(param.shape) < 2:
            raise ValueError(
                f"{what} should give Muon matrices only but gives it: {param.name!r} of shape {tuple(param.shape)}"
            )


def _place(name: str, nodes: dict[str, Node]) -> _Place:
    *path, attribute = name.split(".")
    while isinstance(nodes[".".join(path)].module, COLLECTIONS):
        *path, attribute = path
        # torch keeps what makes ``weight`` as ``parametrizations.weight.original0``
        if path[-1:] == ["parametrizations"]:
            path = path[:-1]
    return _Place(attribute, tuple(nodes[".".join(path[:i])] for i in range(len(path) + 1)))


def _reason(param: NamedParameter, places: Sequence[_Place]) -> str | None:
    """Why it is AdamW's wherever in the model it is; None if that does not say."""
    modules = [place.module for place in places]
    if any(map(is_embedding, modules)) and all(place.attribute == "weight" for place in places):
        return EMBEDDING if all(map(is_embedding, modules)) else TIED
    words = [{word.lower() for word in WORD.findall(place.attribute)} for place in places]
    for found, reason in ((POSITIONS, "positions"), (TABLES, "learned tokens")):
        if any(its & found and not its & FACTORS for its in words):
            return reason
    if is_of_norm(param):
        return "norm"
    if is_bias(param):
        return "bias"
    if is_of_state_space(param):
        return "state space"
    if sum(size > 1 for size in param.shape) < 2:
        return "scalar" if param.shape.numel() == 1 else "vector"
    if any(map(_is_of_router, places)):
        return "router"
    if any(_is_depthwise(module) for module in modules):
        return "depthwise convolution"
    if len(param.shape) > 2 and _matrix(param, places) == HIDDEN:
        return f"{len(param.shape)}-D of no layer that is known"
    return None


def _matrix(param: NamedParameter, places: Sequence[_Place]) -> str:
    """What kind of matrix, or of several, it is."""
    if any(isinstance(place.module, CONVOLUTIONS) for place in places):
        return CONVOLUTION
    if len(param.shape) > 2:
        return STACK if any(map(_is_of_experts, places)) else HIDDEN
    called = {
        place.parts[-2] if place.attribute == "weight" and place.nodes[1:] else place.attribute for place in places
    }
    return PROJECTIONS if any(map(FUSED.fullmatch, called)) else HIDDEN


def _of_muon(param: NamedParameter, places: Sequence[_Place]) -> Route:
    kind = _matrix(param, places)
    settings: dict[str, Any] = {}
    if kind == STACK:
        settings["stacked"] = True
    if any(isinstance(p.module, nn.MultiheadAttention) and p.attribute == "in_proj_weight" for p in places):
        # queries, keys and values; other modules' order and sizes of rows are their own
        settings["split"] = 3
    return Route(MUON, kind, (*settings.items(),))


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, CONVOLUTIONS) and module.groups == module.in_channels > 1


def _is_of_experts(place: _Place) -> bool:
    classes = (type(node.module).__name__ for node in place.nodes[1:])
    return any(map(EXPERTS.search, (*place.parts, *classes)))


def _is_of_router(place: _Place) -> bool:
    parents = place.nodes
    for parent, node, name in zip(parents, parents[1:], place.parts, strict=False):
        if ROUTER.fullmatch(name) or ROUTER_CLASS.search(type(node.module).__name__):
            return True
        beside = [other for other in (*parent.children, *parent.params) if other != name]
        if GATE.fullmatch(name) and any(map(EXPERTS.search, beside)):
            return True
    return False


def _output_layers(
    root: Node,
    nodes: dict[str, Node],
    weights: Sequence[NamedParameter],
    places: dict[NamedParameter, list[_Place]],
) -> list[NamedParameter]:
    """What the model says, what its names say, or the last layer."""
    layers = set(repeated_layers(root))
    ordinals = layer_ordinals(root)
    last: dict[object, NamedParameter] = {}
    for told in _told(root):
        parts = set(told.parameters())
        last.update((told, param) for param in weights if param.param in parts)
    # a tied weight is at each of its places
    named = {name: (param, place) for param in weights for name, place in zip(param.names, places[param], strict=True)}
    for name in (name for name in ordinals if name in named):
        param, place = named[name]
        # a stack of single layers, as an MLP is, ends with one
        if any(node in layers for node in place.nodes[:-1]):
            continue
        at_end = bool(layers) and ordinals[name] == TOP
        for i, part in enumerate(place.parts):
            if HEAD.fullmatch(part) or (at_end and OUTPUT.fullmatch(part)):
                last[_branch(place.parts, i + 1, nodes)] = param
    if not last and weights:
        end = weights[-1]
        is_layer = any(place.nodes[-1] in layers for place in places[end])
        if not layers or is_layer or any(ordinals[name] == TOP for name in end.names):
            return [end]
    return list(last.values())


def _told(root: Node) -> list[nn.Module]:
    """The output layers that the model, or a part of it, returns when it is asked as transformers' models are."""
    asked = [getattr(node.module, "get_output_embeddings", None) for node in root.walk()]
    return [told for ask in asked if callable(ask) and isinstance(told := ask(), nn.Module)]


def _branch(parts: Sequence[str], length: int, nodes: dict[str, Node]) -> str:
    """The path of so many parts; of a list or a dict of heads, each is one."""
    path = ".".join(parts[:length])
    several = path in nodes and isinstance(nodes[path].module, (nn.ModuleList, nn.ModuleDict))
    return ".".join(parts[: length + several])


def _first_layers(
    root: Node, weights: Sequence[NamedParameter], places: dict[NamedParameter, list[_Place]]
) -> list[NamedParameter]:
    """The first layer of the model, and of each of its parts that is called a patch embedding or a stem."""
    layers = set(repeated_layers(root))
    firsts: dict[str, NamedParameter] = {}
    for i, param in enumerate(weights):
        place = places[param][0]
        inside = any(node in layers for node in place.nodes[:-1])
        is_layer = place.attribute == "weight" and not is_embedding(place.module)
        if i == 0 and is_layer and (isinstance(place.module, CONVOLUTIONS) or not inside):
            firsts[""] = param
        for depth, part in enumerate(place.parts[:-1]):
            if FIRST.fullmatch(part):
                firsts.setdefault(".".join(place.parts[: depth + 1]), param)
    return list(firsts.values())
