"""Options: what each is, how flags and files become a checked Config, and the rules between them."""

__all__ = ["cards", "columns", "files", "help", "keep", "options", "parse", "train_types"]
