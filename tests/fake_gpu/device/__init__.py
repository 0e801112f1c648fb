"""The fake device: an extension of torch (``*.cpp``, built by :mod:`.build`) and what it needs in Python."""
