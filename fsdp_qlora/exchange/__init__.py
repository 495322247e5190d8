"""Exchange of adapters' gradients and new values between ranks: by collectives, or through host memory."""

__all__ = ["base", "choose", "collectives"]
