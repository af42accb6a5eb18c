"""The model that a training began with, or a given reference: what an evaluated model is compared with."""

from collections.abc import Iterable

from trl_ulma.saved import adapter_base, saved_file, saved_settings

# Kinds of references that are separate models
_OWN_MODEL = ("copy", "given")


def model_before(source: str, ref_model: str | None) -> str | None:
    """The name or folder of the model before the training of `source`, or None if it is unknown.

    Args:
        source: the name or folder of a model.
        ref_model: a given reference, which is used instead.

    Example:
        >>> model_before("out", "HuggingFaceTB/SmolLM2-135M")
        'HuggingFaceTB/SmolLM2-135M'
    """
    if ref_model is not None:
        return ref_model
    saved = saved_settings(source)
    base = adapter_base(source)
    if base is None or (saved is not None and saved.reference is not None and saved.reference.kind in _OWN_MODEL):
        # A full model, or an adapter whose reference was not its base
        return None if saved is None or saved.reference is None else saved.reference.name or None
    # An adapter that was trained further keeps the earlier one in `ref`
    return base if saved_file(source, "ref/adapter_config.json") is None else f"{source}/ref"


def revision_before(source: str, ref_model: str | None) -> str | None:
    """The revision on the Hub of `model_before`."""
    saved = saved_settings(source)
    if ref_model is not None or saved is None or saved.reference is None:
        return None
    return saved.reference.revision


def name_before(before: str, run: str, runs: Iterable[str] = (), befores: Iterable[str | None] = ()) -> str:
    """The name of `model_before` in a report: the last part of its own name, or all of it if that is taken.

    Args:
        before: the model before training.
        run: the name of the run that it is compared with.
        runs: the names of all runs.
        befores: the models before the trainings of all runs.

    Example:
        >>> name_before("org/model", "ulma"), name_before("out/ref", "ulma")
        ('model (base)', 'ulma before training')
        >>> name_before("a/model", "ulma", befores=["a/model", "b/model"])
        'a/model (base)'
        >>> name_before("a/model", "ulma", runs=["Model (base)"])
        'a/model (base)'
    """
    if before.endswith("/ref"):
        return f"{run} before training"
    own = before.rstrip("/")
    last = own.split("/")[-1]
    others = {each.rstrip("/") for each in befores if each is not None} - {own}
    # The names of files are made from these names, and some file systems ignore case
    taken = [*(f"{each.split('/')[-1]} (base)".casefold() for each in others), *(run.casefold() for run in runs)]
    return f"{own if f'{last} (base)'.casefold() in taken else last} (base)"
