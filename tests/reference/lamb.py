"""LAMB, on a list of float64 numbers that is one tensor.

https://arxiv.org/abs/1904.00962, algorithm 2, with the identity for phi. Beyond the paper:

- The ratio is 1 for a tensor without weight decay, unless ``always_adapt``, and where either norm is 0, as in apex and
  timm.
- ``max_trust_ratio`` bounds it, the 1 for a zero norm included, but not that of tensors that are not adapted; timm's
  ``trust_clip`` is a bound of 1. (The paper's phi would bound the parameters' norm.)
- ``normalize_grads`` divides each step's gradients by their 2-norm over *all* tensors, as NVLAMB does
  (https://developer.nvidia.com/blog/pretraining-bert-with-layer-wise-adaptive-learning-rates/); here one tensor is all.
  Gradients that are all 0 stay 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def lamb(
    theta: Sequence[float],
    gradients: Sequence[Sequence[float]],
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    bias_correction: bool = True,
    max_trust_ratio: float | None = None,
    always_adapt: bool = False,
    normalize_grads: bool = False,
    maximize: bool = False,
    cautious_weight_decay: bool = False,
) -> list[float]:
    """Parameters after ``len(gradients)`` steps."""
    beta1, beta2 = betas
    result = list(theta)
    m = [0.0] * len(result)
    v = [0.0] * len(result)
    for t, gradient in enumerate(gradients, start=1):
        bias1 = 1 - beta1**t if bias_correction else 1.0
        bias2 = 1 - beta2**t if bias_correction else 1.0
        grad_norm = math.hypot(*gradient) if normalize_grads else 1.0
        update = []
        for i in range(len(result)):
            g = -gradient[i] if maximize else gradient[i]
            if grad_norm != 0:
                g /= grad_norm
            m[i] = beta1 * m[i] + (1 - beta1) * g
            v[i] = beta2 * v[i] + (1 - beta2) * g * g
            adam_update = (m[i] / bias1) / (math.sqrt(v[i] / bias2) + eps)
            decays = adam_update * result[i] >= 0 or not cautious_weight_decay
            update.append(adam_update + weight_decay * result[i] * decays)
        ratio = 1.0
        if weight_decay != 0 or always_adapt:
            param_norm, update_norm = math.hypot(*result), math.hypot(*update)
            if param_norm != 0 and update_norm != 0:
                ratio = param_norm / update_norm
            if max_trust_ratio is not None:
                ratio = min(ratio, max_trust_ratio)
        for i in range(len(result)):
            result[i] -= lr * ratio * update[i]
    return result
