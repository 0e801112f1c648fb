"""Small programs that use optimx together with other libraries: ``python -m examples.optuna_search``."""
