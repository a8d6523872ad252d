"""Building blocks of quantizers: codebooks, k-means, the nearest codeword, layers."""
