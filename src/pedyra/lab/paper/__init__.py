"""The paper's tables and figures stand here as they were published, and are measured again."""
