"""The paper's tables and figures: what was published, and how to measure it again."""
