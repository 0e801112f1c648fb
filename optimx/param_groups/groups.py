"""From a model to its parameter groups."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .._checks import check_number, one_of, within
from .layers import PRESETS, Layers, number
from .muon import ADAMW, MUON, Route, check_matrices, choose_muon, routes
from .names import NamedParameter, PatternLike, module_tree, named_parameters
from .no_decay import without_decay
from .rules import Rule, as_rules, same, select_all


def param_groups(
    model: nn.Module,
    *,
    lr: float | Tensor | None = None,
    weight_decay: float | None = None,
    no_decay: str | Sequence[PatternLike] | None = "auto",
    layer_decay: float | None = None,
    layers: Layers | None = None,
    layer_preset: str = "beit",
    min_lr_scale: float = 0.0,
    rules: Sequence[Rule | Mapping[str, Any]] = (),
    freeze: PatternLike | Sequence[PatternLike] = (),
    include_frozen: bool = False,
    muon: str | Sequence[PatternLike] | None = None,
    adamw_lr: float | Tensor | None = None,
    adamw_weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups of a model for any :mod:`torch.optim` optimizer. The model is not changed.

    Every trainable parameter is in one group; parameters with equal settings share it, in the order of the model. Names
    are those without wrappers (``module.``, ``_orig_mod.``, ``_fsdp_wrapped_module.``,
    ``_checkpoint_wrapped_module.`` and Fabric's); a tied parameter has all of its names. Patterns are globs for the
    whole name, or regular expressions searched for in it (compiled, or after ``re:``); one that matches no parameter is
    an error.

    Args:
        model: The model, wrapped or not.
        lr: Learning rate (default: None, the optimizer's).
        weight_decay: Weight decay of the parameters that have one (default: None, the optimizer's).
        no_decay: Who has none. ``"auto"``: biases, which their names tell (``bias``, ``pos_bias_u``,
            ``attention_biases``); parameters of torch's norm layers, and vectors of others that are called norms; those
            of 0 or 1 dimensions; ``A_log`` and ``D`` of state space models; and what the model asks for
            (``no_weight_decay()``, ``no_weight_decay_keywords()``, a parameter's ``_no_weight_decay`` or
            ``_optim["weight_decay"]`` of 0). ``"embeddings"``: embedding tables. A list of these and of patterns, of
            which ``"!pattern"`` takes back what those before it chose. None: nobody (default: ``"auto"``).
        layer_decay: The learning rate of a layer as a factor of that of the next, in (0, 1]; the head's is ``lr``
            (default: None).
        layers: Where the layers are: a function from a name to a number, from 0 at the input; a list of patterns (or
            lists of them) from the input to the head, where numbers that a regular expression captures make a layer
            each, and what matches none is the head; a dict as timm's ``group_matcher`` returns. None asks the model
            (``group_matcher``, ``get_layer_depth``), or numbers its repeated modules in the order of their definition
            (default: None).
        layer_preset: ``"beit"`` or ``"mae"`` (a final norm learns as fast as the head), ``"timm"`` (as fast as the last
            layer) or ``"electra"`` (the last layer is two steps below the head) (default: ``"beit"``).
        min_lr_scale: Least factor that ``layer_decay`` leaves (default: 0).
        rules: :class:`Rule` objects or dicts of their arguments. Where several match, later ones win, setting by
            setting.
        freeze: Patterns of parameters to leave out, whatever their ``requires_grad``.
        include_frozen: Put parameters with ``requires_grad=False`` into groups too, to train them later (default:
            False).
        muon: Who is trained by Muon, where AdamW trains the rest; :func:`by_optimizer` has the groups of each.
            ``"auto"``: the hidden matrices, which are weights of linear layers and convolutions, fused projections and
            stacks of experts' matrices. Not embeddings, output layers (tied or not), first layers (patch embeddings and
            stems too, which is the cautious choice), norms, biases, vectors, tables of positions and of tokens, routers
            of experts, depthwise convolutions, and what cannot be told. The modules decide, not the shapes. A list of
            ``"auto"`` and of patterns, of which ``"!pattern"`` takes back what those before it chose. None: the groups
            are all of one optimizer (default: None).
        adamw_lr: Learning rate of AdamW where ``muon`` is given, and ``lr`` is Muon's (default: None, AdamW's own).
        adamw_weight_decay: Weight decay of AdamW, likewise (default: None, AdamW's own).

    Returns:
        Groups with ``params``, ``param_names``, ``lr_scale`` (what layer decay and ``lr_mult`` made of ``lr``), ``lr``
        and ``weight_decay`` where they are known, ``optimizer`` (``"muon"`` or ``"adamw"``) where ``muon`` is given,
        among Muon's ``stacked=True`` for stacks of experts' matrices and ``split=3`` for queries, keys and values of
        ``nn.MultiheadAttention``, and the rules' other options. ``lr`` is scaled
        already: take ``lr_scale`` out for timm's schedulers, which would scale once more. Optimizers of optimx take
        groups without names beside them; torch's own refuse to, so delete ``param_names`` there if some groups have
        none.

    Raises:
        ValueError: An argument is out of range, a pattern matches nothing, there is nothing to train or a single
            layer to decay, or the parameters are flattened (FSDP1) or have no shape yet.
        TypeError: An argument has another type.

    Sources: layer decay as in BEiT (https://arxiv.org/abs/2106.08254), timm's ``param_groups_layer_decay`` and
    ELECTRA (https://arxiv.org/abs/2003.10555).
    """
    bases = _bases(muon is not None, _Base(lr, weight_decay), _Base(adamw_lr, adamw_weight_decay, "adamw_"))
    _check_numbers(bases.values(), layer_decay, min_lr_scale)
    one_of("layer_preset", layer_preset, PRESETS)
    for name, value in (("layers", layers), ("min_lr_scale", min_lr_scale or None)):
        if value is not None and layer_decay is None:
            raise ValueError(f"layer_decay should be given with {name} but is: None")
    ordered = as_rules(rules)
    root = module_tree(model)
    params = named_parameters(root)

    undecayed = without_decay(root, params, no_decay)
    frozen = select_all(freeze, params, "freeze")
    scales = dict.fromkeys(params, 1.0)
    if layer_decay is not None:
        ids = number(root, params, layers, layer_preset)
        top = max(ids.values())
        scales = {param: max(min_lr_scale, layer_decay ** (top - layer)) for param, layer in ids.items()}
    selected = [(rule, select_all(rule.match, params, f"rules[{i}].match")) for i, rule in enumerate(ordered)]
    found = {} if muon is None else routes(root, params)
    owners = _owners(found, params, muon, selected)
    matched: dict[NamedParameter, list[Rule]] = {param: [] for param in params}
    for i, (rule, chosen) in enumerate(selected):
        _check_rule(rule, f"rules[{i}]", chosen, [bases[owners[param]] for param in chosen], undecayed)
        for param in chosen:
            matched[param].append(rule)

    groups: list[dict[str, Any]] = []
    for param in params:
        its_rules = matched[param]
        if param in frozen or any(rule.freeze for rule in its_rules):
            continue
        if param.param.requires_grad or include_frozen:
            owner = owners[param]
            settings = _settings(its_rules, bases[owner], scales[param], param in undecayed)
            if owner is not None:
                settings["optimizer"] = owner
                if owner == MUON:
                    settings = {**dict(found[param].settings), **settings}
            _add(groups, param, settings)
    if not groups:
        raise ValueError(f"the model should have parameters to train but has none: {len(params)} are frozen")
    return groups


def by_optimizer(groups: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The groups of each optimizer, without the key ``optimizer`` that says whose they are.

    Args:
        groups: From :func:`param_groups` with ``muon``; they are not changed.

    Raises:
        ValueError: A group does not say whose it is.
    """
    members: dict[str, list[dict[str, Any]]] = {}
    for i, group in enumerate(groups):
        if "optimizer" not in group:
            raise ValueError(f"groups[{i}] should have 'optimizer' but has: {', '.join(group)}")
        members.setdefault(group["optimizer"], []).append({k: v for k, v in group.items() if k != "optimizer"})
    return members


def no_decay_groups(
    model: nn.Module,
    weight_decay: float,
    no_decay: str | Sequence[PatternLike] | None = "auto",
    *,
    lr: float | Tensor | None = None,
) -> list[dict[str, Any]]:
    """Two groups at most: with ``weight_decay``, and without. Arguments and errors of :func:`param_groups`."""
    return param_groups(model, lr=lr, weight_decay=weight_decay, no_decay=no_decay)


def layer_decay_groups(
    model: nn.Module,
    lr: float | Tensor,
    layer_decay: float,
    *,
    weight_decay: float | None = None,
    no_decay: str | Sequence[PatternLike] | None = "auto",
    layers: Layers | None = None,
    layer_preset: str = "beit",
    min_lr_scale: float = 0.0,
) -> list[dict[str, Any]]:
    """Learning rates that decay towards the input. Arguments and errors of :func:`param_groups`."""
    return param_groups(
        model, lr=lr, weight_decay=weight_decay, no_decay=no_decay, layer_decay=layer_decay, layers=layers,
        layer_preset=layer_preset, min_lr_scale=min_lr_scale,
    )  # fmt: skip


@dataclass(frozen=True)
class _Base:
    """What the groups of an optimizer have where no rule says otherwise.

    Attributes:
        lr: Learning rate, None if it is the optimizer's own.
        weight_decay: Likewise.
        prefix: Of the names of the arguments that they are from.
    """

    lr: float | Tensor | None
    weight_decay: float | None
    prefix: str = ""


def _bases(two: bool, first: _Base, second: _Base) -> dict[str | None, _Base]:
    """By whose they are, None where there is one optimizer."""
    if two:
        return {MUON: first, ADAMW: second}
    for name, value in (("lr", second.lr), ("weight_decay", second.weight_decay)):
        if value is not None:
            raise ValueError(f"muon should be given with {second.prefix}{name} but is: None")
    return {None: first}


def _check_numbers(bases: Collection[_Base], layer_decay: float | None, min_lr_scale: float) -> None:
    for base in bases:
        if base.lr is not None:
            check_number(f"{base.prefix}lr", base.lr, tensor=True)
        if base.weight_decay is not None:
            check_number(f"{base.prefix}weight_decay", base.weight_decay)
    check_number("min_lr_scale", min_lr_scale, within("[0, 1]"))
    if layer_decay is not None:
        check_number("layer_decay", layer_decay, within("(0, 1]"))
        for base in bases:
            if base.lr is None:
                raise ValueError(f"{base.prefix}lr should be given with layer_decay but is: None")


def _owners(
    found: dict[NamedParameter, Route],
    params: Sequence[NamedParameter],
    muon: str | Sequence[PatternLike] | None,
    rules: Sequence[tuple[Rule, set[NamedParameter]]],
) -> dict[NamedParameter, str | None]:
    """Whose each parameter is, None where ``muon`` is: as the model shows, then as the rules say."""
    muons = set() if muon is None else choose_muon(muon, found, params)
    owners: dict[NamedParameter, str | None] = dict.fromkeys(params)
    if muon is not None:
        owners = {param: MUON if param in muons else ADAMW for param in params}
    for i, (rule, chosen) in enumerate(rules):
        if rule.optimizer is None:
            continue
        if muon is None:
            raise ValueError(f"muon should be given with rules[{i}].optimizer but is: None")
        if rule.optimizer == MUON:
            check_matrices(chosen, f"rules[{i}]")
        owners |= dict.fromkeys(chosen, rule.optimizer)
    return owners


def _check_rule(
    rule: Rule, what: str, chosen: set[NamedParameter], bases: Sequence[_Base], undecayed: set[NamedParameter]
) -> None:
    """A setting that could not take effect is an error."""
    for base in bases:
        if rule.lr_mult is not None and base.lr is None:
            raise ValueError(f"{base.prefix}lr should be given with {what}.lr_mult but is: None")
        if rule.wd_mult is not None and base.weight_decay is None:
            raise ValueError(f"{base.prefix}weight_decay should be given with {what}.wd_mult but is: None")
    if (rule.weight_decay or rule.wd_mult) and chosen <= undecayed:
        first = min(param.name for param in chosen)
        raise ValueError(
            f"{what} sets weight decay for parameters that no_decay exempts, such as {first!r}: "
            f"add {'!' + first!r} to no_decay"
        )


def _settings(rules: Sequence[Rule], base: _Base, lr_scale: float, undecayed: bool) -> dict[str, Any]:
    """What a group of this parameter alone would say."""
    settings: dict[str, Any] = {}
    group_lr, scale = base.lr, lr_scale
    decay = base.weight_decay
    for rule in rules:
        if rule.lr is not None:
            group_lr, scale = rule.lr, 1.0
        elif rule.lr_mult is not None:
            group_lr, scale = base.lr, lr_scale * rule.lr_mult
        if rule.weight_decay is not None:
            decay = rule.weight_decay
        elif rule.wd_mult is not None and base.weight_decay is not None:
            decay = base.weight_decay * rule.wd_mult
        settings.update(rule.others)
    if undecayed:
        decay = 0.0
    if group_lr is not None:
        # a tensor is copied, so that no two groups share what schedulers write into
        settings["lr"] = group_lr * scale if isinstance(group_lr, Tensor) else float(group_lr * scale)
    if decay is not None:
        settings["weight_decay"] = float(decay)
    return {**settings, "lr_scale": scale}


def _add(groups: list[dict[str, Any]], param: NamedParameter, settings: dict[str, Any]) -> None:
    """Into the group of these settings, a new one if there is none."""
    for group in groups:
        if len(group) == len(settings) + 2 and all(k in group and same(group[k], v) for k, v in settings.items()):
            break
    else:
        group = {"params": [], "param_names": [], **settings}
        groups.append(group)
    group["params"].append(param.param)
    group["param_names"].append(param.name)
