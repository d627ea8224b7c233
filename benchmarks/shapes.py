"""Shapes of the parameters of real models, in the order of their layers."""

Shapes = list[tuple[int, ...]]


def gpt(width: int, layers: int, vocabulary: int, length: int) -> Shapes:
    """A GPT-2 of this size: biases and norms with them, the head tied."""
    n = width
    layer: Shapes = [(n,), (n,), (3 * n, n), (3 * n,), (n, n), (n,)]
    layer += [(n,), (n,), (4 * n, n), (4 * n,), (n, 4 * n), (n,)]
    return [(vocabulary, n), (length, n), *layer * layers, (n,), (n,)]


def hidden(shapes: Shapes) -> Shapes:
    """The matrices among them but for the embeddings, which stand first."""
    last = max(i for i, s in enumerate(shapes[:2]) if len(s) == 2)
    return [s for s in shapes[last + 1 :] if len(s) == 2]


def llama(layers: int = 16, n: int = 2048, vocabulary: int = 128256) -> Shapes:
    """Llama-3.2-1B: no biases, keys and values of a quarter of the width, the head tied."""
    layer: Shapes = [(n,), (n, n), (n // 4, n), (n // 4, n), (n, n)]
    layer += [(n,), (4 * n, n), (4 * n, n), (n, 4 * n)]
    return [(vocabulary, n), *layer * layers, (n,)]


GPT2 = gpt(768, 12, 50257, 1024)
LLAMA = llama()
# 30.9 M numbers in 150 tensors, with a norm of the embeddings.
SMALL: Shapes = [*gpt(384, 12, 24576, 512), (384,), (384,)]
# 20,000 tensors, of which no step is arithmetic.
TINY: Shapes = [(16,), (64,), (8, 32), (8,)] * 5000
