"""Building blocks of quantizers: codebooks, k-means, nearest-codeword search, layers."""
