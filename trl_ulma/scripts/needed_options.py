"""The options that other options of a training command need, and that `trl-ulma check` suggests with them."""

from collections.abc import Sequence

from trl_ulma.scripts.suggestions import Suggestion, holds_out_none, values_of

_FALSE = ("false", "f", "no", "n", "0")
# The beginnings of options that have no effect without the option that switches them on
_OF_LORA = ("lora_", "use_dora", "use_rslora")
_OF_4BIT = ("bnb_4bit", "use_bnb_nested")
# The learning rate for an adapter
LEARNING_RATE = ("--learning_rate", "1e-4")


def needed(words: Sequence[str]) -> list[Suggestion]:
    """The options that those of a command need, as far as the rows do not matter. None of them is given already.

    Args:
        words: the options of the command.

    Example:
        >>> [each.options for each in needed(["--load_in_4bit"])]
        [('--use_peft', '--learning_rate', '1e-4')]
        >>> [each.options for each in needed(["--load_best_model_at_end", "--eval_strategy", "epoch"])]
        [('--save_strategy', 'epoch')]
    """
    given = values_of(words)
    return [*_of_labels(given), *_of_adapter(given), *_of_evaluation(given)]


def _is_on(given: dict[str, str], name: str) -> bool:
    return name in given and given[name].lower() not in _FALSE


def _of_labels(given: dict[str, str]) -> list[Suggestion]:
    from trl_ulma.labels import parse_transform

    transform = given.get("label_transform")
    if transform is None or not {"label_type", "preset"}.isdisjoint(given):
        return []
    try:
        parse_transform(transform, "binary")
    except ValueError:
        try:
            parse_transform(transform, "continuous")
        except ValueError:
            return []  # the command says what is wrong
        why = f"--label_transform {transform} makes labels outside [0, 1]"
        return [Suggestion(("--label_type", "continuous"), why)]
    return []


def _of_adapter(given: dict[str, str]) -> list[Suggestion]:
    found = []
    of_4bit = next((name for name in given if name.startswith(_OF_4BIT)), None)
    if of_4bit and "load_in_4bit" not in given and not _is_on(given, "load_in_8bit"):
        found.append(Suggestion(("--load_in_4bit",), f"--{of_4bit} is for a model in 4 bits"))
    rate = () if "learning_rate" in given else LEARNING_RATE
    if _is_on(given, "use_peft"):
        if rate:
            found.append(Suggestion(rate, "for an adapter; the default is for training all weights"))
    elif {"use_peft", "no_use_peft"}.isdisjoint(given):
        of_lora = next((name for name in given if name.startswith(_OF_LORA)), None)
        if found or _is_on(given, "load_in_4bit") or _is_on(given, "load_in_8bit"):
            found.append(
                Suggestion(("--use_peft", *rate), "quantized weights are not trained, so an adapter (LoRA) is")
            )
        elif of_lora:
            found.append(Suggestion(("--use_peft", *rate), f"--{of_lora} is for an adapter (LoRA)"))
    return found


def _of_evaluation(given: dict[str, str]) -> list[Suggestion]:
    if holds_out_none(given):
        return []  # the command says what has to be switched off
    found = []
    is_best = _is_on(given, "load_best_model_at_end")
    saving = given.get("save_strategy", "")
    has_metric = "metric_for_best_model" in given
    is_plateau = given.get("lr_scheduler_type") == "reduce_lr_on_plateau"
    if has_metric and "load_best_model_at_end" not in given and saving not in ("best", "no") and not is_plateau:
        is_best = True
        found.append(Suggestion(("--load_best_model_at_end",), "saves the model that --metric_for_best_model chooses"))
    reasons = (
        (is_best, "--load_best_model_at_end needs evaluations"),
        (saving == "best", "--save_strategy best needs evaluations"),
        (is_plateau, "--lr_scheduler_type reduce_lr_on_plateau needs evaluations"),
        ("eval_steps" in given, "without it, --eval_steps has no effect"),
    )
    why = next((reason for is_given, reason in reasons if is_given), None)
    strategy = given.get("eval_strategy")
    if strategy is None and why:
        is_by_steps = "eval_steps" in given or (is_best and "save_steps" in given)
        strategy = saving if is_best and saving in ("steps", "epoch") else "steps" if is_by_steps else "epoch"
        if strategy == "epoch" and "eval_steps" in given:
            why += ", when checkpoints are saved; --eval_steps has no effect with them"
        every = ("--eval_steps", given["save_steps"]) if is_best and _lacks(given, "eval_steps", "save_steps") else ()
        found.append(Suggestion(("--eval_strategy", strategy, *(every if strategy == "steps" else ())), why))
    if is_best and not saving and strategy == "epoch":
        found.append(Suggestion(("--save_strategy", "epoch"), "saves a checkpoint after each evaluation"))
    elif is_best and saving in ("", "steps") and strategy == "steps" and _lacks(given, "save_steps", "eval_steps"):
        found.append(Suggestion(("--save_steps", given["eval_steps"]), "saves a checkpoint after each evaluation"))
    if saving == "best" and not is_best and not has_metric and not is_plateau:
        found.append(Suggestion(("--metric_for_best_model", "eval_loss"), "decides which checkpoint is the best"))
    return found


def _lacks(given: dict[str, str], name: str, other: str) -> bool:
    """Whether an option is not given, and the option that it has to match is."""
    return name not in given and other in given
