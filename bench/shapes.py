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
    kv = hidden * kv_heads // heads
    attention = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    mlp = [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
    norms = [(hidden,), (hidden,)]
    return [(vocab, hidden), *(attention + mlp + norms) * layers, (hidden,)]


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
