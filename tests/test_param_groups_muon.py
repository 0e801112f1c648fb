"""Whose each parameter is where Muon trains the hidden matrices and AdamW the rest."""

from __future__ import annotations

import copy
import itertools
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.nn.utils import parametrizations

import optimx
from optimx.param_groups import Rule, by_optimizer, describe, param_groups
from tests import models
from tests.models import mixtral, transformers_model

ROOT = Path(__file__).parents[1]

BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}


def bert_for_masks() -> nn.Module:
    return transformers_model("BertForMaskedLM", "BertConfig", **BERT)


def bert_of_one_layer() -> nn.Module:
    return transformers_model("BertForSequenceClassification", "BertConfig", **{**BERT, "num_hidden_layers": 1})


def mamba() -> nn.Module:
    return transformers_model("MambaForCausalLM", "MambaConfig", vocab_size=50, hidden_size=32, num_hidden_layers=2)


def clip() -> nn.Module:
    images = {**BERT, "image_size": 16, "patch_size": 8}
    return transformers_model("CLIPModel", "CLIPConfig", text_config=BERT, vision_config=images, projection_dim=8)


def xlnet() -> nn.Module:
    return transformers_model(
        "XLNetLMHeadModel", "XLNetConfig", vocab_size=50, d_model=16, n_layer=2, n_head=2, d_inner=32
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    **models.TIMM, **models.TRANSFORMERS, "mixtral": mixtral, "bert-masks": bert_for_masks,
    "bert-1": bert_of_one_layer, "mamba": mamba, "clip": clip, "xlnet": xlnet,
    "torchvision-vit": models.torchvision_vit, "torchvision-resnet": models.torchvision_resnet,
    "torchvision-swin": models.torchvision_swin,
}  # fmt: skip

MUON = {"hidden matrix", "convolution", "experts' matrices", "fused projections"}
TIED = "embedding tied to the output layer"

#: Of each model, what parameters are by patterns for their whole names. A parameter is what the first that fits says.
EXPECTED: dict[str, dict[str, str]] = {
    "vit": {
        "patch_embed.proj.weight": "first layer", "pos_embed": "positions", "cls_token": "learned tokens",
        "head.weight": "output layer", ".*norm.*": "norm", ".*bias": "bias", ".*qkv.weight": "fused projections",
        r"blocks.*(proj|fc\d).weight": "hidden matrix",
    },
    "swin": {
        "patch_embed.proj.weight": "first layer", ".*relative_position_bias_table": "positions",
        "head.fc.weight": "output layer", ".*norm.*": "norm", ".*bias": "bias", ".*qkv.weight": "fused projections",
        r"layers.*(proj|fc\d|reduction).weight": "hidden matrix",
    },
    "convnext": {
        r"stem.0.weight": "first layer", "head.fc.weight": "output layer",
        r".*norm.*|stem.1.*|.*downsample.0.*": "norm", ".*bias": "bias", ".*gamma": "vector",
        ".*conv_dw.weight": "depthwise convolution", ".*downsample.1.weight": "convolution",
        r"stages.*fc\d.weight": "hidden matrix",
    },
    "resnet": {
        "conv1.weight": "first layer", "fc.weight": "output layer", r".*bn\d.*|.*downsample.1.*": "norm",
        "fc.bias": "bias", r"layer\d.*(conv\d|downsample.0).weight": "convolution",
    },
    "bert": {
        r".*LayerNorm.*": "norm", ".*bias": "bias", r".*\w+_embeddings.weight": "embedding",
        "classifier.weight": "output layer", "bert.(encoder|pooler).*weight": "hidden matrix",
    },
    "bert-masks": {
        "bert.embeddings.word_embeddings.weight": TIED, r".*LayerNorm.*": "norm", ".*bias": "bias",
        r".*\w+_embeddings.weight": "embedding",
        "bert.encoder.*weight|cls.predictions.transform.dense.weight": "hidden matrix",
    },
    "gpt2": {
        "transformer.wte.weight": TIED, "transformer.wpe.weight": "embedding", ".*ln_.*": "norm", ".*bias": "bias",
        ".*c_attn.weight": "fused projections", r"transformer.h.*c_(proj|fc).weight": "hidden matrix",
    },
    "llama": {
        "model.embed_tokens.weight": "embedding", "lm_head.weight": "output layer", ".*norm.*": "norm",
        r"model.layers.*_proj.weight": "hidden matrix",
    },
    "t5": {
        "shared.weight": TIED, ".*relative_attention_bias.weight": "embedding", ".*layer_norm.*": "norm",
        r"(en|de)coder.*\.([qkvo]|wi|wo).weight": "hidden matrix",
    },
    "mixtral": {
        "model.embed_tokens.weight": "embedding", "lm_head.weight": "output layer", ".*norm.*": "norm",
        ".*mlp.gate.weight": "router", ".*experts.(gate_up|down)_proj": "experts' matrices",
        r"model.layers.*[qkvo]_proj.weight": "hidden matrix",
    },
    "mamba": {
        "backbone.embeddings.weight": TIED, ".*norm.*": "norm", ".*bias": "bias", r".*(A_log|\.D)": "state space",
        ".*conv1d.weight": "depthwise convolution", ".*in_proj.weight": "fused projections",
        ".*(x|dt|out)_proj.weight": "hidden matrix",
    },
    "clip": {
        "logit_scale": "scalar", ".*class_embedding": "learned tokens", ".*patch_embedding.weight": "first layer",
        ".*(token|position)_embedding.weight": "embedding", "(visual|text)_projection.weight": "output layer",
        ".*norm.*": "norm", ".*bias": "bias", ".*encoder.layers.*weight": "hidden matrix",
    },
    "xlnet": {
        "transformer.word_embedding.weight": TIED, ".*(mask_emb|seg_embed)": "learned tokens", ".*layer_norm.*": "norm",
        ".*bias": "bias", r".*rel_attn.[qkvor]": "3-D of no layer that is known",
        r".*ff.layer_\d.weight": "hidden matrix",
    },
    "torchvision-vit": {
        "conv_proj.weight": "first layer", "encoder.pos_embedding": "positions", "class_token": "learned tokens",
        "heads.head.weight": "output layer", ".*ln.*": "norm", ".*bias": "bias",
        ".*in_proj_weight": "fused projections", r"encoder.layers.*(out_proj|mlp.\d).weight": "hidden matrix",
    },
    "torchvision-resnet": {
        "conv1.weight": "first layer", "fc.weight": "output layer", r".*bn\d.*|.*downsample.1.*": "norm",
        "fc.bias": "bias", r"layer\d.*(conv\d|downsample.0).weight": "convolution",
    },
    "torchvision-swin": {
        "features.0.0.weight": "first layer", ".*relative_position_bias_table": "positions",
        "head.weight": "output layer", r".*norm.*|features.0.2.*": "norm", ".*bias": "bias",
        ".*qkv.weight": "fused projections", r"features.*(proj|mlp.\d|reduction).weight": "hidden matrix",
    },
}  # fmt: skip
EXPECTED["bert-1"] = EXPECTED["bert"]


def reasons(model: nn.Module, groups: list[dict[str, Any]] | None = None, **kwargs: Any) -> dict[str, tuple[str, str]]:
    """Whose each parameter is, and why."""
    groups = param_groups(model, muon="auto", **kwargs) if groups is None else groups
    described = describe(model, groups).groups
    pairs = [
        (name, (group.settings["optimizer"], reason))
        for group in described
        for name, reason in zip(group.names, group.reasons, strict=True)
    ]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def muons(model: nn.Module, **kwargs: Any) -> set[str]:
    """Names of the parameters that Muon trains."""
    return {name for name, (optimizer, _) in reasons(model, **kwargs).items() if optimizer == "muon"}


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    model = MODELS[name]()
    expected = {}
    for parameter, _ in model.named_parameters():
        reason = next(said for pattern, said in EXPECTED[name].items() if re.fullmatch(pattern, parameter))
        expected[parameter] = ("muon" if reason in MUON else "adamw", reason)
    assert reasons(model) == expected
    assert {reason for _, reason in expected.values()} == set(EXPECTED[name].values())


# parts of models


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.output = nn.Linear(4, 4)


class Block(nn.Module):
    """With names that mean an output layer elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.attention = Attention()
        self.fc = nn.Linear(4, 4)


class Model(nn.Module):
    """An embedding, blocks, and what comes after them."""

    def __init__(self, depth: int = 2, **after: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.norm = nn.LayerNorm(4)
        for name, module in after.items():
            self.add_module(name, module)


def blocks(depth: int = 2) -> set[str]:
    return {f"blocks.{i}.{part}.weight" for i in range(depth) for part in ("attention.qkv", "attention.output", "fc")}


def linears(*sizes: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(i, o) for i, o in itertools.pairwise(sizes)))


HEADS: dict[str, tuple[dict[str, nn.Module], set[str]]] = {
    "named": ({"head": nn.Linear(4, 8)}, set()),
    "unnamed": ({"to_words": nn.Linear(4, 8)}, set()),
    "unnamed-after-another": ({"neck": nn.Linear(4, 4), "to_words": nn.Linear(4, 8)}, {"neck.weight"}),
    "after-another": ({"pooler": nn.Linear(4, 4), "classifier": nn.Linear(4, 8)}, {"pooler.weight"}),
    "before-another": ({"lm_head": nn.Linear(4, 8), "probe": nn.Linear(4, 4)}, {"probe.weight"}),
    "of-layers": ({"head": linears(4, 4, 4, 8)}, {"head.0.weight", "head.1.weight"}),
    "several": ({"heads": nn.ModuleDict({"a": nn.Linear(4, 8), "b": linears(4, 4, 3)})}, {"heads.b.0.weight"}),
    "beside": ({"policy_head": nn.Linear(4, 8), "value_head": nn.Linear(4, 2)}, set()),
    "convolution": ({"classifier": nn.Conv1d(4, 8, 1)}, set()),
    "none": ({}, set()),
}


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(("after", "hidden"), HEADS.values(), ids=HEADS)
def test_heads(after: dict[str, nn.Module], hidden: set[str], depth: int) -> None:
    """A stack of one block shows no repeated layers, so the last weight of the model is then taken for its head."""
    expected = blocks(depth) | hidden
    if depth == 1 and not after:
        expected -= {"blocks.0.fc.weight"}
    assert muons(Model(depth, **after)) == expected


def test_heads_defined_before_the_layers() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(8, 4), "lm_head": nn.Linear(4, 8), "blocks": Model().blocks})
    assert muons(model) == blocks()


def test_the_model_tells_its_head() -> None:
    """As transformers' models do, whatever it is called and wherever it is."""
    model = Model(to_words=nn.Linear(4, 8), probe=nn.Linear(4, 4))
    assert muons(model) == blocks() | {"to_words.weight"}
    model.get_output_embeddings = lambda: model.to_words
    assert muons(model) == blocks() | {"probe.weight"}
    assert muons(nn.ModuleDict({"model": model})) == {f"model.{name}" for name in blocks() | {"probe.weight"}}
    model.get_output_embeddings = lambda: None
    assert muons(model) == blocks() | {"to_words.weight"}


def test_ties() -> None:
    """Whether the model says so or not, and whichever of the two was there first."""
    model = Model(to_words=nn.Linear(4, 8, bias=False))
    model.to_words.weight = model.embed.weight
    assert muons(model) == blocks()
    assert reasons(model)["embed.weight"] == ("adamw", TIED)
    first = nn.ModuleDict({"head": nn.Linear(4, 8, bias=False), **dict(Model().named_children())})
    first["embed"].weight = first["head"].weight
    assert muons(first) == blocks()
    assert reasons(first)["head.weight"] == ("adamw", TIED)


def test_tied_layers_are_one() -> None:
    model = Model(head=nn.Linear(4, 8))
    model.blocks[1] = model.blocks[0]
    assert muons(model) == blocks(1)


def test_stacks_of_experts_are_no_kernels() -> None:
    """Each expert's matrix is orthogonalized by itself, unless a rule says otherwise."""
    model = nn.ModuleDict({"first": linears(4, 4, 4, 4), "experts": Experts(), "head": nn.Linear(4, 3)})
    groups = param_groups(model, muon="auto", lr=0.1)
    stacked = {name for group in groups if group.get("stacked") for name in group["param_names"]}
    assert stacked == {"experts.w1"}
    optimizer = optimx.Muon(by_optimizer(groups)["muon"])
    group = next(group for group in optimizer.param_groups if group.get("stacked"))
    (block,) = optimizer.rule.variant_of(optimizer.rule.group_variant(group), group["params"][0]).blocks
    assert block[1:] == (3, 4, 4)
    ruled = param_groups(model, muon="auto", lr=0.1, rules=[{"match": "experts.w1", "stacked": False}])
    assert not any(group.get("stacked") for group in ruled)


def test_queries_keys_and_values_are_three_matrices() -> None:
    """Where the module says that they are of one size; unless a rule says otherwise."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2)
    model = nn.ModuleDict({"embed": nn.Embedding(5, 8), "encoder": encoder, "head": nn.Linear(8, 5)})
    groups = param_groups(model, muon="auto", lr=0.1)
    split = {name for group in groups if "split" in group for name in group["param_names"]}
    assert split == {f"encoder.layers.{i}.self_attn.in_proj_weight" for i in range(2)}
    optimizer = optimx.Muon(by_optimizer(groups)["muon"])
    group = next(group for group in optimizer.param_groups if "split" in group)
    assert group["split"] == 3
    rules = [{"match": "*.in_proj_weight", "split": None}]
    ruled = param_groups(model, muon="auto", lr=0.1, rules=rules)
    assert not any(group.get("split") for group in ruled)


def test_stacks_of_single_layers() -> None:
    """Their first and last are the model's."""
    assert muons(linears(8, 6, 6, 4)) == {"1.weight"}
    convolutions = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    model = nn.Module()
    model.features, model.classifier = convolutions, linears(4, 4, 4, 2)
    hidden = {"features.2.weight", "features.3.weight", "classifier.0.weight", "classifier.1.weight"}
    assert muons(model) == hidden
    # what is called a classifier is one, also where another layer is the last
    model.probe = nn.Linear(4, 4)
    assert muons(model) == hidden | {"probe.weight"}


def test_an_encoder_alone_has_no_ends() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2)
    assert muons(encoder) == {name for name, param in encoder.named_parameters() if param.ndim == 2}
    assert reasons(encoder)["layers.0.self_attn.in_proj_weight"] == ("muon", "fused projections")
    # also where the first weight is of a linear layer
    assert muons(nn.Sequential(Block(), Block())) == {name.removeprefix("blocks.") for name in blocks()}


class Experts(nn.Module):
    """Of one matrix in three dimensions, with biases of two."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = Parameter(torch.zeros(3, 4, 4))
        self.w1_bias = Parameter(torch.zeros(3, 4))


class GatedLinearUnit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 8)
        self.up = nn.Linear(4, 8)


class TopKGate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wg = nn.Linear(4, 3)


class Bare(nn.Module):
    """Parameters that no layer owns."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, Parameter(torch.zeros(shape)))


PARTS: dict[str, tuple[nn.Module, dict[str, str]]] = {
    "router": (
        nn.ModuleDict({"router": nn.Linear(4, 3), "experts": Experts()}),
        {"router.weight": "router", "router.bias": "bias", "experts.w1": "experts' matrices",
         "experts.w1_bias": "bias"},
    ),
    "router-of-layers": (
        nn.ModuleDict({"router": linears(4, 4, 3)}), {f"router.{i}.weight": "router" for i in range(2)},
    ),
    "gate": (
        nn.ModuleDict({"gate": nn.Linear(4, 3), "experts": nn.ModuleList(GatedLinearUnit() for _ in range(2))}),
        {"gate.weight": "router", "experts.0.gate.weight": "hidden matrix", "experts.1.up.weight": "hidden matrix"},
    ),
    "gate-by-class": (nn.ModuleDict({"choose": TopKGate()}), {"choose.wg.weight": "router"}),
    "gate-of-a-linear-unit": (GatedLinearUnit(), {"gate.weight": "hidden matrix", "up.weight": "hidden matrix"}),
    "depthwise": (
        nn.ModuleDict({"dw": nn.Conv2d(4, 8, 3, groups=4), "up": nn.ConvTranspose1d(4, 4, 3, groups=4)}),
        {"dw.weight": "depthwise convolution", "up.weight": "depthwise convolution"},
    ),
    "grouped": (
        nn.ModuleDict({"conv": nn.Conv2d(4, 8, 3, groups=2), "one": nn.Conv2d(4, 8, 1)}),
        {"conv.weight": "convolution", "one.weight": "convolution"},
    ),
    "rows": (
        nn.ModuleDict({"to_one": nn.Linear(4, 1), "one": nn.Linear(1, 1), "scale": Bare(gamma=(4, 1, 1))}),
        {"to_one.weight": "vector", "one.weight": "scalar", "scale.gamma": "vector"},
    ),
    "tables": (
        Bare(pos_embed=(1, 4, 4), relPosTable=(4, 4), rel_pos_h=(4, 4), cls_token=(1, 1, 4), queryTokens2=(2, 4),
             latents=(2, 4), prompt=(2, 4), codebook=(2, 4)),
        {"pos_embed": "positions", "relPosTable": "positions", "rel_pos_h": "positions"}
        | dict.fromkeys(["cls_token", "queryTokens2", "latents", "prompt", "codebook"], "learned tokens"),
    ),
    "no-tables": (
        Bare(pos_proj=(4, 4), embed_weight=(4, 4), kernel=(4, 4), purpose=(4, 4)),
        dict.fromkeys(["pos_proj", "embed_weight", "kernel", "purpose"], "hidden matrix"),
    ),
    "three-dimensions": (
        Bare(heads=(2, 4, 4), w=(4, 4)), {"heads": "3-D of no layer that is known", "w": "hidden matrix"},
    ),
    "bilinear": (nn.Bilinear(2, 3, 4), {"weight": "3-D of no layer that is known"}),
    "lists": (
        nn.ModuleDict({"experts": nn.ParameterList([torch.zeros(4, 4), torch.zeros(4)])}),
        {"experts.0": "hidden matrix", "experts.1": "vector"},
    ),
    "norms": (
        nn.ModuleDict({"norm": nn.LayerNorm((2, 2)), "group": nn.GroupNorm(2, 4)}),
        dict.fromkeys(["norm.weight", "norm.bias", "group.weight", "group.bias"], "norm"),
    ),
    "recurrent": (
        nn.LSTM(4, 4), {"weight_ih_l0": "hidden matrix", "weight_hh_l0": "hidden matrix", "bias_hh_l0": "bias"},
    ),
    "parametrized": (
        nn.ModuleDict({
            "embed": parametrizations.weight_norm(nn.Embedding(8, 4)),
            "hidden": parametrizations.orthogonal(nn.Linear(4, 4)),
            "normed": parametrizations.weight_norm(nn.Linear(4, 4)),
        }),
        {"embed.parametrizations.weight.original1": "embedding",
         "hidden.parametrizations.weight.original": "hidden matrix",
         "normed.parametrizations.weight.original0": "vector",
         "normed.parametrizations.weight.original1": "hidden matrix"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("part", "expected"), PARTS.values(), ids=PARTS)
def test_parts(part: nn.Module, expected: dict[str, str]) -> None:
    """Within a model, so that they are not its ends."""
    found = reasons(nn.ModuleDict({"embed": nn.Embedding(8, 4), "part": part, "head": nn.Linear(4, 8)}))
    assert {name: found[f"part.{name}"][1] for name in expected} == expected
    assert all((optimizer == "muon") == (reason in MUON) for optimizer, reason in found.values())


# what can be said


def test_patterns_choose_and_take_back() -> None:
    model = Model(head=nn.Linear(4, 8))
    assert muons(model) == blocks()
    chosen = param_groups(model, muon=["auto", "!blocks.1.*", "head.weight"])
    found = reasons(model, chosen)
    theirs = {name for name, (optimizer, _) in found.items() if optimizer == "muon"}
    assert theirs == {name for name in blocks() if "blocks.0" in name} | {"head.weight"}
    assert found["head.weight"] == ("muon", "by a rule or a pattern")
    assert found["blocks.1.fc.weight"] == ("adamw", "by a rule or a pattern")
    assert found["blocks.0.fc.weight"] == ("muon", "hidden matrix")
    assert {group["optimizer"] for group in param_groups(model, muon=[])} == {"adamw"}


def test_rules_override() -> None:
    model = Model(head=nn.Linear(4, 8))
    rules = [
        {"match": "blocks.*.weight", "lr_mult": 0.5},
        {"match": "*.fc.weight", "optimizer": "adamw"},
        Rule("blocks.1.fc.weight", optimizer="muon", momentum=0.9),
        {"match": "head.weight", "optimizer": "muon", "lr": 1.0},
    ]
    groups = param_groups(model, lr=0.02, adamw_lr=3e-4, muon="auto", rules=rules)
    said = {name: (group["optimizer"], group["lr"]) for group in groups for name in group["param_names"]}
    assert said["blocks.0.fc.weight"] == ("adamw", 3e-4 / 2)
    assert said["blocks.1.fc.weight"] == ("muon", 0.01)
    assert said["blocks.0.attention.qkv.weight"] == ("muon", 0.01)
    assert said["blocks.0.norm.weight"] == ("adamw", 3e-4 / 2)
    assert said["head.weight"] == ("muon", 1.0)
    assert said["embed.weight"] == ("adamw", 3e-4)
    (group,) = (group for group in groups if "momentum" in group)
    assert group["param_names"] == ["blocks.1.fc.weight"]


def test_learning_rates_and_weight_decays_of_their_own() -> None:
    """Each is scaled from its own, and who has no weight decay has none with either."""
    model = Model(head=nn.Linear(4, 8))
    groups = param_groups(
        model, lr=0.02, weight_decay=0.01, adamw_lr=3e-4, adamw_weight_decay=0.1, muon="auto", layer_decay=0.5,
        no_decay=["auto", "blocks.0.fc.*"], rules=[{"match": "head.*", "wd_mult": 2.0}],
    )  # fmt: skip
    said = {
        name: (group["optimizer"], group["lr"], group["lr_scale"], group["weight_decay"])
        for group in groups
        for name in group["param_names"]
    }
    assert said["embed.weight"] == ("adamw", 3e-4 / 8, 1 / 8, 0.1)
    assert said["blocks.0.attention.qkv.weight"] == ("muon", 0.02 / 4, 1 / 4, 0.01)
    assert said["blocks.0.fc.weight"] == ("muon", 0.02 / 4, 1 / 4, 0.0)
    assert said["blocks.1.norm.bias"] == ("adamw", 3e-4 / 2, 1 / 2, 0.0)
    assert said["head.weight"] == ("adamw", 3e-4, 1.0, 0.2)
    assert said["head.bias"] == ("adamw", 3e-4, 1.0, 0.0)


def test_what_is_not_given_is_the_optimizers_own() -> None:
    """Muon's learning rate would be far too large for AdamW."""
    for group in param_groups(Model(), lr=0.02, weight_decay=0.1, muon="auto", no_decay=None):
        ours = group["optimizer"] == "muon"
        assert (group.get("lr"), group.get("weight_decay")) == ((0.02, 0.1) if ours else (None, None))


def test_frozen_parameters() -> None:
    """They count where the order of layers does, and are in no group."""
    model = Model(head=nn.Linear(4, 8))
    model.head.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    assert muons(model) == {name for name in blocks() if "blocks.1" in name}
    assert muons(model, include_frozen=True) == blocks()
    assert muons(model, freeze="*.fc.*") == {f"blocks.1.attention.{part}.weight" for part in ("qkv", "output")}


def test_groups_without_muon_are_as_before() -> None:
    for group in param_groups(Model(), lr=0.1):
        assert group.keys() == {"params", "param_names", "lr", "lr_scale"} | {"weight_decay"} & group.keys()


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "muon": ({"muon": "all"}, "muon should be 'auto', None or a list but is: 'all'"),
    "muon-type": ({"muon": 3}, "muon should be 'auto', None or a list but is: 3"),
    "muon-match": ({"muon": ["blocsk.*"]}, r"muon\[0\] should fit a parameter but is: 'blocsk"),
    "muon-taken-back": ({"muon": ["auto", "!haed.*"]}, r"muon\[1\] should fit a parameter but is: 'haed"),
    "muon-vectors": ({"muon": ["auto", "head.*"]}, r"muon\[1\] should give Muon matrices only but gives it: "
                     r"'head.bias' of shape \(8,\)"),
    "adamw-lr-alone": ({"adamw_lr": 1e-3}, "muon should be given with adamw_lr but is: None"),
    "adamw-decay-alone": ({"adamw_weight_decay": 0}, "muon should be given with adamw_weight_decay but is: None"),
    "adamw-lr": ({"muon": "auto", "adamw_lr": -1}, "adamw_lr should be >= 0 and finite but is: -1"),
    "adamw-decay": ({"muon": "auto", "adamw_weight_decay": -1}, "adamw_weight_decay should be >= 0 and finite"),
    "layer-decay": ({"muon": "auto", "lr": 1, "layer_decay": 0.5}, "adamw_lr should be given with layer_decay"),
    "rule": ({"muon": "auto", "rules": [{"match": "*", "optimizer": "adam"}]}, r"rules\[0\]: optimizer should be one "
             "of adamw, muon but is: 'adam'; did you mean 'adamw'"),
    "rule-alone": ({"rules": [{"match": "*", "optimizer": "adamw"}]}, r"muon should be given with rules\[0\].opt"),
    "rule-vectors": ({"muon": "auto", "rules": [{"match": "norm.*", "optimizer": "muon"}]}, r"rules\[0\] should give "
                     r"Muon matrices only but gives it: 'norm.bias' of shape \(4,\)"),
    "rule-freeze": ({"muon": "auto", "rules": [{"match": "*", "optimizer": "muon", "freeze": True}]}, "nothing else"),
    "rule-lr": ({"muon": "auto", "lr": 1, "rules": [{"match": "*", "lr_mult": 2}]}, r"adamw_lr should be given with "
                r"rules\[0\].lr_mult"),
    "rule-decay": ({"muon": "auto", "adamw_weight_decay": 1, "rules": [{"match": "*fc.weight", "wd_mult": 2}]},
                   r"^weight_decay should be given with rules\[0\].wd_mult"),
}  # fmt: skip


@pytest.mark.parametrize(("kwargs", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        param_groups(Model(head=nn.Linear(4, 8)), **kwargs)


def test_groups_that_do_not_say_whose_they_are() -> None:
    with pytest.raises(ValueError, match=r"groups\[0\] should have 'optimizer' but has: params, param_names, lr_scale"):
        by_optimizer(param_groups(Model()))


def test_description() -> None:
    model = Model(1, head=nn.Linear(4, 8))
    rules = [{"match": "*.fc.weight", "optimizer": "adamw"}, {"match": "head.*", "eps": 1e-6}]
    groups = param_groups(model, lr=0.02, adamw_lr=3e-4, weight_decay=0.1, muon="auto", rules=rules)
    table = describe(model, groups).table
    assert table[0] == (
        "group", "tensors", "elements", "lr", "lr_scale", "weight_decay", "optimizer", "why", "others", "names"
    )  # fmt: skip
    assert [(row[1], row[3], *row[6:9]) for row in table[1:]] == [
        ("2", "0.0003", "adamw", "embedding (1), by a rule or a pattern (1)", "-"),
        ("7", "0.0003", "adamw", "norm (4), bias (3)", "-"),
        ("2", "0.02", "muon", "fused projections (1), hidden matrix (1)", "-"),
        ("1", "0.0003", "adamw", "output layer (1)", "eps=1e-06"),
        ("1", "0.0003", "adamw", "bias (1)", "eps=1e-06"),
    ]
    # groups of one optimizer have no such columns
    assert "why" not in describe(model, param_groups(model)).table[0]


# training


def test_both_train_what_is_theirs() -> None:
    """As if their parameters had been told apart by hand."""
    model = Model(head=nn.Linear(4, 8, bias=False))
    by_hand = copy.deepcopy(model)
    members = by_optimizer(param_groups(model, lr=0.02, weight_decay=0.1, adamw_lr=3e-4, muon="auto", no_decay=None))
    pairs = [(model, torch.optim.Muon(members["muon"]), torch.optim.AdamW(members["adamw"]))]
    named = dict(by_hand.named_parameters())
    theirs = [named[name] for name in sorted(blocks())]
    others = [param for name, param in named.items() if name not in blocks()]
    pairs += [(by_hand, torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1), torch.optim.AdamW(others, lr=3e-4))]
    for each, *optimizers in pairs:
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            for param in each.parameters():
                param.grad = torch.randn(param.shape, generator=generator)
            for optimizer in optimizers:
                optimizer.step()
    for name, param in model.named_parameters():
        assert torch.equal(param, named[name]), name


# wrapped


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "torchvision-vit", "swin"])
def test_compiled_and_wrapped_models_are_the_same(name: str) -> None:
    model = MODELS[name]()
    plain = reasons(model)
    for wrapped in (torch.compile(model), nn.DataParallel(model), nn.DataParallel(torch.compile(model))):
        assert reasons(wrapped) == plain


DISTRIBUTED = """
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from tests.test_param_groups_muon import Model, reasons
dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())

def make():
    model = Model(neck=nn.Conv1d(4, 4, 3), dw=nn.Conv1d(4, 4, 3, groups=4), head=nn.Linear(4, 8, bias=False))
    model.get_output_embeddings = lambda: model.head
    return model

plain = reasons(make())
assert plain["head.weight"] == ("adamw", "output layer")
assert plain["neck.weight"] == ("muon", "convolution")
model = make()
model.blocks[1] = FullyShardedDataParallel(model.blocks[1], device_id=torch.device("cpu"), use_orig_params=True)
model.head = FullyShardedDataParallel(model.head, device_id=torch.device("cpu"), use_orig_params=True)
model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
assert all(p.ndim == 1 for p in model.parameters())
assert reasons(model) == plain
model = make()
for layer in [*model.blocks, model]:
    fully_shard(layer, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
assert all(isinstance(p, dist.tensor.DTensor) for p in model.parameters())
assert reasons(model) == plain
assert reasons(nn.parallel.DistributedDataParallel(make())) == plain
"""


def test_distributed_models_are_the_same() -> None:
    run = subprocess.run([sys.executable, "-c", DISTRIBUTED], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
