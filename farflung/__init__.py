"""farflung: train one model on machines that are far apart and thinly connected."""

__version__ = "0.1.0"
