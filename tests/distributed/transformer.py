"""A small transformer as torchtitan writes it, whole or in parts, and how it is spread over ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
)

VOCABULARY, LENGTH, DIM, HEAD_DIM, HIDDEN, N_LAYERS = 20, 8, 16, 4, 24, 2
#: Rows of a batch, which two or four ranks divide.
ROWS = 8


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(DIM, DIM, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        # a rank of tensor parallelism has some of the heads
        heads = (w(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        return self.wo(nn.functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(DIM, HIDDEN, bias=False) for _ in range(2))
        self.w2 = nn.Linear(HIDDEN, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(DIM), nn.RMSNorm(DIM)
        self.attention, self.feed_forward = Attention(), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """All layers, or those of a pipeline's stage: None stands for the others."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings: nn.Module | None = nn.Embedding(VOCABULARY, DIM)
        self.layers = nn.ModuleDict({str(i): Block() for i in range(N_LAYERS)})
        self.norm: nn.Module | None = nn.RMSNorm(DIM)
        self.output: nn.Module | None = nn.Linear(DIM, VOCABULARY, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.tok_embeddings is None else self.tok_embeddings(x)
        for layer in self.layers.values():
            x = layer(x)
        return x if self.norm is None or self.output is None else self.output(self.norm(x))


def transformer() -> Transformer:
    torch.manual_seed(0)
    return Transformer()


def in_two_parts() -> list[Transformer]:
    """Stages of a pipeline, with the names that parameters have in the whole model."""
    first, last = transformer(), transformer()
    first.norm = first.output = last.tok_embeddings = None
    del first.layers["1"], last.layers["0"]
    return [first, last]


def batch_of(step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
    """A rank's rows, and what is to come after each of their tokens; all rows by default."""
    x, y = torch.randint(VOCABULARY, (2, ROWS, LENGTH), generator=torch.Generator().manual_seed(step))
    return x[rank::world], y[rank::world]


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss whose gradients are worth clipping to 1."""
    return 10 * nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def loss_of_rows(model: nn.Module | Sequence[nn.Module], step: int, rank: int = 0, world: int = 1) -> Tensor:
    """Loss of a rank's rows, of all by default. The model may be in parts."""
    x, targets = batch_of(step, rank, world)
    for part in [model] if isinstance(model, nn.Module) else model:
        x = part(x)
    return cross_entropy(x, targets)


#: How tensor-parallel ranks have the model, with cut sequences between its layers.
PLAN = {
    "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
    "norm": SequenceParallel(),
    "output": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
}
_WHOLE_SEQUENCE = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
PLAN_OF_BLOCK = {
    "attention_norm": SequenceParallel(),
    "attention": _WHOLE_SEQUENCE,
    **{f"attention.{name}": ColwiseParallel() for name in ("wq", "wk", "wv")},
    "attention.wo": RowwiseParallel(output_layouts=Shard(1)),
    "ffn_norm": SequenceParallel(),
    "feed_forward": _WHOLE_SEQUENCE,
    **{f"feed_forward.{name}": ColwiseParallel() for name in ("w1", "w3")},
    "feed_forward.w2": RowwiseParallel(output_layouts=Shard(1)),
}
