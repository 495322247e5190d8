"""Options of other programs that have no counterpart here by name: what to do in their place."""

NOT_YET = "is not built yet"
TORCHRUN = "torchrun tells each process who it is; omit it"
EVALUATION = "--eval_dataset, --eval_fraction or --eval_samples give rows to evaluate on, --eval_steps says when"
HINTS = {
    **dict.fromkeys(("local_rank", "rank", "node_rank"), TORCHRUN),
    **dict.fromkeys(
        ("eval_strategy", "evaluation_strategy", "do_eval", "evals_per_epoch", "evaluation_steps"), EVALUATION
    ),
    **dict.fromkeys(
        ("per_device_eval_batch_size", "eval_batch_size", "eval_accumulation_steps"),
        "an evaluation takes as many tokens at a time as a micro-batch has at most; omit it",
    ),
    **dict.fromkeys(
        ("metric_for_best_model", "greater_is_better", "compute_metrics", "eval_metric"),
        "what is compared is the evaluation loss, lower is better; omit it",
    ),
    "save_strategy": "use --save_steps; the adapter is saved at the end in any case",
    **dict.fromkeys(("do_train", "task_type", "stage"), "to train is all that this program does; omit it"),
    **dict.fromkeys(("logging_steps", "logging_strategy"), "every step is logged; omit it, or see log_to"),
    **dict.fromkeys(
        ("deepspeed", "fsdp_config", "ddp_find_unused_parameters", "device_map"),
        "the plan decides what goes where; omit it, or see sharding_strategy and use_cpu_offload",
    ),
    "load_in_8bit": "use --train_type hqq_lora --n_bits 8",
    **dict.fromkeys(("bf16", "bf16_full_eval"), "use --precision bf16"),
    "fp16": "use --precision fp16_autocast",
    "fp32": "use --precision fp32",
    "tf32": "use --precision bf16; float32 matmuls are not rounded",
    "bnb_4bit_compute_dtype": "use --precision",
    "bnb_4bit_quant_type": "nf4 is the only one; omit it",
    "dataloader_num_workers": "rows are tokenized once, before training; omit it",
    "preprocessing_num_workers": "rows are tokenized on all cores; omit it",
    "warmup_steps": "use --warmup_ratio, a share of all steps",
    "push_to_hub": "nothing is uploaded; use `hf upload` with output_dir afterwards",
    "hub_model_id": "nothing is uploaded; use `hf upload` with output_dir afterwards",
    "trust_remote_code": "code of a checkpoint is never run; omit it",
    "modules_to_save": f"training whole modules beside the adapter {NOT_YET}",
    "lora_bias": f"training biases {NOT_YET}",
    "neftune_noise_alpha": f"NEFTune {NOT_YET}",
    "use_dora": "use --train_type bnb_dora or dora",
}  # fmt: skip
