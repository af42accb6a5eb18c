r"""Trains with ULMA: imitates demonstrations, and learns from the ratings of all other answers.

    trl-ulma ulma \
        --model Qwen/Qwen3-0.6B \
        --dataset feedback.jsonl \
        --eval_strategy steps \
        --output out

With LoRA, with a 4-bit model, on all GPUs with ZeRO-3, or with all options in a file:

    trl-ulma ulma … --use_peft --lora_r 32 --learning_rate 1e-5
    trl-ulma ulma … --use_peft --load_in_4bit
    trl-ulma ulma … --accelerate_config zero3
    trl-ulma ulma --config run.yaml

`--positive_loss` and `--negative_loss` select the other methods of the paper, see `ULMAConfig`.
"""

from typing import TYPE_CHECKING, Any

from trl_ulma.scripts.command_line import be_quiet

if TYPE_CHECKING:
    from trl_ulma.scripts.options import OptionParser


def make_parser(prog: str = "trl-ulma ulma") -> "OptionParser":
    """The parser, with the options of TRL and of `ULMAConfig`."""
    from trl_ulma import ULMAConfig
    from trl_ulma.scripts.options import OptionParser

    return OptionParser(ULMAConfig, prog, "Train with ULMA, on demonstrations and rated answers.", "ulma")


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> None:
    """Run the training."""
    from trl_ulma import ULMATrainer
    from trl_ulma.scripts.training import train

    train(ULMATrainer, script_args, training_args, model_args, dataset_args, prog="trl-ulma ulma")


if __name__ == "__main__":
    be_quiet()
    main(*make_parser().parse_settings())
