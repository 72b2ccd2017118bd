"""Text and tokens: corpora, tokenizers, token files, and the batches of a data set."""
