"""The commands by name."""

from typing import Any

from fsdp_qlora.commands.base import Command
from fsdp_qlora.commands.cache import CACHE_CLEAR, CACHE_LIST
from fsdp_qlora.commands.curve.options import CURVE
from fsdp_qlora.commands.evaluate import EVALUATE
from fsdp_qlora.commands.generate import GENERATE
from fsdp_qlora.commands.gguf import GGUF
from fsdp_qlora.commands.merge import MERGE
from fsdp_qlora.commands.report import REPORT_COMMAND

COMMANDS: dict[str, Command[Any]] = {
    "generate": GENERATE,
    "evaluate": EVALUATE,
    "curve": CURVE,
    "report": REPORT_COMMAND,
    "merge": MERGE,
    "gguf": GGUF,
    "cache list": CACHE_LIST,
    "cache clear": CACHE_CLEAR,
}
