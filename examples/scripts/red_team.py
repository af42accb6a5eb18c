r"""ULMA on red-team attempts: ratings of 0 (the attack failed, a demonstration) to 4, where lower is better.

    python examples/scripts/red_team.py \
        --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --dataset_name Anthropic/hh-rlhf --data_dir red-team-attempts \
        --label_type continuous --log_z prior --sft_weight 0.1 \
        --use_peft --learning_rate 1e-4 --output_dir red-team-out

Labels are −rating, which is not centered: `--log_z prior` takes the mean out. `--dataset_name` may be a file, too. What
became of the transcripts is printed: how many there were, how many rows came out, what was left out and why.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config

from trl_ulma import ULMAConfig, ULMATrainer
from trl_ulma.data.convert import convert, reasons
from trl_ulma.data.files import load_rows, split_by_prompt


@dataclass
class RedTeamArguments(ScriptArguments):
    """TRL's, and the folder within the dataset."""

    data_dir: str | None = field(default=None, metadata={"help": "Folder within the dataset."})


def main() -> None:
    parser = TrlParser((RedTeamArguments, ULMAConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config()
    training_args.model_init_kwargs = {"dtype": model_args.dtype}

    if script_args.data_dir is None:
        raw = load_rows(script_args.dataset_name)["train"]
    else:
        raw = load_dataset(script_args.dataset_name, data_dir=script_args.data_dir, split="train")
    rows, account = convert("red-team", raw)
    splits = split_by_prompt(rows, test_size=0.1, seed=training_args.seed)

    trainer = ULMATrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=splits["train"],
        eval_dataset=splits["test"],
        peft_config=get_peft_config(model_args),
    )
    trainer.accelerator.print(f"{account.rows_in} transcripts, {account.rows_out} rows. {reasons(account)}")
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.log_metrics("eval", trainer.evaluate())


if __name__ == "__main__":
    main()
