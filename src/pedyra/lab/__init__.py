"""Methods stand side by side here: comparisons, and the paper's tables and figures."""
