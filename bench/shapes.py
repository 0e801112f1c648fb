"""Parameter shapes of real models, written out by formula so that a benchmark needs none of their packages."""

Shape = tuple[int, ...]


def llama(
    hidden: int = 2048,
    layers: int = 16,
    vocab: int = 128_256,
    intermediate: int = 8192,
    heads: int = 32,
    kv_heads: int = 8,
) -> list[Shape]:
    """A Llama with grouped-query attention and tied embeddings; the defaults are Llama 3.2 1B (1,235,814,400)."""
    norms = [(hidden,), (hidden,)]
    layer = llama_matrices(hidden, intermediate, hidden * kv_heads // heads) + norms
    return [(vocab, hidden), *layer * layers, (hidden,)]


def llama_matrices(hidden: int, intermediate: int, kv: int) -> list[Shape]:
    """The linear layers of a Llama's block: query, key, value, output; gate, up, down."""
    attention = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    return [*attention, (intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]


def llama_8b_slice(layers: int = 4) -> list[Shape]:
    """Some blocks of Llama 3 8B, as a pipeline stage has them, without embeddings (4 blocks: 872,448,000)."""
    return [*llama_matrices(4096, 14_336, 1024), (4096,), (4096,)] * layers


def lora(rank: int = 8, layers: int = 80) -> list[Shape]:
    """LoRA's two factors for each linear layer of Llama 3 70B: 1120 small matrices (103,546,880)."""
    matrices = llama_matrices(8192, 28_672, 1024)
    return [factor for out, into in matrices for factor in ((rank, into), (out, rank))] * layers


def bert(
    width: int = 768, layers: int = 12, vocab: int = 30_522, context: int = 512, intermediate: int = 3072
) -> list[Shape]:
    """A BERT encoder with pooler; the defaults are BERT-base (109,482,240)."""

    def linear(outputs: int, inputs: int) -> list[Shape]:
        return [(outputs, inputs), (outputs,)]

    norm = [(width,), (width,)]
    attention = linear(width, width) * 4 + norm
    mlp = linear(intermediate, width) + linear(width, intermediate) + norm
    embeddings = [(vocab, width), (context, width), (2, width)]
    return [*embeddings, *norm, *(attention + mlp) * layers, *linear(width, width)]


def gpt2(width: int = 768, layers: int = 12, vocab: int = 50_257, context: int = 1024) -> list[Shape]:
    """A GPT-2 with tied embeddings; the defaults are the 124M model (124,439,808)."""
    norm = [(width,), (width,)]
    attention = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    mlp = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(vocab, width), (context, width), *(norm + attention + norm + mlp) * layers, *norm]


def vit(
    width: int = 768,
    layers: int = 12,
    patch: int = 16,
    image: int = 224,
    classes: int = 1000,
    registers: int = 0,
) -> list[Shape]:
    """A Vision Transformer with a class token; the defaults are ViT-B/16 (86,567,656)."""
    norm = [(width,), (width,)]
    attention = [(3 * width, width), (3 * width,), (width, width), (width,)]
    mlp = [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    tokens = [(1, 1, width), (1, (image // patch) ** 2 + 1, width)]
    if registers:
        tokens.append((1, registers, width))
    patches = [(width, 3, patch, patch), (width,)]
    head = [(classes, width), (classes,)]
    return [*tokens, *patches, *(norm + attention + norm + mlp) * layers, *norm, *head]


def vit_matrices(width: int = 192, layers: int = 21) -> list[Shape]:
    """The matrices of a ViT's blocks that has query, key and value apart; by default 126, as wide as ViT-Ti's."""
    return [*[(width, width)] * 4, (4 * width, width), (width, 4 * width)] * layers


def repeated_matrices(shapes: list[Shape]) -> list[Shape]:
    """The matrices of a model's blocks: embeddings and heads have a shape of their own."""
    return [shape for shape in shapes if len(shape) == 2 and shapes.count(shape) > 1]


def resnet(blocks: tuple[int, ...] = (3, 4, 6, 3), classes: int = 1000) -> list[Shape]:
    """A ResNet of bottleneck blocks with batch norm; the defaults are ResNet-50 (25,557,032)."""

    def conv_norm(outputs: int, inputs: int, kernel: int) -> list[Shape]:
        return [(outputs, inputs, kernel, kernel), (outputs,), (outputs,)]

    shapes = conv_norm(64, 3, 7)
    inputs = 64
    for stage, count in enumerate(blocks):
        width = 64 * 2**stage
        for block in range(count):
            shapes += conv_norm(width, inputs, 1) + conv_norm(width, width, 3) + conv_norm(4 * width, width, 1)
            if block == 0:
                shapes += conv_norm(4 * width, inputs, 1)
            inputs = 4 * width
    return [*shapes, (classes, inputs), (classes,)]


def tiny(count: int = 10_000) -> list[Shape]:
    """Tensors of 16 elements, where all cost is per tensor."""
    return [(16,)] * count


def sized_down(shapes: list[Shape], factor: int) -> list[Shape]:
    """As many tensors, with every dimension of 64 or more divided by ``factor``."""
    return [tuple(size // factor if size >= 64 else size for size in shape) for shape in shapes]


#: Name -> shapes, and the factor by which a CPU has them sized down.
MODELS: dict[str, tuple[list[Shape], int]] = {
    "resnet-50": (resnet(), 2),
    "vit-b16": (vit(), 4),
    "bert-base": (bert(), 4),
    "gpt2-124m": (gpt2(), 4),
    "llama-3-8b-slice": (llama_8b_slice(), 8),
    "lora": (lora(), 8),
    "10k-tiny": (tiny(), 1),
}
