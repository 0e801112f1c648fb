"""Other packages' optimizers, where benchmarks and scripts beside them have always looked for them."""

from optimx.measuring.packages import BY_OPTIMIZER, Missing, Peer, import_torchvision

__all__ = ["BY_OPTIMIZER", "Missing", "Peer", "import_torchvision"]
