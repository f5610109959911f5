"""`headrace train-drafter`: distils a draft head from what the target itself says."""
