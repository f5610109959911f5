"""One model on one device: weights, paged KV cache, forward pass, sampling."""
