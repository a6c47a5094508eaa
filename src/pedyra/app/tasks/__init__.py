"""A task is a recipe's data, tokenised and split, with its collator and metric.

One file a family: text (classes and numbers; glue), question_answering, seq2seq, causal_lm. `test_sets` and
`generation` judge what a model writes.
"""
