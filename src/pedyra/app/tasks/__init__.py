"""A task is a recipe's data, tokenised and split, with its collator and metric, in one file a family."""
