r"""Trains with pointwise DPO: learns from thumbs, votes and ratings, one answer at a time.

    trl-ulma pointwise-dpo \
        --model Qwen/Qwen3-0.6B \
        --dataset thumbs.csv \
        --eval_strategy steps \
        --output out

With LoRA, with a 4-bit model, on all GPUs with ZeRO-3, or with all options in a file:

    trl-ulma pointwise-dpo … --use_peft --lora_r 32 --learning_rate 1e-5
    trl-ulma pointwise-dpo … --use_peft --load_in_4bit
    trl-ulma pointwise-dpo … --accelerate_config zero3
    trl-ulma pointwise-dpo --config run.yaml
"""

from typing import TYPE_CHECKING, Any

from trl_ulma.scripts.command_line import be_quiet

if TYPE_CHECKING:
    from trl_ulma.scripts.options import OptionParser


def make_parser(prog: str = "trl-ulma pointwise-dpo") -> "OptionParser":
    """The parser, with the options of TRL and of `PointwiseDPOConfig`."""
    from trl_ulma import PointwiseDPOConfig
    from trl_ulma.scripts.options import OptionParser

    return OptionParser(PointwiseDPOConfig, prog, "Train with pointwise DPO, on rated answers.", "pointwise-dpo")


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> None:
    """Run the training."""
    from trl_ulma import PointwiseDPOTrainer
    from trl_ulma.scripts.training import train

    train(PointwiseDPOTrainer, script_args, training_args, model_args, dataset_args, prog="trl-ulma pointwise-dpo")


if __name__ == "__main__":
    be_quiet()
    main(*make_parser().parse_settings())
