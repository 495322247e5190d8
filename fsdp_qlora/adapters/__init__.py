"""Adapters: which linears get one, their names and first values as PEFT has them."""

__all__ = ["lora"]
