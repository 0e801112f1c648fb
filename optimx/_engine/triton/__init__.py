"""Buckets of tensors that Triton kernels update, by the walk of their rule. Imports triton."""

from .elementwise import TritonBucket
from .factored import FactoredTritonBucket
from .measured import MeasuredTritonBucket
from .orthogonal import OrthogonalTritonBucket

BUCKETS: dict[str, type[TritonBucket]] = {
    "elementwise": TritonBucket,
    "measured": MeasuredTritonBucket,
    "factored": FactoredTritonBucket,
    "orthogonal": OrthogonalTritonBucket,
}
