"""Buckets of tensors that Triton kernels update, by the walk of their rule. Imports triton."""

from .elementwise import TritonBucket
from .factored import FactoredTritonBucket
from .orthogonal import OrthogonalTritonBucket
from .trust_ratio import TrustRatioTritonBucket

BUCKETS: dict[str, type[TritonBucket]] = {
    "elementwise": TritonBucket,
    "trust_ratio": TrustRatioTritonBucket,
    "factored": FactoredTritonBucket,
    "orthogonal": OrthogonalTritonBucket,
}
