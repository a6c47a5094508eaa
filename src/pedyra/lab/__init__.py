"""Methods side by side: comparisons, benchmarks, and the paper's tables and figures."""
