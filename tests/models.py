"""Small models of timm and transformers with random weights, built where these are installed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from optimx.measuring.packages import import_torchvision

# timm and transformers load it, and tests import those while they are collected: a fixture would come too late
import_torchvision()


def timm_model(cls: str, **config: object) -> nn.Module:
    timm = pytest.importorskip("timm")
    return getattr(timm.models, cls)(num_classes=5, **config)


def vit(depth: int = 3, cls: str = "VisionTransformer", **config: object) -> nn.Module:
    return timm_model(cls, img_size=16, patch_size=8, embed_dim=16, depth=depth, num_heads=2, mlp_ratio=2, **config)


def swin() -> nn.Module:
    return timm_model(
        "SwinTransformer", img_size=32, patch_size=2, window_size=4, embed_dim=8, depths=(1, 2, 2), num_heads=(1, 2, 4)
    )


def convnext() -> nn.Module:
    return timm_model("ConvNeXt", depths=(2, 1, 3, 2), dims=(8, 16, 24, 32))


def resnet() -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm_model("ResNet", block=timm.models.resnet.BasicBlock, layers=(2, 1, 2, 1), channels=(8, 16, 24, 32))


def transformers_model(cls: str, config_cls: str, **config: object) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, cls)(getattr(transformers, config_cls)(**config))


BERT = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
TOKENS = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}


def bert() -> nn.Module:
    return transformers_model("BertForSequenceClassification", "BertConfig", vocab_size=50, **BERT)


def gpt2() -> nn.Module:
    return transformers_model("GPT2LMHeadModel", "GPT2Config", n_embd=16, n_layer=3, n_head=2, n_positions=8, **TOKENS)


def llama() -> nn.Module:
    return transformers_model("LlamaForCausalLM", "LlamaConfig", **BERT, **TOKENS)


def t5() -> nn.Module:
    return transformers_model(
        "T5ForConditionalGeneration", "T5Config", vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )


def mixtral() -> nn.Module:
    return transformers_model(
        "MixtralForCausalLM", "MixtralConfig", num_local_experts=3, num_key_value_heads=1, **BERT, **TOKENS
    )


def torchvision_vit() -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=5)


def torchvision_resnet() -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 2, 1], num_classes=5)


def torchvision_swin() -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.SwinTransformer([4, 4], 8, [2, 2], [2, 2], [4, 4], num_classes=5)


TIMM: dict[str, Callable[[], nn.Module]] = {"vit": vit, "swin": swin, "convnext": convnext, "resnet": resnet}
TRANSFORMERS: dict[str, Callable[[], nn.Module]] = {"bert": bert, "gpt2": gpt2, "llama": llama, "t5": t5}
