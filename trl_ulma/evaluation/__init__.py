"""Evaluation: perplexity, implicit rewards, judged answers, and a report on all of them."""

from importlib.util import find_spec

_missing = [name for name in ("matplotlib", "openai", "scipy") if find_spec(name) is None]
if _missing:
    raise ImportError(
        f"trl_ulma.evaluation needs {', '.join(_missing)}, which is not installed. Run: "
        "pip install 'trl-ulma[evaluation]'"
    )
