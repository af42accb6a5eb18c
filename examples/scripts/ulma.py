r"""ULMA: imitate demonstrations, and learn from the labels of all other answers.

    python examples/scripts/ulma.py \
        --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --dataset_name feedback.jsonl \
        --use_peft --learning_rate 1e-4 --sft_weight 0.1 \
        --eval_strategy steps --eval_steps 50 --output_dir ulma-out

Rows have `prompt`, `completion`, `label`, and `sft_mask` (true for demonstrations); see `docs/rows.md`. `trl-ulma ulma`
is the same with mixtures, streams and errors in one line.
"""

from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from trl_ulma import ULMAConfig, ULMATrainer
from trl_ulma.data.files import load_rows, split_by_prompt


def main() -> None:
    parser = TrlParser((ScriptArguments, ULMAConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config()
    training_args.model_init_kwargs = {"dtype": model_args.dtype, "revision": model_args.model_revision}

    rows = load_rows(script_args.dataset_name, config=script_args.dataset_config)[script_args.dataset_train_split]
    splits = split_by_prompt(rows, test_size=0.1, seed=training_args.seed)

    trainer = ULMATrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=splits["train"],
        eval_dataset=splits["test"],
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
