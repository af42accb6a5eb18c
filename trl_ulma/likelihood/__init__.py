"""The only place where log-probabilities are computed: for training, evaluation, scoring and the demo."""
