r"""Train with point-wise DPO: answers are learned from by their thumbs, votes or ratings, one at a time.

    trl-ulma pointwise-dpo \
        --model_name_or_path Qwen/Qwen3-0.6B \
        --dataset_name thumbs.csv \
        --eval_strategy steps \
        --output_dir out

with LoRA, on a model in four bits, on all GPUs with ZeRO-3, or with all options in a file:

    trl-ulma pointwise-dpo … --use_peft --lora_r 32 --learning_rate 1e-5
    trl-ulma pointwise-dpo … --use_peft --load_in_4bit
    trl-ulma pointwise-dpo … --accelerate_config zero3
    trl-ulma pointwise-dpo --config run.yaml
"""

from typing import Any

from trl_ulma.scripts.options import OptionParser
from trl_ulma.scripts.training import train


def make_parser(prog: str = "trl-ulma pointwise-dpo") -> OptionParser:
    """The command's options: TRL's, and `PointwiseDPOConfig`'s."""
    from trl_ulma import PointwiseDPOConfig

    return OptionParser(PointwiseDPOConfig, prog, "Train with point-wise DPO, on rated answers.")


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> None:
    """Run the training."""
    from trl_ulma import PointwiseDPOTrainer

    train(PointwiseDPOTrainer, script_args, training_args, model_args, dataset_args)


if __name__ == "__main__":
    main(*make_parser().parse_settings())
