# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-ulma[quantization,trackers]"]
#
# [tool.uv.sources]
# trl-ulma = { path = "../.." }
# ///
r"""Pointwise DPO on thumbs or ratings, and the labels that the trained model finds most surprising.

    python examples/scripts/pointwise_dpo.py \
        --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --dataset_name ratings.csv \
        --label_type continuous --label_transform standardize \
        --use_peft --learning_rate 1e-4 --output_dir ratings-out

Without `--label_type` and `--label_transform` labels are thumbs, true or false. Scores of the held-out rows are written
to `scored.jsonl` in the output folder: where label and model disagree most, one of them is wrong.
"""

from pathlib import Path

from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from trl_ulma import PointwiseDPOConfig, PointwiseDPOTrainer
from trl_ulma.data.files import load_rows, split_by_prompt


def main() -> None:
    parser = TrlParser((ScriptArguments, PointwiseDPOConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config()
    training_args.model_init_kwargs = {"dtype": model_args.dtype, "revision": model_args.model_revision}

    rows = load_rows(script_args.dataset_name, config=script_args.dataset_config)[script_args.dataset_train_split]
    splits = split_by_prompt(rows, test_size=0.1, seed=training_args.seed)

    trainer = PointwiseDPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=splits["train"],
        eval_dataset=splits["test"],
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.log_metrics("eval", trainer.evaluate())

    scored = trainer.score(splits["test"]).sort("surprise", reverse=True)
    if trainer.accelerator.is_main_process:
        scored.to_json(Path(training_args.output_dir) / "scored.jsonl")


if __name__ == "__main__":
    main()
