"""Buckets of CPU tensors, by the walk of their rule."""

from .elementwise import NativeBucket
from .factored import FactoredBucket
from .trust_ratio import TrustRatioBucket

BUCKETS: dict[str, type[NativeBucket]] = {
    "elementwise": NativeBucket,
    "trust_ratio": TrustRatioBucket,
    "factored": FactoredBucket,
}
