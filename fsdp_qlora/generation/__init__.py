"""Answers of a placed model, token by token over kept keys and values, in batches dealt to the ranks."""

__all__ = ["adapter_values", "answers", "decoder", "likelihood", "placing", "sampling", "scores", "stops"]
