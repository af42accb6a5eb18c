r"""Train with ULMA: demonstrations are imitated, all other answers are learned from by their ratings.

    trl-ulma ulma \
        --model_name_or_path Qwen/Qwen3-0.6B \
        --dataset_name feedback.jsonl \
        --eval_strategy steps \
        --output_dir out

with LoRA, on a model in four bits, on all GPUs with ZeRO-3, or with all options in a file:

    trl-ulma ulma … --use_peft --lora_r 32 --learning_rate 1e-5
    trl-ulma ulma … --use_peft --load_in_4bit
    trl-ulma ulma … --accelerate_config zero3
    trl-ulma ulma --config run.yaml

`--positive_loss` and `--negative_loss` choose the other methods of the paper: see `ULMAConfig`.
"""

from typing import Any

from trl_ulma.scripts.options import OptionParser
from trl_ulma.scripts.training import train


def make_parser(prog: str = "trl-ulma ulma") -> OptionParser:
    """The command's options: TRL's, and `ULMAConfig`'s."""
    from trl_ulma import ULMAConfig

    return OptionParser(ULMAConfig, prog, "Train with ULMA, on demonstrations and rated answers.")


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> None:
    """Run the training."""
    from trl_ulma import ULMATrainer

    train(ULMATrainer, script_args, training_args, model_args, dataset_args)


if __name__ == "__main__":
    main(*make_parser().parse_settings())
