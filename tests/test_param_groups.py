"""Parameter groups on small modules: names, weight decay, layers, rules, errors."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import Parameter
from torch.nn.utils import parametrize

import optimx
from optimx.param_groups import Rule, describe, layer_decay_groups, layer_ids, no_decay_groups, param_groups

ROOT = Path(__file__).parents[1]


class Block(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)


class Model(nn.Module):
    """A stem, three blocks, a final norm, a head."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.token = Parameter(torch.zeros(1, 1, 4))
        self.embed = nn.Embedding(8, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)


def by_name(groups: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """A setting of each parameter's group; each parameter is in one group only."""
    pairs = [(name, group.get(key)) for group in groups for name in group["param_names"]]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def named(groups: list[dict[str, Any]], key: str, value: object) -> set[str]:
    return {name for name, its in by_name(groups, key).items() if its == value}


# weight decay


class MyRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = Parameter(torch.ones(2, 2))


class GlobalResponseNorm(MyRMSNorm):
    pass


class GRN(MyRMSNorm):
    pass


class NormalizedLinear(MyRMSNorm):
    pass


class NormLinear(nn.Linear):
    pass


class PreNorm(nn.Module):
    """Is around what has a norm, but is none."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm((2, 2))
        self.fn = nn.Linear(2, 2, bias=False)


def lazily(make: Callable[[], nn.Module], *shape: int) -> nn.Module:
    module = make()
    module(torch.zeros(shape))
    return module


NORMS: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: nn.LayerNorm((2, 2)),
    "RMSNorm": lambda: nn.RMSNorm((2, 2)),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    **{f"BatchNorm{d}d": lambda d=d: getattr(nn, f"BatchNorm{d}d")(2) for d in (1, 2, 3)},
    **{f"InstanceNorm{d}d": lambda d=d: getattr(nn, f"InstanceNorm{d}d")(2, affine=True) for d in (1, 2, 3)},
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(2),
    "LazyBatchNorm1d": lambda: lazily(nn.LazyBatchNorm1d, 3, 2),
    "MyRMSNorm": MyRMSNorm,
    "GlobalResponseNorm": GlobalResponseNorm,
    "GRN": GRN,
}


@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
def test_no_norm_decays(make: Callable[[], nn.Module]) -> None:
    model = nn.ModuleDict({"fc": nn.Linear(2, 2), "layer": make()})
    torchs = type(model["layer"]).__module__.startswith("torch.")
    for param in model["layer"].parameters():
        # only the type tells it apart; of what is only called a norm, a matrix would be one
        param.data = torch.zeros(2, 2) if torchs else torch.zeros(1, 2, 1)
    assert named(no_decay_groups(model, 0.1), "weight_decay", 0.1) == {"fc.weight"}


class CosNorm_Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = Parameter(torch.ones(3, 2))


class AdaptiveLayerNorm(nn.Module):
    """With a matrix of its own beside its scale and shift."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = Parameter(torch.ones(1, 3, 1)), Parameter(torch.ones(3))
        self.project = Parameter(torch.ones(3, 2))


class WithHeads(nn.Module):
    """Has a scale for each head, as the norms of queries and keys of Cohere's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm, self.o_norm = MyRMSNorm(), MyRMSNorm(), MyRMSNorm()


def test_matrices_of_what_is_called_a_norm_decay() -> None:
    model = nn.ModuleList([CosNorm_Classifier(), AdaptiveLayerNorm(), WithHeads()])
    assert named(no_decay_groups(model, 0.1), "weight_decay", 0.1) == {"0.weight", "1.project", "2.o_norm.scale"}


LAYERS_ONLY_CALLED_NORM = [NormalizedLinear(), NormLinear(2, 2, bias=False), CosNorm_Classifier()]


@pytest.mark.parametrize("layer", LAYERS_ONLY_CALLED_NORM, ids=lambda m: type(m).__name__)
def test_what_is_only_called_like_a_norm_decays(layer: nn.Module) -> None:
    assert all(group["weight_decay"] == 0.1 for group in no_decay_groups(nn.Sequential(layer), 0.1))


def test_a_module_with_a_norm_is_none() -> None:
    assert named(no_decay_groups(PreNorm(), 0.1), "weight_decay", 0.1) == {"fn.weight"}


class Hints(nn.Module):
    """All the ways in which models ask for no decay."""

    def __init__(self, method: str, hint: object) -> None:
        super().__init__()
        self.pos_embed = Parameter(torch.zeros(2, 2))
        self.fc = nn.Linear(2, 2)
        self.a_log = Parameter(torch.zeros(2, 2))
        if method:
            setattr(self, method, hint)


@pytest.mark.parametrize(
    ("method", "hint"),
    [
        ("no_weight_decay", lambda: {"pos_embed"}),
        ("no_weight_decay", lambda: ["pos_*"]),
        ("no_weight_decay", ("pos_embed",)),
        ("no_weight_decay_keywords", lambda: {"embed"}),
        ("", None),
    ],
    ids=["names", "globs", "attribute", "keywords", "mark"],
)
@pytest.mark.parametrize("inside", [False, True], ids=["model", "part"])
def test_hints_of_the_model(method: str, hint: object, inside: bool) -> None:
    part = Hints(method, hint)
    exempt = {"pos_embed", "fc.bias"}
    if not method:
        part.a_log._no_weight_decay = True
        exempt = {"a_log", "fc.bias"}
    model: nn.Module = part
    if inside:
        # a hint holds below the module that gives it
        model = nn.ModuleDict({"part": part, "other": Hints("", None)})
        exempt = {f"part.{name}" for name in exempt} | {"other.fc.bias"}
    assert named(no_decay_groups(model, 0.1), "weight_decay", 0.0) == exempt
    assert named(no_decay_groups(model, 0.1, None), "weight_decay", 0.0) == set()


BIASES = [
    "bias", "pos_bias_u", "r_r_bias", "down_proj_bias", "attention_biases", "relative_position_bias_table", "bias_k",
    "bias_ih_l0", "relPosBias", "bias1",
]  # fmt: skip
NO_BIASES = ["unbiased", "debias_map", "biased_weight", "alibias", "bias_proj", "bias_weight", "inBiasedKernel"]


def test_biases_of_any_shape() -> None:
    model = nn.Module()
    for name in (*BIASES, *NO_BIASES):
        model.register_parameter(name, Parameter(torch.ones(2, 2)))
    model.biases = nn.ParameterList([torch.ones(2, 2)])
    model.bias_of = nn.ParameterDict({"en": torch.ones(2, 2)})
    model.parts = nn.ParameterDict({"bias": torch.ones(2, 2), "weight": torch.ones(2, 2)})
    model.bias_net = nn.Linear(2, 2, bias=False)
    model.fc = nn.Linear(2, 2)
    model.fc.bias = Parameter(torch.ones(2, 2))
    parametrize.register_parametrization(model.fc, "bias", nn.Identity())
    parametrize.register_parametrization(model.fc, "weight", nn.Identity())
    decay = named(no_decay_groups(model, 0.1), "weight_decay", 0.1)
    assert decay == {*NO_BIASES, "parts.weight", "bias_net.weight", "fc.parametrizations.weight.original"}


def test_state_space_models_keep_their_decay() -> None:
    """Also where nobody has marked it, as in transformers' Mamba. Another ``D`` is a matrix like any other."""
    model = nn.ModuleDict()
    for i, names in enumerate([("A_log", "D", "x"), ("A_b_log", "D_b"), ("A_logs", "Ds"), ("D", "A"), ("DA_log",)]):
        part = nn.Module()
        for name in names:
            part.register_parameter(name, Parameter(torch.ones(2, 2)))
        model[f"part{i}"] = part
    decay = named(no_decay_groups(model, 0.1), "weight_decay", 0.1)
    assert decay == {"part0.x", "part3.D", "part3.A", "part4.DA_log"}


def test_marks_on_parameters() -> None:
    model = nn.ParameterList(torch.ones(2, 2) for _ in range(6))
    marks = [("_no_weight_decay", True), ("no_weight_decay", True), ("_optim", {"weight_decay": 0.0, "lr": 1e-3}),
             ("_no_weight_decay", False), ("_optim", {"lr": 1e-3}), ("_optim", None)]  # fmt: skip
    for param, (name, value) in zip(model, marks, strict=True):
        setattr(param, name, value)
    assert named(no_decay_groups(model, 0.1), "weight_decay", 0.0) == {"0", "1", "2"}


@pytest.mark.parametrize(("hint", "exempt"), [("pos_embed", {"pos_embed", "fc.bias"}), (None, {"fc.bias"})])
def test_hints_that_are_no_list(hint: str | None, exempt: set[str]) -> None:
    assert named(no_decay_groups(Hints("no_weight_decay", lambda: hint), 0.1), "weight_decay", 0.0) == exempt
    with pytest.raises(ValueError, match=r"part\.no_weight_decay should list names of parameters but is: True"):
        no_decay_groups(nn.ModuleDict({"part": Hints("no_weight_decay", True)}), 0.1)


class Listing(nn.Module):
    """Asks for names as its ``named_parameters()`` has them, as timm's models with a table of positions do."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Hints("", None) for _ in range(2))

    def no_weight_decay(self) -> list[str]:
        return [name for name, _ in self.named_parameters() if name.endswith("pos_embed")]


@pytest.mark.parametrize("listed", ["before", "after"])
@pytest.mark.parametrize("wrap", [torch.compile, checkpoint_wrapper, nn.DataParallel,
                                  lambda module: nn.DataParallel(torch.compile(checkpoint_wrapper(module)))],
                         ids=["compile", "checkpoint", "parallel", "all"])  # fmt: skip
def test_hints_within_wrappers(wrap: Callable[[nn.Module], nn.Module], listed: str) -> None:
    model = Listing()
    expected = named(no_decay_groups(model, 0.1), "weight_decay", 0.0)
    assert expected == {f"blocks.{i}.{name}" for i in range(2) for name in ("pos_embed", "fc.bias")}
    if listed == "before":
        names = model.no_weight_decay()
        model.no_weight_decay = lambda: names  # type: ignore[method-assign]
    for i in range(2):
        model.blocks[i] = wrap(model.blocks[i])
    assert named(no_decay_groups(wrap(model), 0.1), "weight_decay", 0.0) == expected


KINDS = ("weight", "bias")
EVERYTHING = {name for name, _ in Model().named_parameters()}
VECTORS = {name for name, param in Model().named_parameters() if param.ndim == 1}


@pytest.mark.parametrize(
    ("no_decay", "exempt"),
    [
        ("auto", VECTORS),
        (None, set()),
        ([], set()),
        ("embeddings", {"embed.weight"}),
        (["auto", "embeddings", "token"], VECTORS | {"embed.weight", "token"}),
        (["head.*"], {"head.weight", "head.bias"}),
        ([r"re:^blocks\.[12]\.fc1"], {f"blocks.{i}.fc1.{kind}" for i in (1, 2) for kind in KINDS}),
        ([re.compile("BIAS$", re.IGNORECASE)], {name for name in EVERYTHING if name.endswith("bias")}),
        (["auto", "!norm.*"], VECTORS - {"norm.weight", "norm.bias"}),
        (["!norm.*", "auto"], VECTORS),
        (["*", r"!re:\.weight$"], {name for name in EVERYTHING if not name.endswith(".weight")}),
    ],
    # sets have no order
    ids=lambda value: "" if isinstance(value, set) else str(value),
)
def test_who_has_no_decay(no_decay: Any, exempt: set[str]) -> None:
    groups = no_decay_groups(Model(), 0.1, no_decay)
    assert named(groups, "weight_decay", 0.0) == exempt
    assert named(groups, "weight_decay", 0.1) == EVERYTHING - exempt


def test_the_optimizers_own_defaults() -> None:
    """What is not given is not in the groups, so that the optimizer fills it in."""
    groups = param_groups(Model())
    assert [set(group) - {"params", "param_names", "lr_scale"} for group in groups] == [set(), {"weight_decay"}]
    optimizer = optimx.AdamW(groups, lr=0.5, weight_decay=0.3)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.5, 0.3), (0.5, 0.0)]


# layers


class Mixed(nn.Module):
    """A pyramid: stages of blocks that downsample before, as ConvNeXt's, or after, as Swin's."""

    def __init__(self, before: bool) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.stages = nn.Sequential()
        for i, depth in enumerate((1, 2, 2)):
            stage = nn.Module()
            if before and i:
                stage.down = nn.Linear(4 * i, 4 * i + 4)
            stage.blocks = nn.Sequential(*(Block(4 * i + 4) for _ in range(depth)))
            if not before and i < 2:
                stage.down = nn.Linear(4 * i + 4, 4 * i + 8)
            self.stages.append(stage)
        self.head = nn.Linear(12, 2)


class Experts(Block):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Block() for _ in range(3))


def mixture() -> nn.Module:
    """A plain layer, then layers of experts, which work side by side."""
    return nn.ModuleDict({"layers": nn.ModuleList([Experts(), Experts(), Experts()]), "head": nn.Linear(4, 2)})


def downsampled() -> nn.Module:
    """ConvNeXt's first code: the downsampling layers in a list of their own, before the stages."""
    stages = nn.ModuleList(nn.Sequential(*(Block(8 * i) for _ in range(2))) for i in (1, 2))
    downs = nn.ModuleList(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for i in (1, 2))
    return nn.ModuleDict({"downs": downs, "stages": stages, "head": nn.Linear(16, 2)})


def small_side_list() -> nn.Module:
    """The same, with layers as deep as blocks that hold little of the model."""
    downs = nn.ModuleList(Block(1) for _ in range(2))
    return nn.ModuleDict({"downs": downs, "layers": nn.ModuleList(Experts() for _ in range(3))})


def blocks_of_lists() -> nn.Module:
    """Funnel's: lists of equal blocks in a list."""
    return nn.ModuleDict({"stages": nn.ModuleList(nn.ModuleList(Block() for _ in range(2)) for _ in range(2))})


class Pairs(nn.Module):
    """EfficientNet's block: a sequence of pairs of modules."""

    def __init__(self, width: int) -> None:
        super().__init__()
        pairs = (nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width)) for _ in range(2))
        self.pairs = nn.Sequential(*pairs)


def list_of_two_kinds() -> nn.Module:
    """Jamba's: one attention layer among the others."""
    return nn.ModuleDict({"layers": nn.ModuleList([Block(), Experts(), Block()]), "head": nn.Linear(4, 2)})


def encoder_decoder() -> nn.Module:
    layers = {
        "dim_feedforward": 8,
        "nhead": 2,
        "d_model": 4,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "batch_first": True,
    }
    return nn.Transformer(**layers)


def shared_layers() -> nn.Module:
    """ALBERT's: one layer that is used several times."""
    return nn.ModuleDict({"embed": nn.Embedding(4, 4), "layers": nn.ModuleList([Block()] * 3), "head": nn.Linear(4, 2)})


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Model(), {"token": 0, "embed": 0, "blocks.0": 1, "blocks.1": 2, "blocks.2": 3, "norm": 4, "head": 4}),
        (
            Mixed(before=True),
            {"stem": 0, "stages.0.blocks.0": 1, "stages.1.down": 2, "stages.1.blocks.0": 2, "stages.1.blocks.1": 3,
             "stages.2.down": 4, "stages.2.blocks.0": 4, "stages.2.blocks.1": 5, "head": 6},
        ),
        (
            Mixed(before=False),
            {"stem": 0, "stages.0.blocks.0": 1, "stages.0.down": 1, "stages.1.blocks.0": 2, "stages.1.blocks.1": 3,
             "stages.1.down": 3, "stages.2.blocks.0": 4, "stages.2.blocks.1": 5, "head": 6},
        ),
        (mixture(), {"layers.0": 0, "layers.1": 1, "layers.2": 2, "head": 3}),
        (
            downsampled(),
            {"downs": 0, "stages.0.0": 1, "stages.0.1": 2, "stages.1.0": 3, "stages.1.1": 4, "head": 5},
        ),
        (small_side_list(), {"downs": 0, "layers.0": 1, "layers.1": 2, "layers.2": 3}),
        (blocks_of_lists(), {"stages.0.0": 0, "stages.0.1": 1, "stages.1.0": 2, "stages.1.1": 3}),
        (nn.Sequential(Pairs(2), Pairs(3), nn.Linear(3, 2)), {"0": 0, "1": 1, "2": 2}),
        (list_of_two_kinds(), {"layers.0": 0, "layers.1": 1, "layers.2": 2, "head": 3}),
        (
            encoder_decoder(),
            {"encoder.layers.0": 0, "encoder.layers.1": 1, "encoder.norm": 1, "decoder.layers.0": 2,
             "decoder.layers.1": 3, "decoder.norm": 4},
        ),
        (shared_layers(), {"embed": 0, "layers": 1, "head": 2}),
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.Linear(2, 2)), {"0": 0, "2": 1, "3": 2}),
        (nn.Sequential(nn.Linear(2, 4), Block(), Block(), nn.Linear(4, 2)), {"0": 0, "1": 1, "2": 2, "3": 3}),
        (nn.ModuleDict({"a": Block(), "b": Block(), "c": nn.Sequential(nn.Linear(4, 2))}), {"a": 0, "b": 1, "c": 2}),
    ],
    ids=["plain", "down-before", "down-after", "experts", "down-apart", "side-list", "lists", "within",
         "two-kinds", "encoder-decoder", "shared", "mlp", "sequential", "dict"],
)  # fmt: skip
def test_layers_of_the_structure(model: nn.Module, expected: dict[str, int]) -> None:
    for name, layer in layer_ids(model).items():
        (prefix,) = (prefix for prefix in expected if name == prefix or name.startswith(prefix + "."))
        assert layer == expected[prefix], name


#: Scales of the last block, the final norm and the head.
PRESETS = {"beit": (0.5, 1, 1), "mae": (0.5, 1, 1), "timm": (0.5, 0.5, 1), "electra": (0.25, 1, 1)}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset: str) -> None:
    scales = by_name(layer_decay_groups(Model(), 0.1, 0.5, layer_preset=preset), "lr_scale")
    assert (scales["blocks.2.fc1.weight"], scales["norm.weight"], scales["head.bias"]) == PRESETS[preset]
    assert scales["token"] == scales["blocks.2.fc1.weight"] / 8


def from_input(name: str) -> int:
    return 0 if name.startswith("embed") else 2 if name.startswith("head") else 1


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (from_input, [0, 1, 1, 1, 2]),
        (["embed.*", "blocks.*"], [0, 1, 1, 1, 2]),
        ([["embed.*", "token"], r"re:^blocks\.(\d+)\."], [0, 1, 2, 3, 4]),
        ([["embed.*", "token"], "head.*"], [0, 2, 2, 2, 1]),
        ([re.compile(r"^blocks\.([01])"), "head.*"], [3, 0, 1, 3, 2]),
        ({"stem": "embed|token", "blocks": [(r"blocks\.(\d+)", None), ("norm", (99999,))]}, [0, 1, 2, 3, 4]),
        ({"stem": r"embed|token", "blocks": r"blocks|norm", "none": None}, [0, 1, 1, 1, 2]),
    ],
    ids=["function", "globs", "captures", "top", "rest", "matcher", "coarse"],
)
def test_layers_that_are_told(layers: Any, expected: list[int]) -> None:
    ids = layer_ids(Model(), layers)
    names = ["embed.weight", *(f"blocks.{i}.fc1.bias" for i in range(3)), "head.weight"]
    assert [ids[name] for name in names] == expected


class Depths(Model):
    """OpenMMLab's protocol: the layer and how many there are."""

    def get_layer_depth(self, name: str, prefix: str = "") -> tuple[int, int]:
        assert name in EVERYTHING
        block = re.match(r"blocks\.(\d)", name)
        return (int(block[1]) + 1 if block else 0 if name in ("token", "embed.weight") else 4), 5


@pytest.mark.parametrize("inside", [False, True], ids=["model", "part"])
def test_layer_depth_protocol(inside: bool) -> None:
    model = nn.ModuleDict({"neck": nn.Linear(2, 2), "backbone": Depths()}) if inside else Depths()
    ids = layer_ids(model)
    assert {name.removeprefix("backbone."): layer for name, layer in ids.items() if "neck" not in name} == layer_ids(
        Model()
    )
    assert ids.get("neck.weight", 4) == 4


def test_frozen_layers_count() -> None:
    """So that thawing them changes nobody's learning rate."""
    model = Model()
    scales = by_name(layer_decay_groups(model, 0.1, 0.5), "lr_scale")
    model.embed.requires_grad_(False)
    model.blocks[1].requires_grad_(False)
    fewer = by_name(layer_decay_groups(model, 0.1, 0.5), "lr_scale")
    assert fewer == {
        name: scale for name, scale in scales.items() if name != "embed.weight" and not name.startswith("blocks.1.")
    }


# rules


def test_rules_in_order() -> None:
    """Later rules win, setting by setting."""
    rules = [
        {"match": "blocks.*", "lr_mult": 0.5, "weight_decay": 0.3, "eps": 1e-6},
        Rule("blocks.1.*", lr=7.0, betas=(0.8, 0.9)),
        {"match": ["re:^head", "blocks.2.fc1.weight"], "lr_mult": 3.0, "wd_mult": 0.5},
    ]
    groups = param_groups(Model(), lr=0.1, weight_decay=0.2, layer_decay=0.5, rules=rules)
    lr, scale, decay = (by_name(groups, key) for key in ("lr", "lr_scale", "weight_decay"))
    eps, betas = (by_name(groups, key) for key in ("eps", "betas"))
    # lr_mult multiplies what layer decay leaves, lr replaces it
    assert lr["blocks.0.fc1.weight"] == pytest.approx(0.1 * 0.5**3 * 0.5)
    assert scale["blocks.0.fc1.weight"] == 0.5**4
    assert (lr["blocks.1.fc1.weight"], scale["blocks.1.fc1.weight"]) == (7.0, 1.0)
    assert (lr["blocks.2.fc1.weight"], scale["blocks.2.fc1.weight"]) == (pytest.approx(0.15), 1.5)
    assert lr["head.bias"] == pytest.approx(0.3)
    # no_decay holds whatever a rule says of the others
    names = (
        "embed.weight",
        "blocks.0.fc1.weight",
        "blocks.0.fc1.bias",
        "blocks.2.fc1.weight",
        "head.weight",
        "head.bias",
    )
    assert [decay[name] for name in names] == [0.2, 0.3, 0.0, 0.1, 0.1, 0.0]
    assert [eps[name] for name in names] == [None, 1e-6, 1e-6, 1e-6, None, None]
    assert [betas["blocks.1.norm.bias"], betas["head.bias"]] == [(0.8, 0.9), None]


def test_rules_without_a_base() -> None:
    groups = param_groups(Model(), no_decay=None, rules=[Rule("head.*", lr=0.5, weight_decay=0.1)])
    assert [{k: v for k, v in group.items() if k not in ("params", "param_names")} for group in groups] == [
        {"lr_scale": 1.0},
        {"lr": 0.5, "weight_decay": 0.1, "lr_scale": 1.0},
    ]


@pytest.mark.parametrize("how", ["freeze", "rule"])
def test_freeze_leaves_out(how: str) -> None:
    model = Model()
    kwargs = {"freeze": ["embed.*", "blocks.0.*"]} if how == "freeze" else {
        "rules": [Rule(["embed.*", "blocks.0.*"], freeze=True), Rule("blocks.*", lr=1.0)]
    }  # fmt: skip
    groups = param_groups(model, include_frozen=True, **kwargs)
    out = {name for name in EVERYTHING if name.startswith(("embed", "blocks.0"))}
    assert by_name(groups, "lr").keys() == EVERYTHING - out
    assert all(param.requires_grad for param in model.parameters())
    described = describe(model, groups)
    assert set(described.left_out) == out
    assert described.frozen == ()


def test_frozen_parameters() -> None:
    model = Model()
    model.embed.requires_grad_(False)
    assert "embed.weight" not in by_name(param_groups(model), "lr")
    groups = param_groups(model, include_frozen=True)
    assert by_name(groups, "lr").keys() == EVERYTHING
    # the optimizer trains it as soon as it is thawed
    optimizer = optimx.SGD(groups, lr=1.0)
    model.embed.requires_grad_(True)
    before = model.embed.weight.detach().clone()
    model.embed.weight.square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, model.embed.weight)


# groups


def test_equal_groups_are_merged_in_the_order_of_the_model() -> None:
    groups = param_groups(Model(), lr=0.1, weight_decay=0.1, rules=[Rule("blocks.1.*", betas=[0.8, 0.9])])
    firsts = [group["param_names"][0] for group in groups]
    assert firsts == ["token", "blocks.0.norm.weight", "blocks.1.norm.weight", "blocks.1.fc1.weight"]
    order = [name for name, _ in Model().named_parameters()]
    assert all(group["param_names"] == sorted(group["param_names"], key=order.index) for group in groups)
    # one that changes nothing makes no group
    assert len(param_groups(Model(), lr=0.1, weight_decay=0.1, rules=[Rule("blocks.1.*", lr_mult=1.0)])) == 2
    assert len(param_groups(Model(), weight_decay=0)) == 1


def test_tensor_learning_rate() -> None:
    lr = torch.tensor(0.1)
    groups = layer_decay_groups(Model(), lr, 0.5)
    assert len(groups) == 9  # five layers, with and without decay; the first has no vectors
    for group in groups:
        torch.testing.assert_close(group["lr"], lr * group["lr_scale"])
    # a scheduler writes into it
    assert len({group["lr"].data_ptr() for group in groups} | {lr.data_ptr()}) == len(groups) + 1
    rules = [Rule("head.weight", lr=torch.tensor(1.0)), Rule("embed.weight", lr=torch.tensor(1.0))]
    assert len(param_groups(Model(), no_decay=None, rules=rules)) == 2


def test_groups_can_be_extended_by_hand() -> None:
    """torch refuses to mix named and unnamed groups in its own optimizers; ours are named."""
    optimizer = torch.optim.SGD(param_groups(Model(), lr=0.1))
    with pytest.raises(ValueError, match="with/without names"):
        optimizer.add_param_group({"params": [Parameter(torch.zeros(2))]})
    optimizer.add_param_group({"params": [("more", Parameter(torch.zeros(2)))]})
    assert optimizer.state_dict()["param_groups"][-1]["param_names"] == ["more"]


def more(*names: str) -> list[Any]:
    params = [Parameter(torch.ones(2)), Parameter(torch.ones(3))]
    return list(zip(names, params, strict=True)) if names else params


NAMES = [group["param_names"] for group in no_decay_groups(Model(), 0.1)]
#: Groups, and the names that they have.
JOINS: dict[str, tuple[Callable[[], list[dict[str, Any]]], list[Any]]] = {
    "plain_joins_named": (
        lambda: [*no_decay_groups(Model(), 0.1), {"params": iter(more()), "lr": 0.5}],
        [*NAMES, None],
    ),
    "names_as_a_list": (
        lambda: [{"params": more()}, {"params": more(), "param_names": ["a", "b"]}],
        [None, ["a", "b"]],
    ),
    "by_turns": (
        lambda: [{"params": more("a", "b")}, {"params": more()}, {"params": more("c", "d")}],
        [["a", "b"], None, ["c", "d"]],
    ),
}


@pytest.mark.parametrize("later", [False, True], ids=["list", "add_param_group"])
def test_pairs_beside_groups_without_names(later: bool) -> None:
    """Torch's error: whoever gives pairs of name and parameter gives all of them so."""
    plain, pairs = {"params": more()}, {"params": iter(more("a", "b"))}
    optimizer = optimx.SGD([plain], lr=0.1)
    with pytest.raises(ValueError, match="cannot add param group with names to the optimizer"):
        optimizer.add_param_group(pairs) if later else optimx.SGD([plain, pairs], lr=0.1)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("later", [False, True], ids=["list", "add_param_group"])
@pytest.mark.parametrize("cls", [optimx.AdamW, optimx.Lion, optimx.Adafactor, optimx.SGD])
@pytest.mark.parametrize(("groups", "names"), JOINS.values(), ids=JOINS)
def test_groups_with_and_without_names(
    groups: Callable[[], list[dict[str, Any]]], names: list[Any], cls: type[torch.optim.Optimizer], later: bool
) -> None:
    """All are stepped, and those that have names keep them, also through checkpoints of either kind."""
    given = groups()
    optimizer = cls(given[:1] if later else given, lr=0.1)
    for group in given[1:] if later else ():
        optimizer.add_param_group(group)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    before = [param.detach().clone() for param in params]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert not any(map(torch.equal, before, params))
    saved = optimizer.state_dict()
    assert [group.get("param_names") for group in saved["param_groups"]] == names
    # neither do names get lost where a checkpoint has none, nor do they keep groups from joining
    plain = [{key: value for key, value in group.items() if key != "param_names"} for group in saved["param_groups"]]
    optimizer.load_state_dict({**saved, "param_groups": plain})
    assert [group.get("param_names") for group in optimizer.param_groups] == names
    other = cls([{"params": [Parameter(p.detach().clone()) for p in g["params"]]} for g in optimizer.param_groups])
    other.load_state_dict(saved)
    assert [group.get("param_names") for group in other.param_groups] == names
    other.add_param_group({"params": more()})
    assert len(other.param_groups) == len(given) + 1


def test_what_torch_refuses_of_a_group_is_refused() -> None:
    optimizer = optimx.SGD(param_groups(Model(), lr=0.1))
    groups = optimizer.param_groups
    before = [*groups]
    shared, new = groups[0]["params"][0], Parameter(torch.zeros(2))
    for group, error, message in (
        ({"params": [new, shared]}, ValueError, "more than one parameter group"),
        ({"params": [("a", new), Parameter(torch.zeros(2))]}, ValueError, "Some param names are missing"),
        ({"params": {new}}, TypeError, "ordered collections"),
        ({"params": [3]}, TypeError, "can only optimize Tensors"),
        ([new], TypeError, "must be a dict"),
    ):
        with pytest.raises(error, match=message):
            optimizer.add_param_group(group)
        assert optimizer.param_groups is groups
        assert groups == before


# wrappers


class Wrapper(nn.Module):
    """As DistributedDataParallel, torch.compile, FSDP and checkpoint wrappers keep what they wrap."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        self.register_module(name, module)


WRAPPERS = ["module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"]


def test_a_wrapper_that_has_it_twice() -> None:
    """As Lightning Fabric's: the module, and the module in the wrapper of its strategy."""
    plain, wrapped = Model(), Wrapper(inner := Model(), "_original_module")
    wrapped.register_module("_forward_module", Wrapper(inner, "module"))
    assert layer_ids(wrapped) == layer_ids(plain)
    assert describe(wrapped, param_groups(wrapped)).tied == ()
    # two modules are no wrapper
    wrapped.register_module("_forward_module", Model())
    assert set(layer_ids(wrapped)) == set(dict(wrapped.named_parameters()))


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["", "blocks", "blocks.0", "blocks.2", "blocks.1.fc1", "norm", "head"]),
                          st.sampled_from(WRAPPERS)), min_size=1, max_size=5))  # fmt: skip
def test_wrappers_at_any_level(wrapped: list[tuple[str, str]]) -> None:
    plain, model = Model(), nn.ModuleDict({"root": Model()})
    for path, name in sorted(wrapped, reverse=True):
        parent, _, child = f"root.{path}".rstrip(".").rpartition(".")
        owner = model.get_submodule(parent)
        owner.register_module(child, Wrapper(owner.get_submodule(child), name))
    groups, expected = (
        layer_decay_groups(m, 0.1, 0.5, weight_decay=0.1, no_decay=["auto", "head.*"]) for m in (model["root"], plain)
    )
    keys = ("param_names", "lr", "weight_decay", "lr_scale")
    assert [[group[key] for key in keys] for group in groups] == [[group[key] for key in keys] for group in expected]


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, checkpoint_wrapper, torch.compile, torch.optim.swa_utils.AveragedModel],
    ids=["DataParallel", "checkpoint", "compile", "AveragedModel"],
)  # fmt: skip
def test_real_wrappers(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = Model()
    model.blocks[1] = wrap(model.blocks[1])
    names = [name for name, _ in Model().named_parameters()]
    assert list(layer_ids(wrap(model))) == names


def test_a_child_of_that_name_among_others_is_no_wrapper() -> None:
    for name in WRAPPERS:
        model = nn.ModuleDict({name: nn.Linear(2, 2), "other": nn.Linear(2, 2)})
        assert f"{name}.weight" in layer_ids(model, lambda name: int("other" in name))


FSDP = """
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from optimx.param_groups import layer_decay_groups, no_decay_groups
from tests.test_param_groups import Model, by_name
dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
plain = layer_decay_groups(Model(), 0.1, 0.5, weight_decay=0.1)

def same(model):
    for key in ("lr", "weight_decay"):
        assert by_name(layer_decay_groups(model, 0.1, 0.5, weight_decay=0.1), key) == by_name(plain, key)

def sharded(**kwargs):
    model = Model()
    model.blocks[1] = FullyShardedDataParallel(model.blocks[1], device_id=torch.device("cpu"), **kwargs)
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **kwargs)

model = sharded(use_orig_params=True)
assert all(p.ndim == 1 for p in model.parameters())
same(model)
model = fully_shard(Model(), mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
assert all(isinstance(p, dist.tensor.DTensor) for p in model.parameters())
same(model)
same(nn.parallel.DistributedDataParallel(Model()))
try:
    no_decay_groups(sharded(), 0.1)
except ValueError as error:
    print(error)
"""


def test_distributed_models() -> None:
    """FSDP1 leaves flat shards, where only FSDP knows how many dimensions there were; without the original
    parameters nothing can be told apart."""
    run = subprocess.run([sys.executable, "-c", FSDP], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert "_flat_param holds many parameters that FSDP has flattened" in run.stdout
    assert "use_orig_params=True" in run.stdout


# tied


def test_a_tied_parameter_has_all_of_its_names() -> None:
    model = Model()
    model.head = nn.Linear(4, 8)
    model.head.weight = model.embed.weight
    groups = param_groups(model, lr=1.0, weight_decay=0.1, no_decay=["head.weight"], rules=[Rule("head.*", lr_mult=2)])
    assert by_name(groups, "weight_decay")["embed.weight"] == 0.0
    assert by_name(groups, "lr")["embed.weight"] == 2.0
    assert "head.weight" not in by_name(groups, "lr")
    assert named(no_decay_groups(model, 0.1, ["embeddings"]), "weight_decay", 0.0) == {"embed.weight"}


# describe


def test_describe() -> None:
    model = Model()
    model.norm.requires_grad_(False)
    groups = param_groups(
        model,
        lr=0.1,
        weight_decay=0.05,
        freeze=["embed.*", "*.norm.*"],
        rules=[Rule("head.*", lr_mult=2.0, eps=1e-6)],
    )
    described = describe(nn.DataParallel(model), groups)
    assert described.frozen == ("norm.weight", "norm.bias")
    assert described.left_out == ("embed.weight", *(f"blocks.{i}.norm.{kind}" for i in range(3) for kind in KINDS))
    assert [group.names for group in described.groups] == [tuple(group["param_names"]) for group in groups]
    assert sum(group.elements for group in described.groups) == sum(
        p.numel() for group in groups for p in group["params"]
    )
    assert str(described) == textwrap.dedent("""\
        group  tensors  elements   lr  lr_scale  weight_decay  others     names
            0        7       196  0.1         1          0.05  -          token, blocks.0.fc1.weight, ...
            1        6        36  0.1         1             0  -          blocks.0.fc1.bias, blocks.0.fc2.bias, ...
            2        1         8  0.2         2          0.05  eps=1e-06  head.weight
            3        1         2  0.2         2             0  eps=1e-06  head.bias
        frozen: 2 (norm.weight, norm.bias)
        trainable, in no group: 7 (embed.weight, blocks.0.norm.weight, ...)""")
    # an optimizer's groups say more, most of it the same in all of them
    lines = str(describe(model, torch.optim.SGD(groups, momentum=0.9).param_groups)).splitlines()
    assert [line for line in lines if "momentum" in line] == [lines[5]]
    assert lines[5].startswith("in every group: momentum=0.9, ")
    with pytest.raises(ValueError, match=r"groups\[0\] should have parameters of the model only but has 1 others"):
        describe(model, [{"params": [Parameter(torch.zeros(1))]}])


# errors


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(2))


def frozen() -> nn.Module:
    return Model().requires_grad_(False)


class TwoMatchers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Depths(), Depths()


DECAY = {"lr": 0.1, "layer_decay": 0.5}

ERRORS = {
    "model": ([], {}, TypeError, "model should be a torch.nn.Module but is: list"),
    "lazy": (lazy, {}, ValueError, "0.weight has no shape yet"),
    "frozen": (frozen, {}, ValueError, "should have parameters to train but has none: 24 are frozen"),
    "empty": (nn.ReLU, {}, ValueError, "should have parameters to train but has none: 0 are frozen"),
    "all-frozen-by-name": (Model, {"freeze": ["*"]}, ValueError, "should have parameters to train but has none"),
    "lr": (Model, {"lr": -1}, ValueError, "lr should be >= 0 and finite but is: -1"),
    "lr-nan": (Model, {"lr": float("nan")}, ValueError, "lr should be >= 0 and finite but is: nan"),
    "lr-type": (Model, {"lr": "0.1"}, TypeError, "lr should be a number but is: '0.1'"),
    "lr-bool": (Model, {"lr": True}, TypeError, "lr should be a number but is: True"),
    "lr-tensor": (Model, {"lr": torch.ones(2)}, ValueError, "lr should have one element but has: 2"),
    "weight-decay": (Model, {"weight_decay": -0.1}, ValueError, "weight_decay should be >= 0 and finite but is: -0.1"),
    "no-decay": (Model, {"no_decay": "atuo"}, ValueError, "no_decay should be 'auto', 'embeddings', None or a list"),
    "no-decay-item": (Model, {"no_decay": [3]}, TypeError, r"no_decay\[0\] should be a glob or a regular expression"),
    "no-decay-match": (Model, {"no_decay": ["nrom.*"]}, ValueError, r"no_decay\[0\] should fit a parameter but is: "
                       r"'nrom.\*'; did you mean 'norm.\*'"),
    "no-decay-taken-back": (Model, {"no_decay": ["auto", "!hed.*"]}, ValueError, r"no_decay\[1\] should fit .*'hed"),
    "layer-decay-0": (Model, {"lr": 0.1, "layer_decay": 0}, ValueError, r"layer_decay should be in \(0, 1\] but is: 0"),
    "layer-decay-2": (Model, {"lr": 0.1, "layer_decay": 2}, ValueError, r"layer_decay should be in \(0, 1\] but is: 2"),
    "layer-decay-no-lr": (Model, {"layer_decay": 0.5}, ValueError, "lr should be given with layer_decay but is: None"),
    "layers-alone": (Model, {"layers": from_input}, ValueError, "layer_decay should be given with layers"),
    "min-alone": (Model, {"min_lr_scale": 0.1}, ValueError, "layer_decay should be given with min_lr_scale"),
    "min": (Model, {**DECAY, "min_lr_scale": 2}, ValueError, r"min_lr_scale should be in \[0, 1\] but is: 2"),
    "preset": (Model, {"layer_preset": "biet"}, ValueError, "layer_preset should be one of beit, electra, .*'beit'"),
    "linear": (lambda: nn.Linear(2, 2), DECAY, ValueError, "needs several layers but all parameters are in one, by the "
               "model's protocol or structure: give layers="),
    "one-block": (lambda: Model(1), DECAY, ValueError, "all parameters are in one"),
    "one-layer": (Model, {**DECAY, "layers": lambda name: 3}, ValueError, "are in one, by what was given as layers"),
    "layers-value": (Model, {**DECAY, "layers": lambda name: None}, ValueError, r"layers\('token'\) should be an int"),
    "layers-type": (Model, {**DECAY, "layers": "blocks.*"}, TypeError, "layers should be a function, a list"),
    "layers-match": (Model, {**DECAY, "layers": ["blocsk.*"]}, ValueError, r"layers\[0\] should fit a parameter"),
    "layers-capture": (Model, {**DECAY, "layers": ["re:^(.)"]}, ValueError, "should capture numbers but captures"),
    "two-protocols": (TwoMatchers, DECAY, ValueError, "several parts of the model number layers of their own: a, b"),
    "freeze": (Model, {"freeze": ["heads.*"]}, ValueError, r"freeze should fit a parameter but is: 'heads.\*'; did "
               r"you mean 'head.\*'"),
    "rule-match": (Model, {"rules": [{"match": "haed.weight", "lr": 1}]}, ValueError, r"rules\[0\].match should fit "
                   "a parameter but is: 'haed.weight'; did you mean 'head.weight' or"),
    "rule-regex": (Model, {"rules": [{"match": "re:(", "lr": 1}]}, ValueError, r"rules\[0\]: match should be a regular "
                   r"expression after 're:' but is: 're:\('"),
    "rule-empty": (Model, {"rules": [{"match": "", "lr": 1}]}, ValueError, r"rules\[0\]: match should not be empty"),
    "rule-none": (Model, {"rules": [{"match": [], "lr": 1}]}, ValueError, r"rules\[0\]: match should not be empty"),
    "rule-no-match": (Model, {"rules": [{"lr": 1}]}, ValueError, r"rules\[0\] should have 'match' but has: lr"),
    "rule-type": (Model, {"rules": ["head"]}, TypeError, r"rules\[0\] should be a Rule or a mapping but is: 'head'"),
    "rules-type": (Model, {"rules": {"match": "*"}}, TypeError, "rules should be a list but is"),
    "rule-nothing": (Model, {"rules": [{"match": "*"}]}, ValueError, r"rules\[0\]: the rule for '\*' should set"),
    "rule-lr": (Model, {"rules": [{"match": "*", "lr": -1}]}, ValueError, r"rules\[0\]: lr should be >= 0 and finite"),
    "rule-lr-twice": (Model, {"rules": [{"match": "*", "lr": 1, "lr_mult": 2}]}, ValueError, "lr and lr_mult should"),
    "rule-wd-twice": (Model, {"rules": [{"match": "*", "weight_decay": 1, "wd_mult": 2}]}, ValueError, "wd_mult sh"),
    "rule-no-lr": (Model, {"rules": [{"match": "*", "lr_mult": 2}]}, ValueError, r"with rules\[0\].lr_mult but is"),
    "rule-no-wd": (Model, {"rules": [{"match": "*", "wd_mult": 2}]}, ValueError, r"with rules\[0\].wd_mult but is"),
    "rule-freeze": (Model, {"rules": [{"match": "*", "lr": 1, "freeze": True}]}, ValueError, "should set nothing else"),
    "rule-freeze-type": (Model, {"rules": [{"match": "*", "freeze": 1}]}, TypeError, "freeze should be True or False"),
    "rule-misspelled": (Model, {"rules": [{"match": "*", "lr_mul": 2}]}, ValueError, r"lr_mul \(value: 2\) is no "
                        "setting of a rule; did you mean 'lr_mult'"),
    "rule-lr-scale": (Model, {"rules": [{"match": "*", "lr_scale": 2}]}, ValueError, "no setting of a rule; did you "
                      "mean 'lr_mult'"),
    "rule-others": (Model, {"rules": [{"match": "*", "others": {"eps": 1}}]}, ValueError, r"did you mean '\*\*others'"),
    "rule-exempt": (Model, {"rules": [{"match": "*.bias", "weight_decay": 0.1}]}, ValueError, r"rules\[0\] sets weight "
                    "decay for parameters that no_decay exempts, such as 'blocks.0.fc1.bias': add '!blocks.0.fc1.b"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "kwargs", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(make: Any, kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    model = make() if callable(make) else make
    with pytest.raises(error, match=message):
        param_groups(model, **kwargs)


def test_options_that_resemble_settings_are_options() -> None:
    (group, _) = param_groups(Model(), rules=[Rule("*", lr_decay=0.1, momentum=0.9, beta1=0.9, foreach=False, decay=1)])
    assert (group["lr_decay"], group["momentum"]) == (0.1, 0.9)


# any model


def sequential(modules: list[nn.Module]) -> nn.Module:
    return nn.Sequential(*modules)


def modules() -> st.SearchStrategy[nn.Module]:
    leaves = st.sampled_from([
        lambda: nn.Linear(2, 2), lambda: nn.LayerNorm(2), lambda: nn.Embedding(2, 2), lambda: nn.Conv1d(2, 2, 1),
        nn.ReLU, Block, lambda: Wrapper(Block(), "_orig_mod"), MyRMSNorm,
    ]).map(lambda make: make())  # fmt: skip
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, min_size=1, max_size=4).flatmap(
            lambda drawn: st.sampled_from([sequential, nn.ModuleList]).map(lambda container: container(drawn))
        ),
        max_leaves=12,
    )


def unwrapped(name: str) -> str:
    return name.replace("_orig_mod.", "")


def unless(refusal: str, make: Callable[[], Any]) -> Any:
    """What is made, or None where it is refused with these words."""
    try:
        return make()
    except ValueError as error:
        if not re.search(refusal, str(error)):
            raise
        return None


@given(data=st.data(), model=modules())
@settings(max_examples=200, deadline=None)
def test_every_trainable_parameter_is_in_one_group(data: st.DataObject, model: nn.Module) -> None:
    params = list(model.parameters())
    names = [unwrapped(name) for name, _ in model.named_parameters()]
    for param in params:
        param.requires_grad_(data.draw(st.booleans()))
    trained = [param.requires_grad for param in params]
    some = st.lists(st.sampled_from(names), max_size=2) if names else st.just([])
    rules = [Rule(name, lr_mult=2.0, betas=[0.5]) for name in data.draw(some)]
    freeze = data.draw(some)
    kwargs = {
        "weight_decay": data.draw(st.sampled_from([None, 0.0, 0.1])),
        "no_decay": data.draw(st.sampled_from(["auto", None, ["auto", "embeddings"]])),
        "layer_decay": data.draw(st.sampled_from([None, 0.5, 1.0])),
        "layer_preset": data.draw(st.sampled_from(["beit", "timm", "electra"])),
        "include_frozen": data.draw(st.booleans()),
    }
    groups = unless(
        "needs several layers|should have parameters to train",
        lambda: param_groups(model, lr=0.1, rules=rules, freeze=freeze, **kwargs),
    )
    if groups is None:
        return
    assert [param.requires_grad for param in params] == trained
    frozen = {id(param) for name, param in model.named_parameters() if unwrapped(name) in freeze}
    expected = [id(p) for p in params if (p.requires_grad or kwargs["include_frozen"]) and id(p) not in frozen]
    grouped = [id(param) for group in groups for param in group["params"]]
    assert sorted(grouped) == sorted(expected)
    assert len(set(grouped)) == len(grouped)
    keyed = [{k: v for k, v in group.items() if k not in ("params", "param_names")} for group in groups]
    assert all(one != other for i, one in enumerate(keyed) for other in keyed[:i])
    assert all(group["params"] and group["lr"] == pytest.approx(0.1 * group["lr_scale"]) for group in groups)
    torch.optim.AdamW([{k: v for k, v in group.items() if k != "betas"} for group in groups])


@given(model=modules(), decay=st.floats(0.1, 1.0), least=st.sampled_from([0.0, 0.2]))
@settings(deadline=None)
def test_scales_grow_towards_the_head(model: nn.Module, decay: float, least: float) -> None:
    ids = unless("needs several layers", lambda: layer_ids(model))
    if ids is None:
        return
    scales = by_name(layer_decay_groups(model, 1.0, decay, min_lr_scale=least), "lr_scale")
    assert ids.keys() == scales.keys()
    ordered = [scales[name] for name in sorted(ids, key=ids.__getitem__)]
    assert ordered == sorted(ordered)
    assert ordered[-1] == 1.0
    assert all(least <= scale <= 1.0 for scale in ordered)
    # the layers of the model come in the order of their definition
    assert min(ids.values()) == 0
