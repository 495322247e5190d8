"""The command curve: what more rows bring, point by point."""
