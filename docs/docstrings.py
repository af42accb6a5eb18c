"""Extension of Griffe, which reads the docstrings: the code below `Example:` is shown as code."""

from typing import Any

import griffe


class Examples(griffe.Extension):
    """Griffe knows the section as `Examples:`."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rename it, as an object is loaded."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("Example:\n", "Examples:\n")
