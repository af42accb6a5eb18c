r"""ULMA of a large model in four bits with adapters (QLoRA), and the full model that comes of merging them.

    pip install -c constraints.txt ".[quantization]"
    python examples/scripts/qlora.py \
        --model_name_or_path Qwen/Qwen2.5-7B-Instruct \
        --dataset_name feedback.jsonl --sft_weight 0.1 \
        --per_device_train_batch_size 2 --gradient_accumulation_steps 8 \
        --learning_rate 1e-4 --merged_dir merged --output_dir qlora-out

The reference is the model with its adapter switched off, and costs no memory.
"""

from dataclasses import dataclass, field

import torch
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import BitsAndBytesConfig
from trl import ModelConfig, ScriptArguments, TrlParser

from trl_ulma import ULMAConfig, ULMATrainer
from trl_ulma.data.files import load_rows


@dataclass
class QLoRAArguments(ScriptArguments):
    """TRL's, and where the merged model goes."""

    merged_dir: str | None = field(default=None, metadata={"help": "Folder for the full model; none without."})


def main() -> None:
    parser = TrlParser((QLoRAArguments, ULMAConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config()
    dtype = torch.bfloat16 if training_args.bf16 else torch.float32

    rows = load_rows(script_args.dataset_name, config=script_args.dataset_config)[script_args.dataset_train_split]
    trainer = ULMATrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=rows,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()

    if script_args.merged_dir and trainer.accelerator.is_main_process:
        # Merged into weights that are not quantized, since rounding would undo some of what was learned
        adapted = AutoPeftModelForCausalLM.from_pretrained(training_args.output_dir, dtype=dtype)
        adapted.merge_and_unload().save_pretrained(script_args.merged_dir)
        trainer.processing_class.save_pretrained(script_args.merged_dir)


if __name__ == "__main__":
    main()
