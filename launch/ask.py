"""Shows what an adapter taught: one answer before and after it, and how many held-out rows are right before and after.

    python launch/ask.py --model models/smollm2-135m-instruct --adapter output/quickstart \\
        --heldout launch/quickstart_data/heldout.jsonl

Nothing of fsdp_qlora is used: the adapter is opened by PEFT on the Hugging Face model, as anyone who gets it would.
Rows are `messages` whose last is the right answer; an answer is right if it is the same text. Exit code 1 if fewer
than `--at_least` of the rows are right at the end.
"""

import argparse
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

# PEFT imports bitsandbytes, which at once complains of a kernel for 4-bit CPU matmuls; nothing here is in 4 bits.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
from peft import PeftModel  # noqa: E402

transformers.utils.logging.disable_progress_bar()
warnings.filterwarnings("ignore", category=FutureWarning)  # between PEFT and transformers, not the user's to mend

BATCH = 40  # a step of generation reads all weights, for one row or for forty


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub id of the model that was trained")
    parser.add_argument("--adapter", required=True, help="output_dir of the training run")
    parser.add_argument(
        "--heldout", required=True, type=Path, help="JSON lines of messages, the last one the right answer"
    )
    parser.add_argument("--at_least", type=float, default=0.0, help="fraction that must be right, else exit code 1")
    options = parser.parse_args()
    rows = [json.loads(line)["messages"] for line in options.heldout.read_text(encoding="utf-8").splitlines()]
    right = [row[-1]["content"] for row in rows]
    cuda = torch.cuda.is_available()
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16 if cuda else torch.float32)
    model.to("cuda" if cuda else "cpu").eval()
    before = answers(model, tokenizer, rows)
    after = answers(PeftModel.from_pretrained(model, options.adapter).eval(), tokenizer, rows)
    print(f"\nasked:  {rows[0][-2]['content']}")
    print(f"before: {' '.join(before[0].split())}\nafter:  {after[0]}\nright:  {right[0]}\n")
    scores = [sum(said == wanted for said, wanted in zip(said, right, strict=True)) for said in (before, after)]
    print(f"held-out rows answered exactly right: {scores[0]} of {len(rows)} before, {scores[1]} of {len(rows)} after")
    return 0 if scores[1] >= options.at_least * len(rows) else 1


@torch.inference_mode()
def answers(model: Any, tokenizer: Any, rows: list[list[dict[str, str]]]) -> list[str]:
    """What the model says, greedily, to each row's messages but the last; at most a few tokens more than are right."""
    said: list[str] = []
    longest = max(len(tokenizer(row[-1]["content"])["input_ids"]) for row in rows)
    for start in range(0, len(rows), BATCH):
        asked = [row[:-1] for row in rows[start : start + BATCH]]
        prompts = tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        ids = model.generate(**prompts, max_new_tokens=longest + 8, do_sample=False)
        new = ids[:, prompts["input_ids"].shape[1] :]
        said += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return said


if __name__ == "__main__":
    sys.exit(main())
