"""The commands by name."""

from typing import Any

from fsdp_qlora.commands.base import Command
from fsdp_qlora.commands.generate import GENERATE
from fsdp_qlora.commands.gguf import GGUF
from fsdp_qlora.commands.merge import MERGE

COMMANDS: dict[str, Command[Any]] = {"generate": GENERATE, "merge": MERGE, "gguf": GGUF}
