"""Buckets of CPU tensors, by the walk of their rule."""

from .elementwise import NativeBucket
from .factored import FactoredBucket
from .lagged import LaggedBucket
from .measured import MeasuredBucket
from .orthogonal import OrthogonalBucket

BUCKETS: dict[str, type[NativeBucket]] = {
    "elementwise": NativeBucket,
    "measured": MeasuredBucket,
    "lagged": LaggedBucket,
    "factored": FactoredBucket,
    "orthogonal": OrthogonalBucket,
}
