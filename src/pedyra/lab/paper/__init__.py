"""The paper's published tables and figures, and the runs that measure them again."""
