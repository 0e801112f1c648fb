"""Buckets of CPU tensors, by the walk of their rule."""

from .elementwise import NativeBucket
from .factored import FactoredBucket
from .measured import MeasuredBucket
from .orthogonal import OrthogonalBucket

BUCKETS: dict[str, type[NativeBucket]] = {
    "elementwise": NativeBucket,
    "measured": MeasuredBucket,
    "factored": FactoredBucket,
    "orthogonal": OrthogonalBucket,
}
