"""Configs by name for what people train, with the source of their numbers.

A preset is a beginning: ``optimx.build(model, {"preset": "gpt-pretrain", "schedule": {"total": 10_000}})``. Where a
source has epochs, ``schedule.steps_per_epoch`` has to be given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["PRESETS", "TREES", "Preset"]


@dataclass(frozen=True)
class Preset:
    """A config to lay one's own over.

    Attributes:
        summary: What it is for.
        source: Of its numbers.
        config: The tree.
    """

    summary: str
    source: str
    config: dict[str, Any]


_GPT3 = "GPT-3, https://arxiv.org/abs/2005.14165, appendix B and table 2.1 (warmup: 375M of 300B tokens)"
_GPT3_ADAMW = {"name": "adamw", "lr": 6e-4, "weight_decay": 0.1, "betas": [0.9, 0.95], "max_grad_norm": 1.0}
_GPT3_SCHEDULE = {"name": "cosine", "warmup": 0.00125, "floor": 0.1}

PRESETS: dict[str, Preset] = {
    "bert-finetune": Preset(
        "BERT and its kin on a task with labels",
        "https://arxiv.org/abs/1810.04805 A.3, and defaults of its run_classifier.py",
        {
            "optimizer": {"name": "adamw", "lr": 5e-5, "weight_decay": 0.01, "eps": 1e-6, "max_grad_norm": 1.0},
            "schedule": {"name": "linear", "total": "3ep", "warmup": 0.1},
        },
    ),
    "vit-finetune": Preset(
        "a ViT-B that was pre-trained without labels, with layer-wise decay of the learning rate",
        "MAE, https://arxiv.org/abs/2111.06377, table 9",
        {
            "optimizer": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.05, "betas": [0.9, 0.999]},
            "groups": {"layer_decay": 0.75},
            "schedule": {"name": "cosine", "total": "100ep", "warmup": "5ep"},
            "batch_scaling": {"batch": 1024, "reference": 256, "rule": "linear"},
        },
    ),
    "gpt-pretrain": Preset(
        "a decoder of about 125M parameters from scratch, half a million tokens a step",
        _GPT3,
        {"optimizer": _GPT3_ADAMW, "schedule": _GPT3_SCHEDULE},
    ),
    "gpt-pretrain-bf16": Preset(
        "the same decoder with bfloat16 parameters, which are updated exactly as in float32 (16 more bits keep the "
        "rest); nothing of a float32 model is rounded",
        _GPT3,
        {
            "optimizer": {**_GPT3_ADAMW, "param_rounding": "remainder16", "state_dtype": "float32"},
            "schedule": _GPT3_SCHEDULE,
        },
    ),
    "finetune-8bit": Preset(
        "fine-tuning of a 16-bit model in little memory: stochastic rounding, states of 8 bits; of a float32 model "
        "only the states are rounded",
        "defaults of transformers' TrainingArguments, "
        "https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments",
        {
            "optimizer": {
                "name": "adamw",
                "lr": 5e-5,
                "weight_decay": 0.0,
                "betas": [0.9, 0.999],
                "eps": 1e-8,
                "max_grad_norm": 1.0,
                "param_rounding": "stochastic",
                "state_dtype": "8bit",
            },
            "groups": {"no_decay": []},
            "schedule": {"name": "linear", "total": "3ep"},
        },
    ),
    "gpt-muon": Preset(
        "a decoder from scratch: Muon for the hidden matrices, AdamW for the rest, weight decay for all",
        "https://github.com/KellerJordan/Muon, usage in its README and defaults of its MuonWithAuxAdam",
        {
            "optimizer": {
                "name": "muon",
                "lr": 0.02,
                "weight_decay": 0.01,
                "momentum": 0.95,
                "adamw": {"lr": 3e-4, "weight_decay": 0.01, "betas": [0.9, 0.95], "eps": 1e-10},
            },
            "groups": {"no_decay": []},
        },
    ),
    "resnet-sgd": Preset(
        "a ResNet on ImageNet: a tenth of the learning rate after 30 and 60 of 90 epochs, weight decay for all",
        "https://arxiv.org/abs/1512.03385, epochs of pytorch/examples, batch size rule of https://arxiv.org/abs/1706.02677",
        {
            "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4},
            "groups": {"no_decay": []},
            "schedule": {"name": "multi_step", "total": "90ep", "milestones": ["30ep", "60ep"], "gamma": 0.1},
            "batch_scaling": {"batch": 256, "reference": 256, "rule": "linear"},
        },
    ),
    "t5-adafactor": Preset(
        "fine-tuning of T5: Adafactor with a constant learning rate",
        "https://arxiv.org/abs/1910.10683, section 3.1.3",
        {"optimizer": {"name": "adafactor", "variant": "hf", "lr": 1e-3, "weight_decay": 0.0}},
    ),
    "gan": Preset(
        "generator or discriminator of a DCGAN: build one for each",
        "https://arxiv.org/abs/1511.06434, section 4",
        {
            "optimizer": {"name": "adam", "lr": 2e-4, "betas": [0.5, 0.999], "weight_decay": 0.0},
            "groups": {"no_decay": []},
        },
    ),
    "ppo": Preset(
        "policy and value network of PPO on Atari; total is updates x epochs x minibatches",
        "https://arxiv.org/abs/1707.06347, table 5; eps and clipping of openai/baselines",
        {
            "optimizer": {"name": "adam", "lr": 2.5e-4, "eps": 1e-5, "weight_decay": 0.0, "max_grad_norm": 0.5},
            "groups": {"no_decay": []},
            "schedule": {"name": "linear"},
        },
    ),
}

#: Their configs by name.
TREES = {name: preset.config for name, preset in PRESETS.items()}
