"""Buckets of tensors that Triton kernels update, by the walk of their rule. Imports triton."""

from .elementwise import TritonBucket
from .factored import FactoredTritonBucket
from .lagged import LaggedTritonBucket
from .measured import MeasuredTritonBucket
from .orthogonal import OrthogonalTritonBucket

BUCKETS: dict[str, type[TritonBucket]] = {
    "elementwise": TritonBucket,
    "measured": MeasuredTritonBucket,
    "lagged": LaggedTritonBucket,
    "factored": FactoredTritonBucket,
    "orthogonal": OrthogonalTritonBucket,
}
