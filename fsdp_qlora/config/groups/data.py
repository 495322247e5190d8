"""The options of the group data: rows, their form and what of them is learnt."""

from dataclasses import dataclass
from typing import Literal

from fsdp_qlora.config.option import option


@dataclass
class DataOptions:
    """Data: rows, their form, and what of them is learnt."""

    dataset: str = option(
        "alpaca_sample",
        """Training rows: alpaca, alpaca_sample (its first 512 rows), dummy (synthetic rows, nothing read), guanaco,
        sql, orca_math, any hub dataset (id, id:config or id:config:split), a local .json, .jsonl, .parquet, .csv, .tsv
        or .arrow file, also .gz, .zst, .bz2, .xz, a folder of such files or one of save_to_disk, - for JSON lines from
        standard input. Several with commas: a.jsonl,b.jsonl is all rows of both, a.jsonl:0.7,b.jsonl:0.3 as many as
        these shares allow, none twice.""",
        "a small download that shows whether everything works",
        "a hub dataset is downloaded once into the Hugging Face cache",
        known_as=("data", "data_path", "dataset_name", "train_file", "datasets"),
        is_path=True,
    )
    dataset_format: Literal["auto", "alpaca", "prompt_completion", "text", "messages"] = option(
        "auto",
        """Form of a row. alpaca: instruction, input, output (system, history). prompt_completion: prompt, completion.
        text: one text, learnt whole. messages: role and content turns (also ShareGPT's conversations), put through the
        chat template. auto: recognised from the columns. docs/rows.md has all forms.""",
        "it is right wherever the columns have their usual names; what it chose is told at start",
        aliases={"sharegpt": "messages", "chat": "messages", "chatml": "messages", "openai": "messages"},
        known_as=("data_format", "template"),
    )
    columns: list[str] | None = option(  # noqa: RUF009 (a dataclasses.field)
        None,
        "Columns of other names, FIELD=COLUMN: instruction=q,output=a. Fields are those of the forms in docs/rows.md.",
        "the usual names are recognised",
        known_as=("column_mapping", "field_mapping", "prompt_column", "response_column"),
    )
    prompt_template: str | None = option(
        None,
        """Jinja file that puts a row's columns into words. What stands between {% generation %} and {% endgeneration %}
        is learnt; without these marks it renders the prompt, and the answer is the row's completion, response, answer
        or output.""",
        "each form has its usual words",
        is_path=True,
        known_as=("prompt_format", "instruction_template"),
    )
    chat_template: str | None = option(
        None,
        """Jinja file in the place of the tokenizer's chat template, or the name of one where the tokenizer has several;
        saved with the tokenizer.""",
        "the tokenizer's own is what the model knows",
        is_path=True,
        known_as=("chat_template_path", "chat_template_file", "custom_chat_template"),
    )
    dataset_samples: int | None = option(
        None,
        "Use only this many rows, the first ones.",
        "all of them",
        unit="rows",
        at_least=1,
        known_as=("max_samples", "num_samples", "max_train_samples"),
    )
    dummy_row_tokens: int | None = option(
        None,
        """Mean tokens of the rows of the dataset dummy. Their lengths spread as those of instructions do, up to
        context_length: to see what short rows, --packing or a larger batch_size come to before there are rows.""",
        "rows that fill the context take most memory",
        unit="tokens",
        at_least=2,
    )
    context_length: int = option(
        512,
        "Longest row, prompt and answer together; the rest of a longer row is cut off.",
        "it holds nearly all Alpaca-like rows",
        "activations, logits and time grow in proportion, attention's time with the square",
        unit="tokens",
        at_least=2,
        known_as=("max_seq_length", "max_length", "cutoff_len", "sequence_len", "block_size"),
    )
    packing: bool = option(
        False,
        """Put short rows together into bins of context_length, each of which counts as a row of the batch. No token
        sees another row than its own.""",
        "a step has the rows that batch_size says",
        """short rows cost hardly more than their tokens; a step learns from more rows, and an epoch has fewer steps""",
        known_as=("pack", "sample_packing", "packed", "pack_sequences"),
    )
    text_overflow: Literal["auto", "split", "cut"] = option(
        "auto",
        """Rows of the form text that are longer than the context. split: into rows of context_length. cut: the rest is
        lost. auto: split.""",
        "a long text is mostly beyond one context",
        "split makes more rows",
        known_as=("overflow", "truncation", "group_texts"),
    )
    bad_rows: Literal["stop", "skip"] = option(
        "stop",
        """Rows that cannot be taken (malformed, no text, a role that nobody knows, a turn whose place in the chat
        template's text is not certain). stop: end with the first one's line. skip: leave them out and count them.""",
        "a mistake in the rows is seen",
        "skip loses rows",
        known_as=("on_bad_rows", "skip_errors", "ignore_errors"),
    )
    show_rows: int = option(
        0,
        "Print so many of the first rows before training, what is learnt of them marked. With --plan_only too.",
        "the summary's counts are enough to see that all is well",
        unit="rows",
        at_least=0,
        known_as=("debug_rows", "preview", "print_rows"),
    )
    rows_cache: str | None = option(
        "auto",
        """Folder where tokenized rows are kept by content, for the node's other ranks and the next run. auto:
        fsdp_qlora/rows in the user's cache folder. null: none. Entries that nobody has read for 30 days go.""",
        "a million rows are tokenized once",
        "5 bytes a token on disk; without it every rank tokenizes",
        is_path=True,
        known_as=("dataset_prepared_path", "tokenized_path", "preprocessing_cache"),
    )
    train_on_prompt: bool = option(
        False,
        "Take the loss over the prompt's tokens too, instead of the answer's alone.",
        "the model is to answer, not to write questions",
        known_as=("train_on_inputs", "train_on_input", "train_on_source"),
    )
