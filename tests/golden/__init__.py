"""Keep the bits of short training runs on the CPU, so that a refactoring that changes one of them is seen.

Run `python -m tests.golden` to compare the checkout with `runs.json`, `--write` to record it anew, and
`--against COMMIT` to compare with what another commit trains on this machine.
"""
