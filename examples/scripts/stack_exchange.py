r"""Pointwise DPO on voted answers of StackExchange: their ranks among a question's answers are the labels.

    python examples/scripts/stack_exchange.py \
        --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --dataset_name HuggingFaceH4/stack-exchange-preferences --data_dir data/ai.stackexchange.com \
        --label_type continuous --label_transform prompt_quantile,center --share_prompts \
        --use_peft --learning_rate 1e-4 --output_dir stack-exchange-out

A question that many people see has more votes on all its answers; the rank among them takes that out, and
`--share_prompts` runs the question once for all of them.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config

from trl_ulma import PointwiseDPOConfig, PointwiseDPOTrainer
from trl_ulma.data.convert import convert, reasons
from trl_ulma.data.files import load_rows, split_by_prompt


@dataclass
class StackExchangeArguments(ScriptArguments):
    """TRL's, and the folder within the dataset."""

    data_dir: str | None = field(default=None, metadata={"help": "Folder of one site within the dataset."})


def main() -> None:
    parser = TrlParser((StackExchangeArguments, PointwiseDPOConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config()
    training_args.model_init_kwargs = {"dtype": model_args.dtype}

    if script_args.data_dir is None:
        raw = load_rows(script_args.dataset_name)["train"]
    else:
        raw = load_dataset(script_args.dataset_name, data_dir=script_args.data_dir, split="train")
    rows, account = convert("votes", raw)
    splits = split_by_prompt(rows, test_size=0.1, seed=training_args.seed)

    trainer = PointwiseDPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=splits["train"],
        eval_dataset=splits["test"],
        peft_config=get_peft_config(model_args),
    )
    trainer.accelerator.print(f"{account.answers} answers, {account.rows_out} rows. {reasons(account)}")
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.log_metrics("eval", trainer.evaluate())


if __name__ == "__main__":
    main()
