"""Buckets of CPU tensors, by the walk of their rule."""

from .elementwise import NativeBucket
from .factored import FactoredBucket
from .orthogonal import OrthogonalBucket
from .trust_ratio import TrustRatioBucket

BUCKETS: dict[str, type[NativeBucket]] = {
    "elementwise": NativeBucket,
    "trust_ratio": TrustRatioBucket,
    "factored": FactoredBucket,
    "orthogonal": OrthogonalBucket,
}
