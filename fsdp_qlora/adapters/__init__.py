"""Adapters: which linears get one, their parameters, names and first values as PEFT has them."""

__all__ = ["base", "lora", "table", "targets"]
