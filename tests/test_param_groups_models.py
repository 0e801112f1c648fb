"""Parameter groups of timm's and transformers' models, beside timm's own groups and the papers' formulas."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import optimx
from optimx.param_groups import describe, layer_decay_groups, layer_ids, no_decay_groups, param_groups
from tests.models import TIMM, TRANSFORMERS, bert, gpt2, t5, timm_model, vit

pytest.importorskip("timm")
pytest.importorskip("transformers")

each_of_timm = pytest.mark.parametrize("build", TIMM.values(), ids=TIMM)
each_model = pytest.mark.parametrize("build", [*TIMM.values(), *TRANSFORMERS.values()], ids=[*TIMM, *TRANSFORMERS])


def cait() -> nn.Module:
    """Its group_matcher is a function."""
    return timm_model("Cait", img_size=16, patch_size=8, embed_dim=16, depth=3, num_heads=2)


def beit() -> nn.Module:
    """With the position bias that all blocks share."""
    return vit(cls="Beit", use_shared_rel_pos_bias=True)


def settings(model: nn.Module, groups: list[dict[str, Any]], *keys: str) -> dict[str, tuple[Any, ...]]:
    """What each parameter's group says, by the name in the model."""
    names = {param: name for name, param in model.named_parameters()}
    said = [(names[param], tuple(group.get(key) for key in keys)) for group in groups for param in group["params"]]
    assert len(said) == len({name for name, _ in said})
    return dict(said)


# timm's own


@pytest.mark.parametrize("min_scale", [0.0, 0.3])
@pytest.mark.parametrize("build", [*TIMM.values(), cait], ids=[*TIMM, "cait"])
def test_layer_decay_is_timms(build: Callable[[], nn.Module], min_scale: float) -> None:
    from timm.optim import param_groups_layer_decay

    model = build()
    theirs = param_groups_layer_decay(
        model, 0.05, model.no_weight_decay() if hasattr(model, "no_weight_decay") else (), layer_decay=0.7,
        min_scale=min_scale,
    )  # fmt: skip
    ours = layer_decay_groups(model, 1e-3, 0.7, weight_decay=0.05, layer_preset="timm", min_lr_scale=min_scale)
    keys = ("lr_scale", "weight_decay")
    assert settings(model, ours, *keys) == settings(model, theirs, *keys)
    assert len(ours) == len({tuple(group[key] for key in keys) for group in theirs})
    assert all(group["lr"] == 1e-3 * group["lr_scale"] for group in ours)


@pytest.mark.parametrize("build", [*TIMM.values(), *TRANSFORMERS.values()], ids=[*TIMM, *TRANSFORMERS])
def test_weight_decay_is_timms(build: Callable[[], nn.Module]) -> None:
    from timm.optim import param_groups_weight_decay

    model = build()
    theirs = param_groups_weight_decay(model, 0.05, no_weight_decay_list=getattr(model, "no_weight_decay", tuple)())
    ours = no_decay_groups(model, 0.05)
    assert settings(model, ours, "weight_decay") == settings(model, theirs, "weight_decay")
    assert len(ours) == 2


@each_of_timm
def test_structure_shows_the_layers_that_timm_names(build: Callable[[], nn.Module]) -> None:
    model = build()
    named = layer_ids(model, layer_preset="timm")
    model.group_matcher = None
    assert layer_ids(model, layer_preset="timm") == named


def test_timms_matcher_as_layers() -> None:
    model = vit()
    named = layer_ids(model)
    matcher = model.group_matcher()
    model.group_matcher = None
    assert layer_ids(model, matcher) == named


# BEiT's and ELECTRA's formulas


def beit_layer(name: str, layers: int) -> int:
    """``get_num_layer_for_vit`` of BEiT's optim_factory, in our words."""
    if name in ("cls_token", "mask_token", "pos_embed") or name.startswith("patch_embed"):
        return 0
    block = re.match(r"blocks\.(\d+)\.", name)
    return int(block[1]) + 1 if block else layers - 1


@pytest.mark.parametrize("protocol", [True, False], ids=["protocol", "structure"])
@pytest.mark.parametrize("build", [vit, beit], ids=["vit", "beit"])
def test_layer_decay_is_beits(build: Callable[[], nn.Module], protocol: bool) -> None:
    model = build()
    if not protocol:
        model.group_matcher = None
    skipped = model.no_weight_decay()
    expected = {}
    for name, param in model.named_parameters():
        scale = 0.65 ** (5 - 1 - beit_layer(name, 5))
        exempt = param.ndim == 1 or name.endswith(".bias") or name in skipped
        expected[name] = (pytest.approx(1e-3 * scale), 0.0 if exempt else 0.05)
    groups = layer_decay_groups(model, 1e-3, 0.65, weight_decay=0.05)
    assert settings(model, groups, "lr", "weight_decay") == expected
    if build is beit:
        assert expected["rel_pos_bias.relative_position_bias_table"][0] == 1e-3


def test_layer_decay_is_electras() -> None:
    """lr * decay ** (n_layers + 2 - depth): embeddings at 0, layer i at i + 1, what the task adds at n_layers + 2."""
    model = bert()
    depths = {}
    for name, _ in model.named_parameters():
        layer = re.search(r"encoder\.layer\.(\d+)\.", name)
        depths[name] = 0 if ".embeddings." in name else int(layer[1]) + 1 if layer else 3 + 2
    groups = layer_decay_groups(model, 1e-3, 0.8, layer_preset="electra")
    expected = {name: (pytest.approx(1e-3 * 0.8 ** (3 + 2 - depth)),) for name, depth in depths.items()}
    assert settings(model, groups, "lr") == expected


# transformers'


#: Pattern of a name to its layer, or to the layer of block 0.
LAYERS = {
    "bert": {r"\.embeddings\.": 0, r"\.layer\.(\d+)\.": 1, r"pooler|^classifier": 4},
    "gpt2": {r"\.w[tp]e\.": 0, r"\.h\.(\d+)\.": 1, r"\.ln_f\.": 4},
    "llama": {r"embed_tokens": 0, r"\.layers\.(\d+)\.": 1, r"\.norm\.|lm_head": 4},
    "t5": {
        r"^shared": 0,
        r"^encoder\.block\.(\d+)\.": 1,
        r"^encoder\.final": 2,
        r"^decoder\.block\.(\d+)\.": 3,
        r"^decoder\.final": 5,
    },
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_layers_of_transformers(name: str) -> None:
    ids = layer_ids(TRANSFORMERS[name]())
    for parameter, layer in ids.items():
        ((found, base),) = ((m, base) for p, base in LAYERS[name].items() if (m := re.search(p, parameter)))
        assert layer == base + (int(found[1]) if found.groups() else 0), parameter
    assert set(ids.values()) == set(range(max(ids.values()) + 1))


@pytest.mark.parametrize(
    ("build", "tables"),
    [
        (bert, {f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")}),
        (gpt2, {"transformer.wte.weight", "transformer.wpe.weight"}),
        (t5, {"shared.weight"} | {
            f"{part}.block.0.layer.0.SelfAttention.relative_attention_bias.weight" for part in ("encoder", "decoder")
        }),
    ],
    ids=["bert", "gpt2", "t5"],
)  # fmt: skip
def test_embeddings_on_request(build: Callable[[], nn.Module], tables: set[str]) -> None:
    model = build()
    matrices = {name for name, param in model.named_parameters() if param.ndim > 1}
    for no_decay, expected in (("auto", matrices), (["auto", "embeddings"], matrices - tables)):
        groups = no_decay_groups(model, 0.1, no_decay)
        assert {name for name, (decay,) in settings(model, groups, "weight_decay").items() if decay} == expected


def test_tied_weights_under_all_names() -> None:
    """The embedding and the head of GPT-2 are one parameter, which named_parameters calls by its first name only."""
    model = gpt2()
    assert "lm_head.weight" not in dict(model.named_parameters())
    for match in ("lm_head.*", "transformer.wte.*"):
        groups = param_groups(model, lr=1.0, rules=[{"match": match, "lr_mult": 3.0}])
        (group,) = (group for group in groups if group["lr"] == 3.0)
        assert group["param_names"] == ["transformer.wte.weight"]
        assert group["params"] == [model.lm_head.weight]
    assert describe(model, groups).tied == (("transformer.wte.weight", "lm_head.weight"),)
    assert "tied: transformer.wte.weight = lm_head.weight" in str(describe(model, groups))
    # the lowest of its layers
    assert layer_ids(model)["transformer.wte.weight"] == 0


# all of them


@each_model
@pytest.mark.parametrize("cls", [optimx.AdamW, torch.optim.AdamW], ids=["optimx", "torch"])
def test_optimizers_take_the_groups(build: Callable[[], nn.Module], cls: type[torch.optim.Optimizer]) -> None:
    """Each parameter moves by its own learning rate, and the checkpoint knows the names."""
    model = build()
    groups = layer_decay_groups(model, 1e-2, 0.5, weight_decay=0.0)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer = cls(groups)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    for name, (lr,) in settings(model, optimizer.param_groups, "lr").items():
        # the first step of Adam is lr for every element
        moved = before[name] - model.get_parameter(name).detach()
        torch.testing.assert_close(moved, torch.full_like(moved, lr), rtol=1e-3, atol=2e-7)
    saved = optimizer.state_dict()
    named = [name for group in saved["param_groups"] for name in group["param_names"]]
    assert sorted(named) == sorted(before)
    again = cls(layer_decay_groups(model, 1e-2, 0.5, weight_decay=0.0))
    again.load_state_dict(saved)
    assert [group["param_names"] for group in again.param_groups] == [group["param_names"] for group in groups]


@each_model
def test_compiled_and_wrapped_models_have_the_same_groups(build: Callable[[], nn.Module]) -> None:
    """timm finds neither layers nor hints in a compiled model: ``_orig_mod.blocks`` is not ``blocks``."""
    model = build()
    plain = layer_decay_groups(model, 1e-3, 0.5, weight_decay=0.1)
    for wrapped in (torch.compile(model), nn.DataParallel(model), nn.DataParallel(torch.compile(model))):
        groups = layer_decay_groups(wrapped, 1e-3, 0.5, weight_decay=0.1)
        assert [group["param_names"] for group in groups] == [group["param_names"] for group in plain]
        assert [group["lr"] for group in groups] == [group["lr"] for group in plain]
        assert [group["weight_decay"] for group in groups] == [group["weight_decay"] for group in plain]


def test_a_backbone_within_a_model() -> None:
    """What the backbone's protocol says holds below it; what surrounds it is the head."""

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.neck = nn.Linear(16, 16)
            self.backbone = vit()

    model = Classifier()
    whole, alone = layer_ids(model, layer_preset="timm"), layer_ids(model.backbone, layer_preset="timm")
    assert {name: whole[f"backbone.{name}"] for name in alone} == alone
    assert whole["neck.weight"] == 4
    decays = settings(model, no_decay_groups(model, 0.1), "weight_decay")
    assert decays["backbone.pos_embed"] == (0.0,)


def test_layer_decay_of_a_vit_is_one_row() -> None:
    """28 groups of 12 layers share a bucket."""
    groups = layer_decay_groups(vit(depth=12), 1e-3, 0.75, weight_decay=0.05)
    assert len(groups) == 2 * 14
    (row,) = optimx.explain(optimx.AdamW(groups)).rows
    assert row.groups == 28


@pytest.mark.interpreted
def test_layer_decay_of_a_vit_is_one_launch(triton_backend: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.test_kernels import record_launches

    launched = record_launches(monkeypatch)
    model = vit(depth=12).to(triton_backend)
    optimizer = optimx.AdamW(layer_decay_groups(model, 1e-3, 0.75, weight_decay=0.05), max_grad_norm=1.0)
    assert len(optimizer.param_groups) == 28
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert launched == ["_norm_kernel", "_finish_kernel", "_adam_kernel"]


def test_timms_schedulers_scale_once_more() -> None:
    """As the docstring says: ``lr`` is scaled already, and timm's schedulers multiply by ``lr_scale``."""
    from timm.scheduler import StepLRScheduler

    for taken_out in (True, False):
        groups = layer_decay_groups(vit(), 1e-3, 0.5, weight_decay=0.05)
        scales = [group.pop("lr_scale") if taken_out else group["lr_scale"] for group in groups]
        optimizer = optimx.AdamW(groups)
        StepLRScheduler(optimizer, decay_t=10, decay_rate=0.1).step(10)
        power = 1 if taken_out else 2
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-4 * s**power for s in scales])
