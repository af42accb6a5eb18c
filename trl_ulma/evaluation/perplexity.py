"""Perplexity of given completions."""

import numpy as np

from trl_ulma.evaluation.intervals import Estimate, bootstrap, ratio_of


def perplexity(logps: np.ndarray, tokens: np.ndarray, prompt: np.ndarray, *, seed: int = 0) -> Estimate:
    """Return exp(−Σ log π(y|x) / Σ tokens) of a set of completions, with its bootstrap interval.

    Every token has the same weight. Lower is better. Do not compare models that have different tokenizers.

    Args:
        logps: `(N,)` log π(y|x), nats, summed over completion tokens.
        tokens: `(N,)` number of completion tokens.
        prompt: `(N,)` numbers of the prompts; the bootstrap resamples prompts.
        seed: seed of the bootstrap.

    Raises:
        ValueError: if arrays have different lengths, or if a row has no token.

    Example:
        >>> found = perplexity(np.log([0.25, 0.5]), np.array([1, 1]), np.array([0, 1]))
        >>> round(found.value, 6)
        2.828427
    """
    if not logps.shape == tokens.shape == prompt.shape:
        raise ValueError(
            f"logps, tokens and prompt must have one shape (N,); got {logps.shape}, {tokens.shape} and {prompt.shape}."
        )
    if tokens.size == 0 or (tokens < 1).any():
        raise ValueError("Perplexity needs a row at least, and a token in every row.")
    rate = ratio_of(-logps, tokens)
    return bootstrap(lambda copies: np.exp(rate(copies)), prompt, seed)
