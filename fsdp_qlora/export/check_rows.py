"""Rows on which a merged model is compared with base + adapter: of the training's own dataset where it is here."""

from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from fsdp_qlora.data.batches import load_rows
from fsdp_qlora.data.sources import is_local
from fsdp_qlora.errors import UserError
from fsdp_qlora.export.adapter_folder import SavedAdapter

MOST_TOKENS = 128  # of a row
TEXTS = (
    "The capital of France is Paris, which lies on the Seine. The capital of Italy is",
    "def factorial(n):\n    return 1 if n < 2 else n * factorial(n - 1)\n\nprint(factorial(5))",
    "### Instruction:\nName three animals that can fly.\n\n### Response:\nEagles, bats and bees.",
    "Dear Ms. Lee, thank you for your letter of 3 May. We will send the 12 chairs on Monday. Kind regards,",
)


def check_rows(
    adapter: SavedAdapter, tokenizer: PreTrainedTokenizerBase, vocabulary: int, count: int
) -> tuple[list[list[int]], str]:
    """Return token ids of some rows and, for the user, where they are from."""
    run = adapter.run
    if run is not None and run.data.dataset not in ("dummy", "-") and is_local(run.data.dataset):
        try:
            rows = load_rows(replace(run.data, dataset_samples=8 * count), tokenizer, vocabulary)
            edges = rows.offsets
            found = [rows.ids[edges[i] : edges[i + 1]][:MOST_TOKENS].tolist() for i in range(min(count, len(rows)))]
            return found, f"of {run.data.dataset}"
        except UserError:
            pass  # it has moved or changed since
    texts = [TEXTS[i % len(TEXTS)] for i in range(min(count, len(TEXTS)))]
    found = [tokenizer(text)["input_ids"][:MOST_TOKENS] for text in texts]
    return [row for row in found if row and max(row) < vocabulary], "of built-in text: the training's rows are not here"
