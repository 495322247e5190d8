"""The options of the group evaluation: rows that are not trained on, and what follows from the loss on them."""

from dataclasses import dataclass

from fsdp_qlora.config.option import option


@dataclass
class EvaluationOptions:
    """Evaluation: the loss on rows that are not trained on, and what follows from it."""

    eval_dataset: str | None = option(
        None,
        """Rows to evaluate on, written as dataset is, and read with the same options. Of a folder or a hub dataset
        without a split those are taken that are named validation, test or alike, where there are such. Rows that are
        among the training rows too are left out.""",
        "no rows but those of dataset are known",
        "evaluation runs forward alone, at about a third of a training step's time for as many tokens",
        is_path=True,
        known_as=("eval_file", "eval_data", "eval_dataset_path", "validation_file", "validation_dataset", "val_dataset",
                  "valid_file", "test_file", "test_datasets"),
    )  # fmt: skip
    eval_fraction: float | None = option(
        None,
        """Share of the training rows to hold out and evaluate on. Chosen by content and seed, whatever their order:
        rows of the same tokens, and the parts of a split text, stay on one side.""",
        "all rows are trained on",
        "those rows are not trained on",
        above=0,
        below=1,
        known_as=("val_set_size", "val_size", "validation_split", "validation_split_percentage", "eval_split",
                  "eval_size", "eval_ratio", "test_size", "split_ratio"),
    )  # fmt: skip
    eval_samples: int | None = option(
        None,
        """Rows to hold out of the training rows, as eval_fraction does; with eval_dataset, use only so many of its
        rows, the first ones.""",
        "eval_fraction, or all of eval_dataset",
        unit="rows",
        at_least=1,
        known_as=("max_eval_samples", "num_eval_samples", "eval_rows", "max_val_samples", "limit_eval_samples"),
    )
    eval_steps: int = option(
        0,
        "Evaluate after every so many optimizer steps, and at the end.",
        "each epoch shows whether the one before was enough",
        "training waits for each evaluation",
        unit="optimizer steps",
        at_least=1,
        special={0: "after each epoch", -1: "only at the end"},
        known_as=("eval_every", "eval_interval", "eval_frequency", "eval_freq", "val_check_interval", "eval_iters"),
    )
    eval_on_start: bool = option(
        False,
        "Evaluate before the first step too: the model without training, to compare with.",
        "what was learnt shows between the first evaluations as well",
        "one more evaluation",
        known_as=("eval_before_training", "eval_at_start", "baseline_eval"),
    )
    eval_generate: int = option(
        0,
        """After each evaluation, answer so many of the held-out rows, the first ones, greedily: eval_answers.jsonl in
        output_dir has prompt, answer and the row's own answer. Training stays the same to the bit.""",
        "the loss needs no reading",
        "a pass over the base for each token of each row; ranks share the rows",
        unit="rows",
        at_least=1,
        special={0: "none"},
        known_as=("generate_samples", "predict_with_generate", "eval_samples_to_generate", "num_generations"),
    )
    eval_generate_tokens: int = option(
        64,
        "With eval_generate: most tokens of an answer.",
        "it shows how an answer begins",
        "keys and values of one row in GPU memory",
        unit="tokens",
        at_least=1,
        known_as=("eval_max_new_tokens", "generation_max_length"),
    )
    save_best: bool = option(
        False,
        """Leave the adapter with the lowest evaluation loss in output_dir, written when it is found. The one of the
        last step is in its folder last, where it is another.""",
        "the last adapter is what other options describe",
        "each new best is written at once; disk space of two adapters, and of a third while one is written",
        known_as=("load_best_model_at_end", "save_best_model", "keep_best", "save_best_only"),
    )
    early_stopping_patience: int | None = option(
        None,
        "Stop after so many evaluations one after the other without a lower loss than the lowest before.",
        "all steps are taken; the schedule of the learning rate is made for them",
        unit="evaluations",
        at_least=1,
        known_as=("early_stopping", "early_stop", "patience", "early_stopping_rounds", "early_stop_patience"),
    )

    @property
    def has_rows(self) -> bool:
        """Whether there are rows to evaluate on."""
        return any(rows is not None for rows in (self.eval_dataset, self.eval_fraction, self.eval_samples))
