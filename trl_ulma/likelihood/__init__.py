"""Log-probabilities for training, evaluation, scoring and the demo. They are computed only in this package."""
