"""A merge from the adapter's folder to what the user is told of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fsdp_qlora.data.batches import load_tokenizer
from fsdp_qlora.errors import UserError, first_line
from fsdp_qlora.export.adapter_folder import SavedAdapter, base_options, read_adapter
from fsdp_qlora.export.check_rows import check_rows
from fsdp_qlora.export.compare import Difference, compare
from fsdp_qlora.export.merged import MergeBase
from fsdp_qlora.export.merged_folder import MergedModel, Wanted, merge, rounding_lines
from fsdp_qlora.models.skeleton import text_config
from fsdp_qlora.runtime.files import Claim
from fsdp_qlora.units import as_gib, count_of

__all__ = ["Wanted", "merge_and_check"]


def merge_and_check(folder: Path, given: Mapping[str, Any], merge_base: MergeBase, wanted: Wanted, rows: int) -> None:
    """Merge the adapter in `folder` as `wanted`, and print what that changed. given: as `base_options` takes it."""
    adapter = read_adapter(folder)
    base = base_options(adapter, given, stored=merge_base == "trained")
    stored = f"as it was trained over ({base.train_type})" if merge_base == "trained" else "its original weights"
    size = f"{len(adapter.linears)} linears of rank {adapter.options.lora_rank}, {as_gib(adapter.nbytes(), 2)}"
    print(f"adapter   {folder}: {size}\nbase      {base.model_name}, {stored}", flush=True)
    with Claim() as claim:
        merged = merge(adapter, base, merge_base, wanted, rows > 0, claim)
        for line in rounding_lines(merged.journal, merged.dtype):
            print(line, flush=True)
        if rows:
            _compare(merged, adapter, rows)
        print(f"merged    {wanted.folder}: {count_of(merged.files, 'file')}, {as_gib(merged.nbytes)}", flush=True)


def _compare(merged: MergedModel, adapter: SavedAdapter, count: int) -> None:
    try:
        tokenizer = load_tokenizer(str(merged.folder))
    except UserError as error:
        print(f"note      nothing is compared: {first_line(error)}", flush=True)
        return
    rows, whence = check_rows(adapter, tokenizer, text_config(merged.source.hf_config).vocab_size, count)
    difference = compare(merged, rows)
    merged.journal.report = {**vars(difference), "rows": len(rows)}
    merged.journal.save(merged.folder)
    for line in _lines(difference, len(rows), whence):
        print(line, flush=True)


def _lines(difference: Difference, rows: int, whence: str) -> list[str]:
    lines = [
        f"compared  {count_of(rows, 'row')} {whence}, {difference.positions} positions: logits of the merged model are "
        f"at most {difference.merged:.3g} from those of base + adapter, which the adapter itself moves by up to "
        f"{difference.learnt:.3g}; the first choice is the same at {difference.same} positions"
    ]
    if difference.merged > difference.learnt / 4:
        lines.append(
            "warning   merging moved logits by more than a quarter of what the adapter learnt: merge with --dtype fp16 "
            "or fp32, or serve base and adapter apart"
        )
    return lines
