"""Tensors in, tensors out: the arithmetic of the decode step. Each folder holds a plain-torch ``reference`` and, where
one exists, a faster twin; ``dispatch`` chooses. The mathematics is told in ``kernels/README.md``."""
