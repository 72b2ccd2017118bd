"""Text and tokens: corpora, tokenizers, token files, and batches of a data set."""
