"""PE-DyRA: the paper's equations, scores, plan and config."""
